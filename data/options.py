"""How the rows of a run are read: own names of columns, a function of one's own, where images lie, what is fetched."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.conversations import FORMATS
from data.values import IMAGE_KEYS, BadRow, kind_of, plain_numbers, shortened, shown
from data.video_keys import CLIP_KEYS, VIDEO_KEYS
from data.web_images import NOT_FETCHED, WebImage
from models.config import TrainConfig

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
SHOWN_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS)
SAME_KEYS = [set(alternatives) for _, needs, _ in FORMATS for alternatives in needs]
FORMAT_KEYS = [set().union(*needs) - set(SHOWN_KEYS) for _, needs, _ in FORMATS]
TEXT_KEYS = set().union(*FORMAT_KEYS)
POINT_KEYS = ("points_unit", "width", "height", "names")
# What --columns may map a column to.
KNOWN_KEYS = sorted(
    {*TEXT_KEYS, *SHOWN_KEYS, *CLIP_KEYS, *POINT_KEYS, "source", *(f"{kind}_ratings" for kind in RATINGS)}
)
SKIPPED = "skipped by --row_function"  # it returned None, which is no mistake
FUNCTION_FAILED = "--row_function failed"
NO_ROW = "--row_function returned no row"


@dataclass(frozen=True)
class RowOptions:
    """The settings that say how a record becomes a row. Without any, a record is taken as it is."""

    columns: Mapping[str, str] = field(default_factory=dict)  # known key -> the column that holds it
    function: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None  # raises BadRow
    image_root: Path | None = None  # where relative paths of images start; None: at the file of the rows
    fetch_images: bool = False

    @classmethod
    def of(cls, cfg: TrainConfig) -> RowOptions:
        """Those of a run. Raises ValueError that names the flag whose value is impossible."""
        if unknown := sorted(set(cfg.columns) - set(KNOWN_KEYS)):
            raise ValueError(
                f"--columns {unknown[0]}={cfg.columns[unknown[0]]}: {unknown[0]} must be one of "
                f"{', '.join(KNOWN_KEYS)}, and {cfg.columns[unknown[0]]} the name of the column that holds it"
            )
        root = Path(cfg.image_root).expanduser() if cfg.image_root else None
        if root is not None and not root.is_dir():
            raise ValueError(f"--image_root {cfg.image_root}: no such folder")
        function = RowFunction.of(cfg.row_function) if cfg.row_function else None
        return cls(dict(cfg.columns), function, root, cfg.fetch_images)

    def read(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record under known keys, and as the function returns it. Raises BadRow."""
        record = renamed(record, self.columns)
        return self.function(record) if self.function else record

    def check_columns_exist(self, columns: Iterable[Sequence[str]], what: str) -> None:
        """Raise ValueError where --columns names a column that no part of a data set has.

        columns: of each part. what: the flag of the data set with its value.
        """
        there = list(dict.fromkeys(column for names in columns for column in names))
        for key, column in self.columns.items():
            if column not in there:
                raise ValueError(
                    f"--columns {key}={column}: {what} has no column {column}; it has {', '.join(there) or 'none'}"
                )

    def check_images(self, images: Sequence[Any]) -> None:
        """Raise BadRow where an image of a row is on the web and nothing is to be fetched."""
        for image in images if not self.fetch_images else ():
            if isinstance(image, WebImage):
                raise BadRow(NOT_FETCHED, shown(image.url))


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The record with the columns under the keys they are mapped to; one that it does not have is left out.

    A mapped key counts before all others that say the same: those that mean the same (caption, text), and those of
    formats that have nothing in common with the mapped keys, are left out.
    """
    mine = {key: record[column] for key, column in columns.items() if column in record}
    if not mine:
        return record
    hidden = {*columns.values(), *(key for same in SAME_KEYS if same & set(mine) for key in same)}
    if said := set(mine) & TEXT_KEYS:
        for _ in FORMAT_KEYS:  # questions belong to answers, and these to choices
            said |= set().union(*(keys for keys in FORMAT_KEYS if keys & said))
        hidden |= TEXT_KEYS - said
    return {key: value for key, value in record.items() if key not in hidden} | mine


class RowFunction:
    """A function of the user's file: a record as a dict -> a record, or None to skip it. Each process imports it."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    @classmethod
    def of(cls, given: str) -> RowFunction:
        """Of file.py:name. Raises ValueError where there is no such function, with what the file raises."""
        file, _, name = given.rpartition(":")
        path = Path(file).expanduser()
        if not file or not name.isidentifier():
            raise ValueError(f"--row_function {given}: must be a file and the name of a function in it, file.py:name")
        if not path.is_file():
            raise ValueError(f"--row_function {given}: no such file {file}")
        made = cls(path.resolve(), name)
        try:
            function = made._imported()
        except Exception as error:  # whatever the user's file raises
            raise ValueError(
                f"--row_function {given}: {path.name} cannot be imported: {_said(error, made.path)}"
            ) from None
        if not callable(function):
            raise ValueError(f"--row_function {given}: {path.name} has no function {name}")
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}

    def _imported(self) -> Any:
        """The function; None where the file does not have it."""
        if "function" not in self.__dict__:
            module_name = f"row_function_{self.path.stem}"
            if str(self.path.parent) not in sys.path:
                sys.path.append(str(self.path.parent))  # last: what lies beside the file hides nothing
            spec = importlib.util.spec_from_file_location(module_name, self.path)
            if spec is None or spec.loader is None:
                raise ImportError("its name must end in .py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module  # classes of the file can be pickled
            spec.loader.exec_module(module)
            self.function: Callable | None = getattr(module, self.name, None)
        return self.function

    def __call__(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the function makes of a record, whose numbers are numbers. Raises BadRow."""
        function = self._imported()
        try:
            made = function(plain_numbers(dict(record)))
        except Exception as error:
            raise BadRow(FUNCTION_FAILED, _said(error, self.path)) from None
        if made is None:
            raise BadRow(SKIPPED, shown(record))
        if not isinstance(made, Mapping):
            raise BadRow(NO_ROW, f"{kind_of(made)}: {shown(made)}")
        return made


def _said(error: Exception, path: Path) -> str:
    """As "KeyError: 'text' (line 3 of mine.py)"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    where = f" (line {lines[-1]} of {path.name})" if lines else ""
    return f"{type(error).__name__}: {shortened(str(error))}{where}"


AS_THEY_ARE = RowOptions()
