"""A running average of the weights, held beside them: nearly always better than the last weights at a constant rate."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

# Keys of a parameter's state. OLDER is of the metric rollback: the average at the previous check.
AVERAGE, BLOCK, OLDER = "average", "average_block", "average_older"


class HasState(Protocol):
    """An optimizer, or another place for what is held of each parameter."""

    state: Any


class OwnState:
    """A place of its own, where the optimizer's state is not to be touched."""

    def __init__(self) -> None:
        self.state: MutableMapping[Any, dict[str, Any]] = defaultdict(dict)


class AveragedWeights:
    """The average of each weight that has been updated, in that weight's own state.

    Its place is the optimizer's state, beside the moments: there it is saved, sharded and freed as they are. A decay
    below 1 gives an exponential average; a window W the mean over the current block of W steps and the whole one
    before, so over W to 2 W steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: HasState, rate: float) -> None:
        """parameters: that may train. optimizer: holds their state. rate: a decay below 1, or a window.

        A parameter whose state in an optimizer is empty (it was never updated, or is frozen) has no average.
        """
        self.parameters, self.optimizer = list(parameters), optimizer
        self.window = round(rate) if rate >= 2 else None
        self.decay = rate
        self.updates = 0  # of the whole run
        self.steps = 0  # in the current block of the window
        self.before = 0  # in the block before: none, or the window
        # Of parameters that joined later, by their place: how many steps (of the block, of both) were before that.
        self.late: dict[int, tuple[int, int]] = {}
        self.is_swapped = False

    @property
    def state(self) -> MutableMapping[Any, dict[str, Any]]:
        """What the optimizer holds of each parameter."""
        state: MutableMapping[Any, dict[str, Any]] = self.optimizer.state
        return state

    @property
    def averaged(self) -> list[nn.Parameter]:
        """The parameters that have an average."""
        return [p for p in self.parameters if AVERAGE in self.state.get(p, ())]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        assert not self.is_swapped
        self.updates += 1
        own = isinstance(self.optimizer, OwnState)
        updated = [p for p in self.parameters if p.requires_grad and (own or self.state.get(p))]
        new = {p for p in updated if AVERAGE not in self.state[p]}
        for parameter in new:
            self.state[parameter][AVERAGE] = parameter.detach().clone()
        old = [p for p in updated if p not in new] if new else updated
        if self.window is None:
            self._lerp(old, AVERAGE, get_ema_multi_avg_fn(self.decay), 0, {})  # type: ignore[no-untyped-call]
            return
        self._update_window(updated, old, new)

    def _update_window(self, updated: list[nn.Parameter], old: list[nn.Parameter], new: set[nn.Parameter]) -> None:
        """BLOCK holds the mean of the current block, AVERAGE that of the block before and this one together."""
        assert self.window is not None
        if self.steps >= self.window:  # the block is whole: from here on it is the one before
            for parameter in updated:
                if BLOCK in self.state[parameter]:
                    self.state[parameter][AVERAGE].copy_(self.state[parameter][BLOCK])
                    del self.state[parameter][BLOCK]
            self.steps, self.before = 0, self.steps
            self.late = {place: (0, block) for place, (block, _) in self.late.items() if block}
        both = self.before + self.steps
        if new and both:
            self.late |= {place: (self.steps, both) for place, p in enumerate(self.parameters) if p in new}
        for parameter in updated:
            if BLOCK not in self.state[parameter]:
                self.state[parameter][BLOCK] = parameter.detach().clone()
        mean = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        late = {self.parameters[place]: missed for place, missed in self.late.items()}
        self._lerp(old, BLOCK, mean, self.steps, {p: in_block for p, (in_block, _) in late.items()})
        self._lerp(old, AVERAGE, mean, both, {p: in_both for p, (_, in_both) in late.items()})
        self.steps += 1

    def _lerp(
        self, parameters: list[nn.Parameter], key: str, average: Any, count: int, missed: Mapping[nn.Parameter, int]
    ) -> None:
        """Move the averages of the parameters towards their weights. count: of the weights that are in an average, less
        those that a parameter has missed."""
        by_kind: dict[tuple[torch.device, torch.dtype, int], list[nn.Parameter]] = {}
        for parameter in parameters:
            kind = parameter.device, parameter.dtype, count - missed.get(parameter, 0)
            by_kind.setdefault(kind, []).append(parameter)
        for (_, _, own), group in by_kind.items():
            average([self.state[p][key] for p in group], [p.detach() for p in group], own)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; afterwards the last ones again, bit for bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages, one parameter after the other; all of them or, after an exception, none."""
        done: list[nn.Parameter] = []
        try:
            for parameter in self.averaged:
                exchange(parameter, self.state[parameter][AVERAGE])
                done.append(parameter)
        except BaseException:
            for parameter in done:
                exchange(parameter, self.state[parameter][AVERAGE])
            raise
        self.is_swapped = not self.is_swapped

    @torch.no_grad()
    def settle(self, parameters: Iterable[nn.Parameter], to: str = "average") -> None:
        """Parameters are about to freeze: give them their "average", or leave the "last" value; free the average."""
        for parameter in parameters:
            state = self.state.get(parameter, {})
            if AVERAGE in state and to == "average":
                parameter.copy_(state[AVERAGE])
            for key in (AVERAGE, BLOCK, OLDER):
                state.pop(key, None)

    def state_dict(self) -> dict[str, Any]:
        """What is not in the parameters' state."""
        kept = ("updates", "steps", "before", "late", "is_swapped")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a checkpoint that was written while swapped holds the averages as its weights, and is swapped."""
        self.steps, self.before, self.is_swapped = state["steps"], state["before"], state["is_swapped"]
        self.updates, self.late = state.get("updates", 0), dict(state.get("late", {}))
        if self.is_swapped:
            self.swap()


def exchange(one: torch.Tensor, other: torch.Tensor) -> None:
    """Swap the values of two tensors in place (sharded weights are known by their storage)."""
    kept = one.detach().clone()
    try:
        one.copy_(other)
    finally:  # an interrupt in between must not lose what one held
        other.copy_(kept)
