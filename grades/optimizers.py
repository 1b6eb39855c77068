"""What freezing has to know of optimizers that do more than a step by each parameter's gradient."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn


def members(optimizer: Any) -> list[Any]:
    """The optimizers that hold the state: this one, or those that it is made of, as Muon with AdamW for the rest; in
    Trainer's layerwise optimizers one for each parameter. Empty for None.
    """
    if optimizer is None:
        return []
    inside = getattr(optimizer, "optimizers", None) or getattr(optimizer, "optimizer_dict", None) or [optimizer]
    return list(inside.values() if isinstance(inside, Mapping) else inside)


def check_optimizer(optimizer: Any, reads_gradients: bool, waits: bool) -> None:
    """Raise ValueError where an optimizer that updates in the backward pass cannot be combined with the settings.

    reads_gradients: whether the metric does. waits: whether what is frozen has gradients for a while, which are to be
    dropped before the optimizer sees them.
    """
    if hasattr(optimizer, "optimizer_dict") or hasattr(optimizer, "fused_backward"):  # layerwise of Trainer; LOMO
        wrong = ["a metric of gradients (take weight_change)"] if reads_gradients else []
        wrong += ["torch.compile or DDP"] if waits else []
        if wrong:
            raise ValueError(
                f"{type(optimizer).__name__}: updates weights in the backward pass, where no gradient can be read or "
                f"dropped; it cannot be combined with {' or '.join(wrong)}"
            )


def settle_average(parameters: Iterable[nn.Parameter], optimizer: Any) -> None:
    """Give parameters that are about to freeze the values with which the model is evaluated.

    A schedule-free optimizer (arXiv:2405.15682) trains at one point and evaluates at another, an average, which its
    `eval()` and `train()` exchange. A parameter that freezes stays at the average, where the model is best.
    """
    chosen = set(parameters)
    for member in members(optimizer):
        if not (callable(getattr(member, "eval", None)) and callable(getattr(member, "train", None))):
            continue
        mode = vars(member).get("train_mode")
        groups = [(group, dict(group)) for group in member.param_groups]
        try:
            for group, before in groups:
                group["params"] = [parameter for parameter in before["params"] if parameter in chosen]
            member.eval()
        finally:
            for group, before in groups:
                group.update(before)
            if mode is not None:
                member.train_mode = mode


def release(parameters: Iterable[nn.Parameter], optimizer: Any) -> int:
    """Free the gradients and the optimizer's state of the parameters; returns the bytes freed.

    The parameters stay in the optimizer's groups, so that a saved optimizer fits after a resume. Without a gradient the
    optimizer skips them, weight decay included.
    """
    freed = 0
    for parameter in parameters:
        if parameter.grad is not None:
            freed += parameter.grad.nbytes
            parameter.grad = None
        for member in members(optimizer):
            state = member.state.pop(parameter, {})
            freed += sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    return freed


class Still:
    """Notices an optimizer that moves what has no gradient, by one small frozen parameter.

    The optimizers of torch.optim do not, so nothing is looked at with them: each look waits for the device.
    """

    def __init__(self, optimizer: Any) -> None:
        self.name = type(optimizer).__name__
        step = getattr(type(optimizer), "step", None)
        self.is_needed = step is not None and not step.__module__.startswith("torch.optim.")
        self.parameter: nn.Parameter | None = None
        self.value = torch.empty(0)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """parameters: that freeze now; the smallest is watched where none is yet."""
        smallest = min(parameters, key=lambda parameter: parameter.numel(), default=None)
        if self.is_needed and self.parameter is None and smallest is not None:
            self.parameter, self.value = smallest, _here(smallest).clone()

    def forget(self) -> None:
        """It trains again."""
        self.parameter, self.value = None, torch.empty(0)

    def check(self) -> None:
        """Raise ValueError where it has moved."""
        if self.parameter is not None and not torch.equal(_here(self.parameter), self.value):
            raise ValueError(
                f"{self.name} moves weights that have no gradient, so nothing that GradES freezes stays as it is; take "
                "an optimizer that skips parameters whose grad is None, as those of torch.optim do"
            )


def _here(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of it."""
    tensor: Any = parameter.detach()
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
