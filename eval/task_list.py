"""What --tasks and --eval_tasks name: benchmarks and rows of one's own, whole or a part of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eval.benchmarks import Benchmark, open_benchmark
from eval.own_rows import open_own_rows
from eval.prompts import STYLES
from eval.tasks import TASKS


def open_tasks(
    tasks: str,
    data_root: Path | None,
    flag: str = "tasks",
    limit: int | None = None,
    style_of: Callable[[str], str | None] = lambda name: STYLES[0],
    with_images: bool = True,
) -> list[Benchmark]:
    """The benchmarks that `tasks` names, separated by commas: names of eval.tasks, files or folders of one's own rows.

    NAME:COUNT is a part: COUNT rows drawn from all of them, the same ones each time. limit: the first rows of each
    instead. style_of: the prompt style of a benchmark by name, None where it is not known. with_images: a model is to
    answer. Raises ValueError, FileNotFoundError or ConnectionError in one sentence that names `flag` or --data_root.
    """
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    parts = [_part(name, flag) for name in names]
    root = data_root and data_root.expanduser()
    alone = sum(name in TASKS for name, _ in parts) == 1
    found: dict[str, Benchmark] = {}
    for name, count in parts:
        if name in TASKS:
            style = style_of(name)
            one = open_benchmark(TASKS[name], root, limit, style, with_images, alone, count)
        elif (path := Path(name).expanduser()).exists():
            one = open_own_rows(path, limit, flag, count=count)
        else:
            raise ValueError(f"--{flag} {name}: no such task, file or folder; the tasks are {', '.join(TASKS)}")
        if one.task.name in found:
            raise ValueError(f"--{flag} {tasks}: two of them are called {one.task.name}; rename a file")
        found[one.task.name] = one
    if not found:
        raise ValueError(f"--{flag} {tasks}: names no task; the tasks are {', '.join(TASKS)}")
    return list(found.values())


def _part(name: str, flag: str) -> tuple[str, int | None]:
    """(name, count) of NAME:COUNT; without a count None."""
    task, colon, count = name.rpartition(":")
    if not colon or not count.isdecimal():
        return name, None
    if int(count) < 1:
        raise ValueError(f"--{flag} {name}: the number of rows must be >= 1")
    return task, int(count)
