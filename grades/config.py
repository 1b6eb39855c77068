"""The settings of GradES and what they may be. Imports nothing heavy, so a wrong flag is reported at once."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import FrozenInstanceError, dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self

from grades.fields import Checked, Relation, doc, suggestion

METRICS = ("weight_change", "gradient_change", "gradient_norm", "gradient_rms")  # each component has its own number
ROLLBACK = "rollback"
ROLLBACK_TAU = 0.004  # nats per 100 steps: the tau of auto with --metric rollback, whatever the model
DEFAULT_TAUS = {"vision": 1e-5, "language": 1e-4, "connector": 1e-4}  # the paper's; the connector's is the language's
TAU_MODES = ("absolute", "relative")
AUTO = "auto"


@dataclass(kw_only=True)
class GradESConfig(Checked):
    """When a weight matrix counts as converged (GradES, arXiv:2509.01842, Algorithm 1).

    A component is one projection matrix (its module: the weight and, where it has one, the bias; under LoRA the pair
    of adapter matrices). Every `compute_interval` optimizer steps it gets one number, the metric; after the grace
    period of ceil(alpha * total steps) it is frozen when that number is below its tau.

    A setting may be changed until a run begins, which then works with a copy that refuses changes.
    """

    prefix: ClassVar[str] = ""  # train.py, where the fields are flags, asks for --

    metric: str = doc(
        "what is measured: weight_change, gradient_change, gradient_norm, gradient_rms or rollback. The L1 norm of: "
        "the weight's change since the previous check; the gradient's since the previous step (the paper's Eq. 1); "
        "the gradient (Eq. 3, for LoRA); or, beyond the paper, sqrt(v), v Adam's running mean of the squared gradient; "
        "it costs nothing. rollback: by how many nats per 100 steps the validation loss rises when a part of the "
        "averaged weights goes back to where it was at the previous check",
        "weight_change",
        choices=(*METRICS, ROLLBACK),
        section="GradES",
    )
    tau_mode: str = doc(
        "what tau is compared with: absolute, the metric as it is; relative, its share of the component's own peak so "
        "far",
        "absolute",
        choices=TAU_MODES,
    )
    vision_tau: float | str = doc(
        "freeze a vision component whose metric is below this; or auto (with --metric rollback the default is auto)",
        DEFAULT_TAUS["vision"],
        gt=0,
        choices=(AUTO,),
    )
    language_tau: float | str = doc(
        "freeze a language component whose metric is below this; or auto (with --metric rollback the default is auto)",
        DEFAULT_TAUS["language"],
        gt=0,
        choices=(AUTO,),
    )
    watch_connector: bool = doc(
        "watch the matrices of the connector (projector) too, as a tower of its own; the paper watches those of the "
        "towers alone",
        False,
    )
    connector_tau: float | str = doc(
        "with watch_connector: freeze a matrix of it whose metric is below this; or auto (with --metric rollback the "
        "default is auto)",
        DEFAULT_TAUS["connector"],
        gt=0,
        choices=(AUTO,),
    )
    taus: dict[str, float | str] = doc(
        "tau of each further tower, a number or auto: audio=0.1; a tower without one trains on unwatched",
        {},
        gt=0,
        choices=(AUTO,),
    )
    vision_attention_tau: float | None = doc(
        "vision_tau of the attention's matrices, where they have their own", None, gt=0
    )
    vision_mlp_tau: float | None = doc("vision_tau of the MLP's matrices, where they have their own", None, gt=0)
    language_attention_tau: float | None = doc(
        "language_tau of the attention's matrices, where they have their own", None, gt=0
    )
    language_mlp_tau: float | None = doc("language_tau of the MLP's matrices, where they have their own", None, gt=0)
    alpha: float = doc("grace period as a share of all steps: nothing freezes in it", 0.3, ge=0, lt=1)
    patience: int = doc("how many checks in a row must be below tau before a component freezes", 1, ge=1)
    compute_interval: int = doc("optimizer steps between two checks", 1, ge=1)
    max_frozen_ratio: float = doc("stop the run when this share of all projection matrices is frozen", 1.0, gt=0, le=1)
    freeze_vision: bool = doc("let vision components freeze; off: they are measured but train on", True)
    freeze_language: bool = doc("let language components freeze; off: they are measured but train on", True)
    freeze_connector: bool = doc("let connector components freeze; off: they are measured but train on", True)
    target_components: list[str] = doc(
        "watch only matrices that one of these names, a whole part of the dotted name (q_proj, mlp, blocks.0, *_proj); "
        "empty: every projection matrix of both towers (and with watch_connector of the connector)",
        [],
        section="GradES in detail",
    )
    rollback_parts: str = doc(
        "metric rollback: what goes back at a time: towers; prefixes (towers, and the first half of what trains in "
        "each); or blocks (towers, and each block)",
        "towers",
        choices=("towers", "prefixes", "blocks"),
    )
    on_converged: str = doc(
        "when max_frozen_ratio of all projection matrices has converged: stop the run; or begin the cooldown of the "
        "learning rate, in which what converged last trains on, and stop after it",
        "stop",
        choices=("stop", "cooldown"),
    )
    freeze_to: str = doc(
        "with average_weights: what a weight that freezes becomes, its average or its last value",
        "average",
        choices=("average", "last"),
    )
    freeze_order: str = doc(
        "any: whatever has converged freezes; front: only once all that lies before it is frozen; together: only when "
        "all that may freeze has converged, and nothing before; the run then ends, unless some may not freeze; the "
        "metric rollback does not measure the vision tower while the language tower still gains, and only a quarter of "
        "the rows where these leave no doubt",
        "any",
        choices=("any", "front", "together"),
    )
    freeze_prefix: bool = doc(
        "freeze whatever lies before the first unfrozen matrix (norms, embeddings, patch convolution) too, so that "
        "this part of the forward pass runs without autograd; off: the matrices alone, as in the paper",
        True,
    )
    freeze_rounds: int = doc(
        "with compiled or distributed models: change requires_grad in at most this many rounds; weights stop at once",
        8,
        ge=1,
    )
    monitor_grace: bool = doc("measure in the grace period too, for the pictures; off: measure and hold nothing", True)
    monitor_sample: int = doc("measure a sample of 1/N of the elements and scale the sum up; 1: all of them", 1, ge=1)
    history_maxlen: int = doc("checks to remember for the pictures; with more, every second one is dropped", 1000, ge=1)
    unfreeze_factor: float | None = doc(
        "let a frozen component train again when its gradient_norm in a probe is above this factor times its tau; "
        "needs --metric gradient_norm",
        None,
        gt=1,
    )
    probe_interval: int = doc(
        "with unfreeze_factor: optimizer steps between two probes of frozen components", 100, ge=1
    )
    replay_history: str | None = doc(
        "a control, not GradES: freeze components drawn at random, as many of each tower at the same steps as the run "
        "of this grades_history.json froze",
        None,
    )
    replay_seed: int = doc("with replay_history: seed of the draw", 0)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for a name that is no setting, and in the copy of a run."""
        if "_is_fixed" in vars(self):
            raise FrozenInstanceError(
                f"{name}: cannot be changed during a run. Set it on the configuration before training begins; here it "
                "would change nothing, or half of what it should"
            )
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"{name}: {type(self).__name__} has no such setting" + suggestion(name, vars(self)))
        super().__setattr__(name, self.read(name, value))

    def read(self, name: str, value: Any) -> Any:
        """The value of a setting as plain Python has it: numbers of NumPy, tuples."""
        if isinstance(value, Real) and not isinstance(value, bool):
            return int(value) if isinstance(value, Integral) else float(value)
        return list(value) if isinstance(value, tuple) else value

    def fixed(self) -> Self:
        """A copy that refuses changes, for a run."""
        made = copy.deepcopy(self)
        vars(made)["_is_fixed"] = True
        return made

    def may_freeze(self, tower: str) -> bool:
        """Whether components of this tower ("vision", "language", "audio" ...) may freeze."""
        return bool(getattr(self, f"freeze_{tower}", True))

    def tower_tau(self, tower: str) -> float | str | None:
        """The tau of a tower; None where it has none and is not watched."""
        if tower in self.taus or tower not in self.towers:
            return self.taus.get(tower)
        tau: float | str = getattr(self, f"{tower}_tau")
        return tau

    def tau_name(self, tower: str) -> str:
        """The setting that holds the tau of a tower."""
        return "taus" if tower in self.taus else f"{tower}_tau"

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that are watched."""
        return ("vision", "language", *(("connector",) if self.watch_connector else ()), *self.taus)

    def means_auto(self, tau: Any) -> bool:
        """Whether the metric rollback takes this tau for "auto": the paper's defaults are not in nats."""
        return self.metric == ROLLBACK and tau in (AUTO, *DEFAULT_TAUS.values())

    def tau_of(self, tower: str, part: str) -> float | str:
        """The threshold of the part ("attention" or "mlp") of a watched tower; "auto" where the grace period has to
        show it."""
        own: float | None = getattr(self, f"{tower}_{part}_tau", None)
        tau = self.tower_tau(tower) if own is None else own
        assert tau is not None, f"the {tower} tower is not watched"
        return ROLLBACK_TAU if self.means_auto(tau) else tau

    def rollback_limits(self, parts: Iterable[tuple[str, str]]) -> dict[str, float]:
        """With freeze_order together: of each tower that may freeze the gain at which none does, whatever the others'.

        parts: (tower, part) of all components. Empty where every part has to be measured.
        """
        together = self.metric == ROLLBACK and self.freeze_order == "together" and self.rollback_parts == "towers"
        if not together or self.replay_history is not None:
            return {}
        limits: dict[str, float] = {}
        for tower, part in parts:
            if self.may_freeze(tower):
                limits[tower] = min(limits.get(tower, math.inf), float(self.tau_of(tower, part)))
        return limits

    def relations(self) -> Iterable[Relation]:
        relative, unfreezes = self.tau_mode == "relative", self.unfreeze_factor is not None
        towers = [tower for tower in self.towers if self.may_freeze(tower)]
        in_use = [self.tau_of(tower, part) for tower in towers for part in ("attention", "mlp")]
        above_peak = relative and any(tau > 1 for tau in in_use if not isinstance(tau, str))
        return [
            (not above_peak, "tau_mode", "absolute where a tau is > 1, which no share of a peak exceeds"),
            (self.monitor_grace or not relative, "monitor_grace", "on with tau_mode relative, which needs the peaks"),
            (self.monitor_grace or not self.finds_taus(), "monitor_grace", "on where a tau is auto"),
            (self.alpha > 0 or not self.finds_taus(), "alpha", "> 0 where a tau is auto"),
            (
                not unfreezes or self.metric == "gradient_norm",
                "unfreeze_factor",
                "left out unless metric is gradient_norm",
            ),
            (
                not unfreezes or self.tau_mode == "absolute",
                "unfreeze_factor",
                "left out unless tau_mode is absolute",
            ),
            (not unfreezes or self.replay_history is None, "unfreeze_factor", "left out with replay_history"),
            (
                self.metric != ROLLBACK or (not relative and self.monitor_sample == 1),
                "metric",
                "another than rollback with tau_mode relative or monitor_sample",
            ),
            (
                self.freeze_order != "front" or self.freeze_vision or not self.freeze_language,
                "freeze_order",
                "another than front where freeze_vision is false, as the vision tower comes before the language model",
            ),
            (not self.taus.keys() & DEFAULT_TAUS.keys(), "taus", "of other towers than vision, language and connector"),
            (self.replay_history is None or Path(self.replay_history).is_file(), "replay_history", "a file"),
        ]

    def finds_taus(self) -> bool:
        """Whether a tau is found in the grace period."""
        return self.metric != ROLLBACK and AUTO in map(self.tower_tau, self.towers)


def is_named(name: str, targets: Sequence[str]) -> bool:
    """Whether one of the targets is a whole part of the dotted name: one word of it or several, with * and ?.

    v_proj names blocks.0.attn.v_proj and not blocks.0.attn.qkv_proj; attn.* names all of an attention, *_proj both.
    """
    return any(fnmatchcase(f".{name}.", f"*.{target}.*") for target in targets)
