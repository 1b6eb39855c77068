"""The tables that the files of a data set, or its subsets on the hub, are read as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.annotation_files import annotation_tables
from data.folders import ARROW, FILE_TYPES, data_files, is_saved, of_split
from data.formats import FIRST_ROWS, NOT_UTF8, Part
from data.hub import require_hub
from data.image_files import ClassFolder, TarFile, image_files
from data.options import FUNCTION_FAILED, NO_ROW, RowOptions
from data.packed_files import file_type, is_packed, unpacked
from data.text_files import open_text_file

UNREADABLE = ("not JSON", "not CSV", NOT_UTF8, "no known format", FUNCTION_FAILED, NO_ROW)
# Subsets that are not loaded yet: name -> what loads its parts.
Subsets = dict[str, Callable[[], list[Part]]]


@dataclass
class Loader:
    """Reads the tables of one data set. Its methods raise ValueError or OSError that names the flag."""

    flag: str
    split: str
    options: RowOptions

    def local_subsets(self, path: Path, names: Sequence[str]) -> Subsets:
        """The named subfolders; for ("all",) every subfolder that holds rows, and under "" the folder's own files."""
        folders = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
        if tuple(names) != ("all",):
            for name in names:
                if path / name not in folders:
                    there = "".join(f", {folder.name}" for folder in folders)
                    raise ValueError(
                        f"--train_dataset_name {name}: --{self.flag} {path} has no such subfolder; there are all{there}"
                    )
            return {name: partial(self._folder_parts, path / name, name) for name in names}
        if path.is_file():
            return {"": partial(self._file_parts, [path], path, "", path.parent)}
        if is_saved(path):
            return {"": partial(self._folder_parts, path, "")}
        saved = [folder for folder in folders if is_saved(folder)]
        files = [file for file in data_files(path) if not any(file.is_relative_to(folder) for folder in saved)]
        if not files and not saved and (images := image_files(path)):
            return {"": partial(self._class_parts, images, path)}
        with_splits = [one for one in saved if (one / "dataset_dict.json").exists()]
        found = [*files, *(one for one in saved if one not in with_splits)]
        of_split = with_splits + (self._of_split(found, path) if found or not saved else [])
        subsets: Subsets = {one.name: partial(self._folder_parts, one, one.name) for one in saved if one in of_split}
        by_name: dict[str, list[Path]] = {}
        for file in (one for one in of_split if one not in saved):
            below = file.relative_to(path).parts
            by_name.setdefault(below[0] if len(below) > 1 else "", []).append(file)
        for name, found in by_name.items():
            subsets[name] = partial(self._file_parts, found, path / name, name, path.parent)
        return dict(sorted(subsets.items()))

    def _of_split(self, files: list[Path], folder: Path, names_of: Callable | None = None) -> list[Path]:
        return of_split(files, folder, self.split, self.flag, names_of)

    def _part(self, name: str, table: Any, subset: str, folder: Path | None, what: str) -> Part:
        """The part, if its rows have a known format."""
        part = Part(name, table, subset, folder, self.options)
        if hasattr(table, "column_names") and not self.options.function:
            part.check_columns(table.column_names)
        else:
            _check_first_rows(part, what)
        return part

    def _folder_parts(self, folder: Path, subset: str) -> list[Part]:
        if is_saved(folder):
            table = _saved_table(folder, self.split, self.flag).with_format("arrow")
            return [self._part(folder.name, table, subset, folder, f"--{self.flag} {folder}")]
        files = self._of_split(data_files(folder), folder)
        return self._file_parts(files, folder, subset, folder.parent)

    def _file_parts(self, files: list[Path], folder: Path, subset: str, root: Path) -> list[Part]:
        flag, types = self.flag, sorted({file_type(file) for file in files})
        if ARROW in types:
            raise ValueError(
                f"--{flag} {folder}: holds {ARROW} files, but not the state.json or dataset_dict.json beside them with "
                "which save_to_disk ends"
            )
        if len(types) > 1:
            raise ValueError(
                f"--{flag} {folder}: holds {' and '.join(types)} files; those of a subset must be of one type"
            )
        try:
            tables = annotation_tables(files, self.options.image_root)
        except ValueError as error:
            raise ValueError(f"--{flag} {folder}: {error}") from None
        # Beside annotations another .json file is no list of rows: the published folders hold boxes, pairs, ...
        found = tables or {file: _read_file(file, flag) for file in files}
        parts = [
            self._part(file.relative_to(root).as_posix(), table, subset, file.parent, f"--{flag} {file}")
            for file, table in found.items()
            if table is not None
        ]
        if not parts:
            raise ValueError(f"--{flag} {folder}: its annotation files hold neither questions nor captions")
        return parts

    def _class_parts(self, images: list[Path], folder: Path) -> list[Part]:
        if any(image.parent == folder for image in images):
            raise ValueError(
                f"--{self.flag} {folder}: holds images, but nothing that is said of them: it needs a metadata.jsonl or "
                "metadata.csv with file_name and text, or a folder of images for each class"
            )
        # The folder above an image is its class, which may be called train.
        mine = self._of_split(images, folder, lambda file: file.relative_to(folder).parts[:-2])
        return [Part(folder.name, ClassFolder(mine, folder), "", folder, replace(self.options, image_root=None))]

    def hub_subsets(self, path: str, names: Sequence[str], streaming: bool) -> Subsets:
        """The named configurations of a data set on the hub."""
        require_hub(f"--{self.flag} {path}", "a local folder or easy-vqa")
        import datasets

        errors = (OSError, ValueError, datasets.exceptions.DatasetsError)

        def load(name: str) -> list[Part]:
            try:
                table = datasets.load_dataset(path, name, split=self.split, streaming=streaming).with_format("arrow")
                part = Part(f"{path}/{name}", table, name, None, self.options)
                if not self.options.function:
                    part.check_columns(part.columns())
            except errors as error:
                raise ValueError(f"--{self.flag} {path}, subset {name}: {error}") from error
            return [part]

        try:
            there = datasets.get_dataset_config_names(path)
        except errors as error:
            raise ValueError(f"--{self.flag} {path}: {error}") from error
        chosen = there if tuple(names) == ("all",) else list(names)
        if missing := sorted(set(chosen) - set(there)):
            raise ValueError(
                f"--train_dataset_name {', '.join(missing)}: --{self.flag} {path} has no such configuration; there are "
                f"all, {', '.join(there)}"
            )
        return {name: partial(load, name) for name in chosen}


def _check_first_rows(part: Part, what: str) -> None:
    """Raise ValueError if none of the part's first rows can be read and has a known format."""
    first = None
    for number in range(min(len(part.table), FIRST_ROWS)):
        bad = part[number].get("bad")
        if bad not in UNREADABLE:
            return
        first = first or bad
    if first == "no known format" and not part.options.function:
        part.check_columns(part.columns())
    if first:
        raise ValueError(f"{what}: cannot be read: {first}, and so are its other first rows: {first.first}")


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


def _read_file(file: Path, flag: str) -> Any:
    """The table of a file: Records, or of parquet a Dataset in arrow format."""
    if file_type(file) not in FILE_TYPES:
        raise ValueError(f"--{flag} {file}: must be one of {', '.join(FILE_TYPES)}, or a folder")
    if file_type(file) != ".parquet":
        try:
            if file_type(file) != ".tar":
                return open_text_file(file)
            return TarFile(unpacked(file) if is_packed(file) else file)
        except ValueError as error:
            raise ValueError(f"--{flag} {file}: cannot be read: {error}") from None
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("parquet", data_files=[str(file)], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--{flag} {file}: cannot be read: {error.__cause__ or error}") from error
    return table.with_format("arrow")
