"""When a component freezes and when the run stops: numbers in, decisions out (arXiv:2509.01842, Algorithm 1)."""

import math
from collections.abc import Mapping
from decimal import Decimal


def grace_steps(alpha: float, total_steps: int) -> int:
    """Steps in which nothing freezes: ceil(alpha * T), exact (0.28 * 1500 is 420, though more in floats)."""
    return math.ceil(Decimal(repr(alpha)) * total_steps)


def is_check(step: int, compute_interval: int) -> bool:
    """Whether step (counted from 1) ends with a measurement."""
    return step % compute_interval == 0


def converged(values: Mapping[str, float | None], taus: Mapping[str, float], step: int, grace: int) -> list[str]:
    """The names to freeze after `step`: measured, below their tau, and the grace period over."""
    if step <= grace:
        return []
    return [name for name, value in values.items() if value is not None and value < taus[name]]


def enough_frozen(frozen: int, total: int, max_frozen_ratio: float) -> bool:
    """Whether the run stops; never while nothing is frozen."""
    return 0 < frozen >= Decimal(repr(max_frozen_ratio)) * total
