"""Time the training step of any recipe with random weights and random data; nothing is downloaded.

    python scripts/bench_step.py --config configs/quickstart.yaml
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --switches 1024 4096

Prints seconds per step, tokens/s, achieved TFLOP/s, peak memory and what one check of GradES costs. Takes every flag of
train.py too. Medians over the steps after warm-up; compare runs by their ratios. --switches prints a table instead:
each switch alone, whatever the flags say, and the rest as the flags say. --batch_sizes prints one of memory and speed
by batch size, where running out of memory is a result.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.bench_common import Bench, make_monitor, make_parser, parse, time_checks
from scripts.runs import markdown_table
from training.arguments import Settings

CHECKS = 5
# Flags of train.py that change the step's speed, as fields of TrainConfig.
OFF: dict[str, Any] = {"packing": False, "activation_checkpointing": False, "compile": False, "loss_chunk_size": 0}
DOCUMENTS = 4  # in a row of --packing
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "--dtype float32": {"dtype": "float32"},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--packing": {"packing": True},
    "--activation_checkpointing": {"activation_checkpointing": True},
    "--loss_chunk_size 128": {"loss_chunk_size": 128},
    "--compile": {"compile": True},
    "--packing --compile": {"packing": True, "compile": True},
}


def main(argv: list[str] | None = None) -> None:
    made = make_parser(__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=10, help="timed steps")
    made.add_argument("--warmup_steps", type=int, default=3, help="steps before them")
    made.add_argument("--switches", type=int, nargs="+", metavar="LENGTH", help="a table of switches at these lengths")
    made.add_argument("--batch_sizes", type=int, nargs="+", metavar="ROWS", help="a table of these batch sizes")
    arguments, settings = parse(made, argv)
    if arguments.switches:
        print(switch_table(arguments, settings))
        return
    if arguments.batch_sizes:
        print(batch_table(arguments, settings))
        return
    grades = settings.grades
    bench = Bench(arguments, settings)
    monitor = make_monitor(bench, grades.metric, grades.monitor_sample)
    bench.step()
    flop = bench.flops()
    step_s = step_seconds(bench, arguments)
    check_s = time_checks(bench, {grades.metric: monitor}, CHECKS)[1][grades.metric]

    peak = bench.peak_gib()  # with the monitor's snapshot
    where = "" if bench.device.type == "cuda" else " (process)"
    lines = [
        *bench.describe(),
        f"step                 {step_s:.4f} s",
        f"tokens/s             {bench.tokens() / step_s:,.0f}",
        f"matrix products      {flop / 1e12:.4f} TFLOP per step, {flop / step_s / 1e12:.3f} TFLOP/s",
        f"peak memory          {'unknown' if peak is None else f'{peak:.2f} GiB{where}'}",
        f"components           {len(monitor.components)}",
        f"one GradES check     {check_s:.4f} s = {check_s / step_s:.1%} of a step",
        f"at interval {grades.compute_interval:<8} {check_s / step_s / grades.compute_interval:.2%} of the run",
    ]
    print("\n".join(lines))


def step_seconds(bench: Bench, arguments: argparse.Namespace) -> float:
    """The median over the timed steps."""
    for _ in range(arguments.warmup_steps):
        bench.step()
    return statistics.median(bench.seconds(bench.step) for _ in range(arguments.steps))


def switched(arguments: argparse.Namespace, settings: Settings, length: int, changes: dict[str, Any]) -> Bench:
    """The benchmark with rows of `length` tokens, these switches on and the others off."""
    train = dataclasses.replace(settings.train, **OFF | changes)
    rows = {"sequence_length": length, "documents": DOCUMENTS if train.packing else 1}
    return Bench(argparse.Namespace(**vars(arguments) | rows), dataclasses.replace(settings, train=train))


def switch_table(arguments: argparse.Namespace, settings: Settings) -> str:
    """A line per sequence length and switch."""
    lines = []
    for length in arguments.switches:
        bench = switched(arguments, settings, length, {})
        flop = bench.flops()
        where = bench.describe()[:2]
        del bench
        for name, changes in SWITCHES.items():
            step_s, tokens, peak = measured(lambda: switched(arguments, settings, length, changes), arguments)  # noqa: B023
            speed = [f"{step_s:.4f}", f"{tokens / step_s:,.0f}", f"{flop / step_s / 1e12:.3f}"] if step_s else ["–"] * 3
            lines.append([name, f"{length:,}", *speed, peak])
            print(f"{length:,} tokens, {name}: {speed[0]} s", file=sys.stderr, flush=True)
    header = ["switch", "tokens per row", "step (s)", "tokens/s", "TFLOP/s", "peak (GiB)"]
    return "\n".join([*where, "", markdown_table(header, lines)])


def batch_table(arguments: argparse.Namespace, settings: Settings) -> str:
    """A line per batch size, without GradES."""
    lines = []
    for rows in arguments.batch_sizes:
        sized = dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=rows))
        step_s, tokens, peak = measured(lambda: Bench(arguments, sized), arguments)  # noqa: B023
        lines.append([f"{rows}", *([f"{step_s:.4f}", f"{tokens / step_s:,.0f}"] if step_s else ["–"] * 2), peak])
    where = f"{settings.recipe.stem}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return "\n".join([where, "", markdown_table(["batch size", "step (s)", "tokens/s", "peak (GiB)"], lines)])


def measured(make: Callable[[], Bench], arguments: argparse.Namespace) -> tuple[float | None, int, str]:
    """(seconds of a step, its tokens, peak memory in GiB as text); without the memory for it no seconds.

    Peak memory is known on CUDA only: that of a process never falls.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        bench = make()
        step_s = step_seconds(bench, arguments)
    except torch.OutOfMemoryError:
        return None, 0, "out of memory"
    return step_s, bench.tokens(), f"{bench.peak_gib():.2f}" if bench.device.type == "cuda" else "–"


if __name__ == "__main__":
    main()
