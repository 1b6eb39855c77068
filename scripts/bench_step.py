"""Time the training step of any recipe with random weights and random data; nothing is downloaded.

    python scripts/bench_step.py --config configs/quickstart.yaml
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128

Prints seconds a step, tokens/s, achieved TFLOP/s, peak memory and what one check of GradES costs. Every flag of
train.py works besides. Medians over the steps after warm-up; compare runs by their ratios.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import Bench, make_monitor, parse, parser, peak_memory_gib, time_checks

CHECKS = 5


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=10, help="timed steps")
    made.add_argument("--warmup_steps", type=int, default=3, help="steps before them")
    arguments, settings = parse(made, argv)
    grades = settings.grades
    bench = Bench(arguments, settings)
    monitor = make_monitor(bench, grades.metric, grades.monitor_sample)
    bench.step()
    flop = bench.flops()
    for _ in range(arguments.warmup_steps):
        bench.step()
    step_s = statistics.median(bench.seconds(bench.step) for _ in range(arguments.steps))
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


if __name__ == "__main__":
    main()
