"""Where a run stands."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

END_REASONS = ("max_training_steps", "frozen", "converged", "early_stopping")  # why a run ends by itself


@dataclass
class LoopState:
    """All that a checkpoint holds of the loop itself."""

    step: int = 0  # optimizer steps done
    evaluated_step: int = 0  # of the latest evaluation
    val: dict[str, float | None] = field(default_factory=dict)  # of the latest one that measured all
    val_step: int = 0  # after which that was
    best_step: int | None = None
    best_value: float | None = None  # of that step, by best_metric
    best_metric: str = "loss"  # of --metric_for_best_model
    tasks: dict[str, Any] = field(default_factory=dict)  # of results.json: the latest evaluation of --eval_tasks
    tasks_step: int = 0  # after which that was
    averaged_is_better: bool = False  # than the last weights, by the latest validation loss
    resumed_at: list[int] = field(default_factory=list)  # steps

    def record(self, val: dict[str, float | None]) -> None:
        """Take in the numbers of a validation after this step."""
        self.val, self.val_step = val, self.step
        loss, averaged = val["val/loss"], val.get("val/loss_averaged")
        if loss is not None:
            self.averaged_is_better = averaged is not None and averaged <= loss

    def val_of(self, metric: str) -> float | None:
        """The number of the latest validation by its name without "val/", the loss of the better weights."""
        averaged = "_averaged" if self.averaged_is_better and metric == "loss" else ""
        return self.val.get(f"val/{metric}{averaged}")

    def offer(self, metric: str, value: float | None) -> None:
        """This step's value of the metric that says which step is best. One that was not measured is None, never best.

        Of a loss the lowest is best, of all else the highest. Another metric than before begins anew.
        """
        if metric != self.best_metric:
            self.best_metric, self.best_value, self.best_step = metric, None, None
        if value is None or not math.isfinite(value):
            return
        sign = -1 if metric == "loss" else 1
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_step = value, self.step

    @property
    def best(self) -> tuple[int | None, float | None, str]:
        """(step, its value, of which metric)."""
        return self.best_step, self.best_value, self.best_metric

    @best.setter
    def best(self, best: tuple[int | None, float | None, str]) -> None:
        self.best_step, self.best_value, self.best_metric = best

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "best_val_loss" in state:  # of an older version
            loss = state.pop("best_val_loss")
            self.best_metric, self.best_value = "loss", loss if loss < math.inf else None
        for name, value in state.items():
            setattr(self, name, value)
        self.resumed_at.append(self.step)
