"""The numbers that --eval_tasks are known by. They are kept as the tasks of results.json: eval.results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class MainNumber(NamedTuple):
    """What a benchmark is known by, by its first rule. value, stderr: None where they are not known."""

    task: str
    metric: str
    value: float | None
    stderr: float | None
    rows: int
    rule: str

    @property
    def words(self) -> str:
        """As text: "average 0.3120 ± 0.0330 (200 rows, lmms-eval since 2026-04)"."""
        number = "none" if self.value is None else f"{self.value:.4f}"
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        return f"{self.metric} {number}{error} ({self.rows:,} rows, {self.rule})"


def main_numbers(tasks: Mapping[str, Any]) -> list[MainNumber]:
    """One of each task."""
    found = []
    for task, of_task in tasks.items():
        rule, by_rule = next(iter(of_task["rules"].items()))
        one = by_rule["metrics"][of_task["main"]]
        found.append(MainNumber(task, of_task["main"], one["value"], one["stderr"], one["rows"], rule))
    return found
