"""What a freeze does to the weights, the optimizer's state and the part of the model before the weights."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from grades import compiled, marks, policy
from grades.components import Component
from grades.feeds import Feeds
from grades.optimizers import Still, release, settle_average
from grades.prefix import frozen_prefix


class Freezer:
    """Carries out decisions to freeze. A decided component does not move any more; compute is saved from `apply` on.

    Applying sets requires_grad, which a plain model follows at once. A compiled model has to be compiled again and a
    distributed one wrapped again, so there decisions are applied in a few rounds; until then the gradients of decided
    components are dropped before the optimizer sees them.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component],
        optimizer: torch.optim.Optimizer | None,
        prefix: bool = True,
        rounds: int = 8,
        rewrap: Callable[[], None] | None = None,
        settle: Callable[[Iterable[nn.Parameter]], None] | None = None,
    ) -> None:
        """optimizer: its state of frozen weights is freed. prefix: freeze what lies before the first trainable matrix,
        as the forward passes from now on tell it; before the first of them matrices alone freeze.

        rounds: at most this many with a compiled or distributed model. rewrap: called after requires_grad has changed,
        to wrap a distributed model again. settle: gives parameters the values with which they are to freeze.
        """
        self.model, self.components, self.optimizer = model, components, optimizer
        self.by_name = {component.name: component for component in components}
        self.prefix = prefix
        self.feeds = Feeds(model, components) if prefix else None
        self.rounds = rounds
        self.rewrap = rewrap
        self.settle = settle or (lambda parameters: None)
        self.decided: set[str] = set()
        self.applied: set[str] = set()
        self.rounds_done = 0
        self.freed_bytes = 0
        self.still = Still(optimizer)
        self.prefix_parameters: list[nn.Parameter] = []  # frozen because they lie before the first trainable matrix
        self.cuts: dict[nn.Module, torch.utils.hooks.RemovableHandle] = {}  # by lookup of a tied embedding

    @property
    def waits(self) -> bool:
        """Whether decisions wait for a round."""
        return compiled.has_compiled(self.model) or self.rewrap is not None

    def freeze(self, names: Iterable[str]) -> None:
        """Decide that these train no more. To be called between two optimizer steps, when gradients are cleared."""
        names = list(names)
        self.decided |= set(names)
        self._stop([p for name in names for p in self.by_name[name].parameters])
        if names and (not self.waits or self._round_number() > self.rounds_done):
            self.apply()

    def _stop(self, parameters: Sequence[nn.Parameter]) -> None:
        """These move no more: give them the values they keep, and free what the optimizer holds of them."""
        self.settle(parameters)
        settle_average(parameters, self.optimizer)
        self.freed_bytes += release(parameters, self.optimizer)
        self.still.watch(parameters)

    def _round_number(self) -> int:
        towers = Counter(component.tower for component in self.components)
        decided = Counter(self.by_name[name].tower for name in self.decided)
        return policy.round_number([decided[tower] for tower in towers], list(towers.values()), self.rounds)

    def drop_gradients(self) -> None:
        """After the backward pass: what is decided gets no update, though it is not applied yet or another library has
        made it require a gradient again. peft does that to all adapters whenever it switches them off and on, as TRL
        does for the reference in DPO and GRPO.

        Applies everything where a resumed run has nothing to wait for: it is neither compiled nor distributed any more.
        """
        for name in self.decided:
            for parameter in self.by_name[name].parameters:
                parameter.grad = None
        for parameter in self.prefix_parameters:
            parameter.grad = None
        self._hold()
        if self.decided != self.applied and not self.waits:
            self.apply()

    def _hold(self) -> None:
        """What was applied requires no gradient."""
        for parameter in (
            *(p for name in self.applied for p in self.by_name[name].parameters),
            *self.prefix_parameters,
        ):
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def apply(self) -> None:
        """Set requires_grad of what was decided, in compiled blocks by few patterns, and of the prefix."""
        self.rounds_done = self._round_number()
        is_compiled = compiled.has_compiled(self.model)
        flipped = compiled.flippable(self.model, self.components, self.decided) if is_compiled else set(self.decided)
        self._mark(self.applied | flipped)
        # While they waited for this round they required a gradient, so that they may have got an average again.
        self.settle([p for name in flipped - self.applied for p in self.by_name[name].parameters])
        for name in self.applied ^ flipped:
            for parameter in self.by_name[name].parameters:
                parameter.requires_grad_(name not in flipped)
        self.applied = flipped
        if self.prefix:
            self._freeze_prefix()
        if is_compiled:
            compiled.follow()
        self._mark(self.applied)
        if self.rewrap is not None:
            self.rewrap()

    def _mark(self, names: Iterable[str]) -> None:
        """Mark in the model what is frozen, these components and the prefix, before it freezes and after it thaws."""
        marks.mark(self.model, [*(p for name in names for p in self.by_name[name].parameters), *self.prefix_parameters])

    def unfreeze(self, names: Iterable[str]) -> None:
        """Let frozen components train again, from new optimizer state."""
        names = set(names)
        self.still.forget()
        self.decided -= names
        self.applied -= names
        self.rounds_done = min(self.rounds_done, self._round_number())  # what freezes again is applied again
        for name in names:
            for parameter in self.by_name[name].parameters:
                parameter.requires_grad_(True)
        for parameter in self.prefix_parameters:
            parameter.requires_grad_(True)
        for cut in self.cuts.values():
            cut.remove()
        self.prefix_parameters, self.cuts = [], {}
        if self.prefix:
            self._freeze_prefix()
        self._mark(self.applied)
        if compiled.has_compiled(self.model):
            compiled.follow()
        if self.rewrap is not None:
            self.rewrap()

    def close(self) -> None:
        """Let everything train again that is frozen, and leave no hook, no mark and no setting behind.

        Works wherever freezing was interrupted. The record of what was decided stays.
        """
        thawed = marks.thaw(self.model)
        is_changed = bool(thawed or self.rounds_done)
        if self.feeds is not None:
            self.feeds.stop()
        self.applied, self.prefix_parameters, self.cuts = set(), [], {}
        if is_changed and compiled.has_compiled(self.model):
            compiled.forget()
        rewrap, self.rewrap = self.rewrap, None
        if is_changed and rewrap is not None:
            rewrap()
        self.settle = lambda parameters: None
        self.optimizer = None  # its state may be twice as large as the model
        self.still.forget()

    def begin_probe(self) -> None:
        """Let the next backward pass compute the gradients of what is frozen."""
        for name in self.applied:
            for weight in self.by_name[name].weights:
                weight.requires_grad_(True)

    def end_probe(self) -> None:
        """After that pass, when the gradients were looked at: drop them before anything uses them."""
        for name in self.applied:
            for weight in self.by_name[name].weights:
                weight.grad = None
                weight.requires_grad_(False)

    def _freeze_prefix(self) -> None:
        assert self.feeds is not None
        if self.rewrap is not None or any(hasattr(c.weights[0], "placements") for c in self.components):
            self.feeds.share()
        parameters, lookups = frozen_prefix(self.model, self.components, self.feeds)
        self.prefix_parameters += parameters
        self._mark(self.applied)
        for parameter in parameters:
            parameter.requires_grad_(False)
        self._stop(parameters)
        for module in lookups:
            if module not in self.cuts:
                self.cuts[module] = module.register_forward_hook(marks.detach_output)

    def check_prefix(self) -> None:
        """After a step: take the prefix back where a resumed run now hides what trains behind it."""
        if self.feeds is not None and self.feeds.is_hidden and (self.prefix_parameters or self.cuts):
            self.unfreeze(())

    def state_dict(self) -> dict[str, Any]:
        """Which components are decided and applied, by name, and the counts."""
        return {
            "decided": sorted(self.decided),
            "applied": sorted(self.applied),
            "rounds_done": self.rounds_done,
            "freed_bytes": self.freed_bytes,
            "feeds": {} if self.feeds is None else self.feeds.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze again at once what was frozen. To be called before the model is wrapped or compiled."""
        freed = state["freed_bytes"]
        if self.feeds is not None:
            self.feeds.load_state_dict(state.get("feeds", {}))
        self.decided = set(state["applied"])
        release((p for name in state["decided"] for p in self.by_name[name].parameters), self.optimizer)
        if self.decided:
            self.apply()
        self.decided = set(state["decided"])
        self.rounds_done, self.freed_bytes = state["rounds_done"], freed
