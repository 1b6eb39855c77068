"""What becomes of rows and turns that cannot be used: each is counted by its reason, with the first row of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data.formats import Row
from data.images import ImageDecodeError
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
TRUNCATED = f"{USED}truncated image"
REASONS_TO_SHOW = 5  # with the first row of each


class DropCounter(Counter):
    """How many rows (and turns of rows that were kept) could not be used, by reason; a row counts at each visit."""

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


def nothing_usable(dropped: DropCounter) -> ValueError:
    """The error to raise when an epoch, in which these rows were dropped, had no other."""
    first = "".join(f"\n  {reason}: {found}" for reason, found in list(dropped.examples().items())[:REASONS_TO_SHOW])
    return ValueError(f"no row of a whole epoch of training data can be used: {dropped.summary()}{first}")


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
    return Reason(error.kind, f"{where}: {error}")


def drops_of(turns: Counter, kept: bool, row: Row) -> dict[str, int]:
    """The counts of a row of which `turns` were dropped: each turn if it was kept, else one row for the main reason."""
    if kept:
        return {TURN + reason: count for reason, count in turns.items()}
    return {Reason(turns.most_common(1)[0][0], where_of(row)): 1}
