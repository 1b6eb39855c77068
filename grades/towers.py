"""Which tower of a model a module belongs to: "vision", "language", "audio" ..., or "connector", which joins them.

What a transformers model says of itself decides: the inputs of its class, and which part of the whole configuration its
own is. Where it says nothing, and in models of other libraries, the names on the path do; then whether the model
begins as vision models do.
"""

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch.nn as nn

TOWERS = ("vision", "language")  # of a vision-language model
VISION, LANGUAGE = TOWERS
AUDIO, TIME, CONNECTOR = "audio", "time", "connector"
FUSION = "fusion"  # blocks after the towers that mix what they give
UNTOLD = ""
# Words, separated by dots and underscores, in the path of a module up to the index of its block. With a word of
# CONNECTOR_WORDS the module joins the towers; else the first word that names a tower decides.
VISION_WORDS = {"vision", "visual", "vit", "image", "video"}
AUDIO_WORDS = {"audio", "speech", "acoustic", "sound"}
LANGUAGE_WORDS = {"language", "text", "llm", "lm", "decoder"}
CONNECTOR_WORDS = {
    "mp", "projector", "connector", "merger", "mergers", "aligner", "resampler", "perceiver", "qformer", "abstractor",
}  # fmt: skip
TOWER_OF_WORD = {
    **dict.fromkeys(VISION_WORDS, VISION),
    **dict.fromkeys(AUDIO_WORDS, AUDIO),
    **dict.fromkeys(LANGUAGE_WORDS, LANGUAGE),
}
# What transformers' classes take, by `input_modalities` and, in classes without these, by `main_input_name`.
TOWER_OF_MODALITY = {"image": VISION, "video": VISION, "text": LANGUAGE, "audio": AUDIO, "time": TIME}
TOWER_OF_INPUT = {
    "pixel_values": VISION, "pixel_values_videos": VISION, "flattened_patches": VISION, "patch_embeds": VISION,
    "input_features": AUDIO, "input_values": AUDIO, "spectrogram": AUDIO, "past_values": TIME,
}  # fmt: skip
ROLES = {"model", "encoder", "decoder", "tower"}  # words at the end of a model's type that tell no tower
# The part of a path that is the index of a block: layers.0, encoder_layer_0, block1.
BLOCK = re.compile(r"(?:^|\.)(?:\w*(?:layer|block)_?)?(\d+)(?=\.)")
# What DDP, torch.compile, activation checkpointing and peft add to the paths of what they wrap.
WRAPPER = re.compile(
    r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module|base_model\.model|base_layer|modules_to_save\.[^.]+)(?=\.|$)"
)


def clean_name(path: str) -> str:
    """The dotted path of a module without the names of wrappers."""
    return WRAPPER.sub("", path).strip(".")


def tower_of(name: str) -> str:
    """The tower that a module or parameter of this name belongs to, by its name alone; "language" where it says none.

    `Towers` also looks at the model.
    """
    words = _words(name)
    return CONNECTOR if CONNECTOR_WORDS & set(words) else _first_told(words) or LANGUAGE


class Towers:
    """The towers of a model's modules and parameters, by their names."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {clean_name(path): module for path, module in model.named_modules()}
        self.roots: dict[str, _Root] = {}  # transformers' models by path: the whole model, or parts of a plain one
        self.told: dict[str, str] = {}  # of the modules that say it, by path
        for path, module in self.modules.items():
            root = next((self.roots[outer] for outer in _outer(path) if outer in self.roots), None)
            if root is None and _is_model(module):
                root = self.roots[path] = _Root(path, module)
            if root is not None and (tower := root.told_by(path, module)) != UNTOLD:
                self.told[path] = tower
                root.towers.add(tower)
        self._begins: dict[str, bool] = {}

    def of(self, name: str) -> str:
        """The tower of a module or parameter of this name."""
        outer = list(_outer(name))
        root = next((self.roots[path] for path in outer if path in self.roots), None)
        words = _words(name if root is None else root.inside(name))
        if CONNECTOR_WORDS & set(words):
            return CONNECTOR
        tower = next((self.told[path] for path in reversed(outer) if path in self.told), UNTOLD)
        if tower != UNTOLD:
            return tower
        if root is not None:
            return root.guess(words)
        return _first_told(words) or (VISION if any(map(self._begins_with_patches, outer)) else LANGUAGE)

    def _begins_with_patches(self, path: str) -> bool:
        """Whether the module takes images: it is timm's, or has patches or convolutions of colours and no tokens."""
        if path not in self._begins and hasattr(self.modules.get(path), "pretrained_cfg"):
            self._begins[path] = True
        if path not in self._begins:
            parts = list(self.modules[path].named_modules()) if path in self.modules else []
            tokens = any(isinstance(part, nn.Embedding) and "pos" not in name for name, part in parts)
            self._begins[path] = not tokens and any(
                "patch" in name or (isinstance(part, nn.Conv2d | nn.Conv3d) and part.in_channels <= 4)
                for name, part in parts
            )
        return self._begins[path]


class _Root:
    """A transformers model that is not a part of another one."""

    def __init__(self, path: str, model: nn.Module) -> None:
        self.path, self.prefix = path, f"{path}." if path else ""
        self.base = f"{getattr(model, 'base_model_prefix', '')}."
        self.config: Any = getattr(model, "config", None)
        self.keys = _keys(self.config)
        self.modalities = _modalities(model)
        self.reads_ids = getattr(model, "main_input_name", "") == "input_ids"
        self.towers: set[str] = set()  # told by parts

    def inside(self, name: str) -> str:
        """The name in the model, without that of its base model: "perceiver." joins nothing in a PerceiverModel."""
        return name.removeprefix(self.prefix).removeprefix(self.base)

    def told_by(self, path: str, module: nn.Module) -> str:
        """The tower of a part by its own configuration and class; UNTOLD where they do not say it."""
        if not _is_model(module) and BLOCK.search(f"{path}."):
            return UNTOLD  # layers that mix towers may be shaped by the configuration of one
        keys = self.keys.get(type(getattr(module, "config", None)), set())
        words = [[word for word in _words(key) if word != "decoder"] for key in keys]  # maybe of masks
        said = {CONNECTOR if CONNECTOR_WORDS & set(known) else _first_told(known) for known in words}
        if len(said) == 1 and said != {UNTOLD}:
            return said.pop()
        if not _is_model(module) or self.is_whole(module):
            return UNTOLD
        return (_by_own_input(module) if path != self.path else UNTOLD) or _by_class(module) or _by_type(module)

    def is_whole(self, module: Any) -> bool:
        """Whether this is the model itself, or its base, and no class says that it takes text alone: code from outside
        of transformers does not, and its towers may be plain modules."""
        same = isinstance(module.config, type(self.config))
        return same and _owner(module) is None and LANGUAGE in self.modalities

    def guess(self, words: list[str]) -> str:
        """The tower of a part that does not say it itself."""
        told = self.towers - {CONNECTOR}
        others = self.modalities - {LANGUAGE}
        has_vocabulary = hasattr(self.config, "vocab_size")
        reads_and_writes = getattr(self.config, "is_encoder_decoder", False) and LANGUAGE not in told
        if reads_and_writes and "encoder" in words and len(others) == 1 and not self.reads_ids:
            return others.pop()
        decodes_text = has_vocabulary or reads_and_writes or not told  # detectors have decoders too
        tower = _first_told([word for word in words if word != "decoder" or decodes_text])
        if tower != UNTOLD:
            return tower
        if has_vocabulary or not told:
            return LANGUAGE
        return FUSION if len(told) > 1 else told.pop()


def _is_model(module: nn.Module) -> bool:
    """Whether this is a model of transformers, whole or part of one."""
    return hasattr(type(module), "main_input_name")


def _by_own_input(model: Any) -> str:
    """The tower of the input that a part's class names, where its family is said to take another one."""
    kind = type(model)
    owners = [
        next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))
        for name in ("main_input_name", "input_modalities")
    ]
    inputs = TOWER_OF_INPUT | {"input_ids": LANGUAGE}
    main = kind.main_input_name
    return inputs.get(main, UNTOLD) if owners[0] < owners[1] and isinstance(main, str) else UNTOLD


def _by_class(model: nn.Module) -> str:
    """The one tower whose input a model takes; UNTOLD for several."""
    towers = _modalities(model)
    return towers.pop() if len(towers) == 1 else UNTOLD


def _by_type(model: Any) -> str:
    """The tower that the type of a model is named after, of one that is no whole one: "qwen2_5_vl_vision"."""
    config = model.config
    if _keys(config) or getattr(config, "is_encoder_decoder", False):
        return UNTOLD
    words = [word for word in re.split(r"[_-]", str(getattr(config, "model_type", ""))) if word not in ROLES]
    return TOWER_OF_WORD.get(words[-1], UNTOLD) if words else UNTOLD


def _modalities(model: nn.Module) -> set[str]:
    """The towers whose inputs a transformers model takes; empty where it does not say it."""
    if (owner := _owner(model)) is not None:
        given = vars(owner)["input_modalities"]
        return {TOWER_OF_MODALITY.get(one, one) for one in ([given] if isinstance(given, str) else given)}
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if isinstance(main, str) and main in TOWER_OF_INPUT:
        return {TOWER_OF_INPUT[main]}
    if hasattr(config, "vocab_size"):
        return {LANGUAGE}
    if hasattr(config, "image_size") or hasattr(config, "patch_size"):
        return {VISION}
    return {AUDIO} if hasattr(config, "num_mel_bins") else set()


def _owner(model: nn.Module) -> type | None:
    """The class that says which inputs a model takes; None where no one does, as text is the default of all."""
    owner = next((base for base in type(model).__mro__ if "input_modalities" in vars(base)), None)
    return None if owner is None or owner.__name__ == "PreTrainedModel" else owner


def _keys(config: Any) -> dict[type, set[str]]:
    """Where in a configuration the parts of each type stand: "vision_config", "decoder" ..."""
    found: dict[type, set[str]] = {}
    for key, part in vars(config).items() if hasattr(config, "__dict__") else ():
        if hasattr(part, "to_dict") and not isinstance(part, type(config)):
            found.setdefault(type(part), set()).add(key)
            for kind, keys in _keys(part).items():
                found.setdefault(kind, set()).update(keys)
    return found


def _words(name: str) -> list[str]:
    """Those that name the tower; a block's own parts may be named after what they attend to."""
    block = BLOCK.search(name)
    return re.split(r"[._]", name[: block.start() if block else None].lower())


def _first_told(words: list[str]) -> str:
    """The tower of the first word that names one; UNTOLD without any."""
    return next((TOWER_OF_WORD[word] for word in words if word in TOWER_OF_WORD), UNTOLD)


def _outer(name: str) -> Iterator[str]:
    """The paths of all that a name lies in, the whole model first and itself last."""
    yield ""
    yield from accumulate(name.split("."), lambda outer, part: f"{outer}.{part}")
