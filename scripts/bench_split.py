"""How long it takes to load and split a large .jsonl, whose rows share images or do not.

python scripts/bench_split.py --rows 1000000
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.rows import load_rows
from data.splits import split_by


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows_per_image", type=int, nargs="+", default=[1, 5])
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for per_image in arguments.rows_per_image:
            path = Path(folder) / f"{per_image}.jsonl"
            write(path, arguments.rows, per_image)
            print(f"{arguments.rows:,} rows, {per_image} of each image: {measure(path)}")


def write(path: Path, rows: int, per_image: int) -> None:
    """Rows of a path, a question and an answer each; there are no such images."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            row = {
                "image": f"images/{i // per_image:07d}.jpg",
                "question": f"What is number {i}?",
                "answer": f"{i % 97}",
            }
            file.write(json.dumps(row) + "\n")


def measure(path: Path) -> str:
    """Seconds of this process, and by how much its memory grew at most."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    rows = load_rows(str(path))
    loaded = time.process_time()
    _, val, how = split_by(rows, "auto", 0.01, seed=0)
    done = time.process_time()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return f"load {loaded - started:.2f} s, split {done - loaded:.2f} s, {grown:.0f} MiB; {len(val):,} held out, {how}"


if __name__ == "__main__":
    main()
