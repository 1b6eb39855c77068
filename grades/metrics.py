"""What is measured of a component. A number that was not measured is None, never 0.0.

Each metric is an element-wise sum in float32 over a component's weights (one matrix, or the pair of an adapter).
All sums of a check are computed on the device and fetched together: one host synchronisation per check.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from grades.components import Component
from grades.sampling import make_sampler, stack


class Metric:
    """Gives each component a number; see the subclasses.

    The monitor calls `after_backward` in every step, when the gradients are whole and not yet clipped, and `measure`
    after the optimizer step where a check is due.
    """

    reads_gradients = False
    is_of_shards = True  # with sharded weights each rank's state is of its own shards

    def __init__(self, sample: int = 1) -> None:
        """sample: measure 1/sample of the elements and scale the sums up."""
        self.sampler = make_sampler(sample)
        self.kept: dict[str, list[torch.Tensor]] = {}  # by component: what its weights are compared with next time

    def first_check(self, compute_interval: int) -> int:
        """The check, counted from 1, that gives the first number."""
        return 1

    def after_backward(self, components: Sequence[Component], check: bool, check_is_next: bool) -> None:
        """check: whether this step ends with a check; check_is_next: whether the step after it does."""

    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """The number of each component by name, None where it is not known. Waits for the device once."""
        raise AssertionError("a subclass measures")

    def details(self) -> dict[str, Any]:
        """What else the history holds of the last check."""
        return {}

    def risen(self) -> list[str]:
        """The names of frozen components that are to train again, as seen at the last check."""
        return []

    def thaw(self, names: Iterable[str]) -> None:
        """These components train again."""

    def forget(self, names: Iterable[str]) -> None:
        """Free what is held for these components, which were frozen."""
        for name in names:
            self.kept.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any], components: Sequence[Component]) -> None:
        devices = {component.name: component.weights[0].device for component in components}
        self.kept = {name: [t.to(devices[name], copy=True) for t in kept] for name, kept in state["kept"].items()}


class WeightChange(Metric):
    """sum |W_t - W_s|, s the previous check: the metric of the authors' nanoVLM runs and of their package."""

    def first_check(self, compute_interval: int) -> int:
        return 2

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None at a component's first check, and where its weight is the same to the last bit: no update reached it
        (steps without an image leave the vision tower alone), which says nothing about its convergence.
        """
        known = [component for component in components if component.name in self.kept]
        weights = [weight for component in known for weight in component.weights]
        sums = self.sampler.change(weights, [kept for component in known for kept in self.kept[component.name]])
        for component in components:
            if component.name not in self.kept:
                self.kept[component.name] = self.sampler.copy(component.weights)
        return fetch(sums, known, components)


class GradientNorm(Metric):
    """sum |g_t|, g the accumulated gradient before clipping: the paper's version 1 and, over A and B, its Eq. 3."""

    reads_gradients = True

    def __init__(self, sample: int = 1) -> None:
        super().__init__(sample)
        self.measured: list[Component] = []  # in the current step
        self.sums = torch.empty(0)  # one per weight of the measured components

    @torch.no_grad()
    def after_backward(self, components: Sequence[Component], check: bool, check_is_next: bool) -> None:
        if check:
            self.measured = [component for component in components if gradients_of(component)]
            self.sums = self.sampler.norm([g for component in self.measured for g in gradients_of(component)])

    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None where the step made no gradient."""
        return fetch(self.sums, self.measured, components)


class GradientChange(GradientNorm):
    """sum |g_t - g_(t-1)|, g the accumulated gradient before clipping: the paper's Eq. 1, Algorithm 1.

    Gradients are copied in the step before a check, so in every step only at a compute_interval of 1. On a CPU the
    memory of the copies is kept, as allocating it again costs more there than the check; on a GPU it is freed after
    the check.
    """

    def __init__(self, sample: int = 1) -> None:
        super().__init__(sample)
        self.copied: set[str] = set()  # components whose copy in self.kept is of the step before

    def first_check(self, compute_interval: int) -> int:
        return 2 if compute_interval == 1 else 1  # before step 1 there is no gradient

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
            self.sums = self.sampler.change(gradients, kept, update=check_is_next)
            self.copied = set()
        if check_is_next:  # where there was a comparison the copy has become this step's
            for component in present:
                if component.name not in compared:
                    old = self.kept.get(component.name)
                    self.kept[component.name] = self.sampler.copy(gradients_of(component), old)
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

    A gradient norm over about the last 1 / (1 - beta2) steps, of clipped gradients. Adam keeps it anyway: no gradient
    is looked at and nothing is held. It does not depend on the learning rate.
    """

    def __init__(self, sample: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Raises ValueError where the optimizer is not of Adam's kind."""
        super().__init__(sample)
        groups = [] if optimizer is None else optimizer.param_groups
        if optimizer is None or not all("betas" in group for group in groups):
            raise ValueError("metric gradient_rms: needs an optimizer of Adam's kind, whose state it reads")
        self.optimizer = optimizer
        self.beta2 = {id(p): group["betas"][1] for group in groups for p in group["params"]}
        self.steps: dict[str, list[float]] = {}  # by component: number of updates of its weights at the last check

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None where no update reached the weights since the last check. Raises ValueError for another optimizer."""
        known = [c for c in components if all(self.optimizer.state.get(weight) for weight in c.weights)]
        weights = [weight for component in known for weight in component.weights]
        states = [self.optimizer.state[weight] for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            if not {"exp_avg_sq", "step"} <= state.keys():
                raise ValueError(
                    f"metric gradient_rms: reads step and exp_avg_sq; this optimizer's state has {', '.join(state)}"
                )
            if state["exp_avg_sq"].shape != weight.shape:
                raise ValueError(
                    "metric gradient_rms: this optimizer's exp_avg_sq is of a projection of the gradient; take another"
                )
        sums = _reduce_shards(self.sampler.root([state["exp_avg_sq"] for state in states]), weights)
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
    """The metric of that name over 1/sample of the elements; rollback has a module of its own.

    Raises ValueError where it needs another optimizer.
    """
    return GradientRms(sample, optimizer) if name == "gradient_rms" else METRICS[name](sample)


def gradients_of(component: Component) -> list[torch.Tensor]:
    """The gradients of the component's weights; an empty list where a weight has none."""
    gradients = [weight.grad for weight in component.weights if weight.grad is not None]
    return gradients if len(gradients) == len(component.weights) else []


def fetch(
    sums: torch.Tensor, measured: Sequence[Component], components: Sequence[Component]
) -> dict[str, float | None]:
    """The number of each component by name, on the host. sums: [weights of the measured components], in their order.

    None for a component that was not measured, whose number is exactly 0 (nothing happened to it) or not finite (as
    with overflows in float16). Sums over the shards of weights are added over the ranks first: one reduction, one host
    synchronisation.
    """
    weights = [weight for component in measured for weight in component.weights]
    values = iter(_reduce_shards(sums, weights).tolist() if weights else [])
    totals = {component.name: sum(next(values) for _ in component.weights) for component in measured}
    known = {name: total for name, total in totals.items() if 0 < total < math.inf}
    return {component.name: known.get(component.name) for component in components}


def _reduce_shards(sums: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """sums [weights], those of sharded weights (DTensor) added over the shards. All are sharded alike on one mesh."""
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
