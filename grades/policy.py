"""When a component freezes and when the run stops: numbers in, decisions out (arXiv:2509.01842, Algorithm 1)."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any


def grace_steps(alpha: float, total_steps: int) -> int:
    """Steps in which nothing freezes: ceil(alpha * T), exact (0.28 * 1500 is 420, though more in floats).

    >>> grace_steps(0.28, 1500), grace_steps(0.3, 12)
    (420, 4)
    """
    return math.ceil(Decimal(repr(alpha)) * total_steps)


def is_check(step: int, compute_interval: int) -> bool:
    """Whether step (counted from 1) ends with a measurement.

    >>> [step for step in range(1, 10) if is_check(step, compute_interval=4)]
    [4, 8]
    """
    return step % compute_interval == 0


def count_below(
    streaks: Mapping[str, int], values: Mapping[str, float | None], taus: Mapping[str, float]
) -> dict[str, int]:
    """For each component, the number of checks in a row with a value below its tau; None leaves the number as it is.

    >>> taus = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.5}
    >>> count_below({"q_proj": 1, "k_proj": 1, "v_proj": 1}, {"q_proj": 0.4, "k_proj": 0.6, "v_proj": None}, taus)
    {'q_proj': 2, 'k_proj': 0, 'v_proj': 1}
    """
    counts = {}
    for name, value in values.items():
        before = streaks.get(name, 0)
        counts[name] = before if value is None else before + 1 if value < taus[name] else 0
    return counts


def converged(values: Mapping[str, float | None], streaks: Mapping[str, int], patience: int) -> list[str]:
    """The names to freeze: measured now, and below their tau for `patience` checks in a row.

    >>> converged({"q_proj": 0.4, "k_proj": None}, {"q_proj": 2, "k_proj": 2}, patience=2)
    ['q_proj']
    """
    return [name for name, value in values.items() if value is not None and streaks[name] >= patience]


def front(names: Iterable[str], frozen: Iterable[str], components: Sequence[tuple[str, str, str, int]]) -> list[str]:
    """Those of the names before which everything is frozen: in block order, the vision tower first, language last.

    components: (name, tower, stack, layer) of all, in the order of the model; of a tower's stacks of blocks, as encoder
    and decoder, one comes after the other. Matrices of one block freeze in any order.
    """
    wanted, done = set(names), set(frozen)
    kept: list[str] = []
    blocks: dict[tuple[str, str, int], list[str]] = {}
    stacks = list(dict.fromkeys(stack for _, _, stack, _ in components))

    def place(component: tuple[str, str, str, int]) -> tuple[bool, bool, int, int]:
        _, tower, stack, layer = component
        return tower == "language", tower != "vision", stacks.index(stack), layer

    for name, tower, stack, layer in sorted(components, key=place):
        blocks.setdefault((tower, stack, layer), []).append(name)
    for block in blocks.values():
        kept += [name for name in block if name in wanted]
        if not all(name in wanted or name in done for name in block):
            break
    return kept


def to_unfreeze(values: Mapping[str, float | None], taus: Mapping[str, float], factor: float) -> list[str]:
    """The frozen names to unfreeze: their gradient norm is above factor times their tau."""
    return [name for name, value in values.items() if value is not None and value > factor * taus[name]]


def enough_frozen(frozen: int, total: int, max_frozen_ratio: float) -> bool:
    """Whether the run stops; never while nothing is frozen.

    >>> enough_frozen(7, 14, 0.5), enough_frozen(6, 14, 0.5)
    (True, False)
    """
    return 0 < frozen >= Decimal(repr(max_frozen_ratio)) * total


def round_number(decided: Sequence[int], totals: Sequence[int], rounds: int) -> int:
    """The latest of the rounds, counted from 1, that is due; 0 for none. decided, totals: components of each tower.

    Each tower but the last to be decided whole gets a round of its own, as that saves the most; the other rounds are
    due at equal shares of all components.
    """
    for_towers = min(len(totals), rounds) - 1
    whole = sum(n == total for n, total in zip(decided, totals, strict=True))
    return sum(decided) * (rounds - for_towers) // sum(totals) + min(whole, for_towers)


def few_patterns(decided: Sequence[frozenset[str]], elements: Mapping[str, int], limit: int) -> list[frozenset[str]]:
    """For each block a subset of its decided names; at most `limit` different subsets occur, the empty one included.

    They are chosen one after the other, each to cover as many further elements as possible. elements: by name.
    """

    def size(pattern: frozenset[str]) -> int:
        return sum(elements[name] for name in pattern)

    def largest(block: frozenset[str], patterns: Sequence[frozenset[str]]) -> frozenset[str]:
        return max((pattern for pattern in patterns if pattern <= block), key=size)

    chosen: list[frozenset[str]] = [frozenset()]
    candidates = sorted({a & b for a in decided for b in decided}, key=sorted)  # the same order in every process
    while candidates and len(chosen) < limit:
        covered = [sum(size(largest(block, [*chosen, c])) for block in decided) for c in candidates]
        chosen.append(candidates[covered.index(max(covered))])
    return [largest(block, chosen) for block in decided]


def replay(events: Iterable[Mapping[str, Any]], towers: Mapping[str, str], seed: int) -> dict[int, list[str]]:
    """The names to freeze at each step: of each tower as many as the events froze at that step, drawn at random.

    events: of a history; only freezes that lasted count. towers: the tower of each component by name.
    """
    remaining = {
        tower: sorted(name for name in towers if towers[name] == tower) for tower in sorted(set(towers.values()))
    }
    for names in remaining.values():
        random.Random(seed).shuffle(names)
    drawn: dict[int, list[str]] = {}
    for event in sorted(lasting(events), key=lambda event: event["step"]):
        drawn.setdefault(event["step"], []).append(remaining[towers[event["name"]]].pop())
    return drawn


def thin(checks: Sequence[dict[str, Any]], compute_interval: int, at_most: int) -> list[dict[str, Any]]:
    """With more than `at_most` checks those with an even number, then with a multiple of 4, and so on."""
    kept, stride = list(checks), 1
    while len(kept) > at_most:
        stride *= 2
        kept = [check for check in kept if check["step"] // compute_interval % stride == 0]
    return kept


def add_up(totals: Mapping[str, float], values: Mapping[str, float | None]) -> dict[str, float]:
    """The totals with a check's values added.

    >>> add_up({"q_proj": 0.5}, {"q_proj": 0.25, "k_proj": 1.0, "v_proj": None})
    {'q_proj': 0.75, 'k_proj': 1.0}
    """
    return {**totals} | {name: totals.get(name, 0.0) + value for name, value in values.items() if value is not None}


def lasting(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The freezes that lasted: for a component that was unfrozen only a later freeze."""
    last = {event["name"]: event for event in events}
    return [event for event in last.values() if not event.get("unfrozen")]
