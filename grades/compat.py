"""The interface of the authors' package `grades` 1.0.6 over this library's record, for people who switch.

Their module names are `grades.gradient_early_stopping` and `grades.vlm_early_stopping`; both take their names from here
and from `grades.callback`. What differs, and why, stands in docs/trainer.md. Needs torch alone.
"""

import logging
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grades.callback_config import VLMGradEarlyStoppingConfig
from grades.files import write_json, write_text
from grades.policy import lasting

if TYPE_CHECKING:
    from grades.components import Component
    from grades.monitor import GradESMonitor

INTERFACE_VERSION = "1.0.6"  # of the package whose interface this is
ATTENTION_COMPONENTS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP_COMPONENTS = ["gate_proj", "up_proj", "down_proj"]
LANGUAGE_ATTENTION_COMPONENTS = ATTENTION_COMPONENTS
LANGUAGE_MLP_COMPONENTS = MLP_COMPONENTS
VISION_COMPONENTS = ["qkv", "q_proj", "k_proj", "v_proj", "o_proj", "proj", "fc1", "fc2"]
LISTED_EVENTS = 10  # in the summary

Change = tuple[int, float]  # step, the metric's value
logger = logging.getLogger("grades")


class _Changes:
    """What the two kinds of statistics share."""

    frozen: bool
    change_history: deque[Change]
    total_change_accumulated: float

    @property
    def is_frozen(self) -> bool:
        """The same as `frozen`, by the name that the authors' notebooks read."""
        return self.frozen

    def add_change(self, change: float, step: int) -> None:
        """Append a measurement of a step."""
        self.change_history.append((step, change))
        self.total_change_accumulated += change


@dataclass
class ComponentStats(_Changes):
    """What was measured of one matrix of a language model.

    >>> stats = ComponentStats("layer_00_attn_q_proj", "full")
    >>> stats.add_change(0.5, step=20)
    >>> stats.change_history[-1], stats.total_change_accumulated, stats.is_frozen
    ((20, 0.5), 0.5, False)
    """

    name: str
    component_type: str  # "lora" or "full"
    frozen: bool = False
    frozen_at_step: int | None = None
    change_history: deque[Change] = field(default_factory=deque)
    weight_cache: None = None  # snapshots are the metric's own
    total_change_accumulated: float = 0.0
    param_count: int = 0


@dataclass
class VLMComponentStats(_Changes):
    """What was measured of one matrix of a vision-language model."""

    name: str
    component_type: str  # its tower, "vision" or "language"
    module_type: str  # "lora" or "full"
    layer_index: int
    frozen: bool = False
    frozen_at_step: int | None = None
    change_history: deque[Change] = field(default_factory=deque)
    weight_cache: None = None  # snapshots are the metric's own
    total_change_accumulated: float = 0.0
    param_count: int = 0


Stats = dict[str, ComponentStats | VLMComponentStats]


def create_vlm_freeze_config(
    vision_tau: float = 1e-5, language_tau: float = 1e-4, alpha: float = 0.3, enable_wandb: bool = False
) -> VLMGradEarlyStoppingConfig:
    """A configuration with these settings and defaults elsewhere.

    >>> create_vlm_freeze_config(vision_tau=1e-3).language_tau
    0.0001
    """
    return VLMGradEarlyStoppingConfig(
        vision_tau=vision_tau, language_tau=language_tau, alpha=alpha, enable_wandb_logging=enable_wandb
    )


def component_keys(components: Iterable["Component"], names_towers: bool) -> dict[str, str]:
    """The authors' key of each component by its dotted name: layer_00_attn_q_proj, or language_L00_attn_q_proj.

    names_towers: whether keys begin with the tower. Components that would share a key (the experts of a block) keep
    their dotted names.
    """
    keys = {}
    for component in components:
        place = f"{component.tower}_L" if names_towers else "layer_"
        keys[component.name] = f"{place}{component.layer:02d}_{_kind(component)}"
    counts = Counter(keys.values())
    return {name: key if counts[key] == 1 else name for name, key in keys.items()}


def _kind(component: "Component") -> str:
    """attn_q_proj, mlp_up_proj ..."""
    return f"{'attn' if component.part == 'attention' else 'mlp'}_{component.kind.rpartition('.')[2]}"


class AuthorsInterface:
    """The attributes of the authors' callbacks, read from the monitor; empty before training begins."""

    ATTENTION_COMPONENTS = ATTENTION_COMPONENTS
    MLP_COMPONENTS = MLP_COMPONENTS
    LANGUAGE_ATTENTION_COMPONENTS = LANGUAGE_ATTENTION_COMPONENTS
    LANGUAGE_MLP_COMPONENTS = LANGUAGE_MLP_COMPONENTS
    VISION_COMPONENTS = VISION_COMPONENTS
    names_towers: ClassVar[bool] = True  # the keys of components, and of what is logged, tell the towers apart

    config: Any
    monitor: "GradESMonitor | None" = None
    start_time: float | None = None  # of training, in seconds since the epoch
    wandb_available: bool = False  # whether something was logged to a wandb run
    _logged_step: int = 0
    _stats: tuple[object, Stats] = (None, {})  # what they are made from, and the statistics

    @property
    def initialized(self) -> bool:
        """Whether training has begun."""
        return self.monitor is not None

    @property
    def mode(self) -> str | None:
        """ "lora" where an adapter is watched, else "full"; None before training."""
        if self.monitor is None:
            return None
        return "lora" if any(len(component.weights) > 1 for component in self.monitor.components) else "full"

    @property
    def current_training_step(self) -> int:
        """The last step that was seen, counted from 1."""
        return 0 if self.monitor is None else self.monitor.last_step

    @property
    def total_training_steps(self) -> int:
        """Steps of the whole run."""
        return 0 if self.monitor is None else self.monitor.total_steps or 0

    @property
    def all_components_frozen_at_step(self) -> int | None:
        """The step at which the last component froze; None while one trains."""
        if self.monitor is None or len(self.monitor.frozen) < len(self.monitor.components):
            return None
        return max(self.monitor.frozen.values())

    @property
    def component_stats(self) -> Stats:
        """Statistics of every watched component by its key (see `component_keys`)."""
        monitor = self.monitor
        if monitor is None:
            return {}
        source = (monitor, monitor.last_step, len(monitor.events))
        if self._stats[0] != source:
            self._stats = (source, self._make_stats(monitor))
        return self._stats[1]

    @property
    def frozen_components(self) -> set[str]:
        """The keys of all components that are frozen."""
        return {key for key, stats in self.component_stats.items() if stats.frozen}

    @property
    def frozen_events(self) -> list[dict[str, Any]]:
        """What froze, in order: step, component, mode, param_count, and with towers component_type."""
        if self.monitor is None:
            return []
        keys, found = component_keys(self.monitor.components, self.names_towers), []
        for event in lasting(self.monitor.events):
            stats = self.component_stats[keys[event["name"]]]
            entry = {"step": event["step"], "component": stats.name}
            entry |= {"component_type": stats.component_type} if self.names_towers else {}
            found.append(entry | {"mode": self.mode, "param_count": stats.param_count})
        return found

    def _make_stats(self, monitor: "GradESMonitor") -> Stats:
        keys, found, mode = component_keys(monitor.components, self.names_towers), Stats(), self.mode or "full"
        for index, component in enumerate(monitor.components):
            key, values = keys[component.name], ((c["step"], c["values"][index]) for c in monitor.checks)
            changes = deque((step, value) for step, value in values if value is not None)
            common: dict[str, Any] = {
                "frozen_at_step": monitor.frozen.get(component.name),
                "change_history": changes,
                "total_change_accumulated": monitor.totals.get(component.name, 0.0),
                "param_count": sum(p.numel() for p in component.parameters),
            }
            is_frozen = component.name in monitor.frozen
            if self.names_towers:
                found[key] = VLMComponentStats(key, component.tower, mode, component.layer, is_frozen, **common)
            else:
                found[key] = ComponentStats(key, mode, is_frozen, **common)
        return found

    def begin_record(self) -> None:
        """Start the clock of the files; to be called when training begins."""
        self.start_time, self.wandb_available, self._logged_step = time.time(), False, 0

    def log_to_wandb(self, step: int) -> None:
        """With enable_wandb_logging, after step `step`: log a check to the wandb run, every log_interval steps."""
        monitor, interval = self.monitor, self.config.log_interval
        is_check = monitor is not None and monitor.checks and monitor.checks[-1]["step"] == step
        if not (self.config.enable_wandb_logging and is_check and step // interval > self._logged_step // interval):
            return
        first, self._logged_step = self._logged_step == 0, step
        wandb = sys.modules.get("wandb")  # whoever has a run has imported it
        if wandb is None or wandb.run is None:
            if first:
                logger.warning(
                    "enable_wandb_logging True: there is no wandb run; set report_to='wandb' or call wandb.init()"
                )
            return
        if not self.wandb_available:
            self.wandb_available = True
            wandb.config.update(self._wandb_settings(), allow_val_change=True)
        wandb.log({**self.wandb_metrics(), "train/global_step": step})

    def _wandb_settings(self) -> dict[str, Any]:
        taus, prefix = (["vision_tau", "language_tau"], "vlm") if self.names_towers else (["tau"], "grades")
        names = [*taus, "alpha", "max_frozen_ratio", "compute_interval"]
        return {f"{prefix}_mode": self.mode} | {f"{prefix}_{name}": getattr(self.config, name) for name in names}

    def wandb_metrics(self) -> dict[str, float]:
        """The numbers of the last check by the authors' wandb keys."""
        monitor = self._begun
        frozen, total = len(monitor.frozen), len(monitor.components)
        if not self.names_towers:
            found = {"frozen_components": frozen, "frozen_ratio": frozen / total, "total_components": total}
            return _under("GradES/global", found) | _under("GradES/changes", _spread(monitor.latest.values()))
        new = sum(event["step"] == monitor.last_step for event in lasting(monitor.events))
        found = {"total_frozen": frozen, "frozen_ratio": frozen / total, "frozen_this_step": new}
        metrics = {"VLMGradES/step": monitor.last_step} | _under("VLMGradES/global", found)
        for tower in dict.fromkeys(component.tower for component in monitor.components):
            names = [component.name for component in monitor.components if component.tower == tower]
            frozen, total = sum(name in monitor.frozen for name in names), len(names)
            found = {"frozen": frozen, "total": total, "frozen_ratio": frozen / total}
            spread = _spread(monitor.latest.get(name) for name in names)
            kept = {"mean": "avg_change", "max": "max_change", "min": "min_change"}
            found |= {theirs: spread[ours] for ours, theirs in kept.items() if ours in spread}
            metrics |= _under(f"VLMGradES/{tower}", found)
        return metrics

    def write_files(self, folder: Path) -> None:
        """Write the authors' two files: dynamic_freezing_history.json and freezing_summary.txt, vlm_... with towers."""
        prefix = "vlm_" if self.names_towers else ""
        details = folder / f"{prefix}dynamic_freezing_history.json"
        record = self.record()
        write_json(details, record)
        write_text(folder / f"{prefix}freezing_summary.txt", summary_text(record, details.name))

    def record(self) -> dict[str, Any]:
        """The run as JSON types, by the keys of the authors' dynamic_freezing_history.json."""
        stats, total_s = self.component_stats, time.time() - (self.start_time or time.time())
        steps, total_steps = self.current_training_step, self.total_training_steps
        frozen = [component for component in stats.values() if component.frozen]
        left_out = ("name", "weight_cache", "change_history")
        details = {}
        for key, component in stats.items():
            values = {name: value for name, value in vars(component).items() if name not in left_out}
            at = component.frozen_at_step
            values["frozen_at_progress"] = None if at is None else _percent(at, total_steps)
            details[key] = values | {"param_count_formatted": f"{component.param_count:,}"}
        towers = {"freeze_vision", "freeze_language", "vision_tau", "language_tau"}
        settings = towers if self.names_towers else {"tau", "target_components"}
        settings |= {"alpha", "max_frozen_ratio", "compute_interval"}
        return {
            "metadata": {
                "version": INTERFACE_VERSION,
                "mode": self.mode,
                "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
            "config": {name: getattr(self.config, name) for name in sorted(settings)},
            "summary": {
                "total_time_seconds": round(total_s, 2),
                "total_time_formatted": f"{int(total_s // 60)}m {int(total_s % 60)}s",
                "current_training_step": steps,
                "total_training_steps": total_steps,
                "training_completion": _percent(steps, total_steps),
                "all_components_frozen_at_step": self.all_components_frozen_at_step,
                "final_frozen_count": len(frozen),
                "total_components": len(stats),
                "frozen_percentage": _percent(len(frozen), len(stats)),
                "component_breakdown": self._breakdown(),
            },
            "freezing_timeline": {"total_events": len(self.frozen_events), "events": self.frozen_events},
            "component_details": details,
            "performance_metrics": {
                "avg_time_per_component": round(total_s / len(stats), 3) if stats else 0.0,
                "total_parameters": sum(component.param_count for component in stats.values()),
                "frozen_parameters": sum(component.param_count for component in frozen),
            },
        }

    def _breakdown(self) -> dict[str, dict[str, int]]:
        """Counts by tower, or for a language model by kind: attn_q."""
        counts: dict[str, dict[str, int]] = {}
        for component in self._begun.components:
            group = component.tower if self.names_towers else _kind(component).removesuffix("_proj")
            entry = counts.setdefault(group, {"total": 0, "frozen": 0})
            entry["total"] += 1
            entry["frozen"] += component.name in self._begun.frozen
        return counts

    @property
    def _begun(self) -> "GradESMonitor":
        assert self.monitor is not None, "training has begun"
        return self.monitor


def summary_text(record: dict[str, Any], details: str) -> str:
    """A record of `AuthorsInterface.record` as a page to read. details: the name of the file that has all of it."""
    summary, events = record["summary"], record["freezing_timeline"]["events"]
    lines = [
        f"GradES: {record['metadata']['mode']} fine-tuning, {summary['total_time_formatted']}",
        f"Steps: {summary['current_training_step']} of {summary['total_training_steps']}",
        f"Frozen: {summary['final_frozen_count']} of {summary['total_components']} ({summary['frozen_percentage']})",
        "",
    ]
    for kind, counts in summary["component_breakdown"].items():
        share = _percent(counts["frozen"], counts["total"])
        lines.append(f"  {kind:20} {counts['frozen']:4} of {counts['total']:4} frozen ({share})")
    lines += ["", *(f"  step {event['step']:6}: {event['component']}" for event in events[:LISTED_EVENTS])]
    if len(events) > LISTED_EVENTS:
        lines.append(f"  and {len(events) - LISTED_EVENTS} more")
    return "\n".join([*lines, "", f"All of it: {details}", ""])


def _under(path: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{path}/{name}": value for name, value in values.items()}


def _spread(values: Iterable[float | None]) -> dict[str, float]:
    """How the measured values lie, as numpy computes it by default; empty where nothing was measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return {}
    low, median, high = statistics.quantiles(measured * 2 if len(measured) == 1 else measured, method="inclusive")
    return {
        "mean": statistics.fmean(measured), "max": max(measured), "min": min(measured),
        "std": statistics.pstdev(measured), "median": median, "p25": low, "p75": high,
    }  # fmt: skip


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "N/A"
