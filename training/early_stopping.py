"""Classic early stopping, the baseline of the paper: end when the validation loss has stopped falling."""

import math

from training.schedule import share_of


def validation_interval(share: float, total_steps: int) -> int:
    """Steps between two validations: that share of the run, rounded up."""
    return math.ceil(share_of(total_steps, share))


class EarlyStopping:
    """Stops after `patience` validations in a row none of which was more than `delta` below the best loss so far."""

    def __init__(self, delta: float, patience: int):
        self.delta, self.patience = delta, patience
        self.best: float | None = None
        self.bad = 0  # validations since the best

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop."""
        return self.bad >= self.patience

    def update(self, loss: float | None) -> None:
        """Take in a validation loss in nats; None where it could not be measured."""
        if loss is None:
            return
        if self.best is None or loss < self.best - self.delta:
            self.best, self.bad = loss, 0
        else:  # a NaN too
            self.bad += 1

    def state_dict(self) -> dict[str, float | int | None]:
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.bad = state["best"], state["bad"]
