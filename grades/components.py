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

CONNECTOR = "connector"  # what joins the towers, as a tower of its own where it is watched
TOWERS = ("vision", CONNECTOR, "language")
# Words, separated by dots and underscores, in the path of a module. With a word of NEITHER_WORDS the module joins the
# towers or is for audio; else the first word that names a tower decides, and without any it is language.
VISION_WORDS = {"vision", "visual", "vit", "image", "video"}
LANGUAGE_WORDS = {"language", "text", "llm", "lm", "decoder"}
CONNECTOR_WORDS = {
    "mp", "projector", "connector", "merger", "mergers", "aligner", "resampler", "perceiver", "qformer",
}  # fmt: skip
NEITHER_WORDS = CONNECTOR_WORDS | {"audio"}
# A router scores the experts for each token; it is a classifier, not a projection.
ROUTER = re.compile(r"\.(\w*expert_)?gate(\.|$)|[._]router([._]|$)")
# What DDP, torch.compile, activation checkpointing and peft add to the paths of what they wrap.
WRAPPER = re.compile(
    r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module|base_model\.model|base_layer|modules_to_save\.[^.]+)(?=\.|$)"
)
# How GPT-2, LLaMA, BLIP and nn.TransformerEncoderLayer name it: attn, self_attn, attention.
ATTENTION = re.compile(r"attn|attention")
LISTED_LINEARS = 30  # how many names an error lists


@dataclass(frozen=True, eq=False)
class Component:
    """One projection matrix of a tower."""

    name: str  # dotted path of the module, without the names of wrappers
    tower: str  # "vision", "language", or "connector"
    kind: str  # last part of the name: q_proj, fc1 ...; the path in the block where several matrices share that part
    layer: int  # index of its block; 0 in a connector without blocks
    weights: tuple[nn.Parameter, ...]  # what is measured: a matrix or a stack [experts, ., .]; an adapter's pair (A, B)
    parameters: tuple[nn.Parameter, ...]  # what freezes: the weights and, where there is one, the bias

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
    parameter [experts, ., .]; not norms, embeddings, convolutions, heads, routers, what joins the towers, audio towers.
    A module with trainable LoRA adapters (peft) is one component: their matrices A and B, adapter by adapter.
    targets: only matrices that one of these names, see `is_named`. connector: what joins the towers too, as a tower of
    that name. Raises ValueError where nothing is found.
    """
    found: list[Component] = []
    seen: set[nn.Parameter] = set()
    for name, weights, others in _matrices(model):
        *path, kind = name.split(".")
        layers = [int(part) for part in path if part.isdigit()]
        joins = connector and is_connector(name)
        tower = CONNECTOR if joins else tower_of(name)
        wanted = not targets or is_named(name, targets)
        if (layers or joins) and tower and wanted and weights[0] not in seen and not ROUTER.search(name):
            seen.add(weights[0])
            found.append(Component(name, tower, kind, layers[0] if layers else 0, weights, (*weights, *others)))
    if not found:
        wish = f" named by {', '.join(targets)}" if targets else ""
        raise ValueError(f"no trainable projection matrix{wish}; the model's linear modules are: {_linears(model)}")
    return _tell_kinds_apart(found)


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


def clean_name(path: str) -> str:
    """The dotted path of a module without the names of wrappers."""
    return WRAPPER.sub("", path).strip(".")


def is_connector(name: str) -> bool:
    """Whether a module or parameter of this name joins the towers."""
    words = set(re.split(r"[._]", name.lower()))
    return bool(CONNECTOR_WORDS & words) and not (NEITHER_WORDS - CONNECTOR_WORDS) & words


def tower_of(name: str) -> str | None:
    """The tower that a module or parameter of this name belongs to; None for what joins the towers and for audio."""
    words = re.split(r"[._]", name.lower())
    if NEITHER_WORDS & set(words):
        return None
    named = [word for word in words if word in VISION_WORDS | LANGUAGE_WORDS]
    return "vision" if named and named[0] in VISION_WORDS else "language"


def _tell_kinds_apart(components: list[Component]) -> list[Component]:
    """Where a block has several matrices of one kind (GPT-2: attn.c_proj, mlp.c_proj), the kind is the path in it."""
    counts = Counter((c.tower, c.layer, c.kind) for c in components)
    shared = {(tower, kind) for (tower, _, kind), count in counts.items() if count > 1}
    return [
        replace(c, kind=re.split(r"\.?\b\d+\.", c.name, maxsplit=1)[-1]) if (c.tower, c.kind) in shared else c
        for c in components
    ]


def _linears(model: nn.Module) -> str:
    """The names of the model's linear modules with * for the index of a block, at most LISTED_LINEARS of them."""
    paths = (clean_name(path) for path, module in model.named_modules() if _is_linear(module))
    names = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in paths))
    rest = len(names) - LISTED_LINEARS
    return ", ".join(names[:LISTED_LINEARS]) + (f" and {rest} more" if rest > 0 else "")
