"""The paper's comparison on any recipe: full training and LoRA, each plain, with early stopping and with GradES.

    python scripts/reproduce.py --config configs/quickstart.yaml --seeds 3
    python scripts/reproduce.py --config configs/table10_nanovlm.yaml --seeds 1 -- --num_workers 8

Two controls say what the choice of the frozen matrices is worth: a full run planned so short that it takes the time of
Full + GradES, and one that freezes as many matrices at the same steps, drawn at random. The runs go seed by seed, so
that a machine that changes its speed hits all rows. Writes table.md, results.json and table.png. After an interruption
or a failure the same command continues.
"""

import argparse
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades.files import write_json, write_text
from scripts import runs
from scripts.runs import Runs, RunSpec, cell, compare
from training.arguments import Settings

ROWS = {
    "full": "Full",
    "full_es": "Full + ES",
    "full_grades": "Full + GradES",
    "lora": "LoRA",
    "lora_es": "LoRA + ES",
    "lora_grades": "LoRA + GradES",
    "shortened": "Full, shortened",
    "random": "Random freezing",
}
NEEDS = {"shortened": ("full", "full_grades"), "random": ("full_grades",)}
BASE = "lora_base"  # the pretrained model that LoRA starts from, where the recipe has none

# What the rows add to the recipe; --es_flags, --grades_flags, --lora_flags and --lora_grades_flags override it.
ES_FLAGS = "--early_stopping"
GRADES_FLAGS = "--enable_grades"
# The paper's Eq. 3. The recipe's taus are in another metric's unit, so the grace period finds them.
LORA_GRADES_FLAGS = "--enable_grades --metric gradient_norm --vision_tau auto --language_tau auto"
# By whether the recipe starts from pretrained backbones. The paper's Table 8: rank 32, ten times the learning rate of
# full training, 2e-5. A recipe from scratch already has a learning rate near the largest that trains: three times.
LORA = {True: {"rank": 32, "lr_factor": 10.0}, False: {"rank": 8, "lr_factor": 3.0}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = runs.parser(__doc__.splitlines()[0], prefix="reproduce", seeds=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table (default: all)")
    for name in ("es", "grades", "lora", "lora_grades"):
        default = globals()[f"{name.upper()}_FLAGS"] if name != "lora" else "rank and learning rate"
        help = f'flags of train.py over "{default}", in one word: --{name}_flags="--a 1 --b 2"'
        parser.add_argument(f"--{name}_flags", default="", help=help)
    share = "recipes without pretrained backbones: length of the run whose weights LoRA starts from, as a share"
    parser.add_argument("--lora_base_share", type=float, default=0.25, help=f"{share} of the recipe's (default: 0.25)")
    arguments = runs.read_arguments(parser, argv)
    if not 0 < arguments.lora_base_share <= 1:
        parser.error(f"--lora_base_share {arguments.lora_base_share}: must be in (0, 1]")
    for row in arguments.rows:
        if absent := [need for need in NEEDS.get(row, ()) if need not in arguments.rows]:
            parser.error(f"--rows {row} needs {' and '.join(absent)} too")
    return arguments


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """All runs in their order: seed by seed, in each seed the base before LoRA and the controls last."""
    rows = [row for row in ROWS if row in arguments.rows]
    recipe = arguments.recipe
    needs_base = not (recipe.vlm.vlm_load_backbone_weights or recipe.train.resume_from_vlm_checkpoint)
    specs = []
    for seed in range(arguments.seeds):
        if needs_base and any(row.startswith("lora") for row in rows):
            specs.append(base_spec(arguments, seed))
        specs += [row_spec(arguments, row, seed, needs_base) for row in rows]
    return specs


def base_spec(arguments: argparse.Namespace, seed: int) -> RunSpec:
    steps = max(1, round(arguments.lora_base_share * arguments.recipe.train.max_training_steps))
    short = ("--max_training_steps", str(steps), "--eval_interval", str(steps))
    return RunSpec(BASE, "base for LoRA", seed, (*arguments.extra, *short, "--seed", str(seed)))


def row_spec(arguments: argparse.Namespace, row: str, seed: int, needs_base: bool) -> RunSpec:
    words = {
        "full": "",
        "full_es": f"{ES_FLAGS} {arguments.es_flags}",
        "full_grades": f"{GRADES_FLAGS} {arguments.grades_flags}",
        "lora": "",
        "lora_es": f"{ES_FLAGS} {arguments.es_flags}",
        "lora_grades": f"{LORA_GRADES_FLAGS} {arguments.lora_grades_flags}",
        "shortened": "",
        "random": f"{GRADES_FLAGS} {arguments.grades_flags}",
    }
    flags = [*arguments.extra, "--seed", str(seed)]
    if row.startswith("lora"):
        flags += [*lora_flags(arguments.recipe), *shlex.split(arguments.lora_flags)]
    flags += shlex.split(words[row])
    options: dict = {"needs": tuple(f"{need}_seed{seed}" for need in NEEDS.get(row, ()))}
    if row == "shortened":
        late = "--max_training_steps for the time of Full + GradES"
        options |= {"late_flags": lambda made: shortened_flags(made, seed), "late": late}
    elif row == "random":
        late = f"--replay_history of Full + GradES --replay_seed {seed}"
        options |= {"late_flags": lambda made: replay_flags(made, seed), "late": late}
    elif row.startswith("lora") and needs_base:
        base = f"{BASE}_seed{seed}"
        options = {"needs": (base,), "late_flags": lambda made: base_flags(made, base), "base": base}
        options["late"] = f"--resume_from_vlm_checkpoint --vlm_checkpoint_path of {base}"
    return RunSpec(row, ROWS[row], seed, tuple(flags), **options)


def lora_flags(recipe: Settings) -> list[str]:
    values, train = LORA[recipe.vlm.vlm_load_backbone_weights], recipe.train
    flags = ["--lora_rank", str(values["rank"])]
    for name in ("lr_vision_backbone", "lr_language_backbone"):
        flags += [f"--{name}", f"{getattr(train, name) * values['lr_factor']:g}"]
    return flags


def base_flags(made: Runs, base: str) -> list[str]:
    return ["--resume_from_vlm_checkpoint", "--vlm_checkpoint_path", str(made.folder(base))]


def replay_flags(made: Runs, seed: int) -> list[str]:
    history = made.folder(f"full_grades_seed{seed}") / "grades_history.json"
    return ["--replay_history", str(history), "--replay_seed", str(seed)]


def shortened_flags(made: Runs, seed: int) -> list[str]:
    full, grades = f"full_seed{seed}", f"full_grades_seed{seed}"
    target_s = made.summary(grades)["total_time_s"]
    steps = shortened_steps(made.summary(full), target_s, made.settings[full].train.eval_interval)
    return ["--max_training_steps", str(steps)]


def shortened_steps(full: dict, target_s: float, eval_interval: int) -> int:
    """The most steps with which a run like `full`, a summary, takes at most target_s; at least 1, at most its own.

    Steps cost what they did, validations and checkpoints each time what they did, and start-up, test and pictures once.
    """
    steps = full["steps"]
    step_s = full["train_time_s"] / steps
    stops_s = full["eval_time_s"] - full["test_time_s"] + full["save_time_s"]
    stop_s = stops_s / math.ceil(steps / eval_interval)
    once_s = full["total_time_s"] - full["train_time_s"] - stops_s
    fits = (n for n in range(steps, 1, -1) if once_s + n * step_s + math.ceil(n / eval_interval) * stop_s <= target_s)
    return next(fits, 1)


def table(made: Runs, rows: list[str]) -> dict[str, list[dict]]:
    """For each row that has finished runs, compare() of each of them, with its seed."""
    found: dict[str, list[dict]] = {}
    for spec in made.specs:
        if spec.row in rows and spec.name in made.results:
            full = f"full_seed{spec.seed}"
            reference = made.summary(full) if full in made.results else None
            values = {"seed": spec.seed} | compare(made.summary(spec.name), reference)
            found.setdefault(spec.row, []).append(values)
    return found


def as_markdown(found: dict[str, list[dict]], made: Runs, arguments: argparse.Namespace) -> str:
    def column(row: str, name: str, pattern: str, scale: float = 1.0) -> str:
        return cell([values[name] for values in found[row]], pattern, scale)

    summaries = [result["summary"] for result in made.results.values()]
    header = ["", f"{runs.accuracy_name(summaries)} (%)", "time (s)", "speed-up", "FLOPs / Full", "frozen (%)", "steps"]
    columns = [
        ("accuracy", "{:.1f}", 100), ("total_time_s", "{:.0f}", 1), ("speedup", "{:.2f}", 1),
        ("flops_ratio", "{:.3f}", 1), ("frozen_share", "{:.0f}", 100), ("steps", "{:.0f}", 1),
    ]  # fmt: skip
    lines = [[ROWS[row], *(column(row, *c) for c in columns)] for row in found]
    parts = [[ROWS[row], *(column(row, name, "{:+.1f}") for name in ("saved_s", *runs.PARTS))] for row in found]
    text = f"# {arguments.config.stem}: {len(made.results)} of {len(made.specs)} runs\n\n"
    text += "Mean ± standard deviation (min..max) over the seeds. Time: from the command to the summary, evaluation "
    text += "included. Speed-up and FLOPs against Full of the same seed.\n\n" + runs.markdown_table(header, lines)
    text += "\nSeconds saved against Full of the same seed, and where; less than none is time added.\n\n"
    text += runs.markdown_table(["", "saved in all", *runs.PARTS.values()], parts)
    bases = [result["summary"] for result in made.results.values() if result["row"] == BASE]
    if bases:
        seconds = cell([base["total_time_s"] for base in bases], "{:.0f}")
        text += (
            f"\nThe LoRA rows start from a base trained for {bases[0]['steps']:,} steps: {seconds} s, not counted.\n"
        )
    return text


MARKERS = {"full": "o", "full_es": "s", "full_grades": "^", "lora": "o", "lora_es": "s", "lora_grades": "^",
           "shortened": "D", "random": "X"}  # fmt: skip
COLORS = {"full": "#0072B2", "lora": "#D55E00", "shortened": "#555555", "random": "#999999"}


def picture(found: dict[str, list[dict]], title: str, accuracy: str) -> Any:
    """Accuracy against time: a marker a row at the means, bars from the smallest to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for row, values in found.items():
        known = [v for v in values if v["accuracy"] is not None]
        if not known:
            continue
        x, y = [v["total_time_s"] for v in known], [100 * v["accuracy"] for v in known]
        middle = [statistics.fmean(numbers) for numbers in (x, y)]
        bars = [[[mean - min(n)], [max(n) - mean]] for mean, n in zip(middle, (x, y), strict=True)]
        color = COLORS[row.split("_")[0]]
        axis.errorbar(
            middle[0], middle[1], xerr=bars[0], yerr=bars[1], fmt=MARKERS[row], color=color, markersize=9, capsize=3,
            elinewidth=1, markeredgecolor="white", label=f"{ROWS[row]} ({len(values)})",
        )  # fmt: skip
    axis.set_xlabel("time of the run, evaluation included (s)")
    axis.set_ylabel(f"{accuracy} (%)")
    axis.set_title(title, loc="left", fontweight="bold")
    axis.grid(color="0.92")
    axis.legend(title="mean, min to max (seeds)", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def write_tables(made: Runs, arguments: argparse.Namespace) -> Path:
    """table.md and results.json of the runs that have finished; returns the first."""
    found = table(made, arguments.rows)
    summaries = {name: result["summary"] for name, result in made.results.items()}
    rows = {
        row: {
            "label": ROWS[row],
            "seeds": values,
            "spread": {name: runs.spread([v[name] for v in values]) for name in values[0] if name != "seed"},
        }
        for row, values in found.items()
    }
    results = {"config": str(arguments.config), "rows": rows, "summaries": summaries}
    write_json(made.output / "results.json", results)
    write_text(made.output / "table.md", as_markdown(found, made, arguments))
    return made.output / "table.md"


def draw(made: Runs, arguments: argparse.Namespace) -> None:
    """table.png."""
    accuracy = runs.accuracy_name([result["summary"] for result in made.results.values()])
    figure = picture(table(made, arguments.rows), arguments.config.stem, accuracy)
    runs.save_figure(figure, made.output / "table.png")


def main(argv: list[str] | None = None, runner: runs.Runner | None = None) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), write_tables, draw, runner)


if __name__ == "__main__":
    sys.exit(main())
