"""The learning rate of each step."""

import math
from decimal import Decimal

import torch

from models.config import TrainConfig


def share_of(steps: int, share: float) -> Decimal:
    """So many steps, exact: 0.07 of 100 is 7, though more in floats, and 0.29 of 100 is 29, though less."""
    return Decimal(repr(float(share))) * steps


def cooldown_steps(cfg: TrainConfig, steps: int) -> int:
    """Length of a cooldown of a run with so many steps (of wsd), or after so many (on_converged cooldown)."""
    return max(1, math.ceil(share_of(steps, cfg.cooldown_ratio)))


def cooldown_end(cfg: TrainConfig, start: int) -> int:
    """The last step of the cooldown of a run that converged after step `start`: at most the planned last one."""
    return max(start + 1, min(start + cooldown_steps(cfg, start), cfg.max_training_steps))


def lr_factor(
    step: int, cfg: TrainConfig, cooldown_start: int | None = None, warmup_ratio: float | None = None
) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1: linear warm-up, then the schedule.

    cooldown_start: the step after which the run converged and cools down; the rate never rises, as a schedule may be
    lower already. warmup_ratio: in place of cfg's.
    """
    ratio = cfg.warmup_ratio if warmup_ratio is None else warmup_ratio
    planned = _planned(step, cfg, ratio)
    if cooldown_start is None:
        return planned
    cooled = _cooled((step - cooldown_start) / (cooldown_end(cfg, cooldown_start) - cooldown_start), cfg)
    return min(planned, cooled, _planned(cooldown_start, cfg, ratio))  # which may lie in the warm-up


def _planned(step: int, cfg: TrainConfig, warmup_ratio: float) -> float:
    """The factor of the warm-up and the schedule."""
    total = cfg.max_training_steps
    warmup = int(share_of(total, warmup_ratio))
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if cfg.lr_schedule == "constant":
        return 1.0
    if cfg.lr_schedule == "wsd":
        length = cooldown_steps(cfg, cfg.max_training_steps)
        return _cooled((step - (cfg.max_training_steps - length)) / length, cfg)
    remaining = 1 - progress if cfg.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining


def _cooled(progress: float, cfg: TrainConfig) -> float:
    """The factor at a share of the cooldown; before it, at a share of at most 0, 1."""
    progress = min(max(progress, 0.0), 1.0)
    remaining = 1 - (math.sqrt(progress) if cfg.cooldown_shape == "sqrt" else progress)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, cfg: TrainConfig, cooldown_start: int | None = None
) -> None:
    """Give each parameter group its rate for optimizer step `step`, counted from 1: its "peak_lr" times lr_factor,
    which may have a warm-up of its own for the group called projector."""
    for group in optimizer.param_groups:
        warmup_ratio = cfg.warmup_ratio_mp if group.get("name") == "projector" else None
        group["lr"] = group["peak_lr"] * lr_factor(step, cfg, cooldown_start, warmup_ratio)
