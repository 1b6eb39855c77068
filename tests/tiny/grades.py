"""A tiny model, its batches and a plain training loop, for the tests of GradES."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from data import easy_vqa
from grades import GradESConfig, GradESMonitor
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel

TINY = {
    "vit_hidden_dim": 16, "vit_inter_dim": 32, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "vit_n_blocks": 2, "lm_hidden_dim": 24, "lm_inter_dim": 48, "lm_n_heads": 3, "lm_n_kv_heads": 1, "lm_n_blocks": 2,
    "lm_base_vocab_size": 30, "extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"},
    "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "max_img_size": 16, "lm_max_length": 32,
}  # fmt: skip
# CLIP + Qwen3 with Molmo's connector, of as many components and image tokens.
MOLMO = {
    "vit_architecture": "clip", "vit_n_blocks": 3, "vit_feature_layers": [-2, -3], "lm_head_dim": 16,
    "lm_qk_norm": True, "mp_type": "molmo", "lm_vocab_size": 40,
}  # fmt: skip
FAMILIES = {"nanovlm": {}, "molmo2": MOLMO}  # with one batch for both; those of tiny.families have their own
LR = 1e-2
NEVER = 1e-9  # a tau that nothing is below
ALWAYS = 1e9  # a tau that everything measured is below


def make_model(seed: int = 0, **fields) -> VisionLanguageModel:
    """22 components, 8 of them vision; fields: of VLMConfig."""
    torch.manual_seed(seed)
    return VisionLanguageModel(VLMConfig(**(TINY | fields)))


def save_answering_model(folder: Path, **fields) -> Path:
    """A checkpoint of an untrained model whose answers depend on picture and question; returns the folder.

    fields: of VLMConfig.
    """
    model = make_model(lm_base_vocab_size=easy_vqa.VOCAB_SIZE, lm_tokenizer=easy_vqa.NAME, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, of different learning rates."""
    projector = list(model.MP.parameters())
    towers = [p for p in model.parameters() if all(p is not other for other in projector)]
    groups = [{"params": towers, "lr": LR}, {"params": projector, "lr": 2 * LR}]
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
    """A training loop with all its state, which can be stopped and continued. config: None for one without GradES."""

    def __init__(
        self, model: nn.Module, config: GradESConfig | None, total_steps: int, optimizer=None, accumulation: int = 1
    ):
        self.model, self.total_steps, self.accumulation = model, total_steps, accumulation
        self.optimizer = optimizer or make_optimizer(model)
        self.lines: list[str] = []
        self.details: list[str] = []
        self.monitor = None
        if config is not None:
            self.monitor = GradESMonitor(
                config, model, self.optimizer, total_steps, self.lines.append, detail=self.details.append
            )
        self.step = 0
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.clip_norms: list[float] = []
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
            group["lr"] = peak * (1 - 0.9 * step / self.total_steps)
        dtype = next(self.model.MP.parameters()).dtype
        for micro in range(self.accumulation):
            (self.model(**batch(step * 10 + micro, dtype))[1] * self.loss_scale(step)).backward()
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
        """A checkpoint as it is on a disk."""
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
        """Continue from a checkpoint, which holds plain types and tensors alone."""
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.monitor.load_state_dict(state["grades"])
        return self


def train(config: dict, steps: int, model: nn.Module | None = None, **fields) -> Loop:
    """A finished run of the tiny model. config: of GradESConfig; fields: of Loop."""
    return Loop(model or make_model(), GradESConfig(**config), steps, **fields).run()


def unfreezing_loop(**others) -> Loop:
    """Gradients grow to 1,000 times in steps 9 to 12: the vision tower freezes at 5, unfreezes at 9, freezes at 13.

    others: of GradESConfig.
    """
    given = {"metric": "gradient_norm", "vision_tau": 50.0, "language_tau": NEVER, "alpha": 0.2}
    config = GradESConfig(**given | {"unfreeze_factor": 3.0, "probe_interval": 3} | others)
    loop = Loop(make_model(), config, 16)
    loop.loss_scale = lambda step: 1000.0 if 9 <= step < 13 else 1.0
    return loop


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
