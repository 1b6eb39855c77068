"""Draw convergence.png and freezing.png again from a run's grades_history.json, and say at what each tower froze.

python scripts/plot_grades.py grades_output/<run name>
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades.plots import draw
from grades.policy import lasting


def tower_lines(history: dict) -> list[str]:
    """For each tower: how many froze and when, and how their metric stood against its own peak when they did."""
    lines = []
    for tower in ("vision", "language"):
        columns = {c["name"]: i for i, c in enumerate(history["components"]) if c["tower"] == tower}
        events = [event for event in lasting(history["events"]) if event["name"] in columns]
        line = f"{tower:<9}{len(events)} of {len(columns)} frozen"
        shares = []
        for event in events:
            measured = [check["values"][columns[event["name"]]] for check in history["checks"]]
            if event["value"] is not None:  # else drawn at random before anything was measured
                peak = max(value for value in [event["value"], *measured] if value is not None)
                shares.append(event["value"] / peak)
        if events:
            steps = [event["step"] for event in events]
            line += f", steps {min(steps):,} to {max(steps):,}"
        if shares:
            line += f", at {min(shares):.0%} to {max(shares):.0%} (median {statistics.median(shares):.0%})"
            line += f" of each matrix's own peak {history['config']['metric']}"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path, help="folder that holds grades_history.json")
    parser.add_argument("--output", type=Path, help="where the pictures go (default: the run folder)")
    arguments = parser.parse_args()
    path = arguments.run_folder / "grades_history.json"
    if not path.is_file():
        parser.error(f"{path} does not exist: a run with --enable_grades writes it")
    for line in tower_lines(json.loads(path.read_text())):
        print(line)
    for picture in draw(path, arguments.output):
        print(picture)


if __name__ == "__main__":
    main()
