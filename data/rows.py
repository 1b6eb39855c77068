"""Rows of local files and folders, of `datasets.save_to_disk` folders and of hub data sets; training and validation.

`data.formats` says what a row is.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data import easy_vqa
from data.folders import FILE_TYPES
from data.formats import Part, Row, Rows
from data.options import AS_THEY_ARE, RowOptions
from data.order import by_subset
from data.packed_files import file_type
from data.parts import Loader, Subsets
from data.streams import RowStream


def load_rows(
    path: str,
    names: Sequence[str] = ("all",),
    split: str = "train",
    streaming: bool = False,
    flag: str = "train_dataset_path",
    skip_bad_subsets: bool = False,
    options: RowOptions = AS_THEY_ARE,
) -> Rows | RowStream:
    """The rows of a data set: a sequence (len, getitem), or a RowStream for hub data with streaming.

    path: "easy-vqa"; a file of one of FILE_TYPES, or a folder of them; a folder of `datasets.save_to_disk`; a folder
    with a folder of images for each class; else a hub id. names: its subsets, which are the configurations of a hub
    data set, the subfolders of a folder, or the kinds of question of easy-vqa; ("all",) is all of them, one after the
    other. A local data set that names no splits has one, which any `split` returns.
    skip_bad_subsets: leave out subsets that cannot be loaded, and say so; their names are in the rows' `bad_subsets`.
    options: how a record becomes a row. Raises FileNotFoundError, ValueError or ConnectionError that names `flag` and
    says what there is.
    """
    if path == easy_vqa.NAME:
        if options.columns or options.function:
            raise ValueError(f"--{flag} {path}: must be of files without --columns and --row_function")
        return easy_vqa.rows(split, names, flag)
    local, loader = Path(path).expanduser(), Loader(flag, split, options)
    if local.exists():
        subsets, streaming = loader.local_subsets(local, names), False
    # No hub id looks like this.
    elif path.count("/") > 1 or "\\" in path or path[:1] in "/.~" or file_type(local) in FILE_TYPES:
        raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    else:
        subsets = loader.hub_subsets(path, names, streaming)
    parts, bad = _load_subsets(subsets, path, flag, skip_bad_subsets)
    if options.columns:
        options.check_columns_exist((part.columns() for part in parts), f"--{flag} {path}")
    return RowStream(parts, bad) if streaming else TableRows(parts, bad)


def split_rows(rows: Rows | RowStream, val_size: float, seed: int) -> tuple[Any, Any]:
    """(training rows, validation rows): a seeded random choice, or the first rows of a stream.

    val_size: how many rows are for validation (0, or >= 1), or their share in (0, 1), which is at least one row and at
    most all but one. Raises ValueError where no row would remain for training, and for a share of unknown rows.
    """
    if isinstance(rows, RowStream):
        held_out = held_out_rows(val_size, rows.about_rows() if 0 < val_size < 1 else None)
        return rows.skip(held_out), rows.take(held_out)
    held_out = held_out_rows(val_size, len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    return RowSubset(rows, order[held_out:]), RowSubset(rows, order[:held_out])


def held_out_rows(val_size: float, num_rows: int | None) -> int:
    """The number of validation rows among num_rows, which is None where it is not known."""
    if not 0 < val_size < 1:
        if num_rows is not None and val_size >= num_rows:
            raise ValueError(
                f"--val_size {val_size:g}: must be less than the {num_rows} rows of the data set; a share of them, as "
                "0.05, suits any number"
            )
        return int(val_size)
    if num_rows is None:
        raise ValueError(
            f"--val_size {val_size:g}: must be a number of rows, as 1000, for this stream, whose length is not known"
        )
    if num_rows < 2:
        raise ValueError(f"--val_size {val_size:g}: must be 0 for a data set of {num_rows} rows")
    return min(max(1, round(val_size * num_rows)), num_rows - 1)


class RowSubset:
    """The rows at the given indices."""

    def __init__(self, rows: Rows, indices: np.ndarray):
        """indices: int64 [n], of `rows`."""
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        return self.rows[int(self.indices[index])]

    def by_subset(self) -> dict[str, np.ndarray]:
        """Name of each subset that has rows here -> the indices of its rows, int64."""
        mine = np.full(len(self.rows), -1)
        mine[self.indices] = np.arange(len(self.indices))
        found = {name: mine[indices] for name, indices in by_subset(self.rows).items()}
        found = {name: indices[indices >= 0] for name, indices in found.items()}
        return {name: indices for name, indices in found.items() if len(indices)}


class TableRows:
    """Rows of tables on disk, one table after the other."""

    def __init__(self, parts: list[Part], bad_subsets: Sequence[str] = ()):
        """parts: their tables have a length. bad_subsets: names of the subsets that could not be loaded."""
        self.parts, self.bad_subsets = parts, bad_subsets
        self.ends = list(accumulate(len(part.table) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, number = self.place(index)
        return part[number]

    def place(self, index: int) -> tuple[Part, int]:
        """(part, number in it) of a row."""
        which = bisect_right(self.ends, index)
        return self.parts[which], index - (self.ends[which - 1] if which else 0)

    def by_subset(self) -> dict[str, np.ndarray]:
        """Name of each subset -> the indices of its rows, int64."""
        found: dict[str, list[np.ndarray]] = {}
        for part, end in zip(self.parts, self.ends, strict=True):
            found.setdefault(part.subset, []).append(np.arange(end - len(part.table), end))
        return {name: np.concatenate(indices) for name, indices in found.items()}


def _load_subsets(subsets: Subsets, path: str, flag: str, skip_bad: bool) -> tuple[list[Part], list[str]]:
    """(parts of all subsets, names of those that were skipped). Raises ValueError where one cannot be loaded."""
    parts, bad = [], []
    for name, load in subsets.items():
        try:
            parts += load()
        except (ValueError, FileNotFoundError) as error:
            if not skip_bad:
                raise
            bad.append(name)
            print(f"SKIPPED subset {name or path}: {error}", file=sys.stderr)
    if bad:
        print(f"SKIPPED {len(bad)} of {len(subsets)} subsets of --{flag} {path}: {', '.join(bad)}", file=sys.stderr)
    if not parts:
        raise ValueError(f"--{flag} {path}: none of its {len(subsets)} subsets can be loaded")
    return parts, bad
