"""What would be watched of a model: built on the meta device from its configuration, without any weights."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from grades.components import clean_name, examine
from grades.config import DEFAULT_TAUS
from grades.towers import Towers

# The classes that a configuration without `architectures` is built as, the first that knows it.
AUTO_CLASSES = (
    "ImageTextToText", "MultimodalLM", "SpeechSeq2Seq", "Seq2SeqLM", "CausalLM", "MaskedLM", "CTC", "TextToWaveform",
    "ObjectDetection", "ZeroShotObjectDetection", "UniversalSegmentation", "SemanticSegmentation", "DepthEstimation",
    "MaskGeneration", "ZeroShotImageClassification", "ImageClassification", "VideoClassification",
    "AudioClassification", "PreTraining",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"
NO_MODEL = "transformers has no model of it"
NO_PROJECTION, NO_TAU = "no projection", "no tau"


@dataclass(frozen=True)
class Row:
    """Matrices of one name in all blocks."""

    name: str  # with * for the index of a block
    count: int
    tower: str
    shape: tuple[int, ...]  # of an adapter's A
    kind: str  # last part of the name, or the class of a module whose weight is no projection
    why_not: str  # empty for what is watched


def load(source: str) -> nn.Module:
    """The model of a configuration, or of the adapters (peft) that a folder with adapter_config.json describes.

    source: hub id, folder or config.json. Raises ValueError where no model can be built from it.
    """
    if not Path(source, ADAPTER_CONFIG).is_file():
        return build(load_config(source))
    try:
        import peft
    except ImportError:
        raise ValueError(f"{source}: adapters need the package peft") from None
    adapter = peft.PeftConfig.from_pretrained(source)
    if not adapter.base_model_name_or_path:
        raise ValueError(f"{Path(source, ADAPTER_CONFIG)}: base_model_name_or_path must name the model")
    base: Any = build(load_config(adapter.base_model_name_or_path))
    adapter.inference_mode = False
    with torch.device("meta"):
        adapted: nn.Module = peft.get_peft_model(base, adapter)
    return adapted


def load_config(source: str | Path) -> Any:
    """The transformers configuration of a hub id, a folder or a config.json. Of a hub id only that file is fetched.

    Raises ValueError where there is none, or where transformers does not know the model.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError("a model's configuration needs the package transformers") from None
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{source}: must be a hub id, a folder or a config.json of transformers ({reason})") from None


def build(config: Any) -> nn.Module:
    """A model of the configuration on the meta device: no memory, no weights. Raises ValueError where it cannot be."""
    kind = model_class(config)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model: nn.Module = kind(config)
    except Exception as error:  # whatever a model's constructor says of its own configuration
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{kind.__name__}: cannot be built from this configuration ({reason})") from error
    return model


def model_class(config: Any) -> Any:
    """The class of a configuration: the first that it names, else the first of AUTO_CLASSES that knows it."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (*(f"AutoModelFor{name}" for name in AUTO_CLASSES), "AutoModel"):
        known = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"model_type {config.model_type}: {NO_MODEL}")


def rows(model: nn.Module, towers: Iterable[str] = DEFAULT_TAUS) -> list[Row]:
    """Every trainable matrix and table of the model, in its order. towers: those with a tau, which are watched."""
    found: Counter[tuple[Any, ...]] = Counter()
    matrices: set[nn.Parameter] = set()
    for component, why_not in examine(model):
        matrices |= {*component.parameters}
        if not why_not and component.tower not in towers:
            why_not = f'{NO_TAU}: taus={{"{component.tower}": ...}}'
        kind = component.name.rpartition(".")[2] + (" (A, B)" if len(component.weights) > 1 else "")
        found[_line(component.name, component.tower, component.weights[0], kind, why_not)] += 1
    tower_of = Towers(model).of
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.dim() >= 2 and parameter not in matrices:
                name = f"{clean_name(path)}.{key}".removesuffix(".weight").lstrip(".")
                found[_line(name, tower_of(name), parameter, type(module).__name__, NO_PROJECTION)] += 1
    return [Row(name, count, *rest) for (name, *rest), count in found.items()]


def _line(name: str, tower: str, weight: nn.Parameter, kind: str, why_not: str) -> tuple[Any, ...]:
    pattern, reason = (re.sub(r"(?<![a-zA-Z\d])\d+(?=[.]|$)", "*", text) for text in (name, why_not))
    return pattern, tower, tuple(weight.shape), kind, reason


def table(found: Sequence[Row]) -> str:
    """The rows as text, and a line for each tower."""
    lines = [("component", "number", "tower", "shape", "kind", "watched")]
    for row in found:
        shape = " x ".join(map(str, row.shape))
        watched = f"no: {row.why_not}" if row.why_not else "yes"
        lines.append((row.name, str(row.count), row.tower, shape, row.kind, watched))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", *summary(found)])


def summary(found: Sequence[Row]) -> list[str]:
    """For each tower how many matrices are watched."""
    watched: Counter[str] = Counter()
    for row in found:
        if row.why_not != NO_PROJECTION:
            watched[row.tower] += 0 if row.why_not else row.count
    return [f"{tower}: {count} matrices watched" for tower, count in watched.items()]
