"""The rows of a benchmark as its data has them: parquet files, a folder of save_to_disk, JSON with images, the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.hub import require_hub
from data.text_files import TYPES, file_type, open_text_file
from data.values import BadRow

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in its folder
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")  # in the name of one of several parquet files
BATCH_ROWS = 500


@dataclass
class Table:
    """Records by number. table: a datasets.Dataset in arrow format, or one of data.text_files.

    source: where it is from, for messages and results; folder: where relative image paths start.
    """

    source: str
    table: Any
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> list[str]:
        """Of a text file those of its first row. Raises ValueError where that cannot be read."""
        if hasattr(self.table, "column_names"):
            return list(self.table.column_names)
        return list(self._text_record(0)) if len(self.table) else []

    def record(self, number: int) -> dict[str, Any]:
        """The whole record, images as they are stored. Raises ValueError."""
        if not hasattr(self.table, "column_names"):
            return self._text_record(number)
        return self._named(self.table[number : number + 1].to_pylist()[0])

    def records(self, columns: Sequence[str], numbers: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """The records with these columns, those of `numbers` or all, in order. Raises ValueError."""
        numbers = range(len(self)) if numbers is None else numbers
        if not hasattr(self.table, "column_names"):
            yield from map(self._text_record, numbers)
            return
        chosen = self.table.select_columns([column for column in self.columns if column in columns])
        for start in range(0, len(numbers), BATCH_ROWS):
            for record in chosen[numbers[start : start + BATCH_ROWS]].to_pylist():
                yield self._named(record)

    def _named(self, record: dict[str, Any]) -> dict[str, Any]:
        """With the names of classes in place of their numbers."""
        for column, feature in self.table.features.items():
            number = record.get(column)
            if hasattr(feature, "names") and isinstance(number, int) and 0 <= number < len(feature.names):
                record[column] = feature.names[number]
        return record

    def _text_record(self, number: int) -> dict[str, Any]:
        try:
            return dict(self.table.record(number))
        except BadRow as bad:
            raise ValueError(f"{self.source}: {self.table.place(number)}: {bad.kind}: {bad.found}") from None


def open_table(root: Path | None, names: Sequence[str], hub_id: str, config: str | None, split: str) -> Table:
    """The table of a split: of the first of root's subfolders `names` that there is, of root itself, or of the hub
    where root is None. root: exists. Raises ValueError, FileNotFoundError or ConnectionError with what there is."""
    if root is None:
        return _hub_table(hub_id, config, split)
    if root.is_file():
        return _file_table([root], root)
    folder = find_folder(root, names, config)
    if is_saved(folder):
        return _saved_table(folder, split)
    return _file_table(files_of_split(folder, config, split), folder)


def find_folder(root: Path, names: Sequence[str], config: str | None) -> Path:
    """Where a task's data is in a --data_root: see open_table."""
    folder = next((root / name for name in names if (root / name).is_dir()), root)
    return folder / config if config and (folder / config).is_dir() else folder


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk has written it."""
    return any((folder / name).exists() for name in SAVED)


def _saved_table(folder: Path, split: str) -> Table:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"--data_root {folder}: cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"--data_root {folder}: no split {split}; there are {', '.join(saved)}")
        saved = saved[split]
    return Table(str(folder), saved.with_format("arrow"))


def files_of_split(folder: Path, config: str | None, split: str) -> list[Path]:
    """The files whose name, or whose folder's name, is that of the split or begins with it; all where the one file says
    nothing of a split. Parquet files, or else JSON. Raises ValueError, FileNotFoundError."""
    files = [file for file in sorted(folder.rglob("*")) if file_type(file) in (".parquet", *TYPES) and file.is_file()]
    parquet = [file for file in files if file.suffix == ".parquet"]
    files = parquet or [file for file in files if file_type(file) in TYPES]
    if config:
        files = _files_of_config(files, folder, config, split)
    if not files:
        raise FileNotFoundError(f"--data_root {folder}: holds no .parquet, .json or .jsonl file and no save_to_disk")
    of_split = [file for file in files if _split_of(file) == split or file.parent.name == split]
    if not of_split and len(files) == 1 and not SHARD.search(files[0].name):
        of_split = files
    if not of_split:
        there = sorted({_split_of(file) for file in files})
        raise ValueError(f"--data_root {folder}: no file of the split {split}; there are {', '.join(there)}")
    _check_shards(of_split, folder)
    return of_split


def _files_of_config(files: Sequence[Path], folder: Path, config: str, split: str) -> list[Path]:
    """Those in a folder of that name, or else those in no folder of another one: its questions would be others."""
    places = {file: file.relative_to(folder).parts[:-1] for file in files}
    of_config = [file for file in files if config in places[file]]
    of_none = [file for file in files if folder.name == config or not {*places[file]} - {"data", split}]
    if files and not of_config and not of_none:
        there = ", ".join(sorted({places[file][0] for file in files}))
        raise FileNotFoundError(f"--data_root {folder}: no folder {config}; there are {there}")
    return of_config or of_none


def _split_of(file: Path) -> str:
    return SHARD.split(file.name)[0] if SHARD.search(file.name) else file.name.split(".")[0]


def _check_shards(files: Sequence[Path], folder: Path) -> None:
    shards = [match for file in files if (match := SHARD.search(file.name))]
    if shards and len(shards) < (count := int(shards[0].group(2))):
        missing = sorted(set(range(count)) - {int(shard.group(1)) for shard in shards})
        raise ValueError(
            f"--data_root {folder}: holds {len(shards)} of {count} parquet files; missing: "
            f"{', '.join(f'{number:05d}' for number in missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )


def _file_table(files: Sequence[Path], source: Path) -> Table:
    if file_type(files[0]) in TYPES:
        if len(files) > 1:
            raise ValueError(f"--data_root {source}: holds {len(files)} files of the split; there must be one")
        try:
            return Table(str(files[0]), open_text_file(files[0]), files[0].parent)
        except ValueError as error:
            raise ValueError(f"--data_root {files[0]}: cannot be read: {error}") from None
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data_root {source}: cannot be read: {error.__cause__ or error}") from error
    return Table(str(source), table.with_format("arrow"), source if source.is_dir() else source.parent)


def _hub_table(hub_id: str, config: str | None, split: str) -> Table:
    require_hub(f"--tasks: {hub_id}", "--data_root, a folder with the benchmark's data")
    import datasets

    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--tasks: {hub_id}, split {split}: {error}") from error
    return Table(f"{hub_id}{f'/{config}' if config else ''}", table.with_format("arrow"))
