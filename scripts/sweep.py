"""GradES over a grid of alpha and tau, as in the paper's Tables 6 and 7, on any recipe.

    python scripts/sweep.py --config configs/table10_quickstart.yaml
    python scripts/sweep.py --alphas 0.3 0.5 --taus 0.5 1 2 --seeds 2 -- --cache_rows

A tau here is a factor on the recipe's vision_tau and language_tau. One full run per seed, in which nothing may freeze,
is the reference and the common beginning: the runs of the grid continue from its last checkpoint before their grace
period ends, on a CPU bit for bit as if they had run from step 1, and its seconds until then count as theirs. Writes
sweep.md, results.json and sweep.png. After an interruption or a failure the same command continues.
"""

import argparse
import functools
import shlex
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.figure import Figure

from grades.components import TOWERS
from grades.policy import grace_steps
from scripts import run_flags, runs
from scripts.runs import Runs, RunSpec
from training.arguments import parse_arguments
from training.checkpoint_folder import step_folders, step_of

CHECKPOINTS = 20  # of Full
PANELS = ("accuracy", "total_time_s", "flops_ratio", "steps")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The script's flags; impossible ones end the program."""
    parser = run_flags.make_parser(__doc__.splitlines()[0], prefix="sweep", seeds=1, recipe=runs.PAPER_RECIPE)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], help="grace periods")
    factors = "factors on the recipe's taus"
    parser.add_argument("--taus", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 8], help=factors)
    parser.add_argument("--grades_flags", default="", help='flags of the GradES runs, in one word: "--patience 3"')
    arguments = run_flags.read_arguments(parser, argv)
    grades = parse_arguments([*arguments.extra, *shlex.split(arguments.grades_flags)]).grades
    arguments.recipe_taus = {tower: grades.tau_of(tower, "") for tower in TOWERS}
    for tower, tau in arguments.recipe_taus.items():
        if isinstance(tau, str):
            parser.error(f"--{tower}_tau {tau}: must be a number, which the factors multiply")
    if not grades.monitor_grace:
        parser.error(
            "--monitor_grace false: must be true, as the grid begins with what Full measured; give it after --"
        )
    return arguments


def grid_row(alpha: float, factor: float) -> str:
    return f"alpha{alpha:g}_tau{factor:g}"


def make_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """Seed by seed: Full, then the grid."""
    specs = []
    interval = max(1, arguments.recipe.train.max_training_steps // CHECKPOINTS)
    for seed in range(arguments.seeds):
        flags = (*arguments.extra, "--seed", str(seed), "--enable_grades", *shlex.split(arguments.grades_flags))
        whole = f"--freeze_vision false --freeze_language false --checkpoint_interval {interval} "
        whole += f"--keep_checkpoints {2 * CHECKPOINTS}"
        full = RunSpec("full", "Full", seed, (*flags, *whole.split()))
        specs.append(full)
        for alpha, factor in product(arguments.alphas, arguments.taus):
            taus = [f"--{tower}_tau {factor * tau:g}" for tower, tau in arguments.recipe_taus.items()]
            words = " ".join([f"--alpha {alpha:g}", *taus])
            specs.append(
                RunSpec(
                    grid_row(alpha, factor), f"alpha {alpha:g}, taus x {factor:g}", seed, (*flags, *words.split()),
                    needs=(full.name,), late_flags=functools.partial(branch_flags, full.name, alpha),
                    late="--resume of Full's checkpoint", base=full.name,
                )
            )  # fmt: skip
    return specs


def branch_flags(full: str, alpha: float, made: Runs) -> list[str]:
    """Continue from Full's last checkpoint in the grace period; without one, from the start."""
    last = grace_steps(alpha, made.settings[full].train.max_training_steps)
    before = [folder for folder in step_folders(made.folder(full)) if step_of(folder) <= last]
    return ["--resume", str(before[0]), "--resume_override"] if before else []


def tables(made: Runs, arguments: argparse.Namespace) -> tuple[str, dict]:
    """The text of sweep.md, a table per panel, and what results.json says of each point of the grid."""
    found = made.compared()
    parts = []
    for name in PANELS:
        header = ["alpha", *(f"taus x {factor:g}" for factor in arguments.taus)]
        lines = [
            [f"{alpha:g}", *(runs.cell(found.get(grid_row(alpha, tau), []), name) for tau in arguments.taus)]
            for alpha in arguments.alphas
        ]
        parts.append(f"{title(made, name)}\n\n{runs.markdown_table(header, lines)}")
    points = [
        {"alpha": alpha, "tau_factor": factor} | runs.with_spread(found.get(grid_row(alpha, factor), []))
        for alpha, factor in product(arguments.alphas, arguments.taus)
    ]
    return "\n".join(parts), {"points": points}


def title(made: Runs, name: str) -> str:
    """Of a panel, with Full's value."""
    return f"{made.title(name)}; Full: {runs.cell(made.compared().get('full', []), name)}"


def picture(made: Runs, arguments: argparse.Namespace) -> Figure:
    """A heat map per panel, of the means over the seeds."""
    found = made.compared()
    columns, rows = len(arguments.taus), len(arguments.alphas)
    figure = Figure(figsize=(4 + 1.3 * columns, 3 + 0.9 * rows), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _, pattern, scale = runs.COLUMNS[name]
        points = (found.get(grid_row(*point), []) for point in product(arguments.alphas, arguments.taus))
        means = [runs.spread(values.get(name) for values in seeds)["mean"] for seeds in points]
        values = scale * np.array(means, dtype=float).reshape(rows, columns)  # nan for None
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
        axis.set_title(title(made, name), loc="left", fontweight="bold")
        figure.colorbar(image, ax=axis)
    return figure


def main(argv: list[str] | None = None, launch: runs.Launch = runs.launch) -> int:
    arguments = parse(argv)
    return runs.run_script(arguments, make_specs(arguments), tables, picture, "sweep", launch)


if __name__ == "__main__":
    sys.exit(main())
