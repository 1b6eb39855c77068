"""What a metric is compared with: the unit of tau, and taus that are found instead of given."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grades.components import Component
from grades.config import AUTO, GradESConfig

# tau auto: a component freezes when its metric has fallen to this share of what its like measured at the end of the
# grace period.
AUTO_SHARE = 0.5
AUTO_CHECKS = 5


def resolve_taus(
    config: GradESConfig, components: Sequence[Component], grace: Sequence[Mapping[str, Any]] = ()
) -> dict[str, float]:
    """The tau of each component by name; empty while one is auto and the checks of the grace period are not there.

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
    """The metric as it is: the paper's."""

    def apply(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        """The values of a check in the unit of tau."""
        return dict(values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Relative(Absolute):
    """The share of the component's own peak so far, this check included."""

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


class PerElementLr(Absolute):
    """Weight change per element and step in units of the learning rate: about 0.1 to 0.2 with Adam, whatever the model.

    The change since the last check is divided by the elements and by the sum of the learning rates of the steps since.
    """

    def __init__(self, components: Sequence[Component], optimizer: torch.optim.Optimizer) -> None:
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if odd := [c.name for c in components if id(c.weights[0]) not in group_of]:
            raise ValueError(f"tau_mode per_element_lr: the optimizer does not hold {', '.join(odd)}")
        self.groups = {c.name: group_of[id(c.weights[0])] for c in components}
        self.elements = {c.name: c.elements for c in components}
        self.lr_sums = [0.0] * len(optimizer.param_groups)  # since the last check
        # At once: a schedule may set the next step's rate before the monitor hears of this one.
        optimizer.register_step_post_hook(self._add_lrs)

    def _add_lrs(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for index, group in enumerate(optimizer.param_groups):
            self.lr_sums[index] = self.lr_sums[index] + group["lr"]

    def apply(self, values: Mapping[str, float | None]) -> dict[str, float | None]:
        sums = [float(lr) for lr in self.lr_sums]
        self.lr_sums = [0.0] * len(sums)
        return {name: self._scaled(value, name, sums[self.groups[name]]) for name, value in values.items()}

    def _scaled(self, value: float | None, name: str, lr_sum: float) -> float | None:
        return None if value is None or lr_sum == 0 else value / (self.elements[name] * lr_sum)

    def state_dict(self) -> dict[str, Any]:
        return {"lr_sums": [float(lr) for lr in self.lr_sums]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lr_sums = list(state["lr_sums"])


def make_scale(
    config: GradESConfig, components: Sequence[Component], optimizer: torch.optim.Optimizer | None
) -> Absolute:
    """The scale of config.tau_mode. Raises ValueError where it needs the optimizer that holds the components."""
    if config.tau_mode == "relative":
        return Relative()
    if config.tau_mode == "per_element_lr":
        if optimizer is None:
            raise ValueError("tau_mode per_element_lr needs the optimizer, which knows the learning rate")
        return PerElementLr(components, optimizer)
    return Absolute()
