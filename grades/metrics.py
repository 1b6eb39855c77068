"""What is measured of a component. A number that was not measured is None, never 0.0.

Each metric is an element-wise sum in float32, over a component's weights (one matrix, or the pair of an adapter).
All of a check's sums are made on the device and fetched together: one host synchronisation a check.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from grades.components import Component

# Elements that are worked on at a time: on a CPU so few that they stay in the cache from the first operation to the
# last, so that each tensor comes from memory once; on a GPU so many that launches do not count.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
# A sample is made of runs of this many neighbouring elements. Memory gives a cache line, 16 of float32, at the least,
# but runs of 8 halve the error at the same N: in a gradient neighbours are alike.
RUN_ELEMENTS = 8
# Sampling less than this of a matrix would save nothing and cost precision.
MIN_SAMPLE_ELEMENTS = 4096


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


class Exact:
    """L1 sums over all elements of each tensor: float32, one number a tensor, left on the device."""

    def copy(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """into: earlier copies of the same tensors, whose memory is used again."""
        if into is not None:
            return [old.copy_(local(x).detach()) for x, old in zip(tensors, into, strict=True)]
        return [local(x).detach().clone(memory_format=torch.contiguous_format) for x in tensors]

    def change(
        self, tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], update: bool = True
    ) -> torch.Tensor:
        """The sums of |x - kept|; then kept is x. Without update it holds nothing of use."""
        pairs = zip(tensors, kept, strict=True)
        return stack([_change(local(x).detach().flatten(), old.view(-1), update) for x, old in pairs])

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums of |x|."""
        return stack([_norm(local(x).detach().flatten()) for x in tensors])

    def root(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums of sqrt(x)."""
        return stack([_sum(torch.sqrt, local(x).detach().flatten()) for x in tensors])


def _change(x: torch.Tensor, kept: torch.Tensor, update: bool) -> torch.Tensor:
    chunk = _chunk_elements(kept)
    total = torch.zeros((), device=kept.device)
    for new, old in zip(x.split(chunk), kept.split(chunk), strict=True):
        # In place: a buffer for the differences would go through the cache besides.
        total += old.sub_(new).abs_().sum() if old.dtype == torch.float32 else (new.float() - old).abs_().sum()
        if update:
            old.copy_(new)
    return total


def _norm(x: torch.Tensor) -> torch.Tensor:
    # PyTorch's L1 norm takes three times as long on a CPU.
    return _sum(torch.abs, x) if x.device.type == "cpu" else torch.linalg.vector_norm(x, 1, dtype=torch.float32)


def _sum(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The sum of function(x), worked out in a buffer that stays in the cache."""
    chunk = min(_chunk_elements(x), x.numel())
    buffer, total = torch.empty(chunk, device=x.device), torch.zeros((), device=x.device)
    for piece in x.split(chunk) if chunk else ():
        part = buffer[: piece.numel()]
        total += function(part.copy_(piece) if piece.dtype != torch.float32 else piece, out=part).sum()
    return total


class Sampled(Exact):
    """The same over a sample of 1/N of the elements, scaled up to all of them.

    A matrix lies in memory as runs of RUN_ELEMENTS; the sample is one run at a random place of each of as many equal
    stretches of them, so that each run is as likely as any other. A stride instead would meet the same columns again
    and again wherever it and the row length have a common divisor, and columns differ more than elements do.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.chosen: dict[tuple[int, torch.device], torch.Tensor] = {}  # indices of runs, by their number and device

    def copy(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        runs = [_runs(x) for x in tensors]
        places = [None] * len(runs) if into is None else into
        return [torch.index_select(x, 0, self._choose(x), out=old) for x, old in zip(runs, places, strict=True)]

    def change(
        self, tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], update: bool = True
    ) -> torch.Tensor:
        new = self.copy(tensors)
        sums = self._scaled(
            tensors,
            [a.float().sub_(b) if a.dtype != torch.float32 else b.sub_(a) for a, b in zip(new, kept, strict=True)],
        )
        if update:
            for old, fresh in zip(kept, new, strict=True):
                old.copy_(fresh)
        return sums

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._scaled(tensors, self.copy(tensors))

    def root(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._scaled(tensors, [part.float().sqrt_() for part in self.copy(tensors)])

    @staticmethod
    def _scaled(tensors: Sequence[torch.Tensor], taken: Sequence[torch.Tensor]) -> torch.Tensor:
        # A rank's part of a small sharded matrix may be empty.
        factors = [local(x).numel() / max(1, part.numel()) for x, part in zip(tensors, taken, strict=True)]
        sums = stack([part.abs_().sum(dtype=torch.float32) for part in taken])
        return sums * torch.tensor(factors).to(sums.device, non_blocking=True)

    def _choose(self, runs: torch.Tensor) -> torch.Tensor:
        """Indices of the chosen runs [k]: the same for all matrices of as many runs, after a resume and on any rank."""
        key = (runs.shape[0], runs.device)
        if key not in self.chosen:
            total, width = runs.shape
            count = min(total, max(-(-total // self.n), MIN_SAMPLE_ELEMENTS // width))
            generator = torch.Generator().manual_seed(total)
            # The stretches are of total / count runs, whole or not: were they rounded, some runs would be likelier.
            places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
            self.chosen[key] = (places * total / count).clamp_(max=total - 1).int().to(runs.device)
        return self.chosen[key]


def make_reader(sample: int) -> Exact:
    """Of 1/sample of the elements."""
    return Sampled(sample) if sample > 1 else Exact()


def _runs(x: torch.Tensor) -> torch.Tensor:
    """The elements as [runs, RUN_ELEMENTS] without a last incomplete run; of small matrices as runs of one."""
    x = local(x).detach().flatten()
    width = RUN_ELEMENTS if x.numel() >= MIN_SAMPLE_ELEMENTS else 1
    return x[: x.numel() // width * width].view(-1, width)


def stack(sums: list[torch.Tensor]) -> torch.Tensor:
    """In one tensor, though a model's layers may lie on several devices."""
    return torch.stack([x.to(sums[0].device) for x in sums]) if sums else torch.empty(0)


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


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor (DTensor), else the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _chunk_elements(x: torch.Tensor) -> int:
    return CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"])
