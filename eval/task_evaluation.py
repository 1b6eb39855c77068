"""Benchmarks during training (--eval_tasks): asked and scored as by evaluate.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from eval.answering import Answering
from eval.asking import ModelAsker
from eval.benchmarks import Benchmark
from eval.evaluation import Evaluator, evaluating
from eval.output import is_detail
from eval.own_rows import show_frames
from eval.results import score
from eval.task_list import open_tasks
from models.config import TrainConfig

VALIDATION_METRICS = ("loss", "exact_match")
NO_DIRECTION = ("yes_share", "neither_share")  # more of it is neither better nor worse
# Of one rank: task -> id -> answer; in words why a task could not be asked.
Answers: TypeAlias = dict[str, dict[str, str] | str]


def open_eval_tasks(cfg: TrainConfig) -> list[Benchmark]:
    """The benchmarks of --eval_tasks. Raises ValueError or OSError in one sentence where a name, a folder or a column
    is wrong, and where --metric_for_best_model is none of their numbers."""
    root = None if cfg.data_root is None else Path(cfg.data_root)
    if cfg.dry_run and root is None:  # which downloads nothing
        return []
    benchmarks = [] if cfg.eval_tasks is None else open_tasks(cfg.eval_tasks, root, "eval_tasks")
    unanswered = {one.task.name: score(one, {question.id: "" for question in one.questions})[1] for one in benchmarks}
    named = [name for name in numbers_of(unanswered) if not name.endswith("_stderr")]
    allowed = [*VALIDATION_METRICS, *(name for name in named if name.split("/")[1] not in NO_DIRECTION)]
    if cfg.best_metric not in allowed:
        raise ValueError(f"--metric_for_best_model {cfg.metric_for_best_model}: must be one of {', '.join(allowed)}")
    return benchmarks


def numbers_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """For metrics.jsonl, of the tasks of results.json: "mmstar/average" with its standard error and the other numbers
    but those of small parts, by the task's first rule; by the other rules the main number, "mmstar/average [rule]"."""
    found: dict[str, float | None] = {}
    for task, of_task in results.items():
        for number, (rule, by_rule) in enumerate(of_task["rules"].items()):
            for metric, one in by_rule["metrics"].items():
                if number and metric == of_task["main"]:
                    found[f"{task}/{metric} [{rule}]"] = one["value"]
                elif not number and not is_detail(metric):
                    found[f"{task}/{metric}"] = one["value"]
                    if metric == of_task["main"]:
                        found[f"{task}/{metric}_stderr"] = one["stderr"]
    return found


@dataclass
class TaskEvaluator:
    """Lets the model of a run answer benchmarks. Draws no random numbers and leaves every weight as it is."""

    benchmarks: list[Benchmark]
    answering: Answering
    until: Callable[[Iterable], Iterator] = iter  # ends the batches early where the run is to stop

    @classmethod
    def of(cls, evaluator: Evaluator, benchmarks: list[Benchmark], share: tuple[int, int]) -> TaskEvaluator | None:
        """None without benchmarks. share: (which, of how many) of the questions this rank has.

        Batches are as large as fit. Where all ranks have all questions, as with sharded weights, one must not take
        smaller batches than the others: there they are of eval_batch_size.
        """
        if not benchmarks:
            return None
        show_frames(benchmarks, evaluator.model.cfg.max_video_frames)
        cfg = evaluator.cfg
        size = cfg.eval_batch_size if cfg.parallel == "fsdp" else None
        asker = ModelAsker(evaluator.model, evaluator.data.tokenizer, evaluator.device, evaluator.autocast)
        answering = Answering(asker, None, size, cfg.num_workers, rank=share[0], world_size=share[1])
        return cls(benchmarks, answering, evaluator.until)

    def __post_init__(self) -> None:
        """Raises ValueError where the first question of a benchmark cannot be asked."""
        for one in self.benchmarks:
            first = self.answering.prompts(one, one.questions[:1])[0]
            if isinstance(first, str):
                raise ValueError(f"--eval_tasks {one.task.name}: question {one.questions[0].id}: {first}")

    def answers(self) -> Answers:
        """The model's answers to this rank's share of the questions."""
        with evaluating(self.answering.asker.model):
            return {one.task.name: self._answers_to(one) for one in self.benchmarks}

    def _answers_to(self, benchmark: Benchmark) -> dict[str, str] | str:
        found: dict[str, str] = {}
        try:
            for batch in self.until(self.answering.answers_to(benchmark, self.answering.mine(benchmark))):
                for one in batch:
                    if "error" in one:  # one bad picture must not end the run
                        return f"{benchmark.task.name}, question {one['id']}: {one['error']}"
                    found[one["id"]] = one["answer"]
        except ValueError as error:  # nor must one that does not fit into memory
            return str(error)
        return found

    def results(self, shares: Sequence[Answers]) -> tuple[dict[str, Any], dict[str, float | None], list[str]]:
        """(the tasks as in results.json, numbers_of them, why a task was not measured) of the answers of all ranks."""
        results: dict[str, Any] = {}
        numbers: dict[str, float | None] = {}
        problems = []
        for one in self.benchmarks:
            name = one.task.name
            answers: dict[str, str] = {}
            parts = [share[name] for share in shares]
            if problem := next((part for part in parts if isinstance(part, str)), None):
                problems.append(problem)
                numbers[f"{name}/{one.task.main}"] = None
                continue
            for part in parts:
                assert isinstance(part, dict)
                answers |= part
            results[name] = score(one, answers)[1] | {"decoding": self.answering.decoding(one)}
        return results, numbers_of(results) | numbers, problems
