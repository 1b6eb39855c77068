"""Time the training step of any recipe with random weights and random data; nothing is downloaded.

    python scripts/bench_step.py --config configs/quickstart.yaml
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --switches 1024 4096

Prints seconds a step, tokens/s, achieved TFLOP/s, peak memory and what one check of GradES costs. Every flag of
train.py works besides. Medians over the steps after warm-up; compare runs by their ratios. --switches makes a table
instead: each switch on top of the flags that are given, all of which are off there.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.bench_common import Bench, make_monitor, parse, parser, peak_memory_gib, table, time_checks
from training.arguments import Settings

CHECKS = 5
# Flags of train.py that change the step's speed, as fields of TrainConfig.
OFF = {"packing": False, "activation_checkpointing": False, "compile": False, "loss_chunk_size": 0}
DOCUMENTS = 4  # in a row of --packing
SWITCHES: dict[str, dict] = {
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
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=10, help="timed steps")
    made.add_argument("--warmup_steps", type=int, default=3, help="steps before them")
    made.add_argument("--switches", type=int, nargs="+", metavar="LENGTH", help="a table of switches at these lengths")
    arguments, settings = parse(made, argv)
    if arguments.switches:
        print(switch_table(arguments, settings))
        return
    grades = settings.grades
    bench = Bench(arguments, settings)
    monitor = make_monitor(bench, grades.metric, grades.monitor_sample)
    bench.step()
    flop = bench.flops()
    step_s = step_seconds(bench, arguments)
    check_s = time_checks(bench, {grades.metric: monitor}, CHECKS)[1][grades.metric]

    tokens = sum(batch["input_ids"].numel() for batch in bench.micro_batches)
    peak_gib = peak_memory_gib(bench.device)  # with the monitor's snapshot
    lines = [
        *bench.describe(),
        f"step                 {step_s:.4f} s",
        f"tokens/s             {tokens / step_s:,.0f}",
        f"matrix products      {flop / 1e12:.4f} TFLOP a step, {flop / step_s / 1e12:.3f} TFLOP/s",
        f"peak memory          {peak_gib:.2f} GiB{'' if bench.device.type == 'cuda' else ' (process)'}",
        f"components           {len(monitor.components)}",
        f"one GradES check     {check_s:.4f} s = {check_s / step_s:.1%} of a step",
        f"at interval {grades.compute_interval:<8} {check_s / step_s / grades.compute_interval:.2%} of the run",
    ]
    print("\n".join(lines))


def step_seconds(bench: Bench, arguments: argparse.Namespace) -> float:
    for _ in range(arguments.warmup_steps):
        bench.step()
    return statistics.median(bench.seconds(bench.step) for _ in range(arguments.steps))


def switched(arguments: argparse.Namespace, settings: Settings, length: int, changes: dict) -> Bench:
    """The benchmark of rows of that number of tokens, with these switches on and the others off."""
    train = dataclasses.replace(settings.train, **OFF | changes)
    rows = {"sequence_length": length, "documents": DOCUMENTS if train.packing else 1}
    return Bench(argparse.Namespace(**vars(arguments) | rows), dataclasses.replace(settings, train=train))


def switch_table(arguments: argparse.Namespace, settings: Settings) -> str:
    """A line for each sequence length and switch. Peak memory is known on a CUDA device alone: a process only grows."""
    lines = []
    for length in arguments.switches:
        bench = switched(arguments, settings, length, {})
        flop = bench.flops()  # of all the lines: what is computed a second time does not count
        where = bench.describe()[:2]
        for name, changes in SWITCHES.items():
            del bench
            bench = switched(arguments, settings, length, changes)
            on_gpu = bench.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step_s = step_seconds(bench, arguments)
            tokens = sum(batch["input_ids"].numel() for batch in bench.micro_batches)
            peak = f"{peak_memory_gib(bench.device):.2f}" if on_gpu else "-"
            speed = f"{tokens / step_s:,.0f}", f"{flop / step_s / 1e12:.3f}"
            lines.append([name, f"{length:,}", f"{step_s:.4f}", *speed, peak])
            print(f"{length:,} tokens, {name}: {step_s:.4f} s", file=sys.stderr, flush=True)
    header = ["switch", "tokens a row", "step (s)", "tokens/s", "TFLOP/s", "peak (GiB)"]
    return "\n".join([*where, "", table(header, lines)])


if __name__ == "__main__":
    main()
