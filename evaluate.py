"""Score answers to benchmarks, and compare two evaluations.

    python evaluate.py --list
    python evaluate.py --tasks mmstar --data_root data/mmstar --answers answers.jsonl --output results/a
    python evaluate.py --compare results/a results/b

docs/evaluation.md says what each number is, by which rule, and where the data comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.prompts import STYLES


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Whatever is wrong with them alone ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the tasks, their data and rules, and end")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two --output folders")
    parser.add_argument("--tasks", help="names, as mmstar,pope, or a file or folder of your own rows (docs/data.md)")
    parser.add_argument("--data_root", type=Path, help="folder with the benchmarks' data; without it, the hub")
    parser.add_argument("--answers", type=Path, help='score these answers: .jsonl of {"id": ..., "answer": ...}')
    parser.add_argument(
        "--missing", choices=("error", "wrong", "skip"), default="error", help="questions without answer"
    )
    parser.add_argument("--output", type=Path, help="folder for results.json, answers.jsonl and results.md")
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--prompt_style", choices=STYLES, help="whose prompts the answers are to")
    given = parser.parse_args(argv)
    if given.list or given.compare:
        return given
    problems = []
    if not given.tasks:
        problems.append("--tasks: is needed, unless --list or --compare is given; --list names what there is")
    if given.tasks and not given.answers:
        problems.append("--answers: is needed")
    if given.limit is not None and given.limit < 1:
        problems.append(f"--limit {given.limit}: must be >= 1")
    if problems:
        parser.error("\n  ".join(problems))
    return given


def list_tasks() -> str:
    """The table of tasks as text: a line of each, and its rules below."""
    from eval.tasks import TASKS

    lines = []
    for task in TASKS.values():
        chance = "1 / choices" if task.chance == "choices" else task.chance or "none"
        where = "/".join(filter(None, (task.hub_id, task.config)))
        lines.append(f"{task.name}  {where}, split {task.split}, {task.published_rows or '?'} rows")
        lines.append(f"    columns: {', '.join(task.columns)}")
        lines.append(
            f"    id: {'/'.join(task.id_columns) or 'row number, from 0'}; number: {task.main}; chance: {chance}"
        )
        lines += [f"    rule: {rule.name}: {rule.source}" for rule in task.rules]
    return "\n".join(lines)


def open_benchmarks(given: argparse.Namespace, earlier: dict[str, Any]) -> list[Any]:
    """The benchmarks that --tasks names, rows of one's own among them, asked as `earlier` says, the results.json of the
    answers, unless --prompt_style does. Raises ValueError, OSError."""
    from eval.benchmarks import open_benchmark
    from eval.own_rows import open_own_rows
    from eval.tasks import TASKS

    names = list(dict.fromkeys(name.strip() for name in given.tasks.split(",") if name.strip()))
    root = given.data_root and given.data_root.expanduser()
    found: dict[str, Any] = {}
    for name in names:
        if name in TASKS:
            alone = sum(other in TASKS for other in names) == 1
            style = given.prompt_style or earlier.get("tasks", {}).get(name, {}).get("prompt", {}).get("style")
            one: Any = open_benchmark(TASKS[name], root, given.limit, style, alone=alone)
        elif (path := Path(name).expanduser()).exists():
            one = open_own_rows(path, given.limit)
        else:
            raise ValueError(f"--tasks {name}: no such task, file or folder; the tasks are {', '.join(TASKS)}")
        if one.task.name in found:
            raise ValueError(f"--tasks {given.tasks}: two of them are called {one.task.name}; rename a file")
        found[one.task.name] = one
    return list(found.values())


def pairs_of(given: argparse.Namespace, benchmarks: list[Any]) -> dict[str, Iterable[tuple[str, str]]]:
    """Task name -> (id, answer) of its questions, from --answers. Raises ValueError, OSError."""
    from eval.answers import read_answers

    return dict(read_answers(given.answers, [one.task.name for one in benchmarks]))


def evaluate(given: argparse.Namespace) -> None:
    """Score the answers, print the main numbers, and write --output."""
    from eval.answers import match
    from eval.output import markdown, write_results
    from eval.results import score

    earlier = _earlier(given.answers)
    benchmarks = open_benchmarks(given, earlier)
    answers = pairs_of(given, benchmarks)
    run = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": earlier.get("model"),
        "answers": str(given.answers),
    }
    rows, summaries = [], {}
    for one in benchmarks:
        scored, summary = score(one, match(answers[one.task.name], one, given.missing))
        rows += scored
        before = earlier.get("tasks", {}).get(one.task.name, {})
        summaries[one.task.name] = summary | {"decoding": before.get("decoding")}
    if given.output:
        write_results(given.output, run, [one.task for one in benchmarks], rows, summaries)
    print(markdown({**run, "tasks": summaries}, short=True))


def _earlier(answers: Path) -> dict[str, Any]:
    """The results.json beside the answers of an earlier evaluation, which knows the model, its prompts and decoding."""
    beside = answers.parent / "results.json"
    if answers.name != "answers.jsonl" or not beside.is_file():
        return {}
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def main(given: argparse.Namespace) -> None:
    """Do what the flags ask for. Raises ValueError, OSError."""
    if given.list:
        print(list_tasks())
    elif given.compare:
        from eval.compare import compare, compared, read_evaluation

        first, second = (read_evaluation(folder.expanduser()) for folder in given.compare)
        print(compared(compare(first, second), *given.compare))
    else:
        evaluate(given)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where the console lacks a letter
    try:
        main(parse_arguments())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
