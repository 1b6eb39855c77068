"""Answers to scores: rows for answers.jsonl, numbers for results.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval import metrics
from eval.benchmarks import Benchmark
from eval.rules import Item, Question, Rule, Task
from eval.statistics import estimate


def score(benchmark: Benchmark, answers: Mapping[str, str]) -> tuple[list[dict], dict[str, Any]]:
    """(the rows of answers.jsonl, the task's part of results.json) of the questions that have an answer.

    answers: of ids of the benchmark's questions. A row has the scores and what was parsed by each rule.
    """
    questions = [question for question in benchmark.questions if question.id in answers]
    texts, items = [answers[question.id] for question in questions], [question.item for question in questions]
    rows = [_row(benchmark, question, text) for question, text in zip(questions, texts, strict=True)]
    for rule in benchmark.task.rules:
        for row, judged in zip(rows, rule.judge(texts, items), strict=True):
            row["rules"][rule.name] = {"parsed": judged.parsed, "score": judged.score}
    summary = {
        "main": benchmark.task.main,
        "rows": len(rows),
        "prompt": {"style": benchmark.prompt_style, "first": rows[0]["prompt"] if rows else None},
        "data": benchmark.describe(),
        "rules": {rule.name: numbers(benchmark.task, rule, rows, items) for rule in benchmark.task.rules},
    }
    return rows, summary


def _row(benchmark: Benchmark, question: Question, answer: str) -> dict[str, Any]:
    """A row without scores; its prompt is None where it is not known."""
    row: dict[str, Any] = {"task": benchmark.task.name, "id": question.id, "number": question.number}
    row["question"] = question.item.question
    row["prompt"] = question.prompt if benchmark.prompt_style else None
    if benchmark.prompt_style and question.answer_prefix:
        row["answer_prefix"] = question.answer_prefix
    row |= {"answer": answer, "truth": question.item.truth, "categories": question.item.categories}
    return row | {"cluster": question.cluster, "rules": {}}


def numbers(task: Task, rule: Rule, rows: Sequence[dict], items: Sequence[Item]) -> dict[str, Any]:
    """{"source", "metrics": {name: {"value", "stderr", "rows", "chance"}}, "constant": the same answer to everything}.

    None where there is no such number. The standard error is that of estimate, by clusters.
    """
    clusters = [row["cluster"] for row in rows]
    chances = _chances(task, rule, rows, items)
    found = {}
    for metric in task.metrics(rows, rule.name):
        value, error = estimate(metric, clusters)
        found[metric.name] = {"value": value, "stderr": error, "rows": metric.rows, "chance": chances.get(metric.name)}
    return {"source": rule.source, "metrics": found, "constant": _constant(task, rule, rows, items)}


def _with_scores(rows: Sequence[dict], rule: Rule, scores: Sequence[float]) -> list[dict]:
    return [row | {"rules": {rule.name: {"parsed": None, "score": one}}} for row, one in zip(rows, scores, strict=True)]


def _chances(task: Task, rule: Rule, rows: Sequence[dict], items: Sequence[Item]) -> dict[str, float | None]:
    """What guessing scores on average, for the metrics that are means."""
    if task.chance is None or (task.chance == "choices" and not any(item.choices for item in items)):
        return {}
    if isinstance(task.chance, float):
        scores = [task.chance] * len(rows)
    else:
        scores = [1 / item.choices if item.choices else 0.0 for item in items]
    guessed = _with_scores(rows, rule, scores)
    return {one.name: estimate(one, [str(i) for i in range(len(rows))])[0]
            for one in task.metrics(guessed, rule.name) if one.is_mean}  # fmt: skip


def _constant(task: Task, rule: Rule, rows: Sequence[dict], items: Sequence[Item]) -> dict[str, Any] | None:
    """The score of the most frequent truth given as the answer to every question; None for captions."""
    if not items or task.metrics is metrics.captions:
        return None
    answer = Counter(_usual(item) for item in items).most_common(1)[0][0]
    judged = rule.judge([answer] * len(items), items)
    given = [row | {"rules": {rule.name: {"parsed": one.parsed, "score": one.score}}}
             for row, one in zip(rows, judged, strict=True)]  # fmt: skip
    main = next(metric for metric in task.metrics(given, rule.name) if metric.name == task.main)
    return {"answer": answer, "value": estimate(main, [row["cluster"] for row in rows])[0]}


def _usual(item: Item) -> str:
    """The truth, or the most frequent of several."""
    truth = item.truth
    if "answer" in truth:
        return truth["answer"]
    return Counter(truth["answers"]).most_common(1)[0][0] if truth["answers"] else ""
