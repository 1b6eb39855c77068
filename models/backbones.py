"""Pretrained weights into our tensor names, from a local folder or file or the hub; and checkpoints to the hub.

A folder holds config.json and model.safetensors, or shards with model.safetensors.index.json, as the hub does; a
language backbone may be a GGUF file too. Nothing here touches the network for what is local.
"""

import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from models.config import SCRATCH, VLMConfig
from models.gguf import GGUFFile, gguf_path
from models.language_model import LanguageModel
from models.vision_transformer import ViT

HUB_TIMEOUT_S = 5
CONFIG_FILES = ["config.json"]
WEIGHT_FILES = [*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
EMBEDDING, HEAD, INV_FREQ = "decoder.token_embedding.weight", "decoder.head.weight", "decoder.rotary_embd.inv_freq"

MODEL_CARD = """\
---
library_name: nanovlm
license: mit
pipeline_tag: image-text-to-text
---

# {name}

A vision-language model of the nanoVLM family: a SigLIP vision tower, a SmolLM2 decoder and a linear projector.
Load it from a checkout of the training repository:

```python
from models.vision_language_model import VisionLanguageModel

model = VisionLanguageModel.from_pretrained("{repo_id}")
```
"""


class BackboneUnavailable(OSError):
    """A pretrained model that is neither a local folder nor to be had from the hub."""


def configure_from_backbones(cfg: VLMConfig, local_only: bool = False) -> None:
    """Take the towers' sizes over from cfg.vit_model_type and cfg.lm_model_type, but where that is `scratch`.

    Sets vit_* and lm_* fields only: the projector's and the image's sizes stay, and may no longer fit (cfg.problems()).
    local_only: a tower whose backbone is not on this machine keeps the sizes that cfg has.
    ValueError for an architecture that our towers are not; BackboneUnavailable without folder and hub.
    """

    def wanted(name: str) -> bool:
        return name != SCRATCH and not (local_only and _is_remote(name))

    fields: dict = {}
    if wanted(cfg.vit_model_type):
        folder = _backbone_folder(cfg.vit_model_type, "vit_model_type", CONFIG_FILES)
        fields |= _vision_fields(folder, cfg.vit_model_type)
    if wanted(cfg.lm_model_type):
        fields |= _language_fields(_language_source(cfg.lm_model_type, CONFIG_FILES), cfg)
    for field, value in fields.items():
        setattr(cfg, field, value)
    cfg.lm_vocab_size = cfg.lm_base_vocab_size + cfg.extra_token_amount


def _is_remote(name: str) -> bool:
    """Whether a backbone's name means a hub id: it is neither a folder nor a GGUF file."""
    return not Path(name).is_dir() and not name.endswith(".gguf")


@torch.no_grad()
def load_vision_backbone(vit: ViT) -> ViT:
    """Fill vit with the SigLIP or SigLIP2 weights of its cfg.vit_model_type, a vision tower alone or the full model.

    The pooling head and the text tower are ignored. With `scratch` vit stays as it is. ValueError where cfg or a
    tensor does not fit the checkpoint.
    """
    name = vit.cfg.vit_model_type
    if name == SCRATCH:
        return vit
    folder = _backbone_folder(name, "vit_model_type", WEIGHT_FILES)
    _require_same_fields(vit.cfg, _vision_fields(folder, name), f"--vit_model_type {name}")
    stored = _stored_tensors(folder)
    if any(key.startswith("vision_model.") for key in stored):
        stored = {key: tensor for key, tensor in stored.items() if key.startswith("vision_model.")}
    stored = {key.removeprefix("vision_model."): tensor for key, tensor in stored.items()}
    # Old files hold position_ids, a constant.
    stored = {key: tensor for key, tensor in stored.items() if not key.startswith(("head.", "embeddings.position_ids"))}
    _copy(f"--vit_model_type {name}", stored, _vision_destinations(vit))
    return vit


@torch.no_grad()
def load_language_backbone(lm: LanguageModel) -> LanguageModel:
    """Fill lm with the SmolLM2 (Llama) weights of its cfg.lm_model_type; the extra tokens start at the mean token.

    With `scratch` lm stays as it is. ValueError where cfg or a tensor does not fit the checkpoint.
    """
    cfg, name = lm.cfg, lm.cfg.lm_model_type
    if name == SCRATCH:
        return lm
    source = _language_source(name, WEIGHT_FILES)
    _require_same_fields(cfg, _language_fields(source, cfg), f"--lm_model_type {name}")
    stored = {key.removeprefix("model."): tensor for key, tensor in _stored_tensors(source).items()}
    stored = {key: tensor for key, tensor in stored.items() if not key.endswith("rotary_emb.inv_freq")}
    destinations = _language_destinations(lm)
    if cfg.lm_tie_weights:
        stored.pop("lm_head.weight", None)
    elif "lm_head.weight" not in stored and "embed_tokens.weight" in stored:  # a tied checkpoint starts an untied head
        stored["lm_head.weight"] = stored["embed_tokens.weight"]
    _copy(f"--lm_model_type {name}", stored, destinations)
    for matrix in {lm.token_embedding.weight, lm.head.weight}:
        _set_extra_rows(matrix, cfg.lm_base_vocab_size)
    return lm


def checkpoint_folder(path: str | Path, revision: str | None = None, flag: str = "vlm_checkpoint_path") -> Path:
    """The folder of a nanoVLM checkpoint: `path` itself if it is a local folder, else a snapshot of that hub id.

    flag: what an error names.
    """
    return _backbone_folder(str(path), flag, WEIGHT_FILES + TOKENIZER_FILES, revision)


def load_vlm_weights(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Fill a VisionLanguageModel with a nanoVLM checkpoint. ValueError lists every tensor that does not fit.

    A checkpoint from before the image token lacks the extra tokens' rows: they start at the mean token, with a warning.
    """
    cfg = model.cfg
    stored, destinations = _stored_tensors(folder), model.state_dict()
    if cfg.lm_tie_weights:  # one matrix, in the file under either name or both
        spare = HEAD if EMBEDDING in stored else EMBEDDING
        stored.pop(spare, None)
        destinations.pop(spare)
    if INV_FREQ not in stored:
        destinations.pop(INV_FREQ)
    base = cfg.lm_base_vocab_size
    short = [
        name
        for name in (EMBEDDING, HEAD)
        if name in destinations and name in stored and stored[name].shape[:1] == [base] != [cfg.lm_vocab_size]
    ]
    matrices = [destinations[name] for name in short]
    destinations |= {name: destinations[name][:base] for name in short}
    _copy(str(folder), stored, destinations)
    for matrix in matrices:
        _set_extra_rows(matrix, base)
    if short:
        warnings.warn(
            f"{folder}: no rows for {cfg.extra_token_amount} extra tokens, they start at the mean", stacklevel=3
        )
    return model


def push_folder(save: Callable[[str], None], repo_id: str, private: bool = False) -> None:
    """Upload what save(folder) writes, with a model card, to the hub repository repo_id, made if need be."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        card = MODEL_CARD.format(name=repo_id.split("/")[-1], repo_id=repo_id)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload nanoVLM checkpoint")


def _backbone_folder(name: str, flag: str, patterns: list[str], revision: str | None = None) -> Path:
    """`name` itself if it is a folder, else its hub snapshot, from the local cache where the hub does not answer."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        # A single request with a timeout: the download would wait for a silent hub without end.
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HTTPError, OSError, HFValidationError) as error:
        reason = error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        takers = "--checkpoint accepts"
        if flag != "checkpoint":
            takers = "--vit_model_type, --lm_model_type, --lm_tokenizer and --vlm_checkpoint_path accept"
        raise BackboneUnavailable(
            f"--{flag} {name}: no such local folder, and the hub could not be reached or does not have it "
            f"({_first_line(reason)}); {takers} a local folder"
        ) from reason


def _language_source(name: str, patterns: list[str]) -> Path:
    """The GGUF file or the folder of a language backbone."""
    return gguf_path(name, "lm_model_type") or _backbone_folder(name, "lm_model_type", patterns)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def _vision_fields(folder: Path, name: str) -> dict:
    """The vit_* fields of a SigLIP config.json, which leaves out what equals the class's defaults."""
    from transformers import SiglipConfig, SiglipVisionConfig

    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _require_family(stored, ("siglip", "siglip_vision_model"), f"--vit_model_type {name}")
    if stored["model_type"] == "siglip":
        config = SiglipConfig.from_dict(stored).vision_config
    else:
        config = SiglipVisionConfig.from_dict(stored)
    _require_known({"hidden_act": (config.hidden_act, "gelu_pytorch_tanh")}, f"--vit_model_type {name}")
    return {
        "vit_hidden_dim": config.hidden_size,
        "vit_inter_dim": config.intermediate_size,
        "vit_patch_size": config.patch_size,
        "vit_img_size": config.image_size,
        "vit_n_heads": config.num_attention_heads,
        "vit_n_blocks": config.num_hidden_layers,
        "vit_ln_eps": config.layer_norm_eps,
    }


def _language_fields(source: Path, cfg: VLMConfig) -> dict:
    """The lm_* fields of a GGUF file or of a Llama config.json, which leaves out what equals the class's defaults.

    An untied checkpoint unties the head; a tied one leaves lm_tie_weights to cfg.
    """
    from transformers import LlamaConfig

    label = f"--lm_model_type {cfg.lm_model_type}"
    stored = (
        GGUFFile(source).config
        if source.is_file()
        else json.loads((source / "config.json").read_text(encoding="utf-8"))
    )
    _require_family(stored, ("llama",), label)
    config = LlamaConfig.from_dict(stored)  # moves the rope_theta of old files into rope_parameters
    rope = config.rope_parameters
    known = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "rope_type": (rope["rope_type"], "default"),
    }
    _require_known(known, label)
    return {
        "lm_hidden_dim": config.hidden_size,
        "lm_inter_dim": config.intermediate_size,
        "lm_rms_eps": config.rms_norm_eps,
        "lm_re_base": int(rope["rope_theta"]),
        "lm_max_position_embeddings": config.max_position_embeddings,
        "lm_base_vocab_size": config.vocab_size,
        "lm_n_heads": config.num_attention_heads,
        "lm_n_kv_heads": config.num_key_value_heads,
        "lm_n_blocks": config.num_hidden_layers,
        "lm_tie_weights": cfg.lm_tie_weights and config.tie_word_embeddings,
    }


def _require_family(stored: dict, families: tuple[str, ...], label: str) -> None:
    if stored.get("model_type") not in families:
        raise ValueError(f"{label}: model_type {stored.get('model_type')!r}, must be {' or '.join(families)}")


def _require_known(values: dict[str, tuple], label: str) -> None:
    """values: name -> (what the checkpoint has, what our tower computes)."""
    unknown = [f"{name} {has!r}, must be {ours!r}" for name, (has, ours) in values.items() if has != ours]
    if unknown:
        raise ValueError(f"{label}: " + "; ".join(unknown))


def _require_same_fields(cfg: VLMConfig, fields: dict, label: str) -> None:
    """Tensors of the right shape do not tell the number of heads, an epsilon or the rotary base."""
    different = [
        f"{field} {value}, config {getattr(cfg, field)}"
        for field, value in fields.items()
        if getattr(cfg, field) != value
    ]
    if different:
        raise ValueError(f"{label} has {'; '.join(different)}: call models.backbones.configure_from_backbones first")


class Stored(NamedTuple):
    """A tensor in a safetensors or GGUF file."""

    file: Path
    name: str
    shape: list[int]


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the folder, or of a GGUF file, by name; reads headers only."""
    from safetensors import SafetensorError, safe_open

    if folder.is_file():
        return {name: Stored(folder, name, info.shape) for name, info in GGUFFile(folder).tensors.items()}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    if absent := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(f"{folder}: no {', '.join(absent)}")
    stored = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                names = tensors.keys()
                stored |= {name: Stored(folder / file, name, tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: is damaged: {error}") from error
    return stored


@torch.no_grad()
def _copy(label: str, stored: dict[str, Stored], destinations: dict[str, torch.Tensor]) -> None:
    """Copy each stored tensor into its destination. ValueError lists all that are missing, left over or misshapen."""
    from safetensors import safe_open

    problems = [f"{key}: missing" for key in destinations if key not in stored]
    problems += [f"{key}: left over" for key in stored if key not in destinations]
    problems += [
        f"{key}: shape {tensor.shape}, must be {list(destinations[key].shape)}"
        for key, tensor in stored.items()
        if key in destinations and list(destinations[key].shape) != tensor.shape
    ]
    if problems:
        raise ValueError(f"{label}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))
    for file in sorted({tensor.file for tensor in stored.values()}):
        is_gguf = file.suffix == ".gguf"
        with contextlib.nullcontext(GGUFFile(file)) if is_gguf else safe_open(file, framework="pt") as tensors:
            for key, tensor in stored.items():
                if tensor.file == file:
                    destinations[key].copy_(tensors.get_tensor(tensor.name))


def _vision_destinations(vit: ViT) -> dict[str, torch.Tensor]:
    """SigLIP's tensor names -> our tensors, or the part of one that a name fills."""
    embedding = vit.patch_embedding
    destinations = {
        "embeddings.patch_embedding.weight": embedding.conv.weight,
        "embeddings.patch_embedding.bias": embedding.conv.bias,
        "embeddings.position_embedding.weight": embedding.position_embedding[0],
        **_named("post_layernorm", vit.layer_norm),
    }
    for i, block in enumerate(vit.blocks):
        layer, qkv = f"encoder.layers.{i}", block.attn.qkv_proj
        parts = zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        for letter, weight, bias in parts:
            destinations[f"{layer}.self_attn.{letter}_proj.weight"] = weight
            destinations[f"{layer}.self_attn.{letter}_proj.bias"] = bias
        destinations |= _named(f"{layer}.self_attn.out_proj", block.attn.out_proj)
        destinations |= _named(f"{layer}.layer_norm1", block.ln1) | _named(f"{layer}.layer_norm2", block.ln2)
        destinations |= _named(f"{layer}.mlp.fc1", block.mlp.fc1) | _named(f"{layer}.mlp.fc2", block.mlp.fc2)
    return destinations


def _language_destinations(lm: LanguageModel) -> dict[str, torch.Tensor]:
    """Llama's tensor names -> our tensors; of embedding and head the rows of the base vocabulary."""
    base = lm.cfg.lm_base_vocab_size
    destinations = {"embed_tokens.weight": lm.token_embedding.weight[:base], "norm.weight": lm.norm.weight}
    if not lm.cfg.lm_tie_weights:
        destinations["lm_head.weight"] = lm.head.weight[:base]
    for i, block in enumerate(lm.blocks):
        layer = f"layers.{i}"
        destinations[f"{layer}.input_layernorm.weight"] = block.norm1.weight
        destinations[f"{layer}.post_attention_layernorm.weight"] = block.norm2.weight
        destinations |= {f"{layer}.self_attn.{x}_proj.weight": getattr(block.attn, f"{x}_proj").weight for x in "qkv"}
        destinations[f"{layer}.self_attn.o_proj.weight"] = block.attn.out_proj.weight
        destinations |= _named(f"{layer}.mlp", block.mlp)
    return destinations


def _named(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def _set_extra_rows(matrix: torch.Tensor, base: int) -> None:
    """New tokens start as the mean token: no logit of theirs stands out."""
    matrix[base:] = matrix[:base].float().mean(dim=0).to(matrix.dtype)
