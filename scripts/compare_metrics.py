"""What freezing by each metric costs in accuracy when all of them save the same work.

    python scripts/compare_metrics.py --seeds 3 -- --max_training_steps 800

A run that freezes nothing gives each metric's curves, and from these follow the taus with which it would have saved
--saved of the FLOPs, both towers sparing the same share of their weight updates. With these taus each metric then
trains the other seeds. References: Full, and matrices drawn at random that freeze at the steps of two of the metrics.
Writes metrics.md, results.json and metrics.png. After an interruption or a failure the same command continues.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from grades import find_components
from grades.files import write_json, write_text
from grades.freezing import Freezer
from models.vision_language_model import VisionLanguageModel
from scripts import runs
from scripts.runs import Runs, RunSpec, cell
from training.arguments import parse_arguments
from training.flops import model_cost
from training.plan import full_batch

# Row -> label, flags.
ROWS = {
    "weight_change": ("weight_change", "--metric weight_change"),
    "weight_relative": (
        "weight_change, relative",
        "--metric weight_change --tau_mode relative --vision_tau auto --language_tau auto",
    ),
    "gradient_norm": ("gradient_norm", "--metric gradient_norm"),
    "gradient_change": ("gradient_change", "--metric gradient_change"),
    "gradient_rms": ("gradient_rms", "--metric gradient_rms"),
}
REPLAYED = ("weight_change", "gradient_rms")  # whose freezes a random control repeats
REFERENCES = {"full": "Full"} | {f"random_{row}": f"random, at {row}'s steps" for row in REPLAYED}
LABELS = {row: label for row, (label, _) in ROWS.items()} | REFERENCES
CALIBRATION_SEED = 100
NO_FREEZE = ("--freeze_vision", "false", "--freeze_language", "false")
TOWERS = ("vision", "language")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = runs.parser(__doc__.splitlines()[0], prefix="metrics", seeds=3)
    parser.add_argument("--saved", type=float, default=0.12, help="share of Full's FLOPs to save (default: 0.12)")
    arguments = runs.read_arguments(parser, argv)
    if not 0 < arguments.saved < 1 - arguments.recipe.grades.alpha:
        parser.error(f"--saved {arguments.saved}: must be > 0 and less than 1 - alpha {arguments.recipe.grades.alpha}")
    return arguments


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """A run a metric that freezes nothing, then seed by seed the metrics and the references."""
    specs = []
    for row, (label, words) in ROWS.items():
        flags = (*arguments.extra, "--enable_grades", *words.split(), *NO_FREEZE, "--seed", str(CALIBRATION_SEED))
        specs.append(RunSpec(f"curves_{row}", f"curves of {label}", CALIBRATION_SEED, flags))
    for seed in range(arguments.seeds):
        common = (*arguments.extra, "--seed", str(seed))
        specs.append(RunSpec("full", LABELS["full"], seed, common))
        for row, (label, words) in ROWS.items():
            specs.append(
                RunSpec(
                    row, label, seed, (*common, "--enable_grades", *words.split()), needs=(curves(row),),
                    late_flags=functools.partial(tau_flags, row=row, saved=arguments.saved), late="the taus",
                )
            )  # fmt: skip
        for row in REPLAYED:
            needs, flags = f"{row}_seed{seed}", (*common, "--enable_grades", "--replay_seed", str(seed))
            specs.append(
                RunSpec(
                    f"random_{row}", LABELS[f"random_{row}"], seed, flags, (needs,),
                    late_flags=functools.partial(replay_flags, name=needs),
                    late="the history to repeat",
                )
            )  # fmt: skip
    return specs


def curves(row: str) -> str:
    return f"curves_{row}_seed{CALIBRATION_SEED}"


def history_path(made: Runs, name: str) -> Path:
    return made.folder(name) / "grades_history.json"


def replay_flags(made: Runs, name: str) -> list[str]:
    """The flags that freeze at random what the run `name` froze."""
    return ["--replay_history", str(history_path(made, name))]


def tau_flags(made: Runs, row: str, saved: float) -> list[str]:
    (spec,) = (spec for spec in made.specs if spec.name == curves(row))
    taus = find_taus(made.folder(spec.name), spec.flags, saved)
    return [word for tower in TOWERS for word in (f"--{tower}_tau", repr(taus[tower]))]


@functools.cache
def find_taus(folder: Path, flags: tuple[str, ...], saved: float) -> dict[str, float]:
    """The taus of both towers that would have saved that share of the FLOPs of the run in the folder."""
    history, summary = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("grades_history.json", "summary.json")
    )
    low, high = 0.0, 1.0  # share of the weight updates
    for _ in range(10):
        share = (low + high) / 2
        taus = {tower: find_tau(history, tower, share) for tower in TOWERS}
        if saved_flops(history, summary, taus, flags) < saved:
            low = share
        else:
            high = share
    return {tower: find_tau(history, tower, high) for tower in TOWERS}


def saved_flops(history: dict, summary: dict, taus: dict[str, float], flags: tuple[str, ...]) -> float:
    """Share of the FLOPs of the steps that freezing at the first check below tau would have spared, the end of the run
    where all is frozen among them. On rows of the run's mean length."""
    settings = parse_arguments(list(flags))
    with torch.device("meta"):
        model = VisionLanguageModel(settings.vlm)
    batch = full_batch(settings, torch.device("meta"))
    tokens = summary["train_tokens"] / summary["steps"] / batch["input_ids"].shape[0]
    train = dataclasses.replace(settings.train, max_sample_length=round(tokens))
    batch = full_batch(dataclasses.replace(settings, train=train), torch.device("meta"))
    components = find_components(model)
    freezer = Freezer(model, components, None)
    frozen = {name: step for tower in TOWERS for name, step in frozen_by_tau(history, tower, taus[tower]).items()}
    whole, spent, begin = model_cost(model).of(batch), 0, 0
    for step in sorted({*frozen.values(), history["total_steps"]}):
        spent += (step - begin) * (model_cost(model).of(batch) if len(freezer.decided) < len(components) else 0)
        freezer.freeze([name for name, at in frozen.items() if at == step])
        begin = step
    return 1 - spent / whole / history["total_steps"]


def find_tau(history: dict, tower: str, saved: float) -> float:
    """The smallest tau just above a measured value with which at least `saved` of the tower's updates are spared."""
    columns = columns_of(history, tower)
    values = sorted({check["values"][i] for check in history["checks"] for i in columns} - {None})
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if saved_by_tau(history, tower, above(values[middle])) < saved:
            low = middle + 1
        else:
            high = middle
    return above(values[low])


def above(value: float) -> float:
    return value * (1 + 1e-6)


def columns_of(history: dict, tower: str) -> list[int]:
    return [i for i, component in enumerate(history["components"]) if component["tower"] == tower]


def saved_by_tau(history: dict, tower: str, tau: float) -> float:
    """Share of the tower's updates (elements x steps) that freezing at the first check below tau would spare."""
    return saved_share(history, tower, frozen_by_tau(history, tower, tau))


def frozen_by_tau(history: dict, tower: str, tau: float) -> dict[str, int]:
    """The step at which each component would freeze, by name."""
    steps: dict[str, int] = {}
    for check in history["checks"]:
        for i in columns_of(history, tower):
            value = check["values"][i]
            if check["step"] > history["grace_steps"] and value is not None and value < tau:
                steps.setdefault(history["components"][i]["name"], check["step"])
    return steps


def saved_share(history: dict, tower: str, steps: dict[str, int]) -> float:
    """The same for components that froze at the given steps. A run that ended early saved the rest for all."""
    total = history["total_steps"]
    members = [history["components"][i] for i in columns_of(history, tower)]
    spared = sum((total - steps.get(c["name"], total)) * c["elements"] for c in members)
    return spared / total / sum(c["elements"] for c in members)


def measured(made: Runs) -> dict[str, list[dict]]:
    """Row -> for each finished seed accuracy, FLOPs ratio and what share of the updates was spared."""
    found: dict[str, list[dict]] = {}
    for spec in made.specs:
        if spec.row not in LABELS or spec.name not in made.results:
            continue
        full = f"full_seed{spec.seed}"
        values = runs.compare(made.summary(spec.name), made.summary(full) if full in made.results else None)
        values = {"seed": spec.seed} | {name: values[name] for name in ("accuracy", "flops_ratio", "steps")}
        if spec.row != "full":
            history = json.loads(history_path(made, spec.name).read_text(encoding="utf-8"))
            steps = {event["name"]: event["step"] for event in history["events"]}
            values |= {f"saved_{tower}": saved_share(history, tower, steps) for tower in TOWERS}
        whole = runs.accuracy_of(made.summary(full)) if full in made.results else None
        if whole is not None and values["accuracy"] is not None:
            values["cost"] = whole - values["accuracy"]
        found.setdefault(spec.row, []).append(values)
    return {row: found[row] for row in LABELS if row in found}


def write_tables(made: Runs, arguments: argparse.Namespace) -> Path:
    """metrics.md and results.json of the runs that have finished; returns the first."""
    found = measured(made)
    columns = [("accuracy", "{:.1f}"), ("cost", "{:+.1f}"), ("saved_vision", "{:.0f}"), ("saved_language", "{:.0f}")]
    lines = []
    for row, values in found.items():
        taus = ""
        if row in ROWS and curves(row) in made.results:
            taus = " / ".join(f"{float(tau):.4g}" for tau in tau_flags(made, row, arguments.saved)[1::2])
        cells = [cell([v.get(name) for v in values], pattern, 100) for name, pattern in columns]
        lines.append([LABELS[row], *cells, cell([v["flops_ratio"] for v in values], "{:.3f}"), taus])
    header = [
        "", "exact match (%)", "below Full (points)", "saved: vision (%)", "language (%)", "FLOPs / Full", "taus",
    ]  # fmt: skip
    text = f"# {arguments.config.stem}: {len(made.results)} of {len(made.specs)} runs\n\n"
    text += "Mean ± standard deviation (min..max) over the seeds. Saved: share of the weight updates not made.\n\n"
    write_json(made.output / "results.json", {"rows": found})
    write_text(made.output / "metrics.md", text + runs.markdown_table(header, lines))
    return made.output / "metrics.md"


def draw(made: Runs, arguments: argparse.Namespace) -> None:
    """metrics.png: the curves of the metrics while nothing freezes, and what freezing by each cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1])
    top, bottom = halves
    for axis, tower in zip(top.subplots(1, 2, sharey=True), TOWERS, strict=True):
        draw_curves(axis, made, tower)
    draw_costs(bottom.subplots(), measured(made))
    runs.save_figure(figure, made.output / "metrics.png")


def draw_curves(axis: Any, made: Runs, tower: str) -> None:
    """The median over the tower's matrices of each metric's share of the matrix's own peak."""
    for row, (label, _) in ROWS.items():
        history = json.loads(history_path(made, curves(row)).read_text(encoding="utf-8"))
        series = [[check["values"][i] for check in history["checks"]] for i in columns_of(history, tower)]
        peaks = [max(v for v in values if v is not None) for values in series]
        points = []
        for n, check in enumerate(history["checks"]):
            shares = [v[n] / peak for v, peak in zip(series, peaks, strict=True) if v[n] is not None]
            if shares:
                points.append((check["step"], statistics.median(shares)))
        if row != "weight_relative":  # the same curve as weight_change
            axis.plot(*zip(*points, strict=True), linewidth=1.4, label=label)
    axis.axvspan(0, history["grace_steps"], color="0.94", zorder=0)
    axis.set_title(f"{tower} tower: share of own peak", loc="left", fontweight="bold")
    axis.set_xlabel("optimizer step (grey: grace period)")
    axis.set_ylim(0, 1.05)
    axis.grid(color="0.92")
    if tower == TOWERS[-1]:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_costs(axis: Any, found: dict[str, list[dict]]) -> None:
    """A dot a seed, a line at the mean."""
    rows = [row for row in found if row != "full"]
    for y, row in enumerate(rows):
        costs = [100 * values["cost"] for values in found[row] if "cost" in values]
        axis.plot(costs, [y] * len(costs), "o", color="#0072B2", alpha=0.6, markersize=7)
        axis.plot([statistics.mean(costs)], [y], "|", color="black", markersize=18, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), [LABELS[row] for row in rows])
    axis.invert_yaxis()
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_xlabel("exact match below Full of the same seed, in points (dots: seeds; bars: means)")
    axis.set_title("what freezing by each metric cost, at about the same FLOPs saved", loc="left", fontweight="bold")
    axis.grid(axis="x", color="0.92")


def main(argv: list[str] | None = None, runner: runs.Runner | None = None) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), write_tables, draw, runner)


if __name__ == "__main__":
    sys.exit(main())
