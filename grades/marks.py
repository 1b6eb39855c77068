"""Marks on what GradES froze, in the model itself: so that any later run can tell it from what its user froze.

A module holds the names of its own parameters that are frozen. Copies of the model and pickled ones keep the marks,
wrappers around it (DDP, torch.compile, peft) do not hide them, and no state dict has them.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

MARK = "_frozen_by_grades"

logger = logging.getLogger("grades")


def mark(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Mark these parameters of the model, and no others. To be called before they freeze."""
    chosen = set(parameters)
    for module in model.modules():
        names = {name for name, parameter in module._parameters.items() if parameter in chosen}
        if names:
            vars(module)[MARK] = names
        else:
            vars(module).pop(MARK, None)
    for module in model.modules():
        if is_switched(module) and any(MARK in vars(part) for part in module.modules()):
            for name in SWITCHES:
                vars(module).setdefault(name, Switch(module, name))


def marked(model: nn.Module) -> set[nn.Parameter]:
    """What GradES froze in it: these parameters require no gradient, but in the step of a probe."""
    return {module.get_parameter(name) for module in model.modules() for name in vars(module).get(MARK, ())}


# Methods by which peft, layer by layer, switches adapters off and on or exchanges them.
SWITCHES = ("set_adapter", "enable_adapters")


def is_switched(module: nn.Module) -> bool:
    """Whether it is a layer of peft that holds adapters (a model can add adapters too)."""
    return all(hasattr(type(module), name) for name in SWITCHES) and not hasattr(type(module), "add_adapter")


class Switch:
    """Takes the place of such a method of one layer, which lets all weights of an adapter train: what GradES froze
    stays frozen. TRL switches adapters off within each step of DPO, where the model without them is the reference.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        getattr(type(self.layer), self.name)(self.layer, *args, **kwargs)
        for module in self.layer.modules():
            for name in vars(module).get(MARK, ()):
                module.get_parameter(name).requires_grad_(False)


def thaw(model: nn.Module) -> list[nn.Parameter]:
    """Let everything that GradES froze in the model train again, and take its hooks and marks away.

    Returns the parameters that were frozen until now.
    """
    thawed: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for name in vars(module).get(MARK, ()):
            parameter = module._parameters.get(name)
            if parameter is not None and not parameter.requires_grad:
                parameter.requires_grad_(True)
                thawed[parameter] = None
        vars(module).pop(MARK, None)
        for name in SWITCHES:
            if isinstance(vars(module).get(name), Switch):
                del vars(module)[name]
        for key in [key for key, hook in module._forward_hooks.items() if hook is detach_output]:
            del module._forward_hooks[key]
    return list(thawed)


def thaw_leftovers(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Before a run: thaw what an earlier one left frozen, as where nothing could undo it; says so in one line.

    Raises ValueError where the optimizer was made without it, so that it would never be updated.
    """
    thawed = thaw(model)
    if not thawed:
        return
    logger.warning(
        f"GradES: an earlier run left {len(thawed)} tensors of this model frozen; they train again, and what you froze "
        "yourself stays frozen"
    )
    if optimizer is not None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if missing := sum(parameter not in held for parameter in thawed):
            raise ValueError(
                f"the optimizer was made while {missing} tensors were frozen by an earlier GradES run, and does not "
                "update them; they are thawed now: make the optimizer (or the Trainer) again"
            )


def detach_output(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that ends the gradient here."""
    return output.detach()


def is_cut(module: nn.Module) -> bool:
    """Whether the gradient ends at what the module returns."""
    return detach_output in module._forward_hooks.values()
