"""What a freeze does to the weights, the optimizer's state and the part of the model before the weights."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from grades import compiled, policy
from grades.components import Component, clean_name
from grades.towers import Towers

# Words in the names of what runs after the blocks, though some models define it before them (OPT's final_layer_norm).
COMES_LAST = re.compile(r"(^|[._])(final|post|out)([._]|$)")


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
        """optimizer: its state of frozen weights is freed. prefix: freeze what lies before the first trainable matrix.

        rounds: at most this many with a compiled or distributed model. rewrap: called after requires_grad has changed,
        to wrap a distributed model again. settle: gives parameters the values with which they are to freeze.
        """
        self.model, self.components, self.optimizer = model, components, optimizer
        self.by_name = {component.name: component for component in components}
        self.prefix = prefix
        self.rounds = rounds
        self.rewrap = rewrap
        self.settle = settle or (lambda parameters: None)
        self.decided: set[str] = set()
        self.applied: set[str] = set()
        self.rounds_done = 0
        self.freed_bytes = 0
        self.prefix_parameters: list[nn.Parameter] = []  # frozen because they lie before the first trainable matrix
        self.cuts: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def waits(self) -> bool:
        """Whether decisions wait for a round."""
        return compiled.has_compiled(self.model) or self.rewrap is not None

    def freeze(self, names: Iterable[str]) -> None:
        """Decide that these train no more. To be called between two optimizer steps, when gradients are cleared."""
        names = list(names)
        self.decided |= set(names)
        self.settle(p for name in names for p in self.by_name[name].parameters)
        self.freed_bytes += release((p for name in names for p in self.by_name[name].parameters), self.optimizer)
        if names and (not self.waits or self._round_number() > self.rounds_done):
            self.apply()

    def _round_number(self) -> int:
        towers = Counter(component.tower for component in self.components)
        decided = Counter(self.by_name[name].tower for name in self.decided)
        return policy.round_number([decided[tower] for tower in towers], list(towers.values()), self.rounds)

    def drop_gradients(self) -> None:
        """After the backward pass: what is decided but not applied gets no update.

        Applies everything where a resumed run has nothing to wait for: it is neither compiled nor distributed any more.
        """
        for name in self.decided - self.applied:
            for parameter in self.by_name[name].parameters:
                parameter.grad = None
        if self.decided != self.applied and not self.waits:
            self.apply()

    def apply(self) -> None:
        """Set requires_grad of what was decided, in compiled blocks by few patterns, and of the prefix."""
        self.rounds_done = self._round_number()
        is_compiled = compiled.has_compiled(self.model)
        flipped = compiled.flippable(self.model, self.components, self.decided) if is_compiled else set(self.decided)
        for name in self.applied ^ flipped:
            for parameter in self.by_name[name].parameters:
                parameter.requires_grad_(name not in flipped)
        self.applied = flipped
        if self.prefix:
            self._freeze_prefix()
        if is_compiled:
            compiled.follow()
        if self.rewrap is not None:
            self.rewrap()

    def unfreeze(self, names: Iterable[str]) -> None:
        """Let frozen components train again, from new optimizer state."""
        names = set(names)
        self.decided -= names
        self.applied -= names
        for name in names:
            for parameter in self.by_name[name].parameters:
                parameter.requires_grad_(True)
        for parameter in self.prefix_parameters:
            parameter.requires_grad_(True)
        for cut in self.cuts:
            cut.remove()
        self.prefix_parameters, self.cuts = [], []
        if self.prefix:
            self._freeze_prefix()
        if compiled.has_compiled(self.model):
            compiled.follow()
        if self.rewrap is not None:
            self.rewrap()

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
        parameters, shared = frozen_prefix(self.model, self.components)
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.settle(parameters)
        self.freed_bytes += release(parameters, self.optimizer)
        self.prefix_parameters += parameters
        if not self.cuts:
            self.cuts = [module.register_forward_hook(_detach_output) for module in shared]

    def state_dict(self) -> dict[str, Any]:
        """Which components are decided and applied, by name, and the counts."""
        return {
            "decided": sorted(self.decided),
            "applied": sorted(self.applied),
            "rounds_done": self.rounds_done,
            "freed_bytes": self.freed_bytes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze again at once what was frozen. To be called before the model is wrapped or compiled."""
        freed = state["freed_bytes"]
        self.decided = set(state["applied"])
        release((p for name in state["decided"] for p in self.by_name[name].parameters), self.optimizer)
        if self.decided:
            self.apply()
        self.decided = set(state["decided"])
        self.rounds_done, self.freed_bytes = state["rounds_done"], freed


def release(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> int:
    """Free the gradients and the optimizer's state of the parameters; returns the bytes freed.

    The parameters stay in the optimizer's groups, so that a saved optimizer fits after a resume. Without a gradient the
    optimizer skips them, weight decay included.
    """
    freed = 0
    for parameter in parameters:
        if parameter.grad is not None:
            freed += parameter.grad.nbytes
            parameter.grad = None
        if optimizer is not None:
            state = optimizer.state.pop(parameter, {})
            freed += sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    return freed


def frozen_prefix(model: nn.Module, components: Sequence[Component]) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """What lies before the first trainable matrix of each tower: parameters to freeze, and modules to detach.

    The prefix of a tower is its first blocks in which no matrix trains, and what lies before the blocks. What trains in
    it besides matrices (norms, embeddings, patch convolution) is to freeze. Where all blocks of the vision tower are in
    the prefix the whole tower is, unless a matrix after the blocks trains. The language tower has a prefix only where
    neither the vision tower nor the projector trains.
    An embedding whose weight is also the head's keeps training there; its module's output is to be detached instead.
    """
    modules = {clean_name(path): module for path, module in model.named_modules()}
    owners = _owners(model)
    towers = Towers(model)
    parameters: list[nn.Parameter] = []
    shared: list[nn.Module] = []
    for tower in ("vision", "language"):
        stacks = {_stack_of(component) for component in components if component.tower == tower}
        if len(stacks) != 1 or (tower == "language" and _trains_before_language(model, towers, parameters)):
            continue  # in a tower of several lists of blocks nothing tells which runs first
        (stack,) = stacks
        root = _root_of(stack, tower, towers)
        for name, parameter in _leading(modules[root], root, modules[stack], tower, towers):
            if len(owners[parameter]) > 1:
                shared.append(modules[root].get_submodule(name.rpartition(".")[0]))
            else:
                parameters.append(parameter)
    return parameters, shared


def _stack_of(component: Component) -> str:
    """The path of the list of blocks that the component is in."""
    return re.split(r"\.\d+\.", component.name, maxsplit=1)[0]


def _root_of(stack: str, tower: str, towers: Towers) -> str:
    """Path of the module that runs the tower: for vision the outermost of that name, else the blocks' parent."""
    parts = stack.split(".")
    if tower == "vision":
        return next(root for i in range(len(parts)) if towers.of(root := ".".join(parts[: i + 1])) == "vision")
    return ".".join(parts[:-1])


def _leading(
    root: nn.Module, path: str, stack: nn.Module, tower: str, towers: Towers
) -> list[tuple[str, nn.Parameter]]:
    """The tower's trainable parameters before its first block with a trainable matrix, with their names in the root.

    path: of the root. All trainable parameters of a vision tower in which no matrix trains.
    """
    blocks = list(stack.children())
    passed = list(itertools.takewhile(lambda block: not any(_trains_as_matrix(p) for p in block.parameters()), blocks))
    if not passed:
        return []
    in_blocks = {p for block in blocks for p in block.parameters()}
    in_passed = {p for block in passed for p in block.parameters()}
    first = next(p for p in root.parameters() if p in in_blocks)
    before = set(itertools.takewhile(lambda p: p is not first, root.parameters()))
    # A projector inside the module of the vision tower is not part of the tower.
    own = {name: p for name, p in root.named_parameters() if p.requires_grad and towers.of(f"{path}.{name}") == tower}
    leading = {name: p for name, p in own.items() if p in in_passed or (p in before and not COMES_LAST.search(name))}
    whole = tower == "vision" and not any(_trains_as_matrix(own[name]) for name in own.keys() - leading.keys())
    return list((own if whole else leading).items())


def _trains_as_matrix(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dim() >= 2


def _trains_before_language(model: nn.Module, towers: Towers, about_to_freeze: Sequence[nn.Parameter]) -> bool:
    """Whether anything outside of the language tower trains, apart from the parameters about to freeze."""
    frozen = set(about_to_freeze)
    return any(
        p.requires_grad and p not in frozen and towers.of(clean_name(name)) != "language"
        for name, p in model.named_parameters()
    )


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """The modules that hold each parameter: two for a tied embedding."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return owners


def _detach_output(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.detach()
