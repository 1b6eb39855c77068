"""The settings of the Hugging Face callbacks: GradESConfig and the further options of the authors' package.

Needs neither torch nor transformers.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, ClassVar

from grades.config import AUTO, GradESConfig
from grades.fields import Relation, doc, suggestion

NO_EFFECT = {
    "auto_detect_mode": "LoRA, DoRA and full fine-tuning are always detected",
    "use_cuda_acceleration": "weights are always measured on their own device",
}


ONE_TAU = "has one tau for all components: set tau, or take VLMGradEarlyStoppingConfig, which has one for each tower"


def refuse_tower_tau(config: Any, value: Any) -> None:
    """What sets the tau of a tower where there is none."""
    raise AttributeError(f"{type(config).__name__} {ONE_TAU}")


def by_place(*names: str) -> Callable[[type[Any]], type[Any]]:
    """A class decorator: these settings may be given by their place too, as in the authors' package."""

    def decorate(made: type[Any]) -> type[Any]:
        init = made.__init__
        parameters = inspect.signature(init).parameters

        @functools.wraps(init)
        def __init__(self: Any, *values: Any, **given: Any) -> None:
            if len(values) > len(names):
                raise TypeError(f"{made.__name__}: by their place only {', '.join(names)} are taken, the rest by name")
            placed = dict(zip(names, values, strict=False))
            if twice := placed.keys() & given.keys():
                raise TypeError(f"{made.__name__}: {', '.join(twice)} given by place and by name")
            for name in given.keys() - parameters.keys():
                if isinstance(getattr(made, name, None), property):
                    raise TypeError(f"{name}: {made.__name__} {ONE_TAU}")
                raise TypeError(f"{made.__name__} has no setting {name}" + suggestion(name, [*parameters][1:]))
            init(self, **placed, **given)

        first = [parameters[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        rest = [parameter for name, parameter in parameters.items() if name not in names]
        __init__.__signature__ = inspect.Signature([rest[0], *first, *rest[1:]])  # type: ignore[attr-defined]
        made.__init__ = __init__
        return made

    return decorate


@by_place(
    "vision_tau", "language_tau", "alpha", "max_frozen_ratio", "compute_interval", "freeze_vision", "freeze_language",
    "auto_detect_mode", "use_cuda_acceleration", "save_freezing_history", "enable_wandb_logging", "output_dir",
)  # fmt: skip
@dataclass(kw_only=True)
class VLMGradEarlyStoppingConfig(GradESConfig):
    """Settings of VLMGradEarlyStoppingCallback: every field of GradESConfig, with a tau for each tower, and these.

    Options of the authors' package without effect here are accepted; the callback names changed ones in one warning.
    """

    output_dir: str | None = doc(
        "where grades_history.json and the pictures go; None: the trainer's output_dir", "./grades_output"
    )
    save_stats: bool = doc("write them at the end of the run", True)
    save_freezing_history: bool = doc(
        "write them in any case, and the authors' dynamic_freezing_history.json and freezing_summary.txt", False
    )
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
    log_interval: int = doc("with enable_wandb_logging: steps between two logged checks", 10, ge=1)
    enable_wandb_logging: bool = doc(
        "log to the wandb run by the authors' keys too (GradES/global/frozen_ratio ...); the trainer's logs have "
        "grades/... without it",
        False,
    )
    auto_detect_mode: bool = doc("no effect: " + NO_EFFECT["auto_detect_mode"], True)
    use_cuda_acceleration: bool = doc("no effect: " + NO_EFFECT["use_cuda_acceleration"], True)

    def read(self, name: str, value: Any) -> Any:
        if name == "target_components" and value is None:  # as the authors write "all"
            return []
        if name == "taus" and value is None:
            return {}
        if name == "output_dir" and isinstance(value, PathLike):
            return str(value)
        return super().read(name, value)

    def relations(self) -> Iterable[Relation]:
        stops = self.on_converged == "stop"
        return [
            *super().relations(),
            (stops, "on_converged", "stop: the learning rate is that of the trainer's schedule"),
        ]

    def without_effect(self) -> list[str]:
        """The options that differ from their default and do nothing, each with the reason."""
        defaults = {f.name: f.default for f in fields(self)}
        return [f"{name}: {reason}" for name, reason in NO_EFFECT.items() if getattr(self, name) != defaults[name]]

    def as_arguments(self) -> dict[str, Any]:
        """The arguments that make an equal configuration, as JSON types."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


@by_place(
    "tau", "alpha", "max_frozen_ratio", "compute_interval", "target_components", "auto_detect_mode",
    "use_cuda_acceleration", "save_freezing_history", "enable_wandb_logging", "output_dir",
)  # fmt: skip
@dataclass(kw_only=True)
class GradEarlyStoppingConfig(VLMGradEarlyStoppingConfig):
    """Settings of GradEarlyStoppingCallback: every field of GradESConfig, but with one tau for all components.

    Where a model has other towers than vision and language, `taus` may give these their own.
    """

    tau: float | str = doc("freeze a component whose metric is below this; or auto", 1e-4, gt=0, choices=(AUTO,))
    # Not settings of their own, so that no two can disagree.
    vision_tau: ClassVar[Any] = property(lambda self: self.tau, refuse_tower_tau)  # type: ignore[misc]
    language_tau: ClassVar[Any] = property(lambda self: self.tau, refuse_tower_tau)  # type: ignore[misc]
    connector_tau: ClassVar[Any] = property(lambda self: self.tau, refuse_tower_tau)  # type: ignore[misc]

    def tower_tau(self, tower: str) -> float | str | None:
        return self.taus.get(tower, self.tau)

    def tau_name(self, tower: str) -> str:
        return "taus" if tower in self.taus else "tau"
