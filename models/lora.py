"""LoRA (arXiv:2106.09685): low-rank adapters on the projection matrices of the towers, through the library peft.

An adapted linear layer is wrapped in a module that holds it unchanged as `base_layer` and adds scale * B A x,
with A [rank, in], B [out, rank], zero at first, and scale = lora_alpha / lora_rank.
"""

from typing import Any

import torch
import torch.nn as nn

from grades.config import is_named
from models.config import TrainConfig

ADAPTER = "default"  # peft's name for the only adapter


def inject_lora(model: nn.Module, cfg: TrainConfig) -> None:
    """Adapt a VisionLanguageModel in place: from here on only its adapters and its projector are trainable.

    Without cfg.lora_vision the vision tower gets no adapters and trains in full. A tower whose learning rate is 0 gets
    no adapters either. Raises ValueError where cfg.lora_targets match no matrix.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    towers = {"decoder": cfg.lr_language_backbone > 0, "vision_encoder": cfg.lora_vision and cfg.lr_vision_backbone > 0}
    matrices = [
        name
        for tower in (tower for tower, trains in towers.items() if trains)
        for name, module in model.named_modules()
        if name.startswith(f"{tower}.blocks.") and isinstance(module, nn.Linear)
    ]
    targets = [name for name in matrices if not cfg.lora_targets or is_named(name, cfg.lora_targets)]
    if not targets:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
        raise ValueError(f"--lora_targets {' '.join(cfg.lora_targets)}: must name some of {kinds}")
    settings = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,  # type: ignore[arg-type]  # peft annotates an int and takes a float
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(settings, model, ADAPTER)
    model.MP.requires_grad_(True)
    if not cfg.lora_vision:
        model.vision_encoder.requires_grad_(True)
    for _, layer in _adapted(model):
        layer.cast_input_dtype_enabled = False  # autocast casts; peft would first make a float32 copy


def is_adapted(model: nn.Module) -> bool:
    """Whether the model has LoRA adapters."""
    return bool(_adapted(model))


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the plain model that computes the same: its names, with the adapters added to the weights.

    Merged weights are new tensors on the CPU, the others the model's own. The model does not change.
    """
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in _adapted(model):
        state[f"{name}.weight"] = (layer.base_layer.weight + layer.get_delta_weight(ADAPTER)).cpu()
    return state


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a merged checkpoint does not hold: the adapters, and the weights they adapt (subtracting would round)."""
    under = {f"{name}.base_layer.weight" for name, _ in _adapted(model)}
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name or name in under}


def load_lora_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what lora_state_dict returned, after inject_lora on a merged checkpoint: restores the model exactly.

    Raises ValueError where the saved run had other adapters.
    """
    own, saved = ({(name, t.shape) for name, t in tensors.items()} for tensors in (lora_state_dict(model), state))
    if differing := sorted(own ^ saved):
        name = differing[0][0]
        raise ValueError(f"--lora_rank, --lora_targets and --lora_vision: must be as in the saved run ({name} differs)")
    model.load_state_dict(state, strict=False)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """(name of an adapted linear layer, peft's module around it) of all in the model."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
