"""Device, seeds, precision, optimizer and memory of a run."""

import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from models.attention import has_compiler
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel
from training.arguments import Settings


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, else Apple's MPS, else the CPU; or the named one of them. Raises ValueError where that is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = next(device for device, is_here in here.items() if is_here)
    if name != "auto" and not here.get(name):
        raise ValueError(f"--device {name}: not on this machine, which has {found}; must be auto or {found}")
    return torch.device(found if name == "auto" else name)


def prepare_backend(device: torch.device) -> None:
    """Process-wide switches that make the step faster and change no result beyond rounding."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # It makes a plan, of up to half a second, for every new number of tiles or tokens; and before cuDNN 9.26 it
        # gives NaN gradients where the number of keys is 64 modulo 128 (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class RandomState:
    """The global random numbers of this process, as a checkpoint holds them for each rank."""

    def __init__(self, device: torch.device, rank: int = 0):
        self.device, self.rank = device, rank

    def state_dict(self) -> dict[str, Any]:
        """State of Python's, NumPy's, torch's and the device's generators, as plain values and tensors."""
        numpy_state: Any = np.random.get_state()
        kind, keys, *rest = numpy_state
        return {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "device": None if self.device.type == "cpu" else torch.get_device_module(self.device).get_rng_state(),
        }

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Take up this rank's state; a rank that the saved run did not have keeps the numbers of its seed."""
        if self.rank >= len(states):
            return
        state = states[self.rank]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["device"] is not None and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state["device"])


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.12
            return torch.cpu._is_avx512_bf16_supported()
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "arm_bf16"))
    return False


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """The context of a forward pass for --dtype auto, bfloat16 or float32."""
    if dtype == "bfloat16" or (dtype == "auto" and has_fast_bfloat16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def dtype_in_effect(context: contextlib.AbstractContextManager) -> str:
    """ "bfloat16" or "float32": what the products of a forward pass in this context are computed in."""
    return "bfloat16" if isinstance(context, torch.autocast) else "float32"


def freeze_untrained(model: VisionLanguageModel, cfg: TrainConfig) -> None:
    """Freeze each part whose learning rate is 0."""
    for module, lr in _parts(model, cfg).values():
        if lr == 0:
            module.requires_grad_(False)


def make_optimizer(model: VisionLanguageModel, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group each for projector, vision tower and language model, over what is trainable in them.

    Under LoRA a tower's group holds its adapters. A part in which nothing is trainable has no group. Each group keeps
    its peak learning rate under "peak_lr", which `set_learning_rate` scales.
    """
    groups = []
    for name, (module, lr) in _parts(model, cfg).items():
        if params := [parameter for parameter in module.parameters() if parameter.requires_grad]:
            groups.append({"params": params, "lr": lr, "peak_lr": lr, "name": name})
    return torch.optim.AdamW(groups, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay, fused=True)


def _parts(model: VisionLanguageModel, cfg: TrainConfig) -> dict[str, tuple[nn.Module, float]]:
    return {
        "projector": (model.MP, cfg.lr_mp),
        "vision": (model.vision_encoder, cfg.lr_vision_backbone),
        "language": (model.decoder, cfg.lr_language_backbone),
    }


def apply_to_model(model: VisionLanguageModel, cfg: TrainConfig) -> None:
    """Apply activation_checkpointing, loss_chunk_size and what else cfg says of loss and blocks; module names stay."""
    model.z_loss = cfg.z_loss
    for block in model.decoder.blocks:
        block.response_dropout = cfg.response_dropout  # type: ignore[assignment]
    model.loss_chunk_size = cfg.loss_chunk_size
    if not cfg.activation_checkpointing:
        return
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *inputs: Any) -> Any:
    # Non-reentrant: where no input needs a gradient, as behind a frozen prefix, the other way would make none at all.
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def compiles(settings: Settings, device: torch.device) -> bool:
    """Whether the run's blocks are compiled: what --compile says; by auto on CUDA, where that is possible.

    Raises ValueError where it is asked for and what it needs is missing.
    """
    asked, probes = settings.train.compile, settings.train.enable_grades and settings.grades.unfreeze_factor is not None
    possible = device.type != "cuda" or has_compiler()
    if asked is True and not possible:
        missing = "Triton, a C compiler (gcc) or Python's headers (python3-dev) are missing"
        raise ValueError(f"--compile on: must be off or auto here, as {missing}")
    return asked is True or (asked == "auto" and device.type == "cuda" and possible and not probes)


def compile_blocks(model: VisionLanguageModel, most_images: int | None = None) -> None:
    """torch.compile every block and the loss in place: equal blocks share one compilation, module names stay.

    most_images: of a micro-batch, tiles counted. With it images and the tokens of rows are padded to few sizes.
    """
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.compile()
    model.cross_entropy = torch.compile(model.cross_entropy)
    model.vision_encoder.most_images = most_images
    model.decoder.in_buckets = most_images is not None
