"""When a component freezes and when the run stops: numbers in, decisions out (arXiv:2509.01842, Algorithm 1)."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal


def grace_steps(alpha: float, total_steps: int) -> int:
    """Steps in which nothing freezes: ceil(alpha * T), exact (0.28 * 1500 is 420, though more in floats)."""
    return math.ceil(Decimal(repr(alpha)) * total_steps)


def is_check(step: int, compute_interval: int) -> bool:
    """Whether step (counted from 1) ends with a measurement."""
    return step % compute_interval == 0


def count_below(
    streaks: Mapping[str, int], values: Mapping[str, float | None], taus: Mapping[str, float]
) -> dict[str, int]:
    """For each component the checks in a row in which its value was below its tau; one not measured keeps its count."""
    counts = {}
    for name, value in values.items():
        before = streaks.get(name, 0)
        counts[name] = before if value is None else before + 1 if value < taus[name] else 0
    return counts


def converged(values: Mapping[str, float | None], streaks: Mapping[str, int], patience: int) -> list[str]:
    """The names to freeze: measured now, and below their tau for `patience` checks in a row."""
    return [name for name, value in values.items() if value is not None and streaks[name] >= patience]


def woken(values: Mapping[str, float | None], taus: Mapping[str, float], factor: float) -> list[str]:
    """The frozen names to train again: their gradient norm is above factor times their tau."""
    return [name for name, value in values.items() if value is not None and value > factor * taus[name]]


def enough_frozen(frozen: int, total: int, max_frozen_ratio: float) -> bool:
    """Whether the run stops; never while nothing is frozen."""
    return 0 < frozen >= Decimal(repr(max_frozen_ratio)) * total


def round_number(decided: Sequence[int], totals: Sequence[int], rounds: int) -> int:
    """The round, counted from 1, that so many decisions in each tower are enough for.

    The first of two towers to be decided whole is worth a round, as that spares the most; the other rounds come at
    equal shares of all.
    """
    for_towers = min(len(totals), rounds) - 1
    whole = sum(n == total for n, total in zip(decided, totals, strict=True))
    return sum(decided) * (rounds - for_towers) // sum(totals) + min(whole, for_towers)


def few_patterns(decided: Sequence[frozenset[str]], elements: Mapping[str, int], limit: int) -> list[frozenset[str]]:
    """A subset of each block's set such that at most `limit` different ones occur, the empty one among them.

    Chosen one after the other, each for what it adds to the elements that the subsets cover.
    """

    def size(pattern: frozenset[str]) -> int:
        return sum(elements[name] for name in pattern)

    def largest(block: frozenset[str], patterns: Sequence[frozenset[str]]) -> frozenset[str]:
        return max((pattern for pattern in patterns if pattern <= block), key=size)

    chosen: list[frozenset[str]] = [frozenset()]
    candidates = sorted({a & b for a in decided for b in decided}, key=sorted)  # alike in every process
    while candidates and len(chosen) < limit:
        covered = [sum(size(largest(block, [*chosen, c])) for block in decided) for c in candidates]
        chosen.append(candidates[covered.index(max(covered))])
    return [largest(block, chosen) for block in decided]


def replay(events: Iterable[Mapping], towers: Mapping[str, str], seed: int) -> dict[int, list[str]]:
    """What to freeze at which step: as many of each tower as the events froze there, drawn at random.

    events: of a history; counted are the freezes that lasted. towers: the tower of each component.
    """
    waiting = {
        tower: sorted(name for name in towers if towers[name] == tower) for tower in sorted(set(towers.values()))
    }
    for names in waiting.values():
        random.Random(seed).shuffle(names)
    plan: dict[int, list[str]] = {}
    for event in sorted(lasting(events), key=lambda event: event["step"]):
        plan.setdefault(event["step"], []).append(waiting[towers[event["name"]]].pop())
    return plan


def lasting(events: Iterable[Mapping]) -> list[Mapping]:
    """The freezes that lasted: of a component that was let train again, only a later one."""
    last = {event["name"]: event for event in events}
    return [event for event in last.values() if not event.get("unfrozen")]
