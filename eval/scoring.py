"""Exact match: the share of questions whose generated answer is the expected one."""

from collections import defaultdict
from collections.abc import Iterable


def normalise(answer: str) -> str:
    """Case, surrounding space and a final full stop do not count."""
    return " ".join(answer.lower().split()).removesuffix(".")


def is_right(answer: str, expected: str | tuple[str, ...]) -> bool:
    """Whether it is the expected answer, or one of several."""
    return normalise(answer) in {normalise(one) for one in ((expected,) if isinstance(expected, str) else expected)}


def score(pairs: Iterable[tuple[str, str | tuple[str, ...], str | None]]) -> dict[str, float | None]:
    """Exact match over (answer, expected, source): "all" and one entry a source; None where there was no question.

    expected: a tuple where several answers count as right.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, expected, source in pairs:
        for key in {"all", source or "all"}:
            right[key].append(is_right(answer, expected))
    means = {key: sum(values) / len(values) for key, values in sorted(right.items())}
    return {"all": None} | means
