"""What a row may look like in a file or on the hub, and the one shape that the rest of the project sees.

Known formats: the_cauldron (`images`, and `texts`: a list of {"user", "assistant", "source"}), FineVision (the same
with ratings of each turn and one `source` per row), and either with one `image` in place of `images`.

A row in the one shape, a `Row`, is a dict with
`images`: list of images that are not decoded yet: a path, bytes, {"bytes", "path"} or a PIL image;
`texts`: list of turns {"user", "assistant", "source"}, each a str or None where it is not known;
`id`: str that says where the row comes from, as "easy-vqa/train/17" or "file.parquet#12";
and, from FineVision, `<kind>_ratings`: one int or None for each turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from models.config import TrainConfig

Row = dict[str, Any]
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


class Rows(Protocol):
    """Rows by index: a list of rows, TableRows, RowSubset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass
class Part:
    """A table of rows in a known format, which is one file or one subset of a data set."""

    name: str  # in row ids
    table: Any  # datasets.Dataset or IterableDataset, in arrow format: images stay encoded
    subset: str = ""
    folder: Path | None = None  # relative image paths start here

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise ValueError if these are not the columns of a known format."""
        if "texts" not in columns or not {"image", "images"} & set(columns):
            raise ValueError(
                f"{self.name}: has the columns {', '.join(columns)}; it needs images (or image) and texts, a list of "
                '{"user": ..., "assistant": ...}'
            )

    def row(self, arrow_table: Any, place: str) -> Row:
        """The row of an arrow table that holds it alone. place: what follows the part's name in the row's id."""
        record = arrow_table.to_pylist()[0]
        images = record["images"] if "images" in record else [record["image"]]
        row = {
            "images": [_located(image, self.folder) for image in images or []],
            "texts": [_turn(turn, record.get("source")) for turn in record["texts"] or []],
            "id": f"{self.name}{place}",
        }
        return row | {f"{kind}_ratings": record[f"{kind}_ratings"] for kind in RATINGS if f"{kind}_ratings" in record}


def _located(image: Any, folder: Path | None) -> Any:
    """The image with its path, if it has one, relative to the folder of its file."""
    if folder and isinstance(image, str):
        return str(folder / image)
    if folder and isinstance(image, dict) and not image.get("bytes") and image.get("path"):
        return image | {"path": str(folder / image["path"])}
    return image


def _turn(turn: dict | None, row_source: str | None) -> dict:
    turn = turn or {}
    spoken = {who: None if turn.get(who) is None else str(turn[who]) for who in ("user", "assistant")}
    return spoken | {"source": turn.get("source") or row_source}


def filter_turns(row: Row, train_config: TrainConfig) -> Row:
    """The row without the turns that are rated below the config's minimum; a turn without a rating stays."""
    keep = [True] * len(row["texts"])
    for kind in RATINGS:
        minimum = getattr(train_config, f"{kind}_min_rating")
        for i, rating in enumerate(row.get(f"{kind}_ratings") or []):
            if i < len(keep) and rating is not None and rating < minimum:
                keep[i] = False
    return row if all(keep) else row | {"texts": [turn for turn, kept in zip(row["texts"], keep, strict=True) if kept]}
