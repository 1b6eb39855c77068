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
    best_val_loss: float = math.inf  # nats
    averaged_is_better: bool = False  # than the last weights, by the latest validation loss
    resumed_at: list[int] = field(default_factory=list)  # steps

    def record(self, val: dict[str, float | None]) -> None:
        """Take in the numbers of an evaluation after this step. A loss that was not measured is None and never best."""
        self.val, self.val_step = val, self.step
        loss, averaged = val["val/loss"], val.get("val/loss_averaged")
        if loss is not None and averaged is not None:
            self.averaged_is_better = averaged <= loss
            loss = min(loss, averaged)
        if loss is not None and loss < self.best_val_loss:
            self.best_val_loss, self.best_step = loss, self.step

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.resumed_at.append(self.step)
