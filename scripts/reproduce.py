"""The paper's comparison on any recipe: full training and LoRA, each plain, with early stopping and with GradES.

    python scripts/reproduce.py --config configs/quickstart.yaml --seeds 5
    python scripts/reproduce.py --config configs/table10_nanovlm.yaml --seeds 1 -- --num_workers 8

Controls show what the measuring is worth: runs of each schedule so short that they take the time of Full + GradES, on
average over the seeds; a run that freezes and ends at the steps of the next seed's; and one that freezes as many
matrices as the paper's rule at the same steps, drawn at random. The runs are made seed by seed, so that a machine that
becomes slower slows all rows. Writes table.md, results.json and table.png. After an interruption or a failure the same
command continues.
"""

import argparse
import functools
import math
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from matplotlib.figure import Figure

from scripts import run_flags, runs
from scripts.runs import Runs, RunSpec
from training.arguments import Settings

ROWS = {
    "full": "Full",
    "full_cosine": "Full, cosine",
    "full_linear": "Full, linear to zero",
    "full_es": "Full + ES",
    "full_grades": "Full + GradES",
    "paper": "Full + GradES, the paper's rule",
    "random": "Random freezing, at the steps of the paper's rule",
    "other_time": "Freezing at the steps of another seed",
    "shortened": "Full, shortened",
    "shortened_cosine": "Full, cosine, shortened",
    "shortened_linear": "Full, linear to zero, shortened",
    "lora": "LoRA",
    "lora_es": "LoRA + ES",
    "lora_grades": "LoRA + GradES",
}
NEEDS: dict[str, tuple[str, ...]] = {"random": ("paper",), "other_time": ("full_grades",)}
NEEDS |= dict.fromkeys(("shortened", "shortened_cosine", "shortened_linear"), ("full", "full_grades"))
LAST = ("other_time", "shortened", "shortened_cosine", "shortened_linear")  # need Full + GradES of all seeds
CONSTANT_ALONE = ("full_cosine", "paper", "random", "shortened_cosine")  # else the recipe's own rows are that
BASE = "lora_base"  # the pretrained model that LoRA starts from, where the recipe has none

# What the rows add to the recipe; --es_flags, --grades_flags, --lora_flags and --lora_grades_flags override it.
ES_FLAGS = "--early_stopping"
GRADES_FLAGS = "--enable_grades"
# nanoVLM's schedule, and the straight line (arXiv:2502.15938).
SCHEDULES = {
    "cosine": "--lr_schedule cosine --min_lr_ratio 0.1 --average_weights 0",
    "linear": "--lr_schedule linear --min_lr_ratio 0 --average_weights 0",
}
PAPER_PEAK = 2.0  # as in configs/table10_quickstart.yaml, whose cosine the paper's rule is on
# Table 10's first row, of the nanoVLM whose taus are 0.30 and 6.00.
MATRIX_BY_MATRIX = "--enable_grades --monitor_grace --compute_interval 20 --patience 1 --freeze_order any"
PAPER_FLAGS = (
    f"{MATRIX_BY_MATRIX} --metric weight_change --alpha 0.28 --vision_tau 0.30 --language_tau 6.00 "
    "--feature_cache_gib 0"
)
# The paper's Eq. 3. The recipe's taus are in another metric's unit, so they are found in the grace period.
LORA_GRADES_FLAGS = f"{MATRIX_BY_MATRIX} --metric gradient_norm --vision_tau auto --language_tau auto --alpha 0.5"
# (rank, factor on the learning rate), by whether the recipe starts from pretrained backbones. The paper's Table 8: rank
# 32, ten times the learning rate of full training, 2e-5. A recipe from scratch already has a learning rate near the
# largest that trains: three times, or six times a constant rate, which is the lower one.
LORA = {True: (32, 10.0), False: (8, 3.0)}

COLUMNS = ("accuracy", "total_time_s", "speedup", "flops_ratio", "frozen_share", "steps")
PARTS = ("saved_s", "saved_steps_s", "saved_cheaper_s", "saved_eval_s", "saved_rest_s")
MARKERS = dict(zip(ROWS, "oPvs^*XdDhHos^", strict=True))
COLORS = {"full": "#0072B2", "lora": "#D55E00", "paper": "#CC79A7", "random": "#999999", "other": "#999999"}
COLORS["shortened"] = "#555555"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The script's flags; impossible ones end the program."""
    parser = run_flags.make_parser(__doc__.splitlines()[0], prefix="reproduce", seeds=5)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, help="rows of the table (default: all that the recipe allows)"
    )
    defaults = {"es": ES_FLAGS, "grades": GRADES_FLAGS, "lora": "rank and rates", "lora_grades": LORA_GRADES_FLAGS}
    for name, default in defaults.items():
        help = f'flags of train.py that override "{default}", in one word: --{name}_flags="--a 1 --b 2"'
        parser.add_argument(f"--{name}_flags", default="", help=help)
    peak = "peak of the rows with a cosine or a line alone, times the recipe's rates (default: 1)"
    parser.add_argument("--peak", type=float, default=1.0, help=peak)
    share = "recipes without pretrained backbones: length of the run whose weights LoRA starts from, as a share of the "
    parser.add_argument("--lora_base_share", type=float, default=0.25, help=f"{share}recipe's (default: 0.25)")
    arguments = run_flags.read_arguments(parser, argv)
    if not 0 < arguments.lora_base_share <= 1:
        parser.error(f"--lora_base_share {arguments.lora_base_share}: must be in (0, 1]")
    if not 0 < arguments.peak < math.inf:
        parser.error(f"--peak {arguments.peak}: must be a number > 0")
    schedule = arguments.recipe.train.lr_schedule
    ruled_out = {} if arguments.seeds > 1 else {"other_time": "--seeds 2 or more"}
    if schedule not in ("constant", "wsd"):
        ruled_out |= dict.fromkeys(CONSTANT_ALONE, f"a recipe with a constant rate, not --lr_schedule {schedule}")
    for row in arguments.rows or []:
        if row in ruled_out:
            parser.error(f"--rows {row} needs {ruled_out[row]}")
    arguments.rows = arguments.rows or [row for row in ROWS if row not in ruled_out]
    for row in arguments.rows:
        if absent := [need for need in NEEDS.get(row, ()) if need not in arguments.rows]:
            parser.error(f"--rows {row} needs {' and '.join(absent)} too")
    return arguments


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """All runs in order: seed by seed, in each seed the base before LoRA; then what needs a run of every seed."""
    rows, recipe = [row for row in ROWS if row in arguments.rows], arguments.recipe
    needs_base = not (recipe.vlm.vlm_load_backbone_weights or recipe.train.resume_from_vlm_checkpoint)
    steps = str(max(1, round(arguments.lora_base_share * recipe.train.max_training_steps)))
    short = (*arguments.extra, "--max_training_steps", steps, "--eval_interval", steps)
    specs = []
    for seed in range(arguments.seeds):
        if needs_base and any(row.startswith("lora") for row in rows):
            specs.append(RunSpec(BASE, "base for LoRA", seed, (*short, "--seed", str(seed))))
        specs += [row_spec(arguments, row, seed, needs_base) for row in rows if row not in LAST]
    return specs + [
        row_spec(arguments, row, seed, False) for seed in range(arguments.seeds) for row in rows if row in LAST
    ]


def row_spec(arguments: argparse.Namespace, row: str, seed: int, needs_base: bool) -> RunSpec:
    """The run of a row. needs_base: LoRA starts from a run of this script."""
    recipe, grades = arguments.recipe, f"{GRADES_FLAGS} {arguments.grades_flags}"
    words = {
        "full_grades": grades,
        "other_time": f"{grades} --metric weight_change --compute_interval 1000000",  # measures nothing
        "paper": f"{schedule_flags(recipe, 'cosine', PAPER_PEAK)} {PAPER_FLAGS}",
        "random": f"{schedule_flags(recipe, 'cosine', PAPER_PEAK)} {PAPER_FLAGS}",
        "lora_grades": f"{LORA_GRADES_FLAGS} {arguments.lora_grades_flags}",
    }
    words |= dict.fromkeys(("full_es", "lora_es"), f"{ES_FLAGS} {arguments.es_flags}")
    words |= {
        f"{row}_{name}": schedule_flags(recipe, name, arguments.peak)
        for row in ("full", "shortened")
        for name in SCHEDULES
    }
    flags = [*arguments.extra, "--seed", str(seed)]
    if row.startswith("lora"):
        if recipe.train.lr_schedule in ("constant", "wsd"):
            flags += shlex.split(SCHEDULES["cosine"])
        flags += [*lora_flags(recipe), *shlex.split(arguments.lora_flags)]
    flags += shlex.split(words.get(row, ""))
    spec = functools.partial(RunSpec, row, ROWS[row], seed, tuple(flags))
    base = f"{BASE}_seed{seed}"
    if row.startswith("shortened"):
        all_seeds = [f"full_grades_seed{other}" for other in range(arguments.seeds)]
        late = "--max_training_steps for the mean time of Full + GradES"
        full = f"full_seed{seed}"
        return spec((full, *all_seeds), lambda made: shortened_flags(made, full, all_seeds), late)
    if row in ("random", "other_time"):
        other = f"paper_seed{seed}" if row == "random" else f"full_grades_seed{(seed + 1) % arguments.seeds}"
        late = f"--replay_history of {other} --replay_seed {seed}"
        return spec((other,), lambda made: [*made.replay_flags(other), "--replay_seed", str(seed)], late)
    if row.startswith("lora") and needs_base:
        late = f"--resume_from_vlm_checkpoint --vlm_checkpoint_path of {base}"
        path = ["--resume_from_vlm_checkpoint", "--vlm_checkpoint_path", str(arguments.output / "runs" / base)]
        return spec((base,), lambda made: path, late, base)
    return spec()


def lora_flags(recipe: Settings) -> list[str]:
    """Rank and learning rates; a rate of 0, which trains nothing, remains 0."""
    rank, factor = LORA[recipe.vlm.vlm_load_backbone_weights]
    flags = ["--lora_rank", str(rank)]
    if recipe.train.lr_schedule in ("constant", "wsd"):
        factor *= 2
    for name in ("lr_vision_backbone", "lr_language_backbone"):
        flags += [f"--{name}", f"{getattr(recipe.train, name) * factor:g}"]
    return flags


def schedule_flags(recipe: Settings, schedule: str, peak: float) -> str:
    """Flags of a schedule with its peak, in learning rates of the recipe."""
    names = ("lr_mp", "lr_vision_backbone", "lr_language_backbone")
    rates = {name: getattr(recipe.train, name) * peak for name in names}
    return " ".join([SCHEDULES[schedule], *(f"--{name} {rate:g}" for name, rate in rates.items())])


def shortened_flags(made: Runs, full: str, grades: list[str]) -> list[str]:
    """The length of a run that takes as long as the runs `grades` on average, at the seconds per step of `full`."""
    target_s = statistics.mean(made.summary(name)["total_time_s"] for name in grades)
    eval_interval = made.settings[full].train.eval_interval
    return ["--max_training_steps", str(shortened_steps(made.summary(full), target_s, eval_interval))]


def shortened_steps(full: dict, target_s: float, eval_interval: int) -> int:
    """The most steps with which a run like `full`, a summary, takes at most target_s; at least 1, at most its own.

    Each step, and each validation and checkpoint, takes the seconds it took in `full`; start-up, test and pictures
    come once.
    """
    steps = full["steps"]
    step_s = full["train_time_s"] / steps
    stops_s = full["eval_time_s"] - full["test_time_s"] + full["save_time_s"]
    stop_s = stops_s / math.ceil(steps / eval_interval)
    once_s = full["total_time_s"] - full["train_time_s"] - stops_s
    fits = (n for n in range(steps, 1, -1) if once_s + n * step_s + math.ceil(n / eval_interval) * stop_s <= target_s)
    return next(fits, 1)


def shown(made: Runs, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Row -> values of its finished runs, in the order in which they ran."""
    return {row: values for row, values in made.compared().items() if row in arguments.rows}


def tables(made: Runs, arguments: argparse.Namespace) -> tuple[str, dict]:
    """The text of table.md, and what results.json says of each row."""
    found = shown(made, arguments)
    labelled = {ROWS[row]: values for row, values in found.items()}
    text = "Mean ± standard deviation (min..max) over the seeds. Time: from the command to the summary, evaluation "
    text += "included. Speed-up and FLOPs: against Full of the same seed.\n\n" + made.table(labelled, COLUMNS)
    text += "\nSeconds saved against Full of the same seed, and by what; negative: time added.\n\n"
    text += made.table(labelled, PARTS)
    if bases := made.compared().get(BASE):
        steps, seconds = bases[0]["steps"], runs.cell(bases, "total_time_s")
        text += f"\nThe LoRA rows start from a base trained for {steps:,} steps: {seconds} s, not counted.\n"
    rows = {row: {"label": ROWS[row]} | runs.with_spread(values) for row, values in found.items()}
    return text, {"rows": rows}


def picture(made: Runs, arguments: argparse.Namespace) -> Figure:
    """Accuracy against time: a marker per row at the means, bars from the smallest to the largest."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for row, values in shown(made, arguments).items():
        known = [(v["total_time_s"], 100 * v["accuracy"]) for v in values if v["accuracy"] is not None]
        if not known:
            continue
        (x, x_bar), (y, y_bar) = map(mean_and_bar, zip(*known, strict=True))
        axis.errorbar(
            x, y, xerr=x_bar, yerr=y_bar, fmt=MARKERS[row], color=COLORS[row.split("_")[0]], markersize=9, capsize=3,
            elinewidth=1, markeredgecolor="white", label=f"{ROWS[row]} ({len(values)})",
        )  # fmt: skip
    axis.set_xlabel("time of the run, evaluation included (s)")
    axis.set_ylabel(made.title("accuracy"))
    axis.set_title(arguments.config.stem, loc="left", fontweight="bold")
    axis.grid(color="0.92")
    axis.legend(title="mean, min to max (seeds)", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def mean_and_bar(values: tuple[float, ...]) -> tuple[float, list[list[float]]]:
    """The mean, and its distances from the smallest and the largest as errorbar takes them."""
    mean = statistics.mean(values)
    return mean, [[mean - min(values)], [max(values) - mean]]


def main(argv: list[str] | None = None, launch: runs.Launch = runs.launch) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), tables, picture, "table", launch)


if __name__ == "__main__":
    sys.exit(main())
