"""Time training with and without --feature_cache_gib on a recipe's own data, in turns, with random weights.

    python scripts/make_shapes.py --output shapes_rows
    python scripts/bench_cache.py --config configs/nanomolmo2_tiny_stage2.yaml

Two runs from the same weights, one with the cache, take turns of --turn steps each; who begins alternates, so that a
machine that becomes slower slows both. Prints, of each, steps per second and CPU seconds per step (of all threads, data
included), the share of images that were not computed, and how far the losses differ. The vision tower is frozen from
the first step on, whatever its learning rate. Takes every flag of train.py too; without --feature_cache_gib N the
recipe's, or 1.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.mixture_rows import load_training_rows
from data.pipeline import load_data
from models.vision_language_model import VisionLanguageModel
from scripts.runs import markdown_table
from training import setup
from training.arguments import Settings, parse_arguments
from training.feature_cache import FeatureCache
from training.flops import FlopCounter
from training.step import clip_gradients, forward_backward


class Run:
    """A run's data, model and optimizer, which count what their steps take."""

    def __init__(self, settings: Settings, gib: float):
        self.cfg = dataclasses.replace(settings.train, feature_cache_gib=gib, lr_vision_backbone=0.0)
        self.device = setup.pick_device()
        setup.prepare_backend(self.device)
        setup.set_seed(self.cfg.seed)
        self.data = load_data(load_training_rows(self.cfg), settings.vlm, self.cfg, None)
        self.model = VisionLanguageModel(settings.vlm).to(self.device)
        setup.freeze_untrained(self.model, self.cfg)
        setup.apply_to_model(self.model, self.cfg)
        self.optimizer = setup.make_optimizer(self.model, self.cfg)
        self.autocast = setup.autocast(self.device, self.cfg.dtype)
        self.cache = FeatureCache(self.model, gib) if gib else None
        self.flops = FlopCounter(self.model)
        self.losses: list[float] = []
        self.wall_s: list[float] = []  # per step, of each turn
        self.cpu_s: list[float] = []
        self.data.start_reading()

    def step(self) -> None:
        batches = [next(self.data) for _ in range(self.cfg.gradient_accumulation_steps)]
        loss = forward_backward(self.model, batches, self.device, self.autocast, cache=self.cache)
        self.flops.add(batches)
        clip_gradients(self.model, self.cfg.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())

    def turn(self, steps: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self.wall_s.append((time.perf_counter() - wall) / steps)
        self.cpu_s.append((time.process_time() - cpu) / steps)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, help="of each run; by default max_training_steps of the recipe")
    parser.add_argument("--turn", type=int, default=10, help="steps in a turn")
    arguments, rest = parser.parse_known_args(argv)
    settings = parse_arguments(rest)
    steps = arguments.steps or settings.train.max_training_steps
    if arguments.turn < 1 or steps < 2 * arguments.turn:  # the halves are reported
        parser.error(f"--steps {steps}: must be at least twice --turn {arguments.turn}, which must be >= 1")
    runs = {"with": Run(settings, settings.train.feature_cache_gib or 1.0), "without": Run(settings, 0.0)}
    for number in range(steps // arguments.turn):
        for name in sorted(runs, reverse=number % 2 == 1):
            runs[name].turn(arguments.turn)
    print("\n".join(report(settings, runs)))


def report(settings: Settings, runs: dict[str, Run]) -> list[str]:
    ours, theirs = runs["with"], runs["without"]
    assert ours.cache is not None
    threads = f"{torch.get_num_threads()} threads"
    lines = []
    for name, run in runs.items():
        speeds = [f"{1 / statistics.fmean(run.wall_s):.2f}", f"{1000 * statistics.fmean(run.cpu_s):.1f}"]
        lines.append([name, *speeds, f"{run.flops.done / 1e12:.3f}"])
    cache = ours.cache
    half = len(ours.wall_s) // 2
    ratios = [statistics.fmean(theirs.cpu_s[part]) / statistics.fmean(ours.cpu_s[part]) for part in
              (slice(None), slice(half), slice(half, None))]  # fmt: skip
    difference = max(abs(one - other) for one, other in zip(ours.losses, theirs.losses, strict=True))
    return [
        f"{settings.recipe.stem}, {len(ours.losses):,} steps, {setup.dtype_in_effect(ours.autocast)} products on "
        f"{ours.device.type}, torch {torch.__version__}, {threads}",
        "",
        markdown_table(["cache", "steps/s", "CPU ms per step", "TFLOP in all"], lines),
        "",
        f"CPU time without / with: {ratios[0]:.3f} (first half {ratios[1]:.3f}, second half {ratios[2]:.3f})",
        f"not computed: {cache.hits:,} of {cache.lookups:,} images, {cache.hits / max(1, cache.lookups):.1%}; "
        f"{cache.held_bytes / 2**20:.1f} MiB held",
        f"largest difference of a step's loss: {difference:.3g}",
    ]


if __name__ == "__main__":
    main()
