"""Rows of local files and folders, of `datasets.save_to_disk` folders and of hub data sets; training and validation.

`data.formats` says what a row is.
"""

from __future__ import annotations

import contextlib
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data import easy_vqa
from data.formats import NOT_UTF8, Part, Row, Rows
from data.hub import require_hub
from data.image_files import ClassFolder, TarFile, image_files
from data.order import by_subset
from data.streams import READ_ROWS, RowStream
from data.text_files import DELIMITERS, TYPES, file_type, open_text_file
from data.values import BadRow

FILE_TYPES = (".parquet", *TYPES, ".tar")
ARROW = ".arrow"  # what save_to_disk writes
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of data sets: no rows
SPLIT_WORDS = {"train": "train", "test": "test", "val": "validation", "validation": "validation", "dev": "validation"}
FIRST_ROWS = 100  # of a file: if none of them has a known format, the file is refused


def load_rows(
    path: str,
    names: Sequence[str] = ("all",),
    split: str = "train",
    streaming: bool = False,
    flag: str = "train_dataset_path",
    skip_bad_subsets: bool = False,
) -> Rows | RowStream:
    """The rows of a data set: a sequence (len, getitem), or a RowStream for hub data with streaming.

    path: "easy-vqa"; a file of one of FILE_TYPES, or a folder of them; a folder of `datasets.save_to_disk`; a folder
    with a folder of images for each class; else a hub id. names: its subsets, which are the configurations of a hub
    data set, the subfolders of a folder, or the kinds of question of easy-vqa; ("all",) is all of them, one after the
    other. A local data set that names no splits has one, which any `split` returns.
    skip_bad_subsets: leave out subsets that cannot be loaded, and say so; their names are in the rows' `bad_subsets`.
    Raises FileNotFoundError, ValueError or ConnectionError that names `flag` and says what there is.
    """
    if path == easy_vqa.NAME:
        return easy_vqa.rows(split, names, flag)
    local = Path(path).expanduser()
    if local.exists():
        return TableRows(*_load_subsets(_local_subsets(local, names, split, flag), path, flag, skip_bad_subsets))
    # No hub id looks like this.
    if path.count("/") > 1 or "\\" in path or path[:1] in "/.~" or file_type(local) in FILE_TYPES:
        raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    subsets = _hub_subsets(path, names, split, streaming, flag)
    parts, bad = _load_subsets(subsets, path, flag, skip_bad_subsets)
    return RowStream(parts, bad) if streaming else TableRows(parts, bad)


def split_rows(rows: Rows | RowStream, val_size: float, seed: int) -> tuple[Any, Any]:
    """(training rows, validation rows): a seeded random choice, or the first rows of a stream.

    val_size: how many rows are for validation (0, or >= 1), or their share in (0, 1), which is at least one row and at
    most all but one. Raises ValueError where no row would remain for training, and for a share of unknown rows.
    """
    if isinstance(rows, RowStream):
        held_out = _held_out(val_size, rows.about_rows() if 0 < val_size < 1 else None)
        return rows.skip(held_out), rows.take(held_out)
    held_out = _held_out(val_size, len(rows))
    order = np.random.default_rng(seed).permutation(len(rows))
    return RowSubset(rows, order[held_out:]), RowSubset(rows, order[:held_out])


def _held_out(val_size: float, num_rows: int | None) -> int:
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
        which = bisect_right(self.ends, index)
        number = index - (self.ends[which - 1] if which else 0)
        return self.parts[which][number]

    def by_subset(self) -> dict[str, np.ndarray]:
        """Name of each subset -> the indices of its rows, int64."""
        found: dict[str, list[np.ndarray]] = {}
        for part, end in zip(self.parts, self.ends, strict=True):
            found.setdefault(part.subset, []).append(np.arange(end - len(part.table), end))
        return {name: np.concatenate(indices) for name, indices in found.items()}


# Subsets that are not loaded yet: name -> what loads its parts.
Subsets = dict[str, Callable[[], list[Part]]]


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


def _local_subsets(path: Path, names: Sequence[str], split: str, flag: str) -> Subsets:
    """The named subfolders; for ("all",) every subfolder that holds rows, and under "" the folder's own files."""
    folders = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    if tuple(names) != ("all",):
        for name in names:
            if path / name not in folders:
                there = "".join(f", {folder.name}" for folder in folders)
                raise ValueError(
                    f"--train_dataset_name {name}: --{flag} {path} has no such subfolder; there are all{there}"
                )
        return {name: partial(_folder_parts, path / name, name, split, flag) for name in names}
    if path.is_file():
        return {"": partial(_file_parts, [path], path, "", path.parent, flag)}
    if _is_saved(path):
        return {"": partial(_folder_parts, path, "", split, flag)}
    saved = [folder for folder in folders if _is_saved(folder)]
    files = [file for file in _data_files(path) if not any(file.is_relative_to(folder) for folder in saved)]
    if not files and not saved and (images := image_files(path)):
        return {"": partial(_class_parts, images, path, split, flag)}
    by_name: dict[str, list[Path]] = {}
    for file in _of_split(files, path, split, flag) if files or not saved else []:
        below = file.relative_to(path).parts
        by_name.setdefault(below[0] if len(below) > 1 else "", []).append(file)
    subsets: Subsets = {one.name: partial(_folder_parts, one, one.name, split, flag) for one in saved}
    for name, found in by_name.items():
        subsets[name] = partial(_file_parts, found, path / name, name, path.parent, flag)
    return dict(sorted(subsets.items()))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _folder_parts(folder: Path, subset: str, split: str, flag: str) -> list[Part]:
    if _is_saved(folder):
        part = Part(folder.name, _saved_table(folder, split, flag).with_format("arrow"), subset, folder)
        part.check_columns(part.table.column_names)
        return [part]
    return _file_parts(_of_split(_data_files(folder), folder, split, flag), folder, subset, folder.parent, flag)


def _file_parts(files: list[Path], folder: Path, subset: str, root: Path, flag: str) -> list[Part]:
    types = sorted({file_type(file) for file in files})
    if ARROW in types:
        raise ValueError(
            f"--{flag} {folder}: holds {ARROW} files, but not the state.json or dataset_dict.json beside them with "
            "which save_to_disk ends"
        )
    if len(types) > 1:
        raise ValueError(f"--{flag} {folder}: holds {' and '.join(types)} files; those of a subset must be of one type")
    return [_file_part(file, subset, root, flag) for file in files]


def _file_part(file: Path, subset: str, root: Path, flag: str) -> Part:
    part = Part(file.relative_to(root).as_posix(), _read_file(file, flag), subset, file.parent)
    if hasattr(part.table, "column_names"):
        part.check_columns(part.table.column_names)
    else:
        _check_first_rows(part, f"--{flag} {file}")
    return part


def _check_first_rows(part: Part, what: str) -> None:
    """Raise ValueError if none of the part's first rows can be read and has a known format."""
    first = None
    for number in range(min(len(part.table), FIRST_ROWS)):
        bad = part[number].get("bad")
        if bad not in ("not JSON", "not CSV", NOT_UTF8, "no known format"):
            return
        first = first or bad
    if first == "no known format":
        with contextlib.suppress(BadRow):  # the first one is not that of an unknown format
            part.check_columns(list(part.table.record(0)))
    if first:
        raise ValueError(f"{what}: cannot be read: {first}, and so are its other first rows: {first.first}")


def _class_parts(images: list[Path], folder: Path, split: str, flag: str) -> list[Part]:
    if any(image.parent == folder for image in images):
        raise ValueError(
            f"--{flag} {folder}: holds images, but nothing that is said of them: it needs a metadata.jsonl or "
            "metadata.csv with file_name and text, or a folder of images for each class"
        )
    # The folder above an image is its class, which may be called train.
    of_split = _of_split(images, folder, split, flag, lambda file: file.relative_to(folder).parts[:-2])
    return [Part(folder.name, ClassFolder(of_split, folder), "", folder)]


def _saved_table(path: Path, split: str, flag: str) -> Any:
    """The table that `save_to_disk` wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag} {path}: cannot be read: {error}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"--{flag} {path}: no split {split}; there are {', '.join(saved)}")
    return saved[split]


def _data_files(folder: Path) -> list[Path]:
    """The files below the folder that hold rows, those of an unfinished `save_to_disk` among them.

    A table of text beside others of them, and a tar file where there is anything else, is something else: a list of
    results, or the images that the rows are about.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file_type(file) in (*FILE_TYPES, ARROW)
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    if any(file_type(file) != ".tar" for file in files):
        files = [file for file in files if file_type(file) != ".tar"]
    with_rows = {file.parent for file in files if file_type(file) not in (*DELIMITERS, ".tar")}
    return [file for file in files if file_type(file) not in DELIMITERS or file.parent not in with_rows]


def _of_split(
    files: list[Path],
    folder: Path,
    split: str,
    flag: str,
    words_of: Callable[[Path], Sequence[str]] | None = None,
) -> list[Path]:
    """All files; where names begin with a split ("train-00.parquet", "test/a.csv") those of this one, the others being
    of train. words_of: what of a file's name may name a split."""
    if not files:
        raise FileNotFoundError(
            f"--{flag} {folder}: holds no {', '.join(FILE_TYPES)} file and no data set written by save_to_disk"
        )
    splits: dict[str, list[Path]] = {}  # under "" those that name none
    for file in files:
        words = words_of(file) if words_of else (re.split(r"[-_.]", file.name)[0], *file.relative_to(folder).parts[:-1])
        splits.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), ""), []).append(file)
    if set(splits) == {""}:
        return files
    splits["train"] = sorted(splits.get("train", []) + splits.pop("", []))
    if not (wanted := splits.get(SPLIT_WORDS.get(split, split))):
        there = ", ".join(sorted(name for name, found in splits.items() if found))
        raise ValueError(f"--{flag} {folder}: no split {split}; there are {there}")
    return wanted


def _read_file(file: Path, flag: str) -> Any:
    """The table of a file: Records, or of parquet a Dataset in arrow format."""
    if file_type(file) not in FILE_TYPES:
        raise ValueError(f"--{flag} {file}: must be one of {', '.join(FILE_TYPES)}, or a folder")
    if file.suffix != ".parquet":
        try:
            return TarFile(file) if file.suffix == ".tar" else open_text_file(file)
        except ValueError as error:
            raise ValueError(f"--{flag} {file}: cannot be read: {error}") from None
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("parquet", data_files=[str(file)], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--{flag} {file}: cannot be read: {error.__cause__ or error}") from error
    return table.with_format("arrow")


def _hub_subsets(path: str, names: Sequence[str], split: str, streaming: bool, flag: str) -> Subsets:
    require_hub(f"--{flag} {path}", "a local folder or easy-vqa")
    import datasets

    errors = (OSError, ValueError, datasets.exceptions.DatasetsError)

    def load(name: str) -> list[Part]:
        try:
            table = datasets.load_dataset(path, name, split=split, streaming=streaming).with_format("arrow")
            part = Part(f"{path}/{name}", table, name)
            # Some streams do not know their columns before they are read.
            part.check_columns(table.column_names or next(table.iter(READ_ROWS)).column_names)
        except errors as error:
            raise ValueError(f"--{flag} {path}, subset {name}: {error}") from error
        return [part]

    try:
        there = datasets.get_dataset_config_names(path)
    except errors as error:
        raise ValueError(f"--{flag} {path}: {error}") from error
    chosen = there if tuple(names) == ("all",) else list(names)
    if missing := sorted(set(chosen) - set(there)):
        raise ValueError(
            f"--train_dataset_name {', '.join(missing)}: --{flag} {path} has no such configuration; there are all, "
            f"{', '.join(there)}"
        )
    return {name: partial(load, name) for name in chosen}
