"""What is measured of a component. A number that was not measured is None, never 0.0.

Each metric is an element-wise sum in float32, over a component's weights (one matrix, or the pair of an adapter).
All of a check's sums are made on the device and fetched together: one host synchronisation a check.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from grades.components import Component
from grades.reading import make_reader, stack


class Metric:
    """Gives each component a number; see the subclasses.

    The monitor calls `after_backward` in every step, when the gradients are whole and not yet clipped, and `measure`
    after the optimizer step where a check is due. `forget` frees what is held for components that were frozen.
    """

    reads_gradients = False
    first_check = 1  # which check gives the first number

    def __init__(self, sample: int = 1) -> None:
        self.reader = make_reader(sample)
        self.kept: dict[str, list[torch.Tensor]] = {}  # by component: what its weights are compared with next time

    def after_backward(self, components: Sequence[Component], check: bool, check_is_next: bool) -> None:
        """check: whether this step ends with a check; check_is_next: whether the step after it does."""

    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """One number a component, None where it is not known. Waits for the device once."""
        raise AssertionError("a subclass measures")

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.kept.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any], components: Sequence[Component]) -> None:
        devices = {component.name: component.weights[0].device for component in components}
        self.kept = {name: [t.to(devices[name], copy=True) for t in kept] for name, kept in state["kept"].items()}


class WeightChange(Metric):
    """sum |W_t - W_s|, s the previous check: the metric of the authors' nanoVLM runs and of their package."""

    first_check = 2

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None at the first visit, and where the weight is what it was to the last bit: no update reached it (steps
        without an image leave the vision tower alone), so nothing was measured of its convergence.
        """
        known = [component for component in components if component.name in self.kept]
        weights = [weight for component in known for weight in component.weights]
        sums = self.reader.change(weights, [kept for component in known for kept in self.kept[component.name]])
        for component in components:
            if component.name not in self.kept:
                self.kept[component.name] = self.reader.copy(component.weights)
        return fetch(sums, known, components)


class GradientNorm(Metric):
    """sum |g_t|, g the accumulated gradient before clipping: the paper's version 1 and, over A and B, its Eq. 3."""

    reads_gradients = True

    def __init__(self, sample: int = 1) -> None:
        super().__init__(sample)
        self.measured: list[Component] = []  # in the step under way
        self.sums = torch.empty(0)  # a number for each of their weights

    @torch.no_grad()
    def after_backward(self, components: Sequence[Component], check: bool, check_is_next: bool) -> None:
        if check:
            self.measured = [component for component in components if gradients_of(component)]
            self.sums = self.reader.norm([g for component in self.measured for g in gradients_of(component)])

    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None where the step made no gradient."""
        return fetch(self.sums, self.measured, components)


class GradientChange(GradientNorm):
    """sum |g_t - g_(t-1)|, g the accumulated gradient before clipping: the paper's Eq. 1, Algorithm 1.

    Gradients are copied in the step before a check: in every step only at a compute_interval of 1. On a CPU the copies
    stay for the next time, as fresh memory costs more there than the check; on a GPU they go after the check.
    """

    first_check = 2  # at a compute_interval above 1 the first

    def __init__(self, sample: int = 1) -> None:
        super().__init__(sample)
        self.copied: set[str] = set()  # components whose copy in self.kept is of the step before

    @torch.no_grad()
    def after_backward(self, components: Sequence[Component], check: bool, check_is_next: bool) -> None:
        if not check and not check_is_next:
            return
        present = [component for component in components if gradients_of(component)]
        compared: set[str] = set()
        if check:
            self.measured = [component for component in present if component.name in self.copied]
            compared = {component.name for component in self.measured}
            gradients = [g for component in self.measured for g in gradients_of(component)]
            kept = [k for component in self.measured for k in self.kept[component.name]]
            self.sums = self.reader.change(gradients, kept, update=check_is_next)
            self.copied = set()
        if check_is_next:  # where there was a comparison the copy has become this step's
            for component in present:
                if component.name not in compared:
                    old = self.kept.get(component.name)
                    self.kept[component.name] = self.reader.copy(gradients_of(component), old)
            self.copied = {component.name for component in present}
        else:
            self.kept = {name: kept for name, kept in self.kept.items() if kept[0].device.type == "cpu"}

    def forget(self, names: Iterable[str]) -> None:
        super().forget(names := list(names))
        self.copied.difference_update(names)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": {name: kept for name, kept in self.kept.items() if name in self.copied}}

    def load_state_dict(self, state: dict[str, Any], components: Sequence[Component]) -> None:
        super().load_state_dict(state, components)
        self.copied = set(self.kept)


class GradientRms(Metric):
    """sum sqrt(v_t), v_t Adam's running mean of the squared gradient, bias-corrected: not in the paper.

    A gradient norm over the last 1 / (1 - beta2) steps, of clipped gradients, and the only one of them that is there
    already: no gradient is looked at and nothing is held. The learning rate is not in it.
    """

    def __init__(self, sample: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Raises ValueError where the optimizer is none of Adam's kind."""
        super().__init__(sample)
        groups = [] if optimizer is None else optimizer.param_groups
        if optimizer is None or not all("betas" in group for group in groups):
            raise ValueError("--metric gradient_rms: must go with an optimizer of Adam's kind, whose state it reads")
        self.optimizer = optimizer
        self.beta2 = {id(p): group["betas"][1] for group in groups for p in group["params"]}
        self.steps: dict[str, list[float]] = {}  # by component: updates that its weights had got at the last check

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None where no update reached the weight since the last check. Raises ValueError for another optimizer."""
        known = [c for c in components if all(self.optimizer.state.get(weight) for weight in c.weights)]
        weights = [weight for component in known for weight in component.weights]
        states = [self.optimizer.state[weight] for weight in weights]
        if odd := [state for state in states if "exp_avg_sq" not in state]:
            raise ValueError(f"--metric gradient_rms: reads exp_avg_sq; this optimizer's state has {', '.join(odd[0])}")
        sums = _reduce_shards(self.reader.root([state["exp_avg_sq"] for state in states]), weights)
        steps = stack([torch.as_tensor(state["step"]) for state in states]).to(sums)
        found = iter(zip(weights, *torch.stack([sums, steps]).tolist(), strict=True))
        values: dict[str, float | None] = dict.fromkeys(c.name for c in components)
        for component in known:
            parts = [next(found) for _ in component.weights]
            steps_now = [step for *_, step in parts]
            total = sum(root / math.sqrt(1 - self.beta2[id(weight)] ** step) for weight, root, step in parts)
            if self.steps.get(component.name) != steps_now and 0 < total < math.inf:
                values[component.name] = total
            self.steps[component.name] = steps_now
        return values

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.steps.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": dict(self.steps)}

    def load_state_dict(self, state: dict[str, Any], components: Sequence[Component]) -> None:
        self.steps = dict(state["steps"])


METRICS: dict[str, type[Metric]] = {
    "weight_change": WeightChange,
    "gradient_change": GradientChange,
    "gradient_norm": GradientNorm,
    "gradient_rms": GradientRms,
}


def make_metric(name: str, sample: int, optimizer: torch.optim.Optimizer | None) -> Metric:
    """The metric of that name. Raises ValueError where it needs another optimizer."""
    return GradientRms(sample, optimizer) if name == "gradient_rms" else METRICS[name](sample)


def gradients_of(component: Component) -> list[torch.Tensor]:
    """The gradients of the component's weights; empty where one has none."""
    gradients = [weight.grad for weight in component.weights if weight.grad is not None]
    return gradients if len(gradients) == len(component.weights) else []


def fetch(
    sums: torch.Tensor, measured: Sequence[Component], components: Sequence[Component]
) -> dict[str, float | None]:
    """sums: a number for each weight of the measured components. Their sums by component, on the host.

    None for components that were not measured, are exactly 0, where nothing happened, or are not finite, as gradients
    in float16 are at times. Sums over the shards of weights are added up over the ranks first: one reduction, one
    host synchronisation.
    """
    weights = [weight for component in measured for weight in component.weights]
    values = iter(_reduce_shards(sums, weights).tolist() if weights else [])
    totals = {component.name: sum(next(values) for _ in component.weights) for component in measured}
    known = {name: total for name, total in totals.items() if 0 < total < math.inf}
    return {component.name: known.get(component.name) for component in components}


def _reduce_shards(sums: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sums, those of sharded weights (DTensor) over all of their shards, which all lie on one mesh alike."""
    sharded = [i for i, weight in enumerate(weights) if hasattr(weight, "placements")]
    if not sharded:
        return sums
    weight: Any = weights[sharded[0]]
    index = torch.tensor(sharded, device=sums.device)
    part = sums.index_select(0, index)
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(part, group=weight.device_mesh.get_group(dim))
    return sums.index_copy(0, index, part)
