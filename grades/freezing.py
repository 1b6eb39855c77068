"""What a freeze means for the weight and for the optimizer."""

from collections.abc import Iterable

import torch

from grades.components import Component


def freeze(components: Iterable[Component], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Stop the components for good; returns the bytes of gradients and optimizer state that this frees.

    To be called between two optimizer steps, never between backward and step.
    The parameters stay in the optimizer's groups, where they are skipped for want of a gradient, weight decay
    included: the groups of a saved optimizer fit again at the next start.
    """
    freed = 0
    for component in components:
        for parameter in component.parameters:
            if parameter.grad is not None:
                freed += parameter.grad.nbytes
            if optimizer is not None:
                state = optimizer.state.pop(parameter, {})
                freed += sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
            parameter.requires_grad_(False)
            parameter.grad = None
    return freed
