"""What becomes of rows and turns that cannot be used: each is counted by its reason, and each row has a record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from data.formats import Row
from data.images import ImageDecodeError
from data.options import SKIPPED
from data.values import Reason

TOO_MANY_IMAGES = "too many images"
TOO_MANY_TILES = "too many tiles"
NO_TEXT = "no text"
IMAGE_TOKEN_IN_TEXT = "image token in text"
CONTROL_TOKEN_IN_TEXT = "control token in text"  # "<|im_end|>" would end the turn and begin another
LOW_RATING = "rating"
TOO_LONG = "too long"
NO_LABEL = "no label"
UNKNOWN_WORD = "word not in the vocabulary"
BAD_SUBSET = "subset that cannot be loaded"
TURN = "turn: "  # stands before the reason where a turn was dropped and its row kept
USED = "used: "  # stands before the count of what is not whole and was used all the same
TRUNCATED, TRUNCATED_VIDEO = f"{USED}truncated image", f"{USED}truncated video"
# What the user's own flags leave out; every other reason is something wrong with the row.
FILTERED = frozenset({TOO_MANY_IMAGES, TOO_MANY_TILES, LOW_RATING, TOO_LONG, BAD_SUBSET, SKIPPED})
REASONS_TO_SHOW = 5  # with the first row of each
DROPPED = "dropped.jsonl"  # in a run's folder: the records of its rows
MAX_RECORDS = 1000  # of each reason and split


class DropRecord(NamedTuple):
    """A row that cannot be used, or of which turns cannot be used."""

    row: str  # its id
    where: str  # its file and line, in words
    reason: str
    found: str  # what stands there, shortened


class DropCounter(Counter):
    """How many rows (and turns of rows that were kept) could not be used, by reason; a row counts at each visit.

    records: those of the rows that were counted since somebody has taken them, at most MAX_RECORDS of each reason.
    """

    def __init__(self, *counts: Any):
        super().__init__(*counts)
        self.records: list[DropRecord] = []

    def note(self, records: Iterable[DropRecord]) -> None:
        """Keep the records, as far as there is room; the counts stay as they are."""
        held = Counter(record.reason for record in self.records)
        for record in records:
            held[record.reason] += 1
            if held[record.reason] <= MAX_RECORDS:
                self.records.append(record)

    def bad_rows(self) -> int:
        """The rows with which something is wrong: without turns, and without what the user's flags leave out."""
        return sum(n for reason, n in self.items() if reason not in FILTERED and not reason.startswith((TURN, USED)))

    def rows(self) -> int:
        """All rows that could not be used."""
        return sum(n for reason, n in self.items() if reason != BAD_SUBSET and not reason.startswith((TURN, USED)))

    def summary(self) -> str:
        """As "dropped 3 rows (2 too long, 1 no text) and 1 turn (1 rating); used 1 truncated image"."""
        rows = {reason: count for reason, count in self.most_common() if not reason.startswith((TURN, USED))}
        turns, used = (
            {reason.removeprefix(kind): count for reason, count in self.most_common() if reason.startswith(kind)}
            for kind in (TURN, USED)
        )
        listed = [_listed(rows, "row"), _listed(turns, "turn")]
        said = "dropped " + (" and ".join(filter(None, listed)) or "nothing")
        return "; used ".join([said, *(f"{count} {what}{'s' * (count != 1)}" for what, count in used.items())])

    def examples(self) -> dict[str, str]:
        """Where the first row of each reason stands, and what was found in it."""
        return {str(reason): reason.first for reason, _ in self.most_common() if isinstance(reason, Reason)}

    def plain(self) -> dict[str, int]:
        """The counts alone."""
        return {str(reason): count for reason, count in self.items()}


def count_drops(samples: Iterable[Any]) -> DropCounter:
    """The drops of all the samples, prepared or not, together."""
    dropped = DropCounter()
    for sample in samples:
        dropped.update(sample.dropped)
    return dropped


def drop_records(samples: Iterable[Any]) -> list[DropRecord]:
    """A record of each sample and each reason for which it, or turns of it, were dropped."""
    return [
        DropRecord(sample.id, getattr(reason, "where", "") or sample.id, str(reason), getattr(reason, "found", ""))
        for sample in samples
        for reason in sample.dropped
        if not reason.startswith(USED)
    ]


def nothing_usable(dropped: DropCounter, rows: str = "row of the training data") -> ValueError:
    """The error to raise when an epoch, or a long part of it, had no other rows than these, which were dropped."""
    first = "".join(f"\n  {reason}: {found}" for reason, found in list(dropped.examples().items())[:REASONS_TO_SHOW])
    return ValueError(f"no {rows} can be used: {dropped.summary()}{first}")


def _listed(counts: dict[str, int], unit: str) -> str:
    total = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{total} {unit}{'s' * (total != 1)} ({reasons})" if counts else ""


class RowDropped(Exception):
    """A whole row cannot be used, for a reason."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def where_of(row: Row) -> str:
    """Where the row stands, in words."""
    return str(row.get("where") or row["id"])


def image_reason(error: ImageDecodeError, where: str) -> Reason:
    """Why an image of the row that stands there cannot be used."""
    found = re.sub(r"\s*<_io\.\w+ object at 0x\w+>", "", str(error))  # PIL's name for bytes: no two are the same
    return Reason(error.kind, where, found)


def drops_of(turns: Counter, kept: bool, row: Row) -> dict[str, int]:
    """The counts of a row of which `turns` were dropped: each turn if it was kept, else one row for the main reason."""
    where = where_of(row)
    if kept:
        return {Reason(TURN + why, where, getattr(why, "found", "")): count for why, count in turns.items()}
    (main, _), *_ = turns.most_common(1)
    return {Reason(main, where, getattr(main, "found", "")): 1}
