"""Draw convergence.png and freezing.png again from a run's grades_history.json.

python scripts/plot_grades.py grades_output/<run name>
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades.plots import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path, help="folder that holds grades_history.json")
    parser.add_argument("--output", type=Path, help="where the pictures go (default: the run folder)")
    arguments = parser.parse_args()
    history = arguments.run_folder / "grades_history.json"
    if not history.is_file():
        parser.error(f"{history} does not exist: a run with --enable_grades writes it")
    for path in draw(history, arguments.output):
        print(path)


if __name__ == "__main__":
    main()
