"""What one check of GradES costs, by metric, exact and on samples; or, with --real_run, how large sampling errors are.

    python scripts/bench_monitor.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128 \\
        --gradient_accumulation_steps 1
    python scripts/bench_monitor.py --config configs/nanovlm_222m.yaml --batch_size 2 --gradient_accumulation_steps 1 \\
        --no_packing --turns_per_image 1 --num_workers 0 --real_run 200 --samples 17 64

A check is all that the monitor does for it: for gradient_change that includes the copy in the step before. Held: what
it keeps until the next check. Two simple ways to measure weight_change are there to compare with. --real_run trains a
model of the recipe's shape on easy-VQA from random weights and compares each sampled value with the exact one of the
same check. Nothing is downloaded. Takes every flag of train.py too; the interval is --compute_interval.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data import easy_vqa
from data.pipeline import load_data
from data.rows import load_rows
from grades import GradESMonitor
from grades.metrics import METRICS
from scripts.bench_common import Bench, make_monitor, make_parser, parse, time_checks
from scripts.runs import markdown_table
from training.arguments import Settings
from training.schedule import set_learning_rate


class Reference:
    """weight_change at even steps with a float copy of every weight and temporary tensors of the same size.

    All matrices at once, or one by one, each with a wait for the device.
    """

    def __init__(self, monitor: GradESMonitor, one_by_one: bool):
        self.weights = [weight.detach() for component in monitor.components for weight in component.weights]
        self.kept = [weight.float().clone() for weight in self.weights]
        self.size = 1 if one_by_one else len(self.weights)

    def measure(self) -> list[float]:
        """The change of each matrix since the last call."""
        sums: list[float] = []
        for i in range(0, len(self.weights), self.size):
            weights, kept = self.weights[i : i + self.size], self.kept[i : i + self.size]
            sums += torch.stack(list(torch._foreach_norm(torch._foreach_sub(weights, kept), 1))).tolist()
            torch._foreach_copy_(kept, weights)
        return sums

    def after_backward(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> None:
        if step % 2 == 0:
            self.measure()


def reading(monitor: GradESMonitor) -> str:
    """How its metric reads the weights."""
    n = getattr(monitor.metric.sampler, "n", 1)
    return "exact" if n == 1 else f"1 in {n}"


def held_bytes(watcher: GradESMonitor | Reference) -> int:
    """Copies, and the places of samples."""
    if isinstance(watcher, Reference):
        return sum(kept.nbytes for kept in watcher.kept)
    places = getattr(watcher.metric.sampler, "chosen", {}).values()
    return sum(t.nbytes for kept in (*watcher.metric.kept.values(), places) for t in kept)


def costs(arguments: argparse.Namespace, settings: Settings) -> list[str]:
    """The lines of the table of costs."""
    bench = Bench(arguments, settings)
    made = [make_monitor(bench, metric, sample) for metric in METRICS for sample in arguments.samples]
    watchers: dict[tuple[str, str], GradESMonitor | Reference] = {
        (monitor.config.metric, reading(monitor)): monitor for monitor in made
    }
    watchers["weight_change", "naive foreach"] = Reference(made[0], one_by_one=False)
    watchers["weight_change", "one sync per component"] = Reference(made[0], one_by_one=True)
    step_s, check_s = time_checks(bench, watchers, arguments.rounds)
    bench.backward()
    for watcher in watchers.values():  # after an odd step the metrics hold what they compare the next one with
        watcher.after_backward(2 * arguments.rounds + 1)
    interval = settings.grades.compute_interval
    rows = []
    for (metric, how), watcher in watchers.items():
        seconds = check_s[metric, how]
        shares = [f"{seconds / step_s:.2%}", f"{seconds / step_s / interval:.3%}"]
        rows.append([metric, how, f"{1e3 * seconds:.2f}", *shares, f"{held_bytes(watcher) / 2**20:.2f}"])
    header = ["metric", "read", "check (ms)", "of a step", f"at interval {interval}", "held (MiB)"]
    count, weights = len(made[0].components), sum(c.elements for c in made[0].components)
    lines = [f"components           {count}, {weights:,} weights", f"step                 {step_s:.4f} s"]
    return [*bench.describe(), *lines, "", markdown_table(header, rows)]


def on_easy_vqa(settings: Settings, steps: int) -> Settings:
    """The recipe on easy-VQA's rows and words, with this number of steps; the towers keep their shapes."""
    words: dict[str, Any] = {
        "lm_tokenizer": "easy-vqa",
        "lm_base_vocab_size": easy_vqa.VOCAB_SIZE,
        "lm_vocab_size": None,
    }
    rows: dict[str, Any] = {"train_dataset_path": easy_vqa.NAME, "test_dataset_path": None, "val_size": 0}
    rows |= {"max_training_steps": steps}
    vlm, train = dataclasses.replace(settings.vlm, **words), dataclasses.replace(settings.train, **rows)
    return dataclasses.replace(settings, vlm=vlm, train=train)


def train_watched(bench: Bench, monitors: list[GradESMonitor]) -> None:
    """The run of the bench's recipe, with its schedule; all monitors watch each step."""
    data = load_data(load_rows(easy_vqa.NAME), bench.settings.vlm, bench.cfg, None)
    data.start_reading()
    for step in range(1, bench.cfg.max_training_steps + 1):
        bench.micro_batches = [next(data) for _ in bench.micro_batches]
        set_learning_rate(bench.optimizer, step, bench.cfg)
        bench.backward()
        for monitor in monitors:
            monitor.after_backward(step)
        bench.update()
        for monitor in monitors:
            monitor.after_step(step)


def relative_errors(sampled: GradESMonitor, exact: GradESMonitor) -> np.ndarray:
    """|sampled / exact - 1| of every component at every check that measured it."""
    pairs = [
        pair
        for checks in zip(sampled.checks, exact.checks, strict=True)
        for pair in zip(*(check["values"] for check in checks), strict=True)
        if None not in pair
    ]
    ours, theirs = np.array(pairs).T
    return np.abs(ours / theirs - 1)


def sampling_errors(arguments: argparse.Namespace, settings: Settings) -> list[str]:
    """The lines of the table of errors."""
    bench = Bench(arguments, on_easy_vqa(settings, arguments.real_run))
    interval, samples = settings.grades.compute_interval, [n for n in arguments.samples if n > 1]
    exact = {metric: make_monitor(bench, metric, 1, interval) for metric in METRICS}
    sampled = [make_monitor(bench, metric, n, interval) for metric in METRICS for n in samples]
    train_watched(bench, [*exact.values(), *sampled])
    rows = []
    for monitor in sampled:
        errors = relative_errors(monitor, exact[monitor.config.metric])
        shares = [f"{share:.2%}" for share in (*np.percentile(errors, [50, 95]), errors.max())]
        rows.append([monitor.config.metric, reading(monitor), f"{len(monitor.checks)}", f"{len(errors):,}", *shares])
    header = ["metric", "read", "checks", "values", "median error", "p95", "largest"]
    return [*bench.describe(), f"easy-VQA             {arguments.real_run} steps", "", markdown_table(header, rows)]


def main(argv: list[str] | None = None) -> None:
    made = make_parser(__doc__.splitlines()[0])
    made.add_argument("--samples", type=int, nargs="+", default=[1, 64], help="the N of --monitor_sample; 1: exact")
    made.add_argument("--rounds", type=int, default=5, help="checks per median")
    made.add_argument("--real_run", type=int, metavar="STEPS", help="train, and compare samples with exact values")
    arguments, settings = parse(made, argv)
    interval = settings.grades.compute_interval
    if min(arguments.samples) < 1:
        made.error(f"--samples {min(arguments.samples)}: must be >= 1")
    if arguments.real_run is not None and arguments.real_run < 2 * interval:
        made.error(f"--real_run {arguments.real_run}: must be at least two checks of --compute_interval {interval}")
    if arguments.real_run is not None and max(arguments.samples) == 1:
        made.error("--samples 1: must hold an N > 1 with --real_run")
    print("\n".join(costs(arguments, settings) if arguments.real_run is None else sampling_errors(arguments, settings)))


if __name__ == "__main__":
    main()
