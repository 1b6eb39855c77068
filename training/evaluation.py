"""Evaluations during a run and at its end."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from grades import GradESMonitor
from grades.averaging import AveragedWeights
from grades.rollback import VisionIs
from models.config import TrainConfig
from training.early_stopping import EarlyStopping, validation_interval
from training.logging import RunLog
from training.meter import Meter
from training.parallel import Parallel
from training.schedule import cooldown_end
from training.signals import StopSignal
from training.state import LoopState
from training.task_numbers import main_numbers


class Evaluator(Protocol):
    """Measures the model: eval.evaluation.Evaluator."""

    measured: list[dict]  # the batches that the latest call of row_losses took

    def loss(self) -> float | None:
        """Mean validation loss in nats."""

    def loss_and_answers(self) -> dict[str, float | None]:
        """val/loss, and val/exact_match as `answers` gives it, in one pass over the rows."""

    def answers(self, split: str = "val") -> dict[str, float | None]:
        """{split}/exact_match of the answers to the questions of "val" or "test"."""

    def hold_out(self, rows: int) -> list[dict]:
        """The batches of row_losses. Raises ValueError where they have no label."""

    def row_losses(self, rows: int, vision: str, first: bool | None) -> list[list[tuple[float, int]]]:
        """(summed loss in nats, label tokens) of each row, of this rank's share of a part of the batches."""

    def next_check(self, vision: str) -> None:
        """What the vision tower of this check is at the next one."""


class Tasks(Protocol):
    """Lets the model answer benchmarks: eval.task_evaluation.TaskEvaluator."""

    def answers(self) -> Any:
        """To this rank's share of the questions."""

    def results(self, shares: Any) -> tuple[dict[str, Any], dict[str, float | None], list[str]]:
        """(the tasks of results.json, their numbers by name, why a task was not measured) of the ranks' answers."""


class Samples(Protocol):
    """Asks sample questions: eval.samples.SampleQuestions."""

    def ask(self) -> list[str]:
        """What the model answers now."""

    def add(self, step: int, answers: list[str]) -> None:
        """Keep the answers after this step."""

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) for a tracker."""

    def page(self, title: str, freezes: list[tuple[int, str, bool]]) -> str:
        """The page. freezes: (step, tower, whether a matrix trains again instead of freezing)."""


@dataclass
class HeldOutLosses:
    """What the metric rollback asks for; see grades.rollback.Evaluate."""

    evaluator: Evaluator
    rows: int
    parallel: Parallel
    meter: Meter

    def check(self, freeze_vision: bool, say: Callable[[str], None]) -> None:
        """Before the first step: raises ValueError where the rows have no label or are not the same on all ranks, and
        says so where the vision tower is to freeze and they have no image. All ranks must call it."""
        batches = self.evaluator.hold_out(self.rows)
        labels = sum(batch["num_labels"] for batch in batches)
        if self.parallel.sum(labels) != [labels * self.parallel.world_size]:
            raise ValueError(f"rollback_rows {self.rows}: the processes read different validation rows")
        if freeze_vision and all(batch["images"] is None for batch in batches):
            say(
                f"--rollback_rows {self.rows}: none of these validation rows has an image, so that the vision tower's "
                "gain cannot be measured: it will not freeze, and with --freeze_order together nothing will"
            )

    def __call__(self, vision: VisionIs, first: bool) -> list[tuple[float, int]]:
        """(summed loss in nats, label tokens) of each row of a part of the first rows. Counts the FLOPs."""
        with self.meter.clock("rollback"):
            batches = self.parallel.divided(lambda: self.evaluator.row_losses(self.rows, vision, first))
            self.meter.flops.add_forward(self.evaluator.measured)
        return [row for batch in batches for row in batch]

    def next_check(self, vision: VisionIs) -> None:
        """What the vision tower of this check is at the next one."""
        with self.meter.clock("rollback"):
            self.evaluator.next_check(vision)


class EvaluationSchedule:
    """When the model is evaluated, and what follows from it. It changes neither weights nor random numbers.

    A signal may cut an evaluation short. Then it counts as not made: whoever resumes makes it again.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        evaluator: Evaluator,
        monitor: GradESMonitor | None,
        parallel: Parallel,
        stop: StopSignal,
        meter: Meter,
        log: RunLog,
        averages: AveragedWeights | None = None,
        tasks: Tasks | None = None,
        samples: Samples | None = None,
    ):
        """averages: of the weights, evaluated too. tasks: of --eval_tasks."""
        self.cfg, self.evaluator, self.monitor, self.parallel = cfg, evaluator, monitor, parallel
        self.averages, self.tasks, self.samples = averages, tasks, samples
        self.stop, self.meter, self.log = stop, meter, log
        self.early_stopping = EarlyStopping(cfg.es_delta, cfg.es_patience) if cfg.early_stopping else None
        self.loss_interval = validation_interval(cfg.es_interval, cfg.max_training_steps)

    def end_reason(self, state: LoopState) -> str | None:
        """Why the run is over after this step, one of END_REASONS; None if it is not."""
        if self.monitor is not None and self.monitor.enough_frozen():
            return "frozen"
        start = None if self.monitor is None else self.monitor.converged_step
        if start is not None and state.step >= cooldown_end(self.cfg, start):
            return "converged"
        if start is None and self.early_stopping is not None and self.early_stopping.is_over:  # a cooldown goes on
            return "early_stopping"
        return "max_training_steps" if state.step >= self.cfg.max_training_steps else None

    def due(self, state: LoopState) -> bool:
        """Whether something is to be evaluated after this step that was not yet."""
        return self._validation_is_due(state) or self._tasks_are_due(state)

    def checkpoint_due(self, state: LoopState) -> bool:
        """Whether one is saved after this step: by checkpoint_interval, and before what may find it to be the best."""
        interval = self.cfg.checkpoint_interval
        by_interval = interval > 0 and state.step % interval == 0
        return by_interval or self.is_full(state) or self._tasks_are_due(state)

    def _validation_is_due(self, state: LoopState) -> bool:
        return self.is_full(state) or (self._stopping_is_due(state) and state.evaluated_step != state.step)

    def _tasks_are_due(self, state: LoopState) -> bool:
        if self.tasks is None or state.tasks_step == state.step:
            return False
        return state.step % self.cfg.tasks_interval == 0 or self.end_reason(state) is not None

    def is_full(self, state: LoopState) -> bool:
        """Whether loss and answers are due; else early stopping may need the loss alone."""
        at_interval = state.step % self.cfg.eval_interval == 0
        return state.evaluated_step != state.step and (at_interval or self.end_reason(state) is not None)

    def _stopping_is_due(self, state: LoopState) -> bool:
        return self.early_stopping is not None and state.step % self.loss_interval == 0

    def run(self, state: LoopState) -> None:
        """Make the evaluations that are due, and record them in state and log."""
        if self._validation_is_due(state):
            self._validate(state)
        if self._tasks_are_due(state) and not self.stop.requested:
            self._run_tasks(state)

    def _run_tasks(self, state: LoopState) -> None:
        """Let the model answer the benchmarks."""
        assert self.tasks is not None
        tasks, before_s = self.tasks, self.meter.seconds["eval"]
        with self.meter.clock("eval"), self.weights_in_use(state):
            shares = self.parallel.shares_with_model(tasks.answers)
            self.stop.share()
            if self.stop.requested:
                return
            results, numbers, problems = self.parallel.from_main(lambda: tasks.results(shares))
        state.tasks, state.tasks_step = results, state.step
        for problem in problems:
            self.log.say(f"step {state.step:,}: not measured: {problem}")
        values = {f"eval/{name}": value for name, value in numbers.items()}
        self.log.record(state.step, values | {"eval/time_s": self.meter.seconds["eval"] - before_s})
        main = main_numbers(results)
        if self.monitor is not None:
            points = {f"{one.task} {one.metric}": [one.value, one.stderr] for one in main}
            self.monitor.note(state.step, {"tasks": points})
        if main:
            self.log.say(f"step {state.step:,}: " + ", ".join(f"{one.task} {one.words}" for one in main))
        if "/" in self.cfg.best_metric:
            state.offer(self.cfg.best_metric, numbers.get(self.cfg.best_metric))

    def _ask_samples(self, state: LoopState) -> None:
        """Let the model answer the sample questions."""
        assert self.samples is not None
        with self.meter.clock("eval"), self.weights_in_use(state):
            self.samples.add(state.step, self.parallel.with_model(self.samples.ask))
            self.show_samples()
            if self.parallel.is_main:
                self.log.tracker.table("samples", *self.samples.table(), state.step)

    def show_samples(self) -> None:
        """Write samples.html: the sample questions with their answers so far, and what froze when."""
        if self.samples is None or not self.parallel.is_main:
            return
        freezes = []
        if self.monitor is not None:
            towers = {component.name: component.tower for component in self.monitor.components}
            events = self.monitor.events
            freezes = [(one["step"], towers[one["name"]], bool(one.get("unfrozen"))) for one in events]
        self.log.write_page("samples.html", self.samples.page(self.log.folder.name, freezes))

    def _validate(self, state: LoopState) -> None:
        """Measure loss and answers, or the loss alone, and let early stopping see it."""
        whole, stopping, before_s = self.is_full(state), copy.copy(self.early_stopping), self.meter.seconds["eval"]
        with self.meter.clock("eval"):
            in_one_pass = whole and self.averages is None  # else the losses say whose answers are wanted
            if in_one_pass:
                val = self.parallel.with_model(self.evaluator.loss_and_answers)
            else:
                val = {"val/loss": self.parallel.with_model(self.evaluator.loss)}
            if self.averages is not None:
                with self.averages.applied():
                    val["val/loss_averaged"] = self.parallel.with_model(self.evaluator.loss)
            self.stop.share()
            if stopping is not None and self._stopping_is_due(state):
                stopping.update(val["val/loss_averaged" if self.cfg.es_weights == "averaged" else "val/loss"])
                whole = whole or stopping.is_over
            if whole and not in_one_pass and not self.stop.requested:
                better = copy.copy(state)
                better.record(val)
                with self.weights_in_use(better):
                    val |= self.parallel.with_model(self.evaluator.answers)
                self.stop.share()
        if self.stop.requested:
            return
        self.early_stopping = stopping
        self.log.record(state.step, val | {"val/time_s": self.meter.seconds["eval"] - before_s})
        state.evaluated_step = state.step
        if self.monitor is not None:
            self.monitor.note(state.step, {key.removeprefix("val/"): val[key] for key in val if "loss" in key})
        if whole:
            state.record(val)
            if "/" not in self.cfg.best_metric:
                state.offer(self.cfg.best_metric, state.val_of(self.cfg.best_metric))
            self.log.say(f"step {state.step:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in val.items() if v is not None))
            if self.samples is not None:
                self._ask_samples(state)

    def weights_in_use(self, state: LoopState) -> contextlib.AbstractContextManager:
        """Within this context the model has the averaged weights, where they are the better ones."""
        averaged = self.averages is not None and state.averaged_is_better
        return self.averages.applied() if averaged and self.averages is not None else contextlib.nullcontext()

    def test(self, state: LoopState) -> dict[str, float | None] | None:
        """Exact match on the test questions; None where a signal has cut it short."""
        self.log.say("Answering the test questions ...")
        with self.meter.clock("test"), self.weights_in_use(state):
            scores = self.parallel.with_model(lambda: self.evaluator.answers("test"))
            self.stop.share()
        return None if self.stop.requested else scores

    def state_dict(self) -> dict[str, float | int | None] | None:
        """Early stopping's state; None without it."""
        return None if self.early_stopping is None else self.early_stopping.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(state)
