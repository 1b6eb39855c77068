"""Device, seeds, precision, optimizer and learning-rate schedule of a run."""

import contextlib
import functools
import itertools
import math
import random
import signal
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from models.config import TrainConfig
from training.parallel import Parallel


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def prepare_backend(device: torch.device) -> None:
    """Process-wide switches that make the step faster and change no result beyond rounding."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for projector, vision tower and language model; a learning rate of 0 freezes its part.

    A group holds what is trainable: all of its part, under LoRA the adapters; a part without any has no group.
    Each group keeps its peak learning rate under "peak_lr", which `set_learning_rate` scales.
    """
    parts = {
        "projector": (model.MP, cfg.lr_mp),
        "vision": (model.vision_encoder, cfg.lr_vision_backbone),
        "language": (model.decoder, cfg.lr_language_backbone),
    }
    groups = []
    for name, (module, lr) in parts.items():
        if lr == 0:
            module.requires_grad_(False)
        if params := [parameter for parameter in module.parameters() if parameter.requires_grad]:
            groups.append({"params": params, "lr": lr, "peak_lr": lr, "name": name})
    return torch.optim.AdamW(groups, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay, fused=True)


def lr_factor(step: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1: linear warm-up, then a cosine."""
    warmup = int(cfg.warmup_ratio * cfg.max_training_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, cfg.max_training_steps - warmup)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, cfg: TrainConfig) -> None:
    factor = lr_factor(step, cfg)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def spare_memory(model: nn.Module, cfg: TrainConfig) -> None:
    """Compute again in the backward pass what activation_checkpointing and loss_chunk_size say; names stay."""
    model.loss_chunk_size = cfg.loss_chunk_size
    if not cfg.activation_checkpointing:
        return
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable, *inputs):
    # Non-reentrant: where no input needs a gradient, as behind a frozen prefix, the other way would make none at all.
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block in place: equal blocks share one compilation, and module names stay as they are."""
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.compile()


class StopSignal:
    """Within this context Ctrl-C and SIGTERM only ask for the end; a second one ends the program at once.

    A data worker that dies is an error where its batch is awaited; by itself torch raises it from the signal of the
    death, wherever the program then is: in the middle of a step or of a checkpoint.

    With several processes any of them may get the signal, and `agree` lets all know of it. There a second one does
    nothing, as the terminal and torchrun both pass on the same one.
    """

    def __init__(self, say: Callable[[str], None], parallel: Parallel | None = None):
        self.say, self.parallel = say, parallel or Parallel()
        self.signal = 0  # the number of the signal that came
        self.agreed = False

    @property
    def requested(self) -> bool:
        return self.agreed or (self.signal != 0 and self.parallel.is_alone)

    def agree(self) -> None:
        """To be called at the same places in all processes: whether it is `requested` changes here alone."""
        if not self.agreed and self.parallel.any(self.signal != 0):
            self.agreed, self.signal = True, self.signal or signal.SIGTERM

    def until(self, items: Iterable) -> Iterator:
        """The items, up to the signal; where the weights are sharded all processes end at the same item."""
        return itertools.takewhile(lambda _: not self._came(), items)

    def _came(self) -> bool:
        if self.parallel.sharded is not None:
            self.agree()
            return self.requested
        return self.signal != 0

    def _receive(self, number: int, _frame) -> None:
        if self.signal and self.parallel.is_alone:
            raise KeyboardInterrupt
        again = "; a second one ends at once" if self.parallel.is_alone else ""
        if not self.signal:
            self.say(f"{signal.Signals(number).name}: saving and ending after this step{again}")
        self.signal = number

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        self.previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
