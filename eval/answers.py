"""Answers made earlier or elsewhere: a JSON Lines file, matched with a benchmark's questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark

SHOWN = 5  # ids in a message
MISSING = ("error", "wrong", "skip")


def read_answers(path: Path, tasks: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Task -> (id, answer) in the order of the file. For one task rows need not name it.

    A row is {"id", "answer"} and, for several tasks, "task"; or a sample of lmms-eval, {"doc_id", "filtered_resps"},
    whose id begins with "#": the row's number. Raises FileNotFoundError or ValueError that names the line.
    """
    found: dict[str, list[tuple[str, str]]] = {task: [] for task in tasks}
    try:
        # Not splitlines: a JSON text may hold other separators as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except IsADirectoryError:
        raise ValueError(f"--answers {path}: is a folder; it must be a .jsonl file, as answers.jsonl in it") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"--answers {path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"--answers {path}: is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--answers {path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: must be an object {{"id": ..., "answer": ...}}')
        task = row.get("task", tasks[0] if len(tasks) == 1 else None)
        if task is None:
            raise ValueError(f'{where}: must name its "task", since there are several: {", ".join(tasks)}')
        if task in found and ("answer" in row or "error" not in row):  # one that could not be asked has no answer
            found[task].append(_pair(row, where))
    return found


def _pair(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    if "doc_id" in row and "id" not in row:
        answer = row.get("filtered_resps", row.get("resps"))
        while isinstance(answer, list) and answer:
            answer = answer[0]
        row = {"id": f"#{row['doc_id']}", "answer": answer}
    if missing := [key for key in ("id", "answer") if key not in row]:
        there = ", ".join(row) or "none"
        raise ValueError(f'{where}: needs the keys "id" and "answer"; there are {there}; missing: {", ".join(missing)}')
    if not isinstance(row["answer"], str):
        raise ValueError(f'{where}: "answer" must be a text, not {json.dumps(row["answer"])[:60]}')
    return str(row["id"]), row["answer"]


def match(given: Iterable[tuple[str, str]], benchmark: Benchmark, missing: str = "error") -> dict[str, str]:
    """Id -> answer, for ids of the benchmark.

    missing, for questions without an answer: "error"; "wrong", an empty answer; or "skip", which leaves them out.
    Where the benchmark is a part of its questions, answers to others may be there; they are left out, as are those to
    questions without a truth.
    Raises ValueError that names the ids that are missing, there twice or unknown.
    """
    name, ids = benchmark.task.name, [question.id for question in benchmark.questions]
    by_number = {f"#{question.number}": question.id for question in benchmark.questions}
    known = set(ids)
    pairs = [(one if one in known else by_number.get(one, one), answer) for one, answer in given]
    pairs = [(one, answer) for one, answer in pairs if one not in benchmark.without_truth]
    if benchmark.is_part and known & {one for one, _ in pairs}:
        pairs = [(one, answer) for one, answer in pairs if one in known]
    counts = Counter(one for one, _ in pairs)
    problems = []
    if twice := [one for one, count in counts.items() if count > 1]:
        problems.append(f"{len(twice)} ids stand there twice: {_some(twice)}")
    if unknown := [one for one in counts if one not in known]:
        problems.append(f"{len(unknown)} ids are none of its {len(ids)} questions, as {_some(ids)}: {_some(unknown)}")
    without = [one for one in ids if one not in counts]
    if without and missing == "error":
        problems.append(
            f"{len(without)} of {len(ids)} questions have no answer: {_some(without)}; --missing wrong counts them as "
            "wrong, --missing skip leaves them out, --limit N takes the first N questions"
        )
    if problems:
        raise ValueError(f"--answers for {name}: {'; '.join(problems)}")
    answers = dict(pairs)
    return answers | dict.fromkeys(without, "") if missing == "wrong" else answers


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
