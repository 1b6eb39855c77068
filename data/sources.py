"""Rows from the embedded easy-VQA, from local files and folders, and from the hub.

A row is a dict with
`images`: list of images that are not decoded yet: a path, bytes, {"bytes", "path"} or a PIL image;
`texts`: list of {"user", "assistant", "source"}, source None where it is not known;
`id`: str that says where the row comes from, as "easy-vqa/train/17" or "file.parquet#12";
and, from FineVision, `<kind>_ratings`: one int or None for each of the texts.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from models.config import TrainConfig

EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
FILE_TYPES = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
SPLIT_WORDS = {"train": "train", "test": "test", "val": "validation", "validation": "validation", "dev": "validation"}


def load_rows(
    path: str,
    names: Sequence[str] = ("all",),
    split: str = "train",
    streaming: bool = False,
    flag: str = "train_dataset_path",
):
    """The rows of a data set: a sequence (len, getitem), or a RowStream for hub data with streaming.

    path: "easy-vqa"; a .parquet, .jsonl or .json file, or a folder of them; a folder of `datasets.save_to_disk`; else a
    hub id. names: configurations of a hub data set or subfolders of a folder; ("all",) is all of them, one after the
    other. A local data set that names no splits has one, which any `split` returns.
    Raises FileNotFoundError, ValueError or ConnectionError that names `flag` and says what there is.
    """
    if path == "easy-vqa":
        if tuple(names) != ("all",):
            raise ValueError(f"--train_dataset_name {' '.join(names)}: easy-vqa has no configurations; leave it at all")
        return easy_vqa_rows(split, flag)
    local = Path(path).expanduser()
    if local.exists():
        return TableRows(_local_parts(local, names, split, flag))
    if path.count("/") > 1 or path[:1] in "/.~" or local.suffix in FILE_TYPES:  # no hub id looks like this
        raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    parts = _hub_parts(path, names, split, streaming, flag)
    return RowStream(parts) if streaming else TableRows(parts)


def split_rows(rows, val_size: int, seed: int):
    """(training rows, validation rows): a seeded random choice, or the first rows of a stream."""
    if isinstance(rows, RowStream):
        return rows.skip(val_size), rows.take(val_size)
    if val_size >= len(rows):
        raise ValueError(f"--val_size {val_size}: must be less than the {len(rows)} rows of the data set")
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return RowSubset(rows, order[val_size:]), RowSubset(rows, order[:val_size])


def filter_turns(row: dict, train_config: TrainConfig) -> dict:
    """The row without the turns that have a rating below its minimum; a turn without a rating stays."""
    keep = [True] * len(row["texts"])
    for kind in RATINGS:
        minimum = getattr(train_config, f"{kind}_min_rating")
        for i, rating in enumerate(row.get(f"{kind}_ratings") or []):
            if i < len(keep) and rating is not None and rating < minimum:
                keep[i] = False
    return row if all(keep) else row | {"texts": [turn for turn, kept in zip(row["texts"], keep, strict=True) if kept]}


class RowSubset:
    """The rows at the given indices."""

    def __init__(self, rows, indices: Sequence[int]):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.rows[self.indices[index]]


def easy_vqa_rows(split: str, flag: str = "train_dataset_path") -> list[dict]:
    """One row an image, with all its questions; source is the kind of question: shape, color, or
    yes_no_shape and yes_no_color, which ask whether there is a certain one."""
    import easy_vqa

    readers = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    if split not in readers:
        raise ValueError(f"--{flag} easy-vqa: no split {split}; there are train and test")
    read_questions, read_paths = readers[split]
    turns: dict[int, list[dict]] = {}
    for question, answer, image in zip(*read_questions(), strict=True):
        turns.setdefault(image, []).append(
            {"user": question, "assistant": answer, "source": _kind_of_question(question, answer)}
        )
    paths = read_paths()
    return [{"images": [paths[i]], "texts": turns[i], "id": f"easy-vqa/{split}/{i}"} for i in sorted(turns)]


def _kind_of_question(question: str, answer: str) -> str:
    yes_no = answer in ("yes", "no")
    asked = question if yes_no else answer  # "what color is the circle?" asks for a color
    kind = "shape" if any(shape in asked for shape in EASY_VQA_SHAPES) else "color"
    return f"yes_no_{kind}" if yes_no else kind


@dataclass
class _Part:
    """A table (datasets.Dataset or IterableDataset, in arrow format: images stay encoded) with a name for row ids."""

    name: str
    table: object
    folder: Path | None = None  # relative image paths start here

    def row(self, arrow_table, number: int) -> dict:
        record = arrow_table.to_pylist()[0]
        images = record["images"] if "images" in record else [record["image"]]
        row = {
            "images": [self._locate(image) for image in images or []],
            "texts": [self._turn(turn, record.get("source")) for turn in record["texts"] or []],
            "id": f"{self.name}#{number}",
        }
        return row | {f"{kind}_ratings": record[f"{kind}_ratings"] for kind in RATINGS if f"{kind}_ratings" in record}

    def _locate(self, image):
        if isinstance(image, str) and self.folder:
            return str(self.folder / image)
        if isinstance(image, dict) and not image.get("bytes") and image.get("path") and self.folder:
            return image | {"path": str(self.folder / image["path"])}
        return image

    @staticmethod
    def _turn(turn: dict | None, row_source: str | None) -> dict:
        turn = turn or {}
        spoken = {who: None if turn.get(who) is None else str(turn[who]) for who in ("user", "assistant")}
        return spoken | {"source": turn.get("source") or row_source}

    def check_columns(self, columns: Sequence[str]) -> None:
        if "texts" not in columns or not {"image", "images"} & set(columns):
            raise ValueError(
                f"{self.name}: has the columns {', '.join(columns)}; it needs images (or image) and texts, a list of "
                '{"user": ..., "assistant": ...}'
            )


class TableRows:
    """Rows of tables on disk, one table after the other."""

    def __init__(self, parts: list[_Part]):
        for part in parts:
            part.check_columns(part.table.column_names)
        self.parts = parts
        self.ends = list(accumulate(len(part.table) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect_right(self.ends, index)
        number = index - (self.ends[which - 1] if which else 0)
        part = self.parts[which]
        return part.row(part.table[number : number + 1], number)


class RowStream:
    """Rows that are read one after the other, from `start` up to but without `stop`."""

    def __init__(self, parts: list[_Part], start: int = 0, stop: int | None = None):
        self.parts, self.start, self.stop = parts, start, stop

    def __iter__(self) -> Iterator[dict]:
        for part, arrow_table, number in islice(self._tables(), self.start, self.stop):
            yield part.row(arrow_table, number)

    def _tables(self) -> Iterator[tuple]:
        """(part, one row as an arrow table, its number): what is skipped is not converted."""
        for part in self.parts:
            for number, arrow_table in enumerate(part.table):
                if number == 0:
                    part.check_columns(arrow_table.column_names)
                yield part, arrow_table, number

    def take(self, count: int) -> RowStream:
        """The first `count` rows."""
        stop = self.start + count
        return RowStream(self.parts, self.start, stop if self.stop is None else min(stop, self.stop))

    def skip(self, count: int) -> RowStream:
        """All but the first `count` rows."""
        return RowStream(self.parts, self.start + count, self.stop)


def _local_parts(path: Path, names: Sequence[str], split: str, flag: str) -> list[_Part]:
    if tuple(names) == ("all",):
        folders = [path]
    else:
        folders = [path / name for name in names]
        for folder in folders:
            if not folder.is_dir():
                there = sorted(child.name for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
                raise ValueError(
                    f"--train_dataset_name {folder.name}: --{flag} {path} has no such subfolder; "
                    f"there are all{''.join(f', {name}' for name in there)}"
                )
    return [part for folder in folders for part in _folder_parts(folder, split, flag)]


def _folder_parts(path: Path, split: str, flag: str) -> list[_Part]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return [_Part(path.name, _saved_table(path, split, flag).with_format("arrow"), path)]
    files = [path] if path.is_file() else _files_of_split(path, split, flag)
    return [_Part(str(file.relative_to(path.parent)), _read_file(file, flag), file.parent) for file in files]


def _saved_table(path: Path, split: str, flag: str):
    """The table that `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"--{flag} {path}: no split {split}; there are {', '.join(saved)}")
    return saved[split]


def _files_of_split(folder: Path, split: str, flag: str) -> list[Path]:
    """The folder's data files of one type; where names begin with a split ("train-00.parquet"), those of this one."""
    by_type = ([file for file in sorted(folder.rglob(f"*{suffix}")) if file.is_file()] for suffix in FILE_TYPES)
    files = next(filter(None, by_type), [])
    if not files:
        raise FileNotFoundError(
            f"--{flag} {folder}: holds no {', '.join(FILE_TYPES)} file and no data set written by save_to_disk"
        )
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(SPLIT_WORDS.get(re.split(r"[-_.]", file.name)[0]), []).append(file)
    if set(splits) == {None}:
        return files
    wanted = splits.get(SPLIT_WORDS.get(split, split))
    if wanted is None:
        there = ", ".join(sorted(name for name in splits if name))
        raise ValueError(f"--{flag} {folder}: no split {split}; there are {there}")
    return wanted


def _read_file(file: Path, flag: str):
    import datasets

    if file.suffix not in FILE_TYPES:
        raise ValueError(f"--{flag} {file}: must be one of {', '.join(FILE_TYPES)}, or a folder")
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(FILE_TYPES[file.suffix], data_files=[str(file)], split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"--{flag} {file}: cannot be read: {error.__cause__ or error}") from error
    return table.with_format("arrow")


def _hub_parts(path: str, names: Sequence[str], split: str, streaming: bool, flag: str) -> list[_Part]:
    require_hub(f"--{flag} {path}", "a local folder or easy-vqa")
    import datasets

    try:
        configs = datasets.get_dataset_config_names(path)
        chosen = configs if tuple(names) == ("all",) else list(names)
        if missing := sorted(set(chosen) - set(configs)):
            raise ValueError(f"no configuration {', '.join(missing)}; there are all, {', '.join(configs)}")
        tables = [datasets.load_dataset(path, name, split=split, streaming=streaming) for name in chosen]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--{flag} {path}: {error}") from error
    return [_Part(f"{path}/{name}", table.with_format("arrow")) for name, table in zip(chosen, tables, strict=True)]


def require_hub(what: str, instead: str, timeout_s: float = 5.0) -> None:
    """Raise ConnectionError if the hub does not answer: its client would try again for a minute.

    what: the flag and its value; instead: what the flag also takes. With HF_HUB_OFFLINE the cache is used.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=timeout_s).close()
    except HTTPError:
        return  # an answer
    except OSError as error:
        raise ConnectionError(
            f"{what}: {constants.ENDPOINT} does not answer ({error}). The flag also takes {instead}; what is in the "
            "hub's cache is used with HF_HUB_OFFLINE=1."
        ) from None
