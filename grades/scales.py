"""What a metric is compared with: the unit of tau, and taus that are found instead of given."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from grades.components import Component
from grades.config import AUTO, GradESConfig

# tau auto: a component freezes when its metric has fallen to this share of what its like measured at the end of the
# grace period.
AUTO_SHARE = 0.5
AUTO_CHECKS = 5


def resolve_taus(
    config: GradESConfig, components: Sequence[Component], grace: Sequence[Mapping[str, Any]] = ()
) -> dict[str, float]:
    """The tau of each component by name; empty while one is auto and `grace`, the checks of the grace period, is empty.

    auto: AUTO_SHARE of the median over the components of the same tower and kind, which have the same size, in the
    last AUTO_CHECKS checks of the grace period. What was never measured there gets 0: it does not freeze.
    """
    given = {c.name: config.tau_of(c.tower, c.part) for c in components}
    if AUTO not in given.values():
        return {name: float(tau) for name, tau in given.items()}
    if not grace:
        return {}
    measured: dict[tuple[str, str], list[float]] = {}
    for check in grace[-AUTO_CHECKS:]:
        for component, value in zip(components, check["values"], strict=True):
            if value is not None:
                measured.setdefault((component.tower, component.kind), []).append(value)
    found = {key: AUTO_SHARE * statistics.median(values) for key, values in measured.items()}
    return {
        c.name: found.get((c.tower, c.kind), 0.0) if given[c.name] == AUTO else float(given[c.name]) for c in components
    }


class Absolute:
    """tau_mode absolute: the metric as it is, as in the paper."""

    def apply(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """The values of a check in the unit of tau."""
        return dict(values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Relative(Absolute):
    """tau_mode relative: the share of the component's own peak so far, this check included; in (0, 1]."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def apply(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        for name, value in values.items():
            if value is not None:
                self.peaks[name] = max(value, self.peaks.get(name, 0.0))
        return {name: None if value is None else value / self.peaks[name] for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"peaks": dict(self.peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.peaks = dict(state["peaks"])


def make_scale(tau_mode: str) -> Absolute:
    """The scale of that name, "absolute" or "relative"."""
    return Relative() if tau_mode == "relative" else Absolute()
