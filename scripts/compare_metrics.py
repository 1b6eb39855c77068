"""What freezing by each metric costs in accuracy when all of them save the same work.

    python scripts/compare_metrics.py --seeds 3 -- --max_training_steps 800

First a run per metric that freezes nothing gives its curves. They tell the taus with which that run would have saved
--saved of the FLOPs, the same share of the weight updates in both towers. With these taus each metric trains the other
seeds. References: Full, and matrices drawn at random that freeze at the steps of two of the metrics. Writes metrics.md,
results.json and metrics.png. After an interruption or a failure the same command continues.
"""

import argparse
import bisect
import dataclasses
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.collators import to_device
from grades import find_components, policy
from grades.components import TOWERS, stack_of
from grades.freezing import Freezer
from models.vision_language_model import VisionLanguageModel
from scripts import run_flags, runs
from scripts.runs import Runs, RunSpec
from training.arguments import parse_arguments
from training.flops import model_cost
from training.plan import full_batch

RELATIVE = "--metric weight_change --tau_mode relative --vision_tau auto --language_tau auto"
METRICS = ("weight_change", "gradient_norm", "gradient_change", "gradient_rms")
FLAGS = {row: f"--metric {row}" for row in METRICS} | {"weight_relative": RELATIVE}
FLAGS["front"] = "--metric weight_change --freeze_order front"
ROWS = ("weight_change", "front", "weight_relative", *METRICS[1:])
CURVES = {row: row for row in ROWS} | {"front": "weight_change"}  # whose curves tell a row's taus
REPLAYED = ("weight_change", "gradient_rms")  # whose freezes a random control repeats
LABELS = {row: row for row in ROWS} | {"weight_relative": "weight_change, relative", "full": "Full"}
LABELS["front"] = "weight_change, from the front"
LABELS |= {f"random_{row}": f"random, at {row}'s steps" for row in REPLAYED}
CALIBRATION_SEED = 100
NO_FREEZE = ("--freeze_vision", "false", "--freeze_language", "false")
COLUMNS = ("accuracy", "cost", "saved_vision", "saved_language", "flops_ratio")
SHARES = 1024  # of the weight updates, into which the search divides the whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The script's flags; impossible ones end the program."""
    parser = run_flags.make_parser(__doc__.splitlines()[0], prefix="metrics", seeds=3, recipe=runs.PAPER_RECIPE)
    parser.add_argument("--saved", type=float, default=0.12, help="share of Full's FLOPs to save (default: 0.12)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="metrics to run (default: all)")
    arguments = run_flags.read_arguments(parser, argv)
    if not 0 < arguments.saved < 1 - arguments.recipe.grades.alpha:
        parser.error(f"--saved {arguments.saved}: must be > 0 and less than 1 - alpha {arguments.recipe.grades.alpha}")
    grades, total = arguments.recipe.grades, arguments.recipe.train.max_training_steps
    unmeasured = 0 if grades.monitor_grace else policy.grace_steps(grades.alpha, total)
    checks = total // grades.compute_interval - unmeasured // grades.compute_interval
    if checks < 2:  # a change is known from the second one on
        parser.error(f"--compute_interval {grades.compute_interval}: must leave two checks or more, not {checks}")
    return arguments


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """A run per metric that freezes nothing, then seed by seed the metrics and the references."""
    rows = [row for row in ROWS if row in arguments.rows]
    specs, watching = [], {row: ("--enable_grades", *FLAGS[row].split()) for row in ROWS}
    for row in dict.fromkeys(CURVES[row] for row in rows):
        flags = (*arguments.extra, *watching[row], *NO_FREEZE, "--seed", str(CALIBRATION_SEED))
        specs.append(RunSpec(f"curves_{row}", f"curves of {LABELS[row]}", CALIBRATION_SEED, flags))
    for seed in range(arguments.seeds):
        common = (*arguments.extra, "--seed", str(seed))
        specs.append(RunSpec("full", LABELS["full"], seed, common))
        for row in rows:
            late = functools.partial(tau_flags, row, arguments.saved)
            specs.append(RunSpec(row, LABELS[row], seed, common + watching[row], (curves(row),), late, "the taus"))
        for row in [row for row in REPLAYED if row in rows]:
            name, need = f"random_{row}", f"{row}_seed{seed}"
            flags = (*common, "--enable_grades", "--replay_seed", str(seed))
            replay = functools.partial(Runs.replay_flags, name=need)
            specs.append(RunSpec(name, LABELS[name], seed, flags, (need,), replay, "the history to repeat"))
    return specs


def curves(row: str) -> str:
    """The run that gives the curves of a row's metric."""
    return f"curves_{CURVES[row]}_seed{CALIBRATION_SEED}"


@functools.cache
def tau_flags(row: str, saved: float, made: Runs) -> list[str]:
    """The taus with which the run that gives the curves would have saved that share of its FLOPs."""
    history, summary = made.history(curves(row)), made.summary(curves(row))
    (flags,) = (spec.flags for spec in made.specs if spec.name == curves(row))

    def taus(share: int) -> dict[str, float]:
        return {tower: find_tau(history, tower, share / SHARES) for tower in TOWERS}

    def spared(share: int) -> float:
        frozen = frozen_by_taus(history, taus(share), front=row == "front")
        return saved_flops(history, summary, frozen, flags)

    enough = bisect.bisect_left(range(SHARES), saved, key=spared)
    return [word for tower, tau in taus(enough).items() for word in (f"--{tower}_tau", repr(tau))]


def saved_flops(history: dict, summary: dict, frozen: dict[str, int], flags: tuple[str, ...]) -> float:
    """Share of the FLOPs that these freezes would have saved, on rows of the run's mean length. frozen: name -> step.

    The steps after the last freeze are saved whole, as the run would have ended there.
    """
    settings = parse_arguments(list(flags))
    with torch.device("meta"):
        model = VisionLanguageModel(settings.vlm)
    rows = len(full_batch(settings, torch.device("meta"))["input_ids"])
    tokens = round(summary["train_tokens"] / summary["steps"] / rows)
    train = dataclasses.replace(settings.train, max_sample_length=tokens)
    batch = full_batch(dataclasses.replace(settings, train=train), torch.device("meta"))
    components = find_components(model)
    freezer = Freezer(model, components, None)
    model(**to_device(batch, torch.device("meta")))  # which tells the prefix
    whole, spent, begin = model_cost(model).of(batch), 0, 0
    for step in sorted({*frozen.values(), history["total_steps"]}):
        spent += (step - begin) * (model_cost(model).of(batch) if len(freezer.decided) < len(components) else 0)
        freezer.freeze([name for name, at in frozen.items() if at == step])
        begin = step
    return 1 - spent / whole / history["total_steps"]


def find_tau(history: dict, tower: str, saved: float) -> float:
    """The smallest tau just above a measured value that saves at least that share of the tower's updates."""
    columns = columns_of(history, tower)
    values = {check["values"][i] for check in history["checks"] for i in columns} - {None}
    taus = [value * (1 + 1e-6) for value in sorted(values)]
    place = bisect.bisect_left(
        taus, saved, key=lambda tau: saved_share(history, tower, frozen_by_taus(history, {tower: tau}))
    )
    return taus[min(place, len(taus) - 1)]


def columns_of(history: dict, tower: str) -> list[int]:
    """Where the tower's matrices stand in `components` and in the values of a check."""
    return [i for i, component in enumerate(history["components"]) if component["tower"] == tower]


def frozen_by_taus(history: dict, taus: dict[str, float], front: bool = False) -> dict[str, int]:
    """The step at which each component would freeze, by name. taus: by tower. front: with --freeze_order front."""
    components = [(c["name"], c["tower"], stack_of(c["name"]), c["layer"]) for c in history["components"]]
    steps: dict[str, int] = {}
    for check in history["checks"]:
        if check["step"] <= history["grace_steps"]:
            continue
        low = [
            name
            for (name, tower, *_), value in zip(components, check["values"], strict=True)
            if value is not None and value < taus.get(tower, 0.0)
        ]
        for name in policy.front(low, steps, components) if front else low:
            steps.setdefault(name, check["step"])
    return steps


def saved_share(history: dict, tower: str, steps: dict[str, int]) -> float:
    """Share of the tower's updates (elements x steps) that is saved when components freeze at these steps."""
    total = history["total_steps"]
    members = [history["components"][i] for i in columns_of(history, tower)]
    spared = sum((total - steps.get(c["name"], total)) * c["elements"] for c in members)
    return spared / total / sum(c["elements"] for c in members)


def measured(made: Runs) -> dict[str, list[dict]]:
    """Row -> what `compare` says of each finished seed, and the share of the updates that it saved in each tower."""
    found = made.compared()
    for row in found.keys() & LABELS.keys() - {"full"}:
        for values in found[row]:
            history = made.history(f"{row}_seed{values['seed']}")
            steps = {event["name"]: event["step"] for event in history["events"]}
            values |= {f"saved_{tower}": saved_share(history, tower, steps) for tower in TOWERS}
    return {row: found[row] for row in LABELS if row in found}


def tables(made: Runs, arguments: argparse.Namespace) -> tuple[str, dict]:
    """The text of metrics.md, and what results.json says of each row."""
    found = measured(made)
    text = "Mean ± standard deviation (min..max) over the seeds. Saved: share of the weight updates not made.\n\n"
    text += made.table({LABELS[row]: values for row, values in found.items()}, COLUMNS)
    ready = [row for row in ROWS if row in arguments.rows and curves(row) in made.results]
    taus = ([LABELS[row], *tau_flags(row, arguments.saved, made)[1::2]] for row in ready)
    lines = ([label, *(f"{float(tau):.4g}" for tau in both)] for label, *both in taus)
    return f"{text}\n{runs.markdown_table(['metric', 'vision_tau', 'language_tau'], lines)}", {"rows": found}


def picture(made: Runs, arguments: argparse.Namespace) -> Figure:
    """The curves of the metrics while nothing freezes, and what freezing by each cost."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplot_mosaic([list(TOWERS), ["costs", "costs"]])
    for tower in TOWERS:
        draw_curves(axes[tower], made, tower)
    draw_costs(axes["costs"], measured(made))
    return figure


def draw_curves(axis: Axes, made: Runs, tower: str) -> None:
    """The median over the tower's matrices of each metric's share of the matrix's own peak."""
    for row in METRICS:  # the relative one has the same curve as weight_change
        if curves(row) not in made.results:
            continue
        history = made.history(curves(row))
        series = [[check["values"][i] for check in history["checks"]] for i in columns_of(history, tower)]
        peaks = [max(v for v in values if v is not None) for values in series]
        points = []
        for n, check in enumerate(history["checks"]):
            shares = [v[n] / peak for v, peak in zip(series, peaks, strict=True) if v[n] is not None]
            if shares:
                points.append((check["step"], statistics.median(shares)))
        axis.plot(*zip(*points, strict=True), linewidth=1.4, label=row)
    axis.axvspan(0, history["grace_steps"], color="0.94", zorder=0)
    axis.set_title(f"{tower} tower: share of own peak", loc="left", fontweight="bold")
    axis.set_xlabel("optimizer step (grey: grace period)")
    axis.set_ylim(0, 1.05)
    axis.grid(color="0.92")
    if tower == TOWERS[-1]:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_costs(axis: Axes, found: dict[str, list[dict]]) -> None:
    """A dot per seed, a line at the mean."""
    rows = [row for row in found if row != "full"]
    for y, row in enumerate(rows):
        costs = [100 * values["cost"] for values in found[row] if values.get("cost") is not None]
        if not costs:  # nothing asks for exact match
            continue
        axis.plot(costs, [y] * len(costs), "o", color="#0072B2", alpha=0.6, markersize=7)
        axis.plot([statistics.mean(costs)], [y], "|", color="black", markersize=18, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), [LABELS[row] for row in rows])
    axis.invert_yaxis()
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_xlabel("exact match below Full of the same seed, in points (dots: seeds; bars: means)")
    axis.set_title("what freezing by each metric cost, at about the same FLOPs saved", loc="left", fontweight="bold")
    axis.grid(axis="x", color="0.92")


def main(argv: list[str] | None = None, launch: runs.Launch = runs.launch) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), tables, picture, "metrics", launch)


if __name__ == "__main__":
    sys.exit(main())
