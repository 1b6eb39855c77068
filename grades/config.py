"""The settings of GradES and what they may be. Imports nothing heavy, so a wrong flag is reported at once."""

from dataclasses import dataclass, field
from typing import Any

METRICS = ("weight_change",)


def doc(help: str, default: Any) -> Any:
    """A dataclass field whose help text is its documentation, on the command line too."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class GradESConfig:
    """When a weight matrix counts as converged (GradES, arXiv:2509.01842, Algorithm 1).

    A component is one projection matrix (its module: the weight and, where it has one, the bias). Every
    `compute_interval` optimizer steps it gets one number, the metric; after the grace period of
    ceil(alpha * total steps) it is frozen when that number is below the tau of its tower.
    """

    metric: str = doc(
        "what is measured; weight_change: L1 norm of the change of the weight since the previous check", "weight_change"
    )
    vision_tau: float = doc("freeze a vision component whose metric is below this (in the metric's unit)", 1e-5)
    language_tau: float = doc("freeze a language component whose metric is below this (in the metric's unit)", 1e-4)
    alpha: float = doc("grace period as a share of all steps, in [0, 1): nothing freezes in it", 0.3)
    compute_interval: int = doc("optimizer steps between two checks", 1)
    max_frozen_ratio: float = doc("stop the run when this share of the components is frozen, in (0, 1]", 1.0)
    freeze_vision: bool = doc("let vision components freeze; off: they are measured but train on", True)
    freeze_language: bool = doc("let language components freeze; off: they are measured but train on", True)
    target_components: list[str] = doc(
        "only components whose name contains one of these; empty: every projection matrix of both towers", []
    )

    def tau(self, tower: str) -> float:
        """The threshold of a tower, "vision" or "language"."""
        return self.vision_tau if tower == "vision" else self.language_tau

    def may_freeze(self, tower: str) -> bool:
        return self.freeze_vision if tower == "vision" else self.freeze_language

    def problems(self) -> list[str]:
        """Every impossible value: flag, value, what is allowed. Empty when all is well."""
        checks = [
            (self.metric in METRICS, "metric", "one of " + ", ".join(METRICS)),
            (self.vision_tau > 0, "vision_tau", "> 0"),
            (self.language_tau > 0, "language_tau", "> 0"),
            (0 <= self.alpha < 1, "alpha", "in [0, 1)"),
            (self.compute_interval >= 1, "compute_interval", ">= 1"),
            (0 < self.max_frozen_ratio <= 1, "max_frozen_ratio", "in (0, 1]"),
        ]
        return [f"--{name} {getattr(self, name)}: must be {allowed}" for ok, name, allowed in checks if not ok]

    def validate(self) -> None:
        """Raise ValueError naming every impossible value at once."""
        if problems := self.problems():
            raise ValueError("\n".join(problems))
