"""GradESMonitor: measures the components, asks the policy, freezes, and remembers all of it."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from grades import policy
from grades.components import TOWERS, Component, find_components
from grades.config import GradESConfig
from grades.freezing import freeze
from grades.metrics import WeightChange

HISTORY_VERSION = 1


class GradESMonitor:
    """Watches every projection matrix of a model and freezes each one when it has converged.

    Call `after_step(step)` once after each optimizer step, when the gradients are cleared. Reads weights only, so a
    run in which nothing freezes is bit for bit the run without it.
    """

    def __init__(
        self,
        config: GradESConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        total_steps: int | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        """total_steps: length of the run, which the grace period is a share of; may be set later, before step 1.

        optimizer: its state of frozen weights is freed. log: takes one line a freeze. Raises ValueError on impossible
        settings and where the model has no component.
        """
        config.validate()
        self.config = config
        self.optimizer = optimizer
        self.log = log
        self.components = find_components(model, config.target_components)
        self.by_name = {component.name: component for component in self.components}
        self.total_steps = total_steps
        self.metric = WeightChange()
        self.frozen: dict[str, int] = {}  # name -> step of freezing
        self.freed_bytes = 0
        self.last_step = 0
        self.checks: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.latest: dict[str, float | None] = {}

    @property
    def grace_steps(self) -> int:
        """Steps in which nothing freezes. Raises ValueError where that depends on an unknown total_steps."""
        if self.total_steps is None and self.config.alpha > 0:
            raise ValueError(f"alpha {self.config.alpha}: the grace period needs the monitor's total_steps")
        return policy.grace_steps(self.config.alpha, self.total_steps or 0)

    def after_step(self, step: int) -> bool:
        """Measure and freeze after optimizer step `step`, counted from 1. True: enough is frozen, end the run."""
        self.last_step = step
        if policy.is_check(step, self.config.compute_interval):
            self.latest = self._measure(step)
            taus = {name: self.config.tau(self.by_name[name].tower) for name in self.latest}
            allowed = {name: value for name, value in self.latest.items() if self._may_freeze(name)}
            self._freeze(policy.converged(allowed, taus, step, self.grace_steps), step)
        return self.enough_frozen()

    def enough_frozen(self) -> bool:
        return policy.enough_frozen(len(self.frozen), len(self.components), self.config.max_frozen_ratio)

    def frozen_share(self, tower: str | None = None) -> float | None:
        """Share of the components (of a tower) that are frozen; None where there are none."""
        names = [component.name for component in self.components if tower in (None, component.tower)]
        return sum(name in self.frozen for name in names) / len(names) if names else None

    def scalars(self) -> dict[str, float]:
        """What a training log wants: the frozen shares and each tower's median metric at the last check."""
        found = {"grades/frozen_share": self.frozen_share()}
        for tower in TOWERS:
            found[f"grades/frozen_share_{tower}"] = self.frozen_share(tower)
            values = [v for name, v in self.latest.items() if v is not None and self.by_name[name].tower == tower]
            found[f"grades/{self.config.metric}_{tower}"] = statistics.median(values) if values else None
        return {name: value for name, value in found.items() if value is not None}

    def _may_freeze(self, name: str) -> bool:
        return self.config.may_freeze(self.by_name[name].tower)

    def _measure(self, step: int) -> dict[str, float | None]:
        live = [component for component in self.components if component.name not in self.frozen]
        values = dict(zip((component.name for component in live), self.metric.measure(live), strict=True))
        self.checks.append({"step": step, "values": [values.get(component.name) for component in self.components]})
        return values

    def _freeze(self, names: list[str], step: int) -> None:
        self.freed_bytes += freeze([self.by_name[name] for name in names], self.optimizer)
        self.metric.forget(names)
        for name in names:
            self.frozen[name] = step
            component, value = self.by_name[name], self.latest[name]
            tau = self.config.tau(component.tower)
            self.events.append({"step": step, "name": name, "value": value, "tau": tau})
            self.log(f"step {step:,}: froze {name}, {value:.4g} < tau {tau:g} ({self._count(component)})")

    def _count(self, component: Component) -> str:
        tower = [other for other in self.components if other.tower == component.tower]
        return f"{component.tower} {sum(other.name in self.frozen for other in tower)}/{len(tower)}"

    def history(self) -> dict[str, Any]:
        """Everything that happened, as JSON: the pictures are drawn from this alone."""
        return {
            "version": HISTORY_VERSION,
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "grace_steps": self.grace_steps,
            "last_step": self.last_step,
            "stopped_early": self.enough_frozen(),
            "components": [
                {"name": c.name, "tower": c.tower, "kind": c.kind, "layer": c.layer, "elements": c.weight.numel()}
                for c in self.components
            ],
            "checks": self.checks,
            "events": self.events,
        }

    def save_history(self, path: str | Path) -> None:
        """Write grades_history.json, beside its name first."""
        path = Path(path)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.history()))
        beside.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as the uninterrupted one would; snapshots are tensors."""
        return {
            "components": [component.name for component in self.components],
            "frozen": dict(self.frozen),
            "freed_bytes": self.freed_bytes,
            "last_step": self.last_step,
            "checks": list(self.checks),
            "events": list(self.events),
            "latest": dict(self.latest),
            "metric": self.metric.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; what was frozen is frozen again at once. Raises ValueError for another model."""
        names = [component.name for component in self.components]
        if state["components"] != names:
            odd = sorted(set(state["components"]) ^ set(names))
            raise ValueError(f"the saved GradES state watches other components: {', '.join(odd) or 'another order'}")
        self.frozen = dict(state["frozen"])
        self.freed_bytes, self.last_step = state["freed_bytes"], state["last_step"]
        self.checks, self.events = list(state["checks"]), list(state["events"])
        self.latest = dict(state["latest"])
        self.metric.load_state_dict(state["metric"], self.components)
        freeze([self.by_name[name] for name in self.frozen], self.optimizer)
