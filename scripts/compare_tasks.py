"""One setting over tasks of different difficulty: rollback gain ends each run when it has learned.

    python scripts/compare_tasks.py --seeds 2        # needs scikit-learn, for its digits

Every run goes to its full length and measures all the way; where the rule ends it, without a grace period, is read off
afterwards, as in compare_stopping.py. The control is the best single length for all tasks: the one that takes the same
time in total.
Writes tasks.md, results.json and tasks.png.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure

from data import easy_vqa
from grades.config import ROLLBACK, ROLLBACK_TAU
from grades.files import written_beside
from scripts import run_flags, runs
from scripts.compare_stopping import Curves
from scripts.runs import Runs, RunSpec

# From an early step on every check measures, and nothing freezes.
CURVES = (
    "--enable_grades --vision_tau 1e-12 --language_tau 1e-12 --freeze_order any --alpha 0.1 --compute_interval 100 "
    "--eval_interval 100"
)
WIDER = (
    "--vit_hidden_dim 96 --vit_inter_dim 384 --lm_hidden_dim 192 --lm_inter_dim 384 --lm_n_heads 6 --lm_n_kv_heads 3"
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_QUESTION, DIGIT_TEST_ROWS = "what digit is it?", 297
TASKS = {
    "colors": "colours",
    "shapes": "shapes",
    "yes_no": "yes or no",
    "all": "all questions",
    "quarter": "all, a quarter of the images",
    "digits": "digits of scikit-learn",
    "wider": "all, towers half as wide again",
}


def task_flags(task: str, data: Path) -> list[str]:
    """What a task adds to the recipe. data: folder of the tasks' rows."""
    digits = f"--image_mean 0.3 --image_std 0.38 --no_flip_images --lm_base_vocab_size {len(digit_words()) + 4}"
    words = {
        "colors": "--train_dataset_name color",
        "shapes": "--train_dataset_name shape",
        "yes_no": "--train_dataset_name yes_no_shape yes_no_color",
        "quarter": "--test_dataset_path easy-vqa",
        "digits": digits,
        "wider": WIDER,
    }.get(task, "")
    paths: dict[str, Path] = {}
    if task in ("quarter", "digits"):
        paths["train_dataset_path"] = data / task / "train.jsonl"
    if task == "digits":
        paths |= {"test_dataset_path": data / task / "test.jsonl", "lm_tokenizer": data / task / "tokenizer"}
    return words.split() + [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def digit_words() -> list[str]:
    """Words of the digits' questions and answers, with ChatML's."""
    return ["\n", "system", "user", "assistant", "?", *DIGIT_QUESTION.rstrip("?").split(), *DIGITS]


def write_quarter(folder: Path) -> None:
    """Every fourth image of easy-VQA's training rows, in a new folder."""
    folder.mkdir()
    rows = easy_vqa.rows("train")[::4]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_digits(folder: Path) -> None:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn brings: pictures, rows and a tokenizer of their words."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f"the task digits needs scikit-learn ({error}): install it, or choose --tasks") from None
    folder.mkdir()
    found = load_digits()
    lines = []
    for i, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
        path = folder / f"{i:04}.png"
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).convert("RGB").save(path)
        turn = {"user": DIGIT_QUESTION, "assistant": DIGITS[digit], "source": "digit"}
        lines.append(json.dumps({"images": [path.name], "texts": [turn]}) + "\n")
    for name, part in (("test", lines[:DIGIT_TEST_ROWS]), ("train", lines[DIGIT_TEST_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    easy_vqa.tokenizer(digit_words()).save_pretrained(folder / "tokenizer")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = run_flags.make_parser(__doc__.splitlines()[0], prefix="tasks", seeds=1)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--tau", type=float, default=ROLLBACK_TAU, help=f"nats per 100 steps (default: {ROLLBACK_TAU})")
    parser.add_argument("--patience", type=int, default=2, help="checks in a row below tau (default: 2)")
    own = [word.removeprefix("--") for word in CURVES.split() if word.startswith("--")]
    arguments = run_flags.read_arguments(parser, argv, own)
    if (metric := arguments.recipe.grades.metric) != ROLLBACK:
        parser.error(f"--metric {metric}: must be {ROLLBACK}, in the recipe or after --")
    return arguments


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """Seed by seed, so that a machine that becomes slower slows all tasks."""
    data = arguments.output / "data"
    return [
        RunSpec(
            task, TASKS[task], seed,
            (*arguments.extra, *CURVES.split(), *task_flags(task, data), "--seed", str(seed)),
        )
        for seed in range(arguments.seeds)
        for task in TASKS
        if task in arguments.tasks
    ]  # fmt: skip


def ends(made: Runs, arguments: argparse.Namespace) -> tuple[list[dict], int]:
    """What each finished run says at the rule's end, at the single length and at its own; and the single length."""
    found = []
    for spec in made.specs:
        if spec.name in made.results:
            curves, summary = Curves.read(made.folder(spec.name)), made.summary(spec.name)
            step_s = summary["train_time_s"] / summary["steps"]
            ours = curves.end_by_gain(arguments.tau, arguments.patience)
            found.append({"task": spec.row, "seed": spec.seed, "step_s": step_s, "curves": curves, "ours": ours})
    total_s = sum(run["ours"] * run["step_s"] for run in found)
    single = total_s / sum(run["step_s"] for run in found) if found else 0
    for run in found:
        curves = run.pop("curves")
        run["single"] = min(curves.val, key=lambda step: abs(step - single))
        run["full"] = curves.last
        for rule in ("ours", "single", "full"):
            run[f"{rule}_match"] = curves.val[run[rule]]["val/exact_match"]
            run[f"{rule}_loss"] = curves.val[run[rule]]["val/loss_averaged"]
    return found, round(single)


def tables(made: Runs, arguments: argparse.Namespace) -> tuple[str, dict]:
    """The text of tasks.md, and what results.json says of each run."""
    found, single = ends(made, arguments)
    nearest = ", ".join(f"{step:,}" for step in sorted({run["single"] for run in found}))
    at_single = f"at {nearest} steps, the evaluation nearest to {single:,}"
    header = ["task", "ends by gain", "exact match (%)", at_single, "at full length"]
    lines = []
    for task, label in TASKS.items():
        if mine := [run for run in found if run["task"] == task]:
            steps = ", ".join(f"{run['ours']:,}" for run in mine)
            means = (statistics.mean(run[f"{rule}_match"] for run in mine) for rule in ("ours", "single", "full"))
            lines.append([label, steps, *(f"{100 * match:.2f}" for match in means)])
    totals: dict[str, list[str]] = {"mean": [], "worst": []}
    for rule in ("ours", "single", "full") if found else ():
        matches = [100 * run[f"{rule}_match"] for run in found]
        totals["mean"].append(f"{statistics.mean(matches):.2f}")
        totals["worst"].append(f"{min(matches):.2f}")
    if found:
        hours = {rule: sum(run[rule] * run["step_s"] for run in found) for rule in ("ours", "single", "full")}
        mean_steps = f"{statistics.mean(run['ours'] for run in found):,.0f}"
        lines += [["mean", mean_steps, *totals["mean"]], ["worst run", "", *totals["worst"]]]
        lines.append(["seconds of steps", "", *(f"{seconds:,.0f}" for seconds in hours.values())])
    text = "Exact match over the validation rows: mean over the seeds; steps of each seed.\n\n"
    return text + runs.markdown_table(header, lines), {"runs": found, "single_length": single}


def picture(made: Runs, arguments: argparse.Namespace) -> Figure:
    """Validation exact match by step, a line per run, with a mark where the rule ends it."""
    found, single = ends(made, arguments)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for i, (task, label) in enumerate(TASKS.items()):
        for run in (run for run in found if run["task"] == task):
            curves = Curves.read(made.folder(f"{task}_seed{run['seed']}"))
            steps = sorted(curves.val)
            matches = [100 * curves.val[step]["val/exact_match"] for step in steps]
            named = label if run["seed"] == 0 else None
            axis.plot(steps, matches, color=f"C{i}", linewidth=1.2, label=named)
            axis.plot(run["ours"], 100 * run["ours_match"], "o", color=f"C{i}", markeredgecolor="white", markersize=9)
    axis.axvline(single, color="0.5", linewidth=1, linestyle="--", label="single length of equal time")
    axis.set_xlabel("optimizer step (dots: where the rule ends the run)")
    axis.set_ylabel("validation exact match (%)")
    axis.set_title("each task at its own time", loc="left", fontweight="bold")
    axis.grid(color="0.92")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def main(argv: list[str] | None = None, launch: runs.Launch = runs.launch) -> int:
    arguments = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    specs = make_specs(arguments)
    for task, write in {"quarter": write_quarter, "digits": write_digits}.items():
        folder = arguments.output / "data" / task
        if task in arguments.tasks and not arguments.list and not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(folder) as beside:  # an interruption leaves no half of it
                write(beside)
    return runs.run_script(arguments, specs, tables, picture, "tasks", launch)


if __name__ == "__main__":
    sys.exit(main())
