"""Rows from the embedded easy-VQA, from local files and folders, and from the hub.

A row is a dict with
`images`: list of images that are not decoded yet: a path, bytes, {"bytes", "path"} or a PIL image;
`texts`: list of {"user", "assistant", "source"}, source None where it is not known;
`id`: str that says where the row comes from, as "easy-vqa/train/17" or "file.parquet#12";
and, from FineVision, `<kind>_ratings`: one int or None for each of the texts.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from data.hub import require_hub
from models.config import TrainConfig

EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
FILE_TYPES = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
ARROW = ".arrow"  # what save_to_disk writes
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of data sets: no rows
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
READ_ROWS = 16  # rows of a stream that are read at once
SHUFFLE_BUFFER_ROWS = 1000
OPEN_SHARDS = 4  # shards of a stream that a reader draws its rows from at a time
SPLIT_WORDS = {"train": "train", "test": "test", "val": "validation", "validation": "validation", "dev": "validation"}


def load_rows(
    path: str,
    names: Sequence[str] = ("all",),
    split: str = "train",
    streaming: bool = False,
    flag: str = "train_dataset_path",
    skip_bad_subsets: bool = False,
):
    """The rows of a data set: a sequence (len, getitem), or a RowStream for hub data with streaming.

    path: "easy-vqa"; a .parquet, .jsonl or .json file, or a folder of them; a folder of `datasets.save_to_disk`; else a
    hub id. names: its subsets, which are the configurations of a hub data set or the subfolders of a folder; ("all",)
    is all of them, one after the other. A local data set that names no splits has one, which any `split` returns.
    skip_bad_subsets: leave out subsets that cannot be loaded, and say so; their names are in the rows' `bad_subsets`.
    Raises FileNotFoundError, ValueError or ConnectionError that names `flag` and says what there is.
    """
    if path == "easy-vqa":
        if tuple(names) != ("all",):
            raise ValueError(f"--train_dataset_name {' '.join(names)}: easy-vqa has no configurations; leave it at all")
        return easy_vqa_rows(split, flag)
    local = Path(path).expanduser()
    if local.exists():
        parts, bad = _load_subsets(_local_subsets(local, names, split, flag), path, flag, skip_bad_subsets)
        return TableRows(parts, bad)
    if path.count("/") > 1 or path[:1] in "/.~" or local.suffix in FILE_TYPES:  # no hub id looks like this
        raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    subsets = _hub_subsets(path, names, split, streaming, flag)
    parts, bad = _load_subsets(subsets, path, flag, skip_bad_subsets)
    return RowStream(parts, bad) if streaming else TableRows(parts, bad)


def split_rows(rows, val_size: int, seed: int):
    """(training rows, validation rows): a seeded random choice, or the first rows of a stream."""
    if isinstance(rows, RowStream):
        return rows.skip(val_size), rows.take(val_size)
    if val_size >= len(rows):
        raise ValueError(f"--val_size {val_size}: must be less than the {len(rows)} rows of the data set")
    order = np.random.default_rng(seed).permutation(len(rows))
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

    def __init__(self, rows, indices: np.ndarray):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.rows[int(self.indices[index])]

    def by_subset(self) -> dict[str, np.ndarray]:
        """The indices of the rows of each subset."""
        mine = np.full(len(self.rows), -1)
        mine[self.indices] = np.arange(len(self.indices))
        found = {name: mine[indices] for name, indices in _by_subset(self.rows).items()}
        found = {name: indices[indices >= 0] for name, indices in found.items()}
        return {name: indices for name, indices in found.items() if len(indices)}


def _by_subset(rows) -> dict[str, np.ndarray]:
    return rows.by_subset() if hasattr(rows, "by_subset") else {"": np.arange(len(rows))}


class EpochIndices:
    """epoch -> the indices of its rows, int64 [visits], in a seeded order.

    Each row once; with weights so many times as the weight of its subset says, 1 where it is not named: of a subset
    with weight 0.5 every epoch takes the half that the one before has left.
    """

    def __init__(self, rows, weights: dict[str, float], seed: int):
        """rows: with len. Raises ValueError for a weight whose subset there is not, and without rows."""
        if len(rows) == 0:
            raise ValueError("the training data has no rows")
        self.seed = seed
        self.length = len(rows)
        self.groups: list[tuple[np.ndarray, int]] = []  # indices of a subset, and how many of them an epoch has
        if weights:
            subsets = _by_subset(rows)
            check_mixture(weights, subsets)
            for name, indices in subsets.items():
                self.groups.append((indices, max(1, round(weights.get(name, 1.0) * len(indices)))))
            self.length = sum(count for _, count in self.groups)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, epoch: int) -> np.ndarray:
        if not self.groups:
            return np.random.default_rng((self.seed, epoch)).permutation(len(self))
        drawn = []
        for number, (indices, count) in enumerate(self.groups):
            size, start, stop = len(indices), epoch * count, (epoch + 1) * count
            rounds = range(start // size, -(-stop // size))
            orders = [np.random.default_rng((self.seed, number, r)).permutation(indices) for r in rounds]
            drawn.append(np.concatenate(orders)[start - rounds[0] * size :][:count])
        return np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(drawn))


def check_mixture(weights: dict[str, float], subsets) -> None:
    """Raise ValueError for a weight whose subset there is not."""
    if missing := sorted(set(weights) - set(subsets)):
        there = ", ".join(filter(None, subsets)) or "no subsets"
        raise ValueError(
            f"--mixture_weights {', '.join(missing)}: no such subset in the training rows; there are {there}"
        )


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
    subset: str = ""
    folder: Path | None = None  # relative image paths start here

    def row(self, arrow_table, number: int, shard: int | None = None) -> dict:
        """The row of a table that holds it alone; `number` and `shard` say where it stands."""
        record = arrow_table.to_pylist()[0]
        images = record["images"] if "images" in record else [record["image"]]
        row = {
            "images": [self._locate(image) for image in images or []],
            "texts": [self._turn(turn, record.get("source")) for turn in record["texts"] or []],
            "id": f"{self.name}#{number}" if shard is None else f"{self.name}[{shard}]#{number}",
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
        """Raise ValueError if the columns are not those of a row."""
        if "texts" not in columns or not {"image", "images"} & set(columns):
            raise ValueError(
                f"{self.name}: has the columns {', '.join(columns)}; it needs images (or image) and texts, a list of "
                '{"user": ..., "assistant": ...}'
            )


class TableRows:
    """Rows of tables on disk, one table after the other."""

    def __init__(self, parts: list[_Part], bad_subsets: Sequence[str] = ()):
        self.parts, self.bad_subsets = parts, bad_subsets
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

    def by_subset(self) -> dict[str, np.ndarray]:
        """The indices of the rows of each subset."""
        found: dict[str, list[np.ndarray]] = {}
        for part, end in zip(self.parts, self.ends, strict=True):
            found.setdefault(part.subset, []).append(np.arange(end - len(part.table), end))
        return {name: np.concatenate(indices) for name, indices in found.items()}


@dataclass
class _Shard:
    """One file of a stream's table, which is read from its beginning."""

    part: _Part
    number: int
    skip: int = 0  # rows at its beginning that are left out

    def records(self) -> Iterator[tuple[int, object]]:
        """(number in the shard, arrow table of one row) for each row; `row` converts it."""
        start = 0
        # Not by iterating over the table: in a worker process it would deal its shards out a second time.
        for records in self.part.table.shard(self.part.table.num_shards, self.number).iter(READ_ROWS):
            if start == 0:
                self.part.check_columns(records.column_names)
            yield from ((start + i, records.slice(i, 1)) for i in range(max(0, self.skip - start), len(records)))
            start += len(records)

    def row(self, number: int, record) -> dict:
        return self.part.row(record, number, None if self.part.table.num_shards == 1 else self.number)


@dataclass
class _Visit:
    """The rows that a reader takes of a shard: of those kept, from `first` on each `step`-th."""

    shard: _Shard
    first: int = 0
    step: int = 1
    keep: float = 1.0  # share of the shard's rows, drawn at random

    def rows(self, key: str) -> Iterator[dict]:
        """`key` draws those that are kept, the same for all readers."""
        kept = (record for record in self.shard.records() if self._is_kept(f"{key}/{record[0]}"))
        return (self.shard.row(*record) for record in islice(kept, self.first, None, self.step))

    def _is_kept(self, key: str) -> bool:
        if self.keep == 1.0:
            return True
        return random.Random(f"{self.shard.part.name}/{self.shard.number}/{key}").random() < self.keep


class RowStream:
    """Rows that are read one after the other, from `start` up to but without `stop`."""

    def __init__(self, parts: list[_Part], bad_subsets: Sequence[str] = (), start: int = 0, stop: int | None = None):
        self.parts, self.bad_subsets, self.start, self.stop = parts, bad_subsets, start, stop

    def __iter__(self) -> Iterator[dict]:
        """The rows in their order."""
        records = ((shard, *record) for shard in self._all_shards() for record in shard.records())
        return (shard.row(*record) for shard, *record in islice(records, self.start, self.stop))

    def prepare(self, weights: dict[str, float]) -> None:
        """Check and count here what the readers of `epoch` would each find out for themselves."""
        check_mixture(weights, [part.subset for part in self.parts])
        _ = self.shards

    def _all_shards(self) -> list[_Shard]:
        return [_Shard(part, number) for part in self.parts for number in range(part.table.num_shards)]

    @cached_property
    def shards(self) -> list[_Shard]:
        """The shards without the rows before `start`, which are counted for it."""
        to_skip, found = self.start, []
        for shard in self._all_shards():
            passed = sum(1 for _ in islice(shard.records(), to_skip + 1)) if to_skip else 1
            if passed > to_skip:  # it has rows after those
                found.append(_Shard(shard.part, shard.number, skip=to_skip))
            to_skip -= min(to_skip, passed)
        return found

    def epoch(self, key: str, weights: dict[str, float], share: int = 0, shares: int = 1) -> Iterator[dict]:
        """The rows of an epoch in an order drawn by `key`: a few shards at a time, shuffled within a buffer.

        Of `shares` readers each gets other rows, all of them together each row once; with weights so many times as the
        weight of its subset says, what is left of a whole number being a share of its rows drawn anew every epoch.
        Each reader gets equally many whole shards of a subset. The rest, less than a shard for each, all of them read
        and take every `shares`-th row of. So their shares differ by a few rows, and by as much as shards do in length
        (those with rows for validation are shorter).
        """
        assert self.stop is None, "a part of a stream can be read in its order alone"
        if multiprocessing.parent_process() is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked process has the lock of its parent, but not the thread that holds it
        rng = random.Random(key)
        return _shuffled(_drawn(self._visits(weights, share, shares, rng), key, rng), rng)

    def _visits(self, weights: dict[str, float], share: int, shares: int, rng: random.Random) -> list[_Visit]:
        """What a reader reads of the shards, as often as the weights say."""
        visits = []
        for part in self.parts:
            shards = [shard for shard in self.shards if shard.part is part]
            rng.shuffle(shards)
            whole = len(shards) // shares * shares
            mine = [_Visit(shard) for shard in shards[share:whole:shares]]
            turn = share + rng.randrange(shares)  # not always the same readers have a row more than the others
            mine += [_Visit(shard, (turn + i) % shares, shares) for i, shard in enumerate(shards[whole:])]
            weight = weights.get(part.subset, 1.0)
            visits += mine * int(weight)
            if weight % 1:
                visits += [replace(visit, keep=weight % 1) for visit in mine]
        return visits

    def take(self, count: int) -> RowStream:
        """The first `count` rows."""
        stop = self.start + count
        stop = stop if self.stop is None else min(stop, self.stop)
        return RowStream(self.parts, self.bad_subsets, self.start, stop)

    def skip(self, count: int) -> RowStream:
        """All but the first `count` rows."""
        return RowStream(self.parts, self.bad_subsets, self.start + count, self.stop)


def _drawn(visits: list[_Visit], key: str, rng: random.Random) -> Iterator[dict]:
    """The rows of the visits in a random order, each row from one of a few."""
    rng.shuffle(visits)
    opened: list[Iterator[dict]] = []
    while visits or opened:
        while visits and len(opened) < OPEN_SHARDS:
            opened.append(visits.pop().rows(key))
        place = rng.randrange(len(opened))
        row = next(opened[place], None)
        if row is None:
            del opened[place]
        else:
            yield row


def _shuffled(rows: Iterator[dict], rng: random.Random) -> Iterator[dict]:
    """The rows, each in place of a random one of a buffer."""
    buffer: list[dict] = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER_ROWS:
            buffer.append(row)
            continue
        place = rng.randrange(SHUFFLE_BUFFER_ROWS)
        yield buffer[place]
        buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer


# The subsets of a data set that are still to be loaded: name -> what loads its parts.
Subsets = dict[str, Callable[[], list[_Part]]]


def _load_subsets(subsets: Subsets, path: str, flag: str, skip_bad: bool) -> tuple[list[_Part], list[str]]:
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
        return {name: lambda name=name: _folder_parts(path / name, name, split, flag) for name in names}
    if path.is_file():
        return {"": lambda: [_file_part(path, "", path.parent, flag)]}
    if _is_saved(path):
        return {"": lambda: _folder_parts(path, "", split, flag)}
    saved = [folder for folder in folders if _is_saved(folder)]
    files = [file for file in _data_files(path) if not any(file.is_relative_to(folder) for folder in saved)]
    by_name: dict[str, list[Path]] = {}
    for file in _of_split(files, path, split, flag) if files or not saved else []:
        below = file.relative_to(path).parts
        by_name.setdefault(below[0] if len(below) > 1 else "", []).append(file)
    subsets: Subsets = {one.name: lambda one=one: _folder_parts(one, one.name, split, flag) for one in saved}
    for name, found in by_name.items():
        subsets[name] = lambda name=name, found=found: _file_parts(found, path / name, name, path.parent, flag)
    return dict(sorted(subsets.items()))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _folder_parts(folder: Path, subset: str, split: str, flag: str) -> list[_Part]:
    if _is_saved(folder):
        part = _Part(folder.name, _saved_table(folder, split, flag).with_format("arrow"), subset, folder)
        part.check_columns(part.table.column_names)
        return [part]
    return _file_parts(_of_split(_data_files(folder), folder, split, flag), folder, subset, folder.parent, flag)


def _file_parts(files: list[Path], folder: Path, subset: str, root: Path, flag: str) -> list[_Part]:
    types = sorted({file.suffix for file in files})
    if ARROW in types:
        raise ValueError(
            f"--{flag} {folder}: holds {ARROW} files, but not the state.json or dataset_dict.json beside them with "
            "which save_to_disk ends"
        )
    if len(types) > 1:
        raise ValueError(f"--{flag} {folder}: holds {' and '.join(types)} files; those of a subset must be of one type")
    return [_file_part(file, subset, root, flag) for file in files]


def _file_part(file: Path, subset: str, root: Path, flag: str) -> _Part:
    part = _Part(str(file.relative_to(root)), _read_file(file, flag), subset, file.parent)
    part.check_columns(part.table.column_names)
    return part


def _saved_table(path: Path, split: str, flag: str):
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
    """The files below the folder that hold rows, those of an unfinished `save_to_disk` among them."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in (*FILE_TYPES, ARROW)
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]


def _of_split(files: list[Path], folder: Path, split: str, flag: str) -> list[Path]:
    """All files; where names begin with a split ("train-00.parquet") those of this one, the others being of train."""
    if not files:
        raise FileNotFoundError(
            f"--{flag} {folder}: holds no {', '.join(FILE_TYPES)} file and no data set written by save_to_disk"
        )
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(SPLIT_WORDS.get(re.split(r"[-_.]", file.name)[0]), []).append(file)
    if set(splits) == {None}:
        return files
    splits["train"] = sorted(splits.get("train", []) + splits.pop(None, []))
    if not (wanted := splits.get(SPLIT_WORDS.get(split, split))):
        there = ", ".join(sorted(name for name, found in splits.items() if found))
        raise ValueError(f"--{flag} {folder}: no split {split}; there are {there}")
    return wanted


def _read_file(file: Path, flag: str):
    import datasets

    if file.suffix not in FILE_TYPES:
        raise ValueError(f"--{flag} {file}: must be one of {', '.join(FILE_TYPES)}, or a folder")
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(FILE_TYPES[file.suffix], data_files=[str(file)], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--{flag} {file}: cannot be read: {error.__cause__ or error}") from error
    return table.with_format("arrow")


def _hub_subsets(path: str, names: Sequence[str], split: str, streaming: bool, flag: str) -> Subsets:
    require_hub(f"--{flag} {path}", "a local folder or easy-vqa")
    import datasets

    errors = (OSError, ValueError, datasets.exceptions.DatasetsError)

    def load(name: str) -> list[_Part]:
        try:
            table = datasets.load_dataset(path, name, split=split, streaming=streaming).with_format("arrow")
            part = _Part(f"{path}/{name}", table, name)
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
    return {name: lambda name=name: load(name) for name in chosen}
