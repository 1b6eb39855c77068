"""GradES over a grid of alpha and tau, as the paper's Tables 6 and 7, on any recipe.

    python scripts/sweep.py --config configs/quickstart.yaml
    python scripts/sweep.py --config configs/quickstart.yaml --alphas 0.3 0.5 --taus 0.5 1 2 --seeds 2 -- --cache_rows

A tau here is a factor on the recipe's vision_tau and language_tau. One full run a seed, in which nothing may freeze, is
the reference and the common beginning: the runs of the grid resume from its last checkpoint before their grace period
ends, to the bit as if they had run from step 1, and its seconds until then count as theirs. Writes sweep.md,
results.json and sweep.png. After an interruption or a failure the same command continues.
"""

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades.files import write_json, write_text
from grades.policy import grace_steps
from scripts import runs
from scripts.runs import Runs, RunSpec, cell, compare
from training.checkpoint_folder import step_folders, step_of

CHECKPOINTS = 20  # of Full

# What is shown of a run: title, how it is printed, scale.
PANELS = {
    "accuracy": ("{accuracy} (%)", "{:.1f}", 100),
    "total_time_s": ("time (s)", "{:.0f}", 1),
    "flops_ratio": ("FLOPs / Full", "{:.3f}", 1),
    "steps": ("step at which the run ended", "{:.0f}", 1),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = runs.parser(__doc__.splitlines()[0], prefix="sweep", seeds=1)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], help="grace periods")
    parser.add_argument(
        "--taus", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 8], help="factors on the recipe's taus"
    )
    parser.add_argument("--grades_flags", default="", help='flags of the GradES runs, in one word: "--patience 3"')
    arguments = runs.read_arguments(parser, argv)
    grades = arguments.recipe.grades
    for name in ("vision_tau", "language_tau"):
        if isinstance(getattr(grades, name), str):
            parser.error(f"--{name} {getattr(grades, name)}: must be a number, which the factors multiply")
    return arguments


def grid_row(alpha: float, factor: float) -> str:
    return f"alpha{alpha:g}_tau{factor:g}"


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """Seed by seed: Full, then the grid."""
    grades, specs = arguments.recipe.grades, []
    interval = max(1, arguments.recipe.train.max_training_steps // CHECKPOINTS)
    for seed in range(arguments.seeds):
        flags = (*arguments.extra, "--seed", str(seed), "--enable_grades", *shlex.split(arguments.grades_flags))
        whole = f"--freeze_vision false --freeze_language false --checkpoint_interval {interval} "
        whole += f"--keep_checkpoints {2 * CHECKPOINTS}"
        full = RunSpec("full", "Full", seed, (*flags, *whole.split()))
        specs.append(full)
        for alpha in arguments.alphas:
            for factor in arguments.taus:
                words = f"--alpha {alpha:g} --vision_tau {factor * grades.vision_tau:g} "
                words += f"--language_tau {factor * grades.language_tau:g}"
                label = f"alpha {alpha:g}, taus x {factor:g}"
                options: dict = {"needs": (full.name,), "base": full.name, "late": "--resume of Full's checkpoint"}
                options["late_flags"] = functools.partial(branch_flags, full, alpha)
                specs.append(RunSpec(grid_row(alpha, factor), label, seed, (*flags, *words.split()), **options))
    return specs


def branch_flags(full: RunSpec, alpha: float, made: Runs) -> list[str]:
    """Resume from Full's last checkpoint in the grace period; from the start where there is none."""
    last = grace_steps(alpha, made.settings[full.name].train.max_training_steps)
    before = [folder for folder in step_folders(made.folder(full.name)) if step_of(folder) <= last]
    return ["--resume", str(before[0]), "--resume_override"] if before else []


def grid(made: Runs, arguments: argparse.Namespace) -> dict[tuple[float, float], list[dict]]:
    """compare() of the finished runs at each point of the grid."""
    found = {}
    for alpha in arguments.alphas:
        for factor in arguments.taus:
            names = [(f"{grid_row(alpha, factor)}_seed{seed}", f"full_seed{seed}") for seed in range(arguments.seeds)]
            found[alpha, factor] = [
                compare(made.summary(name), made.summary(full)) for name, full in names if name in made.results
            ]
    return found


def titles(made: Runs) -> dict[str, str]:
    accuracy = runs.accuracy_name([result["summary"] for result in made.results.values()])
    return {name: title.format(accuracy=accuracy) for name, (title, *_) in PANELS.items()}


def reference(made: Runs, name: str) -> str:
    """Full's value of one of PANELS."""
    full = [result["summary"] for result in made.results.values() if result["row"] == "full"]
    _, pattern, scale = PANELS[name]
    return cell([compare(summary, summary)[name] for summary in full], pattern, scale)


def as_markdown(found: dict, made: Runs, arguments: argparse.Namespace) -> str:
    text = f"# {arguments.config.stem}: {len(made.results)} of {len(made.specs)} runs\n"
    for name, title in titles(made).items():
        _, pattern, scale = PANELS[name]
        text += f"\n{title[0].upper() + title[1:]}; Full: {reference(made, name)}\n\n"
        header = ["alpha", *(f"taus x {factor:g}" for factor in arguments.taus)]
        lines = [
            [f"{alpha:g}", *(cell([v[name] for v in found[alpha, tau]], pattern, scale) for tau in arguments.taus)]
            for alpha in arguments.alphas
        ]
        text += runs.markdown_table(header, lines)
    return text


def picture(found: dict, made: Runs, arguments: argparse.Namespace) -> Any:
    """A heat map for each of PANELS, of the means over the seeds."""
    import numpy as np
    from matplotlib.figure import Figure

    columns, rows = len(arguments.taus), len(arguments.alphas)
    figure = Figure(figsize=(4 + 1.3 * columns, 3 + 0.9 * rows), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 2).flat, titles(made).items(), strict=True):
        _, pattern, scale = PANELS[name]
        values = np.full((rows, columns), np.nan)
        for (row, column), _ in np.ndenumerate(values):
            point = found[arguments.alphas[row], arguments.taus[column]]
            mean = runs.spread([v[name] for v in point])["mean"]
            values[row, column] = np.nan if mean is None else scale * mean
        image = axis.imshow(values, cmap="viridis", aspect="auto")
        middle = np.nanmean([np.nanmin(values), np.nanmax(values)]) if not np.isnan(values).all() else 0
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value <= middle else "black"
            text = "" if np.isnan(value) else pattern.format(value)
            axis.text(column, row, text, ha="center", va="center", fontsize=9, color=ink)
        axis.set_xticks(range(columns), [f"{factor:g}" for factor in arguments.taus])
        axis.set_yticks(range(rows), [f"{alpha:g}" for alpha in arguments.alphas])
        axis.set_xlabel("factor on the recipe's taus")
        axis.set_ylabel("alpha")
        axis.set_title(f"{title}; Full: {reference(made, name)}", loc="left", fontweight="bold")
        figure.colorbar(image, ax=axis)
    return figure


def write_tables(made: Runs, arguments: argparse.Namespace) -> Path:
    """sweep.md and results.json of the runs that have finished; returns the first."""
    found = grid(made, arguments)
    points = [
        {
            "alpha": alpha,
            "tau_factor": factor,
            "seeds": values,
            "spread": {name: runs.spread([v[name] for v in values]) for name in PANELS},
        }
        for (alpha, factor), values in found.items()
    ]
    summaries = {name: result["summary"] for name, result in made.results.items()}
    results = {"config": str(arguments.config), "points": points, "summaries": summaries}
    write_json(made.output / "results.json", results)
    write_text(made.output / "sweep.md", as_markdown(found, made, arguments))
    return made.output / "sweep.md"


def draw(made: Runs, arguments: argparse.Namespace) -> None:
    """sweep.png."""
    runs.save_figure(picture(grid(made, arguments), made, arguments), made.output / "sweep.png")


def main(argv: list[str] | None = None, runner: runs.Runner | None = None) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), write_tables, draw, runner)


if __name__ == "__main__":
    sys.exit(main())
