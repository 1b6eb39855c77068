"""The flags that the scripts over several runs share: reproduce.py, sweep.py, compare_metrics.py, compare_tasks.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.arguments import DEFAULT_RECIPE, parse_arguments


def make_parser(description: str, prefix: str, seeds: int, recipe: Path = DEFAULT_RECIPE) -> argparse.ArgumentParser:
    """A parser with the flags that the scripts share. prefix: begins the name of the default output folder.

    recipe: the default of --config.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, epilog="Flags after -- are passed to every run of train.py."
    )
    parser.add_argument("--config", type=Path, default=recipe, help="recipe of train.py")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds 0 to N - 1 (default: {seeds})")
    parser.add_argument("--output", type=Path, help=f"results go here (default: grades_output/{prefix}_<recipe>)")
    jobs = "runs at once, which share the CPU's cores; compare times of equal --jobs only (default: 1)"
    parser.add_argument("--jobs", type=int, default=1, help=jobs)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.set_defaults(prefix=prefix)
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, own: Sequence[str] = ()
) -> argparse.Namespace:
    """With `extra`, the flags after --, and `recipe`, the Settings of a run with these flags alone.

    own: settings that the script sets for all runs, besides seed and folder.
    """
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:cut])
    arguments.extra = ("--config", str(arguments.config), *argv[cut + 1 :])
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be >= 1")
    arguments.output = arguments.output or Path("grades_output") / f"{arguments.prefix}_{arguments.config.stem}"
    arguments.recipe = parse_arguments(list(arguments.extra))
    if taken := sorted(arguments.recipe.given & {"seed", "output_dir", "run_name", *own}):
        parser.error(", ".join(f"--{name}" for name in taken) + ": set by this script, must not stand after --")
    for name in ("enable_grades", "early_stopping", "lora_rank"):
        if getattr(arguments.recipe.train, name):
            parser.error(f"--{name}: set for single rows, must be neither in the recipe nor after --")
    return arguments
