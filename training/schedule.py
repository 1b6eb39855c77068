"""The learning rate of each step."""

import math

import torch

from models.config import TrainConfig


def lr_factor(step: int, cfg: TrainConfig) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1: linear warm-up, then a cosine."""
    warmup = int(cfg.warmup_ratio * cfg.max_training_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, cfg.max_training_steps - warmup)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, cfg: TrainConfig) -> None:
    """Give each parameter group its rate for optimizer step `step`, counted from 1: its "peak_lr" times lr_factor."""
    factor = lr_factor(step, cfg)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
