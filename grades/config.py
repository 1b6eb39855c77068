"""The settings of GradES and what they may be. Imports nothing heavy, so a wrong flag is reported at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

METRICS = ("weight_change", "gradient_change", "gradient_norm", "gradient_rms")
TAU_MODES = ("absolute", "relative", "per_element_lr")
AUTO = "auto"


def doc(help: str, default: Any) -> Any:
    """A dataclass field whose help text is its documentation, on the command line too."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class GradESConfig:
    """When a weight matrix counts as converged (GradES, arXiv:2509.01842, Algorithm 1).

    A component is one projection matrix (its module: the weight and, where it has one, the bias; under LoRA the pair
    of adapter matrices). Every `compute_interval` optimizer steps it gets one number, the metric; after the grace
    period of ceil(alpha * total steps) it is frozen when that number is below its tau.
    """

    metric: str = doc(
        "what is measured: the L1 norm of weight_change, since the previous check; of gradient_change, since the "
        "previous step (the paper's Eq. 1); of gradient_norm (Eq. 3 for LoRA); or, beyond the paper, gradient_rms: the "
        "sum of sqrt(v), v Adam's running mean of the squared gradient, which costs nothing to keep",
        "weight_change",
    )
    tau_mode: str = doc(
        "what tau is compared with: absolute, the metric as it is; relative, its share of the component's own peak so "
        "far; per_element_lr, weight_change per element and step in units of the learning rate",
        "absolute",
    )
    vision_tau: float | str = doc("freeze a vision component whose metric is below this; or auto", 1e-5)
    language_tau: float | str = doc("freeze a language component whose metric is below this; or auto", 1e-4)
    vision_attention_tau: float | None = doc("vision_tau of the attention's matrices, where they have their own", None)
    vision_mlp_tau: float | None = doc("vision_tau of the MLP's matrices, where they have their own", None)
    language_attention_tau: float | None = doc(
        "language_tau of the attention's matrices, where they have their own", None
    )
    language_mlp_tau: float | None = doc("language_tau of the MLP's matrices, where they have their own", None)
    alpha: float = doc("grace period as a share of all steps, in [0, 1): nothing freezes in it", 0.3)
    patience: int = doc("freeze after so many checks in a row below tau", 1)
    compute_interval: int = doc("optimizer steps between two checks", 1)
    max_frozen_ratio: float = doc("stop the run when this share of all projection matrices is frozen, in (0, 1]", 1.0)
    freeze_vision: bool = doc("let vision components freeze; off: they are measured but train on", True)
    freeze_language: bool = doc("let language components freeze; off: they are measured but train on", True)
    target_components: list[str] = doc(
        "watch only matrices that one of these names, a whole part of the dotted name (q_proj, mlp, blocks.0, *_proj); "
        "empty: every projection matrix of both towers",
        [],
    )
    freeze_prefix: bool = doc(
        "freeze whatever lies before the first unfrozen matrix (norms, embeddings, patch convolution) too, so that "
        "this part of the forward pass runs without autograd; off: the matrices alone, the paper's letter",
        True,
    )
    freeze_rounds: int = doc(
        "with compiled or distributed models: apply freezes in at most so many rounds; the weights stop at once", 8
    )
    monitor_grace: bool = doc("measure in the grace period too, for the pictures; off: hold nothing in it", True)
    monitor_sample: int = doc("measure a sample of 1/N of the elements and scale the sum up; 1: all of them", 1)
    history_maxlen: int = doc("checks to remember for the pictures: of more, every second one is dropped", 1000)
    unfreeze_factor: float | None = doc(
        "let a frozen component train again when its gradient_norm in a probe is above this factor times its tau, "
        "> 1; needs --metric gradient_norm",
        None,
    )
    probe_interval: int = doc("with unfreeze_factor: optimizer steps between two probes of frozen components", 100)
    replay_history: str | None = doc(
        "a control, not GradES: freeze components drawn at random, as many of each tower at the same steps as the run "
        "of this grades_history.json froze",
        None,
    )
    replay_seed: int = doc("with replay_history: seed of the draw", 0)

    def may_freeze(self, tower: str) -> bool:
        """Whether components of this tower, "vision" or "language", may freeze."""
        return self.freeze_vision if tower == "vision" else self.freeze_language

    def tau_of(self, tower: str, part: str) -> float | str:
        """The threshold of a tower's "attention" or "mlp" matrices; "auto" where it is still to be found."""
        own = getattr(self, f"{tower}_{part}_tau")
        return getattr(self, f"{tower}_tau") if own is None else own

    def problems(self) -> list[str]:
        """Every impossible value: flag, value, what is allowed. Empty when all is well."""
        taus = ("vision_attention_tau", "vision_mlp_tau", "language_attention_tau", "language_mlp_tau")
        per_lr = self.tau_mode != "per_element_lr" or self.metric == "weight_change"
        relative = self.tau_mode == "relative"
        towers = [tower for tower in ("vision", "language") if self.may_freeze(tower)]
        in_use = [self.tau_of(tower, part) for tower in towers for part in ("attention", "mlp")]
        below_peak = not relative or all(tau <= 1 for tau in in_use if not isinstance(tau, str))
        unfreeze = self.unfreeze_factor is None
        checks = [
            (self.metric in METRICS, "metric", "one of " + ", ".join(METRICS)),
            (self.tau_mode in TAU_MODES, "tau_mode", "one of " + ", ".join(TAU_MODES)),
            (per_lr, "tau_mode", "absolute or relative for a metric other than weight_change"),
            *((_is_tau(getattr(self, name)), name, "> 0 or auto") for name in ("vision_tau", "language_tau")),
            *((getattr(self, name) is None or getattr(self, name) > 0, name, "> 0") for name in taus),
            (below_peak, "tau_mode", "absolute or per_element_lr with a tau > 1, which every share of a peak is below"),
            (0 <= self.alpha < 1, "alpha", "in [0, 1)"),
            (self.patience >= 1, "patience", ">= 1"),
            (self.compute_interval >= 1, "compute_interval", ">= 1"),
            (0 < self.max_frozen_ratio <= 1, "max_frozen_ratio", "in (0, 1]"),
            (self.freeze_rounds >= 1, "freeze_rounds", ">= 1"),
            (self.monitor_grace or not relative, "monitor_grace", "on with --tau_mode relative: there lie the peaks"),
            (self.monitor_grace or not self.finds_taus(), "monitor_grace", "on where a tau is auto"),
            (self.alpha > 0 or not self.finds_taus(), "alpha", "> 0 where a tau is auto"),
            (self.monitor_sample >= 1, "monitor_sample", ">= 1"),
            (self.history_maxlen >= 1, "history_maxlen", ">= 1"),
            (unfreeze or self.unfreeze_factor > 1, "unfreeze_factor", "> 1"),  # type: ignore[operator]
            (unfreeze or self.metric == "gradient_norm", "unfreeze_factor", "left out but for --metric gradient_norm"),
            (unfreeze or self.tau_mode == "absolute", "unfreeze_factor", "left out but for --tau_mode absolute"),
            (unfreeze or self.replay_history is None, "unfreeze_factor", "left out with --replay_history"),
            (self.probe_interval >= 1, "probe_interval", ">= 1"),
            (self.replay_history is None or Path(self.replay_history).is_file(), "replay_history", "a file"),
        ]
        return [f"--{name} {getattr(self, name)}: must be {allowed}" for ok, name, allowed in checks if not ok]

    def finds_taus(self) -> bool:
        """Whether a tau is found in the grace period."""
        return AUTO in (self.vision_tau, self.language_tau)

    def validate(self) -> None:
        """Raise ValueError naming every impossible value at once."""
        if problems := self.problems():
            raise ValueError("\n".join(problems))


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Whether one of the targets is a whole part of the dotted name: one word of it or several, with * and ?.

    v_proj names blocks.0.attn.v_proj and not blocks.0.attn.qkv_proj; attn.* names all of an attention, *_proj both.
    """
    return any(fnmatchcase(f".{name}.", f"*.{target}.*") for target in targets)


def _is_tau(value: float | str) -> bool:
    return value == AUTO if isinstance(value, str) else value > 0
