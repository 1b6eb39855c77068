"""A tiny model, its batches and a plain training loop, for the tests of GradES."""

import io
from collections.abc import Callable

import torch
import torch.nn as nn

from grades import GradESConfig, GradESMonitor
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel

TINY = {
    "vit_hidden_dim": 16, "vit_inter_dim": 32, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "vit_n_blocks": 2, "lm_hidden_dim": 24, "lm_inter_dim": 48, "lm_n_heads": 3, "lm_n_kv_heads": 1, "lm_n_blocks": 2,
    "lm_base_vocab_size": 30,
    "extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"}, "mp_pixel_shuffle_factor": 2,
    "mp_image_token_length": 4, "max_img_size": 16, "lm_max_length": 32,
}  # fmt: skip
LR = 1e-2


def make_model(seed: int = 0, **fields) -> VisionLanguageModel:
    """22 components, 8 of them vision; fields: of VLMConfig."""
    torch.manual_seed(seed)
    return VisionLanguageModel(VLMConfig(**(TINY | fields)))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, of different learning rates."""
    towers = [p for p in model.parameters() if p is not model.MP.proj.weight]
    groups = [{"params": towers, "lr": LR}, {"params": [model.MP.proj.weight], "lr": 2 * LR}]
    return torch.optim.AdamW(groups, weight_decay=0.1, fused=True)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> dict:
    """Two rows of ten tokens, four of which are an image's."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (2, 10), generator=generator)
    ids[:, 2:6] = 30
    targets = torch.randint(0, 30, (2, 10), generator=generator)
    images = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    return {"input_ids": ids, "images": images, "targets": targets}


class Loop:
    """A training loop with all its state, which can be stopped and taken up again."""

    def __init__(
        self, model: nn.Module, config: GradESConfig | None, total_steps: int, optimizer=None, accumulation: int = 1
    ):
        self.model, self.total_steps, self.accumulation = model, total_steps, accumulation
        self.optimizer = optimizer or make_optimizer(model)
        self.lines: list[str] = []
        self.monitor = None
        if config is not None:
            self.monitor = GradESMonitor(config, model, self.optimizer, total_steps, log=self.lines.append)
        self.step = 0
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.clip_norms: list[float] = []
        self.losses: list[float] = []
        self.loss_scale: Callable[[int], float] = lambda step: 1.0
        self.on_backward: Callable[[int], None] = lambda step: None  # when the gradients are whole, not yet clipped
        self.on_step: Callable[[int], None] = lambda step: None  # after the monitor's after_step

    def run(self, until: int | None = None) -> "Loop":
        """Train to the end, or to a step."""
        while self.step < (until or self.total_steps):
            self.step += 1
            if self._train_step(self.step):
                break
        return self

    def _train_step(self, step: int) -> bool:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            set_lr(group, peak * (1 - 0.9 * step / self.total_steps))
        dtype = self.model.MP.proj.weight.dtype
        for micro in range(self.accumulation):
            loss = self.model(**batch(step * 10 + micro, dtype))[1] * self.loss_scale(step)
            loss.backward()
            self.losses.append(loss.item())
        self.on_backward(step)
        if self.monitor:
            self.monitor.after_backward(step)
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        self.clip_norms.append(nn.utils.clip_grad_norm_(gradients, 0.5).item())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stop = self.monitor.after_step(step) if self.monitor else False
        self.on_step(step)
        return stop

    def save(self) -> bytes:
        """A checkpoint as it lies on a disk."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "grades": self.monitor.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> "Loop":
        """Take up a checkpoint, read as plain types and tensors alone."""
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["grades"])
        return self


def set_lr(group: dict, lr: float) -> None:
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
