"""Which matrices are watched. A component is one projection matrix: its module's weight and, where it has one, bias."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn as nn

TOWERS = ("vision", "language")
# Parts of a module's path that tell which tower it belongs to; what is neither vision nor projector is language.
VISION_NAMES = {"vision_encoder", "vision_tower", "vision_model", "visual"}
PROJECTOR_NAMES = {"MP", "multi_modal_projector", "connector", "merger", "projector"}
# What DDP and torch.compile put into the names of the modules they wrap.
WRAPPER_NAMES = {"module", "_orig_mod"}


@dataclass(frozen=True, eq=False)
class Component:
    """One projection matrix of a tower."""

    name: str  # dotted path of the module, without the names of wrappers
    tower: str  # "vision" or "language"
    kind: str  # last part of the name: q_proj, fc1 ...
    layer: int  # index of its block
    weight: nn.Parameter  # [out, in]
    parameters: tuple[nn.Parameter, ...]  # the weight and, where there is one, the bias


def find_components(model: nn.Module, targets: Sequence[str] = ()) -> list[Component]:
    """Every trainable projection matrix of the model's repeated blocks, in the order of the forward pass by name.

    Norms, embeddings, the patch convolution, heads and the modality projector are none. targets: only those whose
    name contains one of these. Raises ValueError where nothing is found.
    """
    found, linears = [], []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = [part for part in path.split(".") if part not in WRAPPER_NAMES]
        name = ".".join(parts)
        linears.append(name)
        layers = [int(part) for part in parts[:-1] if part.isdigit()]
        wanted = not targets or any(target in name for target in targets)
        if not layers or not wanted or not module.weight.requires_grad or PROJECTOR_NAMES & set(parts):
            continue
        tower = "vision" if VISION_NAMES & set(parts) else "language"
        weight, *bias = module.parameters(recurse=False)
        found.append(Component(name, tower, parts[-1], layers[-1], weight, (weight, *bias)))
    if not found:
        wish = f" whose name contains one of {', '.join(targets)}" if targets else ""
        raise ValueError(f"no trainable projection matrix{wish}; the model's linear modules are: {', '.join(linears)}")
    return found
