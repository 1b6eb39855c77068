"""python -m grades report FOLDER: print the table of components and draw the pictures of a run's saved history."""

import argparse
import json
from pathlib import Path

from grades.plots import draw
from grades.report import find_history, summary, table


def main(arguments: list[str] | None = None) -> None:
    """arguments: of the command line; None for the process's own. Errors end the process with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m grades", description="What GradES did in a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="the table of components, when each froze, and the pictures")
    report.add_argument("folder", type=Path, help="of a run or of a checkpoint; holds grades_history.json")
    report.add_argument("--output", type=Path, help="where the pictures go (default: beside the history)")
    given = parser.parse_args(arguments)
    try:
        path = find_history(given.folder)
    except ValueError as error:
        parser.error(str(error))
    history = json.loads(path.read_text(encoding="utf-8"))
    print(table(history), "", *summary(history), sep="\n")
    for picture in draw(path, given.output):
        print(picture)


if __name__ == "__main__":
    main()
