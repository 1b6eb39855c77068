"""Which matrices are watched: the projection matrices of a transformer's blocks, in models of any library.

A component is one matrix and its bias: the weight of a linear, a stack of experts, or the adapter of one of these.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch.nn as nn

from grades.config import is_named
from grades.towers import BLOCK, CONNECTOR, TOWERS, Towers, clean_name, tower_of

__all__ = ["TOWERS", "Component", "block_of", "clean_name", "examine", "find_components", "tower_of"]

# Why a matrix of a block is no component, and the names of such.
EXCEPTIONS = {
    # It scores the experts, or the tokens to attend to: a classifier.
    "router": re.compile(r"\.(\w*expert_)?gate(\.|$)|[._]router([._]|$)|\.indexer\."),
    # Of detectors, segmenters and others: a list of small MLPs, one for each layer or class.
    "head": re.compile(
        r"(^|\.)((\w+_)?heads?|\w*(bbox|class|mask)_embed(der)?|\w*hypernetworks_mlps|reg_conf|match_assignment_layers"
        r"|token_confidence|readout_projects)\."
    ),
    "embedding": re.compile(r"(^|\.)(continuous_position_bias_mlp|timestep_embeddings)\."),
}
# How GPT-2, LLaMA, BLIP and nn.TransformerEncoderLayer name it: attn, self_attn, attention.
ATTENTION = re.compile(r"attn|attention")
LISTED_LINEARS = 30  # how many names an error lists


@dataclass(frozen=True, eq=False)
class Component:
    """One projection matrix of a tower."""

    name: str  # dotted path of the module, without the names of wrappers
    tower: str  # "vision", "language", "audio" ...; "connector" for what joins them
    kind: str  # last part of the name: q_proj, fc1 ...; the path in the block where several matrices share that part
    layer: int  # index of its block; 0 in a connector without blocks
    weights: tuple[nn.Parameter, ...]  # what is measured: a matrix or a stack [experts, ., .]; an adapter's pair (A, B)
    parameters: tuple[nn.Parameter, ...]  # what freezes: the weights and, where there is one, the bias

    @property
    def stack(self) -> str:
        """The path of the list of blocks that it belongs to, see `stack_of`."""
        return stack_of(self.name)

    @property
    def elements(self) -> int:
        """The number of elements that are measured."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def part(self) -> str:
        """The part of the block that it belongs to: "attention" or "mlp"."""
        return "attention" if ATTENTION.search(self.name) else "mlp"


def find_components(model: nn.Module, targets: Sequence[str] = (), connector: bool = False) -> list[Component]:
    """Every trainable projection matrix of the model's repeated blocks, once, in the order of its modules.

    These are linears, GPT-2's Conv1D, the fused input projection of nn.MultiheadAttention, and experts stacked in one
    parameter [experts, ., .]; not norms, embeddings, convolutions, heads, routers, what joins the
    towers.
    A module with trainable LoRA adapters (peft) is one component: their matrices A and B, adapter by adapter.
    targets: only matrices that one of these names, see `is_named`. connector: what joins the towers too, as a tower of
    that name. Raises ValueError where nothing is found.
    """
    found = [
        component
        for component, why_not in examine(model)
        if (not why_not or (connector and why_not == JOINS)) and (not targets or is_named(component.name, targets))
    ]
    if not found:
        wish = f" named by {', '.join(targets)}" if targets else ""
        raise ValueError(f"no trainable projection matrix{wish}; the model's linear modules are: {_linears(model)}")
    return _tell_kinds_apart(found)


JOINS = "joins the towers"


def examine(model: nn.Module) -> Iterator[tuple[Component, str]]:
    """Every trainable matrix of the model, and why it is no component; "" for those that are."""
    towers = Towers(model)
    seen: dict[nn.Parameter, str] = {}
    for name, weights, others in _matrices(model):
        block, tower = BLOCK.search(name), towers.of(name)
        if weights[0] in seen:
            why_not = f"is {seen[weights[0]]}"
        elif tower == CONNECTOR:
            why_not = JOINS
        else:
            exceptions = (reason for reason, names in EXCEPTIONS.items() if names.search(name))
            why_not = "in no block" if block is None else next(exceptions, "")
        seen.setdefault(weights[0], name)
        layer = int(block[1]) if block else 0
        yield Component(name, tower, name.rpartition(".")[2], layer, weights, (*weights, *others)), why_not


def block_of(name: str) -> tuple[str, str]:
    """(path of the block, the rest of the name) of a component; the path is empty for one in no block."""
    block = BLOCK.search(name)
    return (name[: block.end()], name[block.end() + 1 :]) if block else ("", name)


def stack_of(name: str) -> str:
    """The path of a component's list of blocks: "model.encoder.layers"; empty for one in no block."""
    block = BLOCK.search(name)
    return name[: block.start(1)].rstrip("._") if block else ""


# Name, what is measured, what else freezes with it.
Matrix = tuple[str, tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]


def _matrices(model: nn.Module) -> Iterator[Matrix]:
    """The trainable matrices of the whole model."""
    done: set[nn.Module] = set()  # inside an adapted module: its adapters and the base, which is never a component
    for path, module in model.named_modules():
        name = clean_name(path)
        if _is_lora(module):
            done.update(part for part in module.modules() if not _is_lora(part))
            yield from _adapter(name, module)
        elif module not in done:
            yield from _own_matrices(name, module)


def _is_lora(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of an adapted module; told by its structure, as peft may not be installed."""
    return all(isinstance(getattr(module, side, None), nn.ModuleDict) for side in ("lora_A", "lora_B"))


def _adapter(name: str, module: Any) -> Iterator[Matrix]:
    """The trainable adapters of a module; DoRA's magnitude and a trainable bias freeze with them."""
    pairs = [side[adapter].weight for adapter in module.lora_A for side in (module.lora_A, module.lora_B)]
    weights = tuple(weight for weight in pairs if _is_trainable(weight) and weight.dim() == 2)
    others = [p for child, part in module.named_children() if child != "base_layer" for p in part.parameters()]
    others.append(getattr(module.base_layer, "bias", None))
    if weights:
        # An adapter of a bare parameter knows that parameter's name; for several parameters the wrappers are nested.
        parameter = getattr(module, "parameter_name", "weight")
        name = name if parameter == "weight" else f"{name}.{parameter}"
        yield name, weights, tuple(p for p in others if _is_trainable(p) and p not in set(weights))


def _own_matrices(name: str, module: nn.Module) -> Iterator[Matrix]:
    """The trainable matrices that the module itself holds: one of a linear, several of a stack of experts."""
    own = {key: p for key, p in module.named_parameters(recurse=False) if _is_trainable(p)}
    # A module of stacked experts says so in its own name or its class's.
    experts = "expert" in f"{name} {type(module).__name__}".lower()
    for key, weight in own.items():
        if (
            (key == "weight" and weight.dim() == 2 and _is_linear(module))
            or (key.endswith("proj_weight") and isinstance(module, nn.MultiheadAttention))
            or (weight.dim() == 3 and experts)
        ):
            stem = key.removesuffix("weight").rstrip("_")
            bias = own.get(f"{stem}_bias" if stem else "bias")
            yield f"{name}.{stem}".rstrip("."), (weight,), () if bias is None else (bias,)


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear with weight [in, out]; told by its name, as this library imports torch alone.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_trainable(parameter: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    """Whether there is a parameter and it trains. Quantized weights never do: integers cannot require a gradient."""
    return parameter is not None and parameter.requires_grad


def _tell_kinds_apart(components: list[Component]) -> list[Component]:
    """Where a block has several matrices of one kind (GPT-2: attn.c_proj, mlp.c_proj), the kind is the path in it; with
    several stacks of blocks in a tower (an encoder and a decoder), that of the stack before it."""
    told = [replace(c, kind=block_of(c.name)[1]) if shared else c for c, shared in _shared(components)]
    return [replace(c, kind=f"{c.stack}.{block_of(c.name)[1]}") if shared else c for c, shared in _shared(told)]


def _shared(components: list[Component]) -> list[tuple[Component, bool]]:
    """With each component whether in some layer of its tower several have its kind."""
    counts = Counter((c.tower, c.layer, c.kind) for c in components)
    shared = {(tower, kind) for (tower, _, kind), count in counts.items() if count > 1}
    return [(c, (c.tower, c.kind) in shared) for c in components]


def _linears(model: nn.Module) -> str:
    """The names of the model's linear modules with * for the index of a block, at most LISTED_LINEARS of them."""
    paths = (clean_name(path) for path, module in model.named_modules() if _is_linear(module))
    names = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in paths))
    rest = len(names) - LISTED_LINEARS
    return ", ".join(names[:LISTED_LINEARS]) + (f" and {rest} more" if rest > 0 else "")
