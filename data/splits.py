"""Training and validation rows: a seeded choice of rows, or of images with all of their rows.

An image is told from others by a key that costs little: its path or URL as the row has it, or a hash of its bytes where
they are in the table itself. No picture is opened.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.formats import Part, Row, Rows
from data.image_files import ClassFolder, TarFile
from data.mixture_rows import MixtureRows
from data.rows import RowSubset, TableRows, held_out_rows, split_rows
from data.streams import RowStream
from data.text_files import TextFile
from data.values import IMAGE_KEYS, BadRow
from data.web_images import WebImage

PROBED_ROWS = 2048  # in a row, and as many drawn from all: of a larger data set these tell whether rows share images
EMBEDDED_BYTES = 2**30  # of a table with the images in it, up to which all of them are read


def split_by(rows: Rows | RowStream, by: str, val_size: float, seed: int) -> tuple[Any, Any, str]:
    """(training rows, validation rows, how they were divided, in words).

    by: "row"; "image", all rows of an image on one side, with at most val_size rows for validation; "auto": by image
    where rows share images and they can be told apart cheaply. Raises ValueError as split_rows, and where "image"
    cannot be done.
    """
    if val_size == 0:
        return *split_rows(rows, 0, seed), ""
    if isinstance(rows, RowStream):
        if by == "image":
            raise ValueError("--split_by image: must be row for a stream, of which the first rows are held out")
        return *split_rows(rows, val_size, seed), "the first rows of the stream"
    groups, why = (None, "--split_by row") if by == "row" else image_groups(rows, probe=by == "auto")
    if groups is not None:
        chosen = _choose(groups, held_out_rows(val_size, len(rows)), seed)
        if chosen is not None:
            order = np.random.default_rng(seed).permutation(len(rows))
            is_held_out = chosen[order]
            parts = RowSubset(rows, order[~is_held_out]), RowSubset(rows, order[is_held_out])
            return *parts, f"by image, {groups.max() + 1:,} of them: none is in both"
        why = f"no image has as few rows as --val_size {val_size:g} asks for"
    if by == "image" and groups is None and why != NOT_SHARED:
        raise ValueError(f"--split_by image: must be row: {why}")
    if by == "image" and groups is not None:
        raise ValueError(f"--split_by image: must be row, or --val_size larger: {why}")
    return *split_rows(rows, val_size, seed), f"by row: {why}"


NOT_SHARED = "no image is in two rows"


def image_groups(rows: Rows, probe: bool) -> tuple[np.ndarray | None, str]:
    """(int64 [rows], the same number, from 0, for rows that share an image, directly or through others; "") or, where
    no rows do or images cannot be told apart cheaply, (None, why).

    probe: look at some rows of a large data set first, and at all of them only if those share images.
    """
    if any(_is_too_large(part) for part in getattr(rows, "parts", ())):
        return None, f"the images are in the table itself, which has more than {EMBEDDED_BYTES / 2**30:g} GiB"
    if probe and len(rows) > 4 * PROBED_ROWS:
        drawn = np.random.default_rng(0).choice(len(rows), PROBED_ROWS, replace=False).tolist()
        start = (len(rows) - PROBED_ROWS) // 2
        some = sorted({*drawn, *range(start, start + PROBED_ROWS)})
        if not _share(_keys_at(rows, index) for index in some):
            return None, f"no image is in two of {len(some):,} rows that were looked at"
    owners, keys = array("q"), array("q")
    for index, found in enumerate(_all_keys(rows)):
        for key in found:
            owners.append(index)
            keys.append(key)
    groups = _connected(np.array(owners, dtype=np.int64), np.array(keys, dtype=np.int64), len(rows))
    return (groups, "") if groups.max(initial=-1) + 1 < len(rows) else (None, NOT_SHARED)


def _share(keys: Iterable[Iterable[int]]) -> bool:
    seen: set[int] = set()
    for found in keys:
        if not seen.isdisjoint(own := set(found)):
            return True
        seen |= own
    return False


def _connected(owners: np.ndarray, keys: np.ndarray, rows: int) -> np.ndarray:
    """int64 [rows]: the same number for rows with a common key, directly or through others; numbered by first row.

    owners, keys: int64 [n], row and key of each image.
    """
    _, keys = np.unique(keys, return_inverse=True)
    label = np.arange(rows)
    while len(keys):
        least = np.full(keys.max() + 1, rows)
        np.minimum.at(least, keys, label[owners])
        new = label.copy()
        np.minimum.at(new, owners, least[keys])
        new = new[new]  # a row's label is a row: what that one has learned counts too
        if (new == label).all():
            break
        label = new
    return np.unique(label, return_inverse=True)[1]


def _choose(groups: np.ndarray, count: int, seed: int) -> np.ndarray | None:
    """bool [rows]: whole groups in a seeded order, as many as have at most `count` rows together; None without any."""
    sizes = np.bincount(groups)
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if sizes[group] <= count:
            chosen[group] = True
            count -= sizes[group]
        if count == 0:
            break
    return chosen[groups] if chosen.any() else None


def _is_too_large(part: Part) -> bool:
    return not hasattr(part.table, "record") and part.table.data.nbytes > EMBEDDED_BYTES


def _all_keys(rows: Rows) -> Iterator[list[int]]:
    if isinstance(rows, MixtureRows):
        for of_set in rows.rows:
            yield from _all_keys(of_set)
        return
    if not isinstance(rows, TableRows):
        yield from (_keys_at(rows, index) for index in range(len(rows)))
        return
    for part in rows.parts:
        yield from _keys_of_part(part)


def _keys_of_part(part: Part) -> Iterator[list[int]]:
    table = part.table
    folder = part.options.image_root or part.folder
    column = next((name for name in IMAGE_KEYS if name in getattr(table, "column_names", ())), None)
    if isinstance(table, ClassFolder | TarFile):  # each row has its own
        yield from ([] for _ in range(len(table)))
    elif part.options.function or part.options.columns:
        yield from (keys_of(shown_by(part[number]), None) for number in range(len(table)))
    elif isinstance(table, TextFile):
        for number, record in enumerate(table.records()):
            yield _keys_of_record(part, number, record)
    elif column:
        for batch in table.select_columns([column]).iter(256):
            yield from (keys_of(value, folder) for value in batch.column(column).to_pylist())
    else:
        yield from (keys_of(shown_by(part[number]), None) for number in range(len(table)))


def _keys_of_record(part: Part, number: int, record: Any) -> list[int]:
    """The keys of a record of a text file: where an image key has a value, the row need not be made of it."""
    value = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), None)
    folder = part.options.image_root or part.folder
    return keys_of(shown_by(part[number]), None) if value is None else keys_of(value, folder)


def _keys_at(rows: Rows, index: int) -> list[int]:
    if isinstance(rows, TableRows):
        part, number = rows.place(index)
        if isinstance(part.table, ClassFolder | TarFile):
            return []
        if isinstance(part.table, TextFile) and not (part.options.function or part.options.columns):
            try:
                return _keys_of_record(part, number, part.table.record(number))
            except BadRow:
                return []
    return keys_of(shown_by(rows[index]), None)


def shown_by(row: Row) -> list[Any]:
    """All images and videos of a row, by which rows are told apart."""
    return [*row["images"], *row.get("videos", ())]


def keys_of(value: Any, folder: Path | None) -> list[int]:
    """A number for each image of a value as a row has it, the same for the same path, URL or bytes in this process."""
    found = []
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, dict):
            one = one.get("bytes") or one.get("path") or one.get("url")
        one = one.url if isinstance(one, WebImage) else one
        if isinstance(one, str) and one:
            found.append(hash(one if folder is None or one[0] == "/" or ":" in one[:8] else f"{folder}/{one}"))
        elif isinstance(one, bytes):
            found.append(hash(one))
        elif hasattr(one, "getexif"):
            found.append(id(one))
    return found
