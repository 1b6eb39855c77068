"""What a rule makes of an answer."""

from typing import NamedTuple


class Judged(NamedTuple):
    """score: in [0, 1]. parsed: what the rule read out of the answer; None where it found nothing that it can read."""

    score: float
    parsed: str | None


def judged(is_right: bool, parsed: str | None) -> Judged:
    return Judged(float(is_right), parsed)
