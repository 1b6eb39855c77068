"""Freezing under torch.compile: which of the decided components may set requires_grad.

Dynamo compiles one variant of a function for each combination of requires_grad, input shapes and the like that occurs,
and all blocks of one class share their variants. Beyond `torch._dynamo.config.recompile_limit` variants the function
runs uncompiled from then on, with a warning as the only sign. Thirty blocks that freeze matrix by matrix would reach
the limit at once. Hence in each round

- where the guards of compiled functions notice that requires_grad has changed (torch 2.15), only the sets of frozen
  matrices that are new are compiled. Elsewhere (torch 2.11) all variants are dropped, or nothing would be saved; what
  was compiled before then comes from inductor's cache on disk;
- the blocks of a class have at most PATTERNS different sets of frozen matrices (`flippable`);
- the limit is raised to dynamo's default for each pattern, and by what a round can add where nothing is dropped, so
  that a model which stays below it while nothing is frozen stays below it in every round.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from grades import policy
from grades.components import Component, clean_name

# Sets of frozen matrices: none, all, and two others. Each costs the compilation of a block, once for fixed and once for
# varying shapes.
PATTERNS = 4
# A pattern is compiled once for inputs that need a gradient and once for others; blocks of the prefix, whose norms are
# frozen too, are one more pattern.
VARIANTS = 2 * (PATTERNS + 1)
DEFAULT_RECOMPILE_LIMIT = 8
LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_limits_before: dict[str, int] = {}  # dynamo's, before the first freeze of a run


def is_compiled(module: nn.Module) -> bool:
    """Whether the module itself is compiled: by module.compile() or as torch.compile(module)."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def has_compiled(model: nn.Module) -> bool:
    """Whether the model or a module in it is compiled."""
    return any(is_compiled(module) for module in model.modules())


def flippable(model: nn.Module, components: Sequence[Component], decided: set[str]) -> set[str]:
    """The names of decided components whose requires_grad may be off; outside of compiled modules that is all of them.

    Inside, each block gets the largest subset that the limit on patterns allows.
    """
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


def follow() -> None:
    """After requires_grad has changed: let the next step compile what is new, or, where it cannot tell, everything."""
    from torch._dynamo import config  # takes a second to import

    for name in LIMITS:
        _limits_before.setdefault(name, getattr(config, name))
    limit = max(config.recompile_limit, DEFAULT_RECOMPILE_LIMIT * VARIANTS)
    if notices_freezing():
        limit += 2 * VARIANTS
    else:
        torch.compiler.reset()
    config.recompile_limit = limit
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


def forget() -> None:
    """After a run: drop the variants that its freezes made, and set dynamo's limits back."""
    from torch._dynamo import config

    torch.compiler.reset()
    for name in list(_limits_before):
        setattr(config, name, _limits_before.pop(name))


@functools.cache
def notices_freezing() -> bool:
    """Whether a compiled module is compiled again once requires_grad of its weight has changed, as tried on one."""
    compilations = 0

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    scale, x = Scale(), torch.ones(1, requires_grad=True)
    scale.compile(backend=count)
    for trains in (True, False):
        scale.weight.requires_grad_(trains)
        with torch.enable_grad():
            scale(x)
    return compilations == 2
