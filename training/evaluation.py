"""Evaluations during a run and at its end."""

import contextlib
import copy
from typing import Protocol

from grades import GradESMonitor
from grades.averaging import AveragedWeights
from models.config import TrainConfig
from training.early_stopping import EarlyStopping, validation_interval
from training.logging import RunLog
from training.meter import Meter
from training.parallel import Parallel
from training.schedule import cooldown_steps
from training.signals import StopSignal
from training.state import LoopState


class Evaluator(Protocol):
    """Measures the model: eval.evaluation.Evaluator."""

    def loss(self) -> float | None:
        """Mean validation loss in nats."""

    def loss_and_answers(self) -> dict[str, float | None]:
        """val/loss, and val/exact_match as `answers` gives it, in one pass over the rows."""

    def answers(self, split: str = "val") -> dict[str, float | None]:
        """{split}/exact_match of the answers to the questions of "val" or "test"."""


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
    ):
        """averages: of the weights, evaluated too."""
        self.cfg, self.evaluator, self.monitor, self.parallel = cfg, evaluator, monitor, parallel
        self.averages = averages
        self.stop, self.meter, self.log = stop, meter, log
        self.early_stopping = EarlyStopping(cfg.es_delta, cfg.es_patience) if cfg.early_stopping else None
        self.loss_interval = validation_interval(cfg.es_interval, cfg.max_training_steps)

    def end_reason(self, state: LoopState) -> str | None:
        """Why the run is over after this step, one of END_REASONS; None if it is not."""
        if self.monitor is not None and self.monitor.enough_frozen():
            return "frozen"
        start = None if self.monitor is None else self.monitor.converged_step
        if start is not None and state.step >= start + cooldown_steps(self.cfg, start):
            return "converged"
        if self.early_stopping is not None and self.early_stopping.is_over:
            return "early_stopping"
        return "max_training_steps" if state.step >= self.cfg.max_training_steps else None

    def due(self, state: LoopState) -> bool:
        """Whether something is to be evaluated after this step that was not yet."""
        return self.is_full(state) or (self._stopping_is_due(state) and state.evaluated_step != state.step)

    def is_full(self, state: LoopState) -> bool:
        """Whether that is loss and answers, before which a checkpoint is saved; else early stopping needs the loss."""
        at_interval = state.step % self.cfg.eval_interval == 0
        return state.evaluated_step != state.step and (at_interval or self.end_reason(state) is not None)

    def _stopping_is_due(self, state: LoopState) -> bool:
        return self.early_stopping is not None and state.step % self.loss_interval == 0

    def run(self, state: LoopState) -> None:
        """Make the evaluation that is due; record it in state and log, and let early stopping see its loss."""
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
            self.log.say(f"step {state.step:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in val.items() if v is not None))

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
