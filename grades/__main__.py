"""python -m grades report FOLDER: the table of components and the pictures, from a run's saved history alone."""

import argparse
import json
from pathlib import Path

from grades.plots import draw
from grades.report import find_history, summary, table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m grades", description="What GradES did in a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="the table of components, when each froze, and the pictures")
    report.add_argument("folder", type=Path, help="of a run or of a checkpoint, with grades_history.json in it")
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
