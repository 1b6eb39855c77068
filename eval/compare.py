"""Two evaluations of the same questions: the paired difference of every number, its error, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.output import is_detail, percent
from eval.own_rows import own_task
from eval.rules import Task
from eval.statistics import SIGNIFICANT, Z_95, paired
from eval.tasks import TASKS


@dataclass(frozen=True)
class Evaluation:
    """What a result folder holds. rows: task name -> id -> row of answers.jsonl."""

    folder: Path
    results: dict[str, Any]
    rows: dict[str, dict[str, dict]]


def read_evaluation(folder: Path) -> Evaluation:
    """Raises FileNotFoundError or ValueError that names what is missing."""
    for name in ("results.json", "answers.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--compare {folder}: holds no {name}; it must be an --output of evaluate.py")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        # Not splitlines: a JSON text may hold other separators as they are.
        lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        rows: dict[str, dict[str, dict]] = {name: {} for name in results["tasks"]}
        for row in map(json.loads, filter(str.strip, lines)):
            rows[row["task"]][row["id"]] = row
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare {folder}: cannot be read: {type(error).__name__}: {error}") from None
    return Evaluation(folder, results, rows)


def compare(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """{task: {"rows", "notes", "rules": {rule: {metric: {"first", "second", and what eval.statistics.paired gives}}}}}
    of the tasks and rules that both have, over the questions that both answered. Raises ValueError without any.

    Numbers of small parts (eval.output.is_detail) are left out: too few rows, and too many tests."""
    both = [name for name in first.rows if name in second.rows]
    if not both:
        raise ValueError(
            f"--compare: {first.folder} has {', '.join(first.rows)}, {second.folder} has {', '.join(second.rows)}: no "
            "task in common"
        )
    return {name: _compare_task(name, first, second) for name in both}


def _compare_task(name: str, first: Evaluation, second: Evaluation) -> dict[str, Any]:
    one, other = first.rows[name], second.rows[name]
    ids = [row_id for row_id in one if row_id in other]
    changed = [row_id for row_id in ids if one[row_id]["truth"] != other[row_id]["truth"]]
    if not ids or changed:
        why = f"{len(changed)} questions have another truth, as {changed[0]}" if changed else "no question in common"
        raise ValueError(f"--compare: {name} of {first.folder} and of {second.folder}: {why}")
    notes = []
    if alone := len(one) + len(other) - 2 * len(ids):
        notes.append(f"{alone} questions that only one of them answered are left out")
    summaries = [evaluation.results["tasks"][name] for evaluation in (first, second)]
    for key, what in (("prompt", "prompt styles"), ("decoding", "decoding settings")):
        values = [summary.get(key) for summary in summaries]
        values = [value.get("style") if key == "prompt" else value for value in values]
        if values[0] != values[1]:
            notes.append(f"{what} differ: {values[0]} and {values[1]}")
    pairs = [one[row_id] for row_id in ids], [other[row_id] for row_id in ids]
    clusters = [row["cluster"] for row in pairs[0]]
    task = TASKS.get(name.split("/")[0]) or own_task(name)  # of mmstar/likelihood: mmstar
    rules = [rule for rule in summaries[0]["rules"] if rule in summaries[1]["rules"]]
    return {
        "rows": len(ids),
        "images": len(set(clusters)),
        "main": summaries[0]["main"],
        "notes": notes,
        "rules": {rule: _compare_rule(task, rule, pairs, clusters) for rule in rules},
    }


def _compare_rule(
    task: Task, rule: str, pairs: tuple[Sequence[dict], Sequence[dict]], clusters: Sequence[str]
) -> dict[str, Any]:
    found = {}
    for one, other in zip(*(task.metrics(rows, rule) for rows in pairs), strict=True):
        if is_detail(one.name):
            continue
        values = [float(metric.value(metric.parts.sum(0, keepdims=True))[0]) for metric in (one, other)]
        found[one.name] = {"first": values[0], "second": values[1], **paired(one, other, clusters)}
    return found


def verdict(one: Mapping[str, Any]) -> str:
    """In words, from what eval.statistics.paired gives."""
    if one["p"] is None:
        return "too few rows"
    if one["p"] < SIGNIFICANT:
        return "B is better" if one["difference"] > 0 else "A is better"
    return f"no difference shown; one below {percent(Z_95 * one['stderr'])} points would not be"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def compared(found: Mapping[str, Any], first: Path, second: Path) -> str:
    """The comparison as a Markdown text."""
    parts = [f"A: {first}\nB: {second}\n", "In percent; ± is one standard error of the difference B - A.\n"]
    for name, task in found.items():
        parts.append(f"## {name}: {task['rows']} questions, {task['images']} images\n")
        parts += [f"- {note}" for note in task["notes"]]
        parts += ["", "| rule | number | A | B | B - A | ± | p | test |", "|---|---|--:|--:|--:|--:|--:|---|"]
        for rule, numbers in task["rules"].items():
            parts += [
                f"| {rule} | {metric} | {percent(one['first'])} | {percent(one['second'])} | "
                f"{100 * one['difference']:+.2f} | {percent(one['stderr'])} | "
                f"{_p(one['p'])} | {one['test'] or '–'} |"
                for metric, one in numbers.items()
            ]
        parts.append("")
        parts += [f"- {rule}: {verdict(numbers[task['main']])}" for rule, numbers in task["rules"].items()]
        if any(len(numbers) > 1 for numbers in task["rules"].values()):
            parts.append(
                "- The verdict is on the main number; among many numbers one in twenty has p < 0.05 by chance."
            )
        parts.append("")
    return "\n".join(parts)
