"""The sizes of pretrained backbones: config.json of a SigLIP or Llama model -> VLMConfig's vit_* or lm_* fields."""

import json
from pathlib import Path
from typing import Any

from models.config import SCRATCH, VLMConfig
from models.hub import CONFIG_FILES, hub_folder


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
    """Set the vit_* sizes to those of the SigLIP or SigLIP2 model cfg.vit_model_type; returns its folder.

    files: what to download of a model on the hub. Errors as configure_from_backbones.
    """
    from transformers import SiglipConfig, SiglipVisionConfig  # config.json leaves out what equals their defaults

    folder, label = hub_folder(cfg.vit_model_type, "vit_model_type", files), f"--vit_model_type {cfg.vit_model_type}"
    stored = _read_config(folder, ("siglip", "siglip_vision_model"), label)
    is_full = stored["model_type"] == "siglip"
    config: Any = SiglipConfig.from_dict(stored).vision_config if is_full else SiglipVisionConfig.from_dict(stored)
    _require_known({"hidden_act": (config.hidden_act, "gelu_pytorch_tanh")}, label)
    cfg.vit_hidden_dim = config.hidden_size
    cfg.vit_inter_dim = config.intermediate_size
    cfg.vit_patch_size = config.patch_size
    cfg.vit_img_size = config.image_size
    cfg.vit_n_heads = config.num_attention_heads
    cfg.vit_n_blocks = config.num_hidden_layers
    cfg.vit_ln_eps = config.layer_norm_eps
    return folder


def configure_language(cfg: VLMConfig, files: tuple[str, ...] = CONFIG_FILES) -> Path:
    """Set the lm_* sizes to those of the Llama model (SmolLM2 is one) cfg.lm_model_type; returns its folder.

    The vocabulary becomes the model's plus cfg.extra_token_amount. A model with a head of its own unties cfg's; one
    without leaves lm_tie_weights as it is. files: what to download of a model on the hub. Errors as
    configure_from_backbones.
    """
    from transformers import LlamaConfig  # config.json leaves out what equals its defaults

    folder, label = hub_folder(cfg.lm_model_type, "lm_model_type", files), f"--lm_model_type {cfg.lm_model_type}"
    # from_dict moves the rope_theta of old files into rope_parameters.
    config: Any = LlamaConfig.from_dict(_read_config(folder, ("llama",), label))
    rope = config.rope_parameters
    known = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "rope_type": (rope["rope_type"], "default"),
    }
    _require_known(known, label)
    cfg.lm_hidden_dim = config.hidden_size
    cfg.lm_inter_dim = config.intermediate_size
    cfg.lm_rms_eps = config.rms_norm_eps
    cfg.lm_re_base = int(rope["rope_theta"])
    cfg.lm_max_position_embeddings = config.max_position_embeddings
    cfg.lm_base_vocab_size = config.vocab_size
    cfg.lm_vocab_size = config.vocab_size + cfg.extra_token_amount
    cfg.lm_n_heads = config.num_attention_heads
    cfg.lm_n_kv_heads = config.num_key_value_heads
    cfg.lm_n_blocks = config.num_hidden_layers
    cfg.lm_tie_weights = cfg.lm_tie_weights and config.tie_word_embeddings
    return folder


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
