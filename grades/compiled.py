"""Freezing under torch.compile: how much of a decision may show in requires_grad.

A compiled function holds one variant for each combination of requires_grad, input shapes and the like that it has met,
and all blocks of one class share them, as dynamo keeps them with the code of the class. Every new combination compiles
anew, and beyond `torch._dynamo.config.recompile_limit` variants the function runs uncompiled for good, with a warning
as the only sign. Thirty blocks that freeze matrix by matrix would get there at once. Hence in a round

- all variants are dropped (`restart`). torch 2.11 needs that anyway: the guards of what it has compiled do not see
  that requires_grad has changed, so nothing would be saved;
- the blocks of a class show at most PATTERNS different sets of frozen matrices (`flippable`);
- the limit becomes what dynamo grants by default for each pattern, so that a model which keeps within it while nothing
  is frozen keeps within it ever after.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn

from grades import policy
from grades.components import Component, clean_name

# Of blocks that are neither without frozen matrices nor frozen whole, two sets of frozen matrices may occur: each costs
# the compilation of a block, once for fixed and once for varying shapes.
PATTERNS = 4
# A pattern is compiled once for an input that needs a gradient and once for one that does not; blocks before the first
# trainable weight, whose norms are frozen too, are one pattern more.
VARIANTS = 2 * (PATTERNS + 1)
DEFAULT_RECOMPILE_LIMIT = 8


def is_compiled(module: nn.Module) -> bool:
    """Whether the module itself is compiled: by module.compile() or as torch.compile(module)."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def has_compiled(model: nn.Module) -> bool:
    return any(is_compiled(module) for module in model.modules())


def flippable(model: nn.Module, components: Sequence[Component], decided: set[str]) -> set[str]:
    """Of the decided components those whose requires_grad may be off; all of them outside of compiled modules."""
    blocks_of: dict[type, list[dict[str, Component]]] = {}
    for path, region in _regions(model):
        parameters = set(region.parameters())
        inside = {c.name.removeprefix(f"{path}."): c for c in components if c.weights[0] in parameters}
        blocks_of.setdefault(type(region), []).append(inside)
    flipped = set(decided)
    for blocks in blocks_of.values():
        mixed = [block for block in blocks if not decided.issuperset(c.name for c in block.values())]
        sets = [frozenset(key for key, c in block.items() if c.name in decided) for block in mixed]
        elements = {key: c.elements for block in mixed for key, c in block.items()}
        for block, allowed in zip(mixed, policy.few_patterns(sets, elements, PATTERNS - 1), strict=True):
            flipped -= {c.name for key, c in block.items() if key not in allowed}
    return flipped


def _regions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost compiled modules with their paths."""
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inside and is_compiled(module):
            found.append((clean_name(path), module))
            inside.update(module.modules())
    return found


def restart() -> None:
    """Drop everything that was compiled; the next step compiles what it meets."""
    from torch._dynamo import config  # takes a second to import

    torch.compiler.reset()
    config.recompile_limit = max(config.recompile_limit, DEFAULT_RECOMPILE_LIMIT * VARIANTS)
