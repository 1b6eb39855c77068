"""python -m grades report FOLDER: print the table of components and draw the pictures of a run's saved history.

python -m grades components MODEL: print which matrices of a model are watched, from its configuration alone.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from grades.plots import draw
from grades.report import find_history, reading_history, summary, table


def main(arguments: list[str] | None = None) -> None:
    """arguments: of the command line; None for the process's own. Errors end the process with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m grades", description="What GradES did in a run, or would watch.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="the table of components, when each froze, and the pictures")
    report.add_argument("folder", type=Path, help="of a run or of a checkpoint; holds grades_history.json")
    report.add_argument("--output", type=Path, help="where the pictures go (default: beside the history)")
    components = commands.add_parser("components", help="which matrices of a model are watched, and why others are not")
    components.add_argument("model", help="hub id, folder (of adapters too) or config.json; no weights are read")
    components.add_argument(
        "--taus", nargs="*", default=[], metavar="TOWER", help="further towers with a tau, as audio or audio=0.1"
    )
    given = parser.parse_args(arguments)
    try:
        print_report(given.folder, given.output) if given.command == "report" else print_components(given)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        parser.error(str(error))


def print_report(folder: Path, output: Path | None) -> None:
    """The table and the summary of a run; draws its pictures. Raises ValueError for what is no history."""
    path = find_history(folder)
    with reading_history(str(path)):
        history = json.loads(path.read_text(encoding="utf-8"))
        lines = [table(history), "", *summary(history)]
    print(*lines, *draw(path, output), sep="\n")


def print_components(given: argparse.Namespace) -> None:
    """The table of a model's matrices."""
    from grades import listing
    from grades.config import DEFAULT_TAUS

    # NAME, or as the setting has it: NAME=TAU,NAME=TAU. What is watched does not depend on the tau.
    towers = [one.partition("=")[0].strip() for taus in given.taus for one in taus.split(",")]
    if not all(towers):
        raise ValueError(f"--taus {' '.join(given.taus)}: must be names of towers, as audio or audio=0.1")
    model = listing.load(given.model)
    found = listing.rows(model, (*DEFAULT_TAUS, *towers))
    print(type(model).__name__, listing.table(found), sep="\n\n")


if __name__ == "__main__":
    main()
