"""The settings of the Hugging Face callbacks: GradESConfig and the further options of the authors' package.

Needs neither torch nor transformers.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from grades.config import AUTO, GradESConfig
from grades.fields import doc

NO_EFFECT = {
    "auto_detect_mode": "LoRA, DoRA and full fine-tuning are always detected",
    "use_cuda_acceleration": "weights are always measured on their own device",
    "log_interval": "values are logged with the trainer's, every logging_steps",
    "enable_wandb_logging": "values are logged with the trainer's, to all that report_to names",
}


@dataclass(kw_only=True)
class VLMGradEarlyStoppingConfig(GradESConfig):
    """Settings of VLMGradEarlyStoppingCallback: every field of GradESConfig, with a tau for each tower, and these.

    Options of the authors' package without effect here are accepted; the callback names changed ones in one warning.
    """

    output_dir: str | None = doc(
        "where grades_history.json and the pictures go; None: the trainer's output_dir", "./grades_output"
    )
    save_stats: bool = doc("write them at the end of the run", True)
    save_freezing_history: bool = doc("the same; where either is off nothing is written", True)
    average_weights: float = doc(
        "metric rollback: keep a running average of the weights, with this decay per step, with which the model ends "
        "where its held-out loss is lower",
        0.99,
        gt=0,
        lt=1,
    )
    rollback_rows: int = doc(
        "metric rollback: rows of the trainer's eval_dataset on which the gain is measured", 200, gt=1
    )
    log_interval: int = doc("no effect: " + NO_EFFECT["log_interval"], 10)
    enable_wandb_logging: bool = doc("no effect: " + NO_EFFECT["enable_wandb_logging"], False)
    auto_detect_mode: bool = doc("no effect: " + NO_EFFECT["auto_detect_mode"], True)
    use_cuda_acceleration: bool = doc("no effect: " + NO_EFFECT["use_cuda_acceleration"], True)

    def __post_init__(self) -> None:
        self.target_components = list(self.target_components or [])
        self.taus = dict(self.taus or {})
        self.output_dir = None if self.output_dir is None else str(self.output_dir)

    def without_effect(self) -> list[str]:
        """The options that differ from their default and do nothing, each with the reason."""
        defaults = {f.name: f.default for f in fields(self)}
        return [f"{name}: {reason}" for name, reason in NO_EFFECT.items() if getattr(self, name) != defaults[name]]

    def as_arguments(self) -> dict[str, Any]:
        """The arguments that make an equal configuration, as JSON types."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


@dataclass(kw_only=True)
class GradEarlyStoppingConfig(VLMGradEarlyStoppingConfig):
    """Settings of GradEarlyStoppingCallback: every field of GradESConfig, but with one tau for all components.

    Where a model has other towers than vision and language, `taus` may give these their own.
    """

    tau: float | str = doc("freeze a component whose metric is below this; or auto", 1e-4, gt=0, choices=(AUTO,))
    vision_tau: float | str = field(init=False, default=1e-4)
    language_tau: float | str = field(init=False, default=1e-4)
    connector_tau: float | str = field(init=False, default=1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vision_tau = self.language_tau = self.connector_tau = self.tau

    def tower_tau(self, tower: str) -> float | str | None:
        return self.taus.get(tower, self.tau)
