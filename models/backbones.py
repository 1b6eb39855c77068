"""The sizes of pretrained backbones: config.json of a vision or language model -> VLMConfig's vit_* or lm_* fields."""

import json
from pathlib import Path
from typing import Any

from models.config import CLIP_MEAN, CLIP_STD, SCRATCH, VLMConfig
from models.hub import CONFIG_FILES, hub_folder

TOKENIZER = "tokenizer.json"


def configure_from_backbones(cfg: VLMConfig, local_only: bool = False) -> None:
    """Set cfg's vit_* and lm_* sizes to those of cfg.vit_model_type and cfg.lm_model_type, unless that is `scratch`.

    The projector's and the image's sizes stay as they are, and may no longer fit (cfg.problems()).
    local_only: a tower whose backbone is not on this machine keeps the sizes that cfg has.
    Raises ValueError for an architecture that our towers do not have, BackboneUnavailable without folder and hub.
    """
    if cfg.vit_model_type != SCRATCH and (not local_only or Path(cfg.vit_model_type).is_dir()):
        configure_vision(cfg)
    if cfg.lm_model_type != SCRATCH and (not local_only or Path(cfg.lm_model_type).is_dir()):
        configure_language(cfg)


def configure_vision(cfg: VLMConfig, files: tuple[str, ...] = CONFIG_FILES) -> Path:
    """Set the vit_* sizes to those of the SigLIP, SigLIP2 or CLIP model cfg.vit_model_type; returns its folder.

    A CLIP gets its own image_mean and image_std where cfg has SigLIP's. files: what to download of a model on the hub.
    Errors as configure_from_backbones.
    """
    import transformers  # config.json leaves out what equals the defaults of its classes

    folder, label = hub_folder(cfg.vit_model_type, "vit_model_type", files), f"--vit_model_type {cfg.vit_model_type}"
    stored = _read_config(folder, ("siglip", "siglip_vision_model", "clip", "clip_vision_model"), label)
    kind, part = stored["model_type"].partition("_")[::2]
    name = {"siglip": "Siglip", "clip": "CLIP"}[kind] + ("VisionConfig" if part else "Config")
    config: Any = getattr(transformers, name).from_dict(stored)
    config = config if part else config.vision_config
    activation = {"siglip": "gelu_pytorch_tanh", "clip": "quick_gelu"}[kind]
    _require_known({"hidden_act": (config.hidden_act, activation)}, label)
    if kind == "clip" and cfg.image_mean == cfg.image_std == 0.5:
        cfg.image_mean, cfg.image_std = list(CLIP_MEAN), list(CLIP_STD)
    cfg.vit_architecture = kind
    cfg.vit_hidden_dim = config.hidden_size
    cfg.vit_inter_dim = config.intermediate_size
    cfg.vit_patch_size = config.patch_size
    # Whole patches: SigLIP's So400m/14 at 384 sees 27 x 27 patches, which are 378 pixels.
    cfg.vit_img_size = config.image_size - config.image_size % config.patch_size
    cfg.vit_n_heads = config.num_attention_heads
    cfg.vit_n_blocks = config.num_hidden_layers
    cfg.vit_ln_eps = config.layer_norm_eps
    return folder


def configure_language(cfg: VLMConfig, files: tuple[str, ...] = CONFIG_FILES) -> Path:
    """Set the lm_* sizes to those of the Llama (SmolLM2), Qwen2 or Qwen3 model cfg.lm_model_type; returns its folder.

    The base vocabulary becomes the tokenizer's where the folder has one with fewer tokens than the matrix has rows
    (Qwen3: 151,669 of 151,936): the extra tokens follow it into the spare rows, and add rows where these do not
    suffice. A model with a head of its own unties cfg's; one without leaves lm_tie_weights as it is. files: what to
    download of a model on the hub. Errors as configure_from_backbones.
    """
    import transformers  # config.json leaves out what equals the defaults of its classes

    label = f"--lm_model_type {cfg.lm_model_type}"
    folder = hub_folder(cfg.lm_model_type, "lm_model_type", (*files, TOKENIZER))
    stored = _read_config(folder, ("llama", "qwen2", "qwen3"), label)
    kind = stored["model_type"]
    name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[kind]
    # from_dict moves the rope_theta of old files into rope_parameters.
    config: Any = getattr(transformers, name).from_dict(stored)
    rope, rows = config.rope_parameters, config.vocab_size
    known = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "use_sliding_window": (bool(getattr(config, "use_sliding_window", False)), False),
        "rope_type": (rope["rope_type"], "default"),
    }
    _require_known(known, label)
    usual = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or usual
    cfg.lm_head_dim = None if head_dim == usual else head_dim
    cfg.lm_qk_norm, cfg.lm_qkv_bias = kind == "qwen3", kind == "qwen2"
    cfg.lm_hidden_dim = config.hidden_size
    cfg.lm_inter_dim = config.intermediate_size
    cfg.lm_rms_eps = config.rms_norm_eps
    cfg.lm_re_base = int(rope["rope_theta"])
    cfg.lm_max_position_embeddings = config.max_position_embeddings
    cfg.lm_base_vocab_size = min(rows, _tokens(folder) or rows)
    cfg.lm_vocab_size = max(rows, cfg.lm_base_vocab_size + cfg.extra_token_amount)
    cfg.lm_n_heads = config.num_attention_heads
    cfg.lm_n_kv_heads = config.num_key_value_heads
    cfg.lm_n_blocks = config.num_hidden_layers
    cfg.lm_tie_weights = cfg.lm_tie_weights and config.tie_word_embeddings
    return folder


def _tokens(folder: Path) -> int | None:
    """The number of tokens of the folder's tokenizer, without reading it as one; None where there is none."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    own = stored.get("model", {}).get("vocab", ())  # token -> id, or pairs of token and score
    words = set(own) if isinstance(own, dict) else {word for word, *_ in own}
    return len(words | {token["content"] for token in stored.get("added_tokens", ())}) or None


def _read_config(folder: Path, families: tuple[str, ...], label: str) -> dict[str, Any]:
    """The folder's config.json; ValueError where its model_type is none of the families."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stored.get("model_type") not in families:
        raise ValueError(f"{label}: model_type {stored.get('model_type')!r}, must be {' or '.join(families)}")
    return stored


def _require_known(values: dict[str, tuple[Any, Any]], label: str) -> None:
    """values: name -> (what the checkpoint has, what our tower computes); ValueError names those that differ."""
    unknown = [f"{name} {has!r}, must be {ours!r}" for name, (has, ours) in values.items() if has != ours]
    if unknown:
        raise ValueError(f"{label}: " + "; ".join(unknown))
