"""The one shape of a row that the rest of the project sees, and the tables that rows come from.

What a row may look like in a file is said in data.conversations. In the one shape a `Row` is a dict with
`images`: list of images that are not decoded yet: a path, bytes, {"bytes", "path"}, a WebImage or a PIL image;
`texts`: list of turns {"user", "assistant", "source"}, each a str or None where it is not known. A turn may also have
`answers`: all that count as right, of which the assistant's is the first; `image_only`: the question is the image;
`image_places`: where in the user's text its images stand, in characters, and `images_before`: how many images stand in
the turns before it; without them all images stand before the first question;
`steps`: messages between question and answer, {"role": "assistant", "content", "tool_calls"} and {"role": "tool",
"content"}; where the last is a call, there may be no answer;
`id`: str that says where the row comes from, as "easy-vqa/train/17" or "file.parquet#12";
and, where it has them, `system`: a text before the first turn; `tools`: those that may be called;
`videos`: list of videos that are not decoded yet, see data.video_keys, with `subtitles`, `clip_start` and `clip_end`;
`format`: the name of the format it was recognised by;
`where`: its file and line in words, for messages;
`bad`: the reason why the row cannot be used, which then has neither images nor texts; and, from FineVision,
`<kind>_ratings`: one number or None for each turn.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from data.arrow_values import exact_floats
from data.conversations import format_of, read_record
from data.options import AS_THEY_ARE, RATINGS, RowOptions, renamed
from data.point_rows import with_pixel_answers
from data.values import BadRow, Reason, ratings_of, shortened
from models.config import TrainConfig

Row = dict[str, Any]
NOT_UTF8 = "not UTF-8"
FIRST_ROWS = 100  # of a file: what none of them has or can is an error
READ_ROWS = 16  # rows of a stream that are converted at once


class Rows(Protocol):
    """Rows by index: a list of rows, TableRows, RowSubset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class Records(Protocol):
    """A table that the project reads itself: records by number."""

    def __len__(self) -> int: ...

    def record(self, number: int) -> Mapping[str, Any]:
        """Raises BadRow for one that cannot be read."""

    def place(self, number: int) -> str:
        """Where it stands, in words: "line 12"."""


@dataclass
class Part:
    """A table of rows, which is one file or one subset of a data set."""

    name: str  # in row ids
    table: Any  # Records; or datasets.Dataset or IterableDataset, in arrow format: images stay encoded
    subset: str = ""
    folder: Path | None = None  # relative image paths start here, unless the options say where
    options: RowOptions = AS_THEY_ARE
    format: str = ""  # that of all its rows, where the columns tell

    def columns(self) -> list[str]:
        """The names of the columns; of records and of some streams those of the first rows."""
        if isinstance(names := getattr(self.table, "column_names", None), list):
            return names
        if not hasattr(self.table, "record"):  # a stream that does not know before it is read
            return next(iter(self.table.iter(READ_ROWS))).column_names
        found: dict[str, None] = {}
        for number in range(min(len(self.table), FIRST_ROWS)):
            with contextlib.suppress(BadRow):
                found |= dict.fromkeys(self.table.record(number))
        return list(found)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise ValueError if these are not the columns of a known format."""
        try:
            self.format = format_of(renamed(dict.fromkeys(columns), self.options.columns))
        except BadRow:
            raise ValueError(
                f"{self.name}: has the columns {', '.join(columns)}; it needs images (or image) and texts, a list of "
                '{"user": ..., "assistant": ...}, or those of another format in docs/data.md. --columns names columns '
                "of one's own, as question=COLUMN,answer=COLUMN,image=COLUMN"
            ) from None

    def row(self, arrow_table: Any, place: str) -> Row:
        """The row of an arrow table that holds it alone. place: what follows the part's name in the row's id."""
        try:
            record = exact_floats(arrow_table.to_pylist()[0], arrow_table.schema)
        except (ValueError, OverflowError) as error:  # Arrow checks neither letters nor dates before they are asked for
            kind = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else "a value that cannot be read"
            return self._bad_row(f"{self.name}{place}", BadRow(kind, shortened(str(error))), f"{self.name}{place}")
        for column, names in self._class_names.items():
            if isinstance(number := record.get(column), int) and 0 <= number < len(names):
                record[column] = names[number]
        return self._row(record, f"{self.name}{place}", f"{self.name}{place}")

    def __getitem__(self, number: int) -> Row:
        """The row of that number; a table in arrow format is a Dataset."""
        if not hasattr(self.table, "record"):
            return self.row(self.table[number : number + 1], f"#{number}")
        row_id, where = f"{self.name}#{number}", f"{self.name}, {self.table.place(number)}"
        try:
            record = self.table.record(number)
        except BadRow as bad:
            return self._bad_row(row_id, bad, where)
        return self._row(record, row_id, where) | {"where": where}

    def _row(self, record: Mapping[str, Any], row_id: str, where: str) -> Row:
        try:
            record = self.options.read(record)
            row = read_record(record, self.options.image_root or self.folder) | {"id": row_id}
            self.options.check_images(row["images"])
            row = with_pixel_answers(row)
            row["format"] = getattr(self.table, "format_name", row["format"])
            kinds = [f"{kind}_ratings" for kind in RATINGS]
            return row | {kind: ratings_of(record[kind], kind) for kind in kinds if kind in record}
        except BadRow as bad:
            return self._bad_row(row_id, bad, where)

    @staticmethod
    def _bad_row(row_id: str, bad: BadRow, where: str) -> Row:
        return {"images": [], "texts": [], "id": row_id, "bad": Reason(bad.kind, where, bad.found)}

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """Of the columns that hold the numbers of classes, the names of these."""
        features = getattr(self.table, "features", None) or {}
        return {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}


def count_formats(rows: Iterable[Row]) -> Counter:
    """How many of the rows were recognised by each format, and by none; rows that are made in memory do not count."""
    return Counter("not usable" if "bad" in row else row["format"] for row in rows if {"bad", "format"} & set(row))


def filter_turns(row: Row, train_config: TrainConfig) -> Row:
    """The row without the turns that are rated below the config's minimum; a turn without a rating stays."""
    keep = [True] * len(row["texts"])
    for kind in RATINGS:
        minimum = getattr(train_config, f"{kind}_min_rating")
        for i, rating in enumerate(row.get(f"{kind}_ratings") or []):
            if i < len(keep) and rating is not None and rating < minimum:
                keep[i] = False
    return row if all(keep) else row | {"texts": [turn for turn, kept in zip(row["texts"], keep, strict=True) if kept]}
