"""GradESMonitor: measures the components, asks the policy, freezes, and remembers all of it."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from grades import policy
from grades.components import TOWERS, Component, find_components
from grades.config import AUTO, GradESConfig
from grades.freezing import Freezer
from grades.metrics import GradientNorm, make_metric
from grades.scales import AUTO_CHECKS, make_scale, resolve_taus

HISTORY_VERSION = 2
Values = dict[str, float | None]  # by the component's name; None where nothing was measured


class GradESMonitor:
    """Watches every projection matrix of a model and freezes each one when it has converged.

    In every step call `after_backward(step)` between the backward pass and the clipping of the gradient, and
    `after_step(step)` after the optimizer step, when the gradients are cleared. A run in which nothing freezes is bit
    for bit the run without it.
    """

    def __init__(
        self,
        config: GradESConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        total_steps: int | None = None,
        log: Callable[[str], None] = print,
        on_round: Callable[[], None] | None = None,
        agree: Callable[[Values], Values] | None = None,
    ) -> None:
        """total_steps: length of the run, which the grace period is a share of; may be set later, before step 1.

        optimizer: its state of frozen weights is freed. log: takes one line a freeze. on_round: called after
        requires_grad has changed, where that asks for the model to be wrapped anew (DDP). agree: given a check's
        numbers, returns those that every process goes by, rank 0's. Raises ValueError on impossible settings and
        where the model has no component.
        """
        config.check()
        if config.unfreeze_factor is not None and on_round is not None:
            raise ValueError(
                f"--unfreeze_factor {config.unfreeze_factor:g}: must be left out under DDP, where frozen components "
                "cannot be probed; FSDP2 (--parallel fsdp) can"
            )
        self.config = config
        self.log = log
        self.agree = agree
        self.components = find_components(model, config.target_components)
        self.by_name = {component.name: component for component in self.components}
        # What target_components leaves out trains on, so that a run does not end for the lack of it.
        self.num_matrices = len(find_components(model) if config.target_components else self.components)
        self.total_steps = total_steps
        self.metric = make_metric(config.metric, config.monitor_sample, optimizer)
        self.scale = make_scale(config, self.components, optimizer)
        self.freezer = Freezer(model, self.components, optimizer, config.freeze_prefix, config.freeze_rounds, on_round)
        self.prober = GradientNorm(config.monitor_sample)
        self.taus = resolve_taus(config, self.components)  # by name; without those that are still to be found
        self.plan = self._replay_plan()
        self.frozen: dict[str, int] = {}  # name -> step of freezing
        self.streaks: dict[str, int] = {}  # name -> checks in a row below tau
        self.last_step = 0
        self.checks: list[dict[str, Any]] = []
        self.grace_checks: list[dict[str, Any]] = []  # the last of the grace period, where taus are to be found
        self.events: list[dict[str, Any]] = []
        self.latest: dict[str, float | None] = {}
        self._seen_backward = False
        if total_steps is not None:
            self._check_grace()

    @property
    def grace_steps(self) -> int:
        """Steps in which nothing freezes. Raises ValueError where that depends on an unknown total_steps."""
        if self.total_steps is None and self.config.alpha > 0:
            raise ValueError(f"alpha {self.config.alpha}: the grace period needs the monitor's total_steps")
        return policy.grace_steps(self.config.alpha, self.total_steps or 0)

    @property
    def freed_bytes(self) -> int:
        """Gradients and optimizer state that freezing has freed so far."""
        return self.freezer.freed_bytes

    def after_backward(self, step: int) -> None:
        """Look at the gradients of step `step`, counted from 1: whole, averaged over ranks, not yet clipped."""
        self._seen_backward = True
        if self._is_probe(step):
            self.prober.after_backward([self.by_name[name] for name in self.frozen], True, False)
            self.freezer.end_probe()
        self.freezer.drop_gradients()
        self.metric.after_backward(self._live(), self._is_check(step), self._is_check(step + 1))

    def after_step(self, step: int) -> bool:
        """Measure and freeze after optimizer step `step`, counted from 1. True: enough is frozen, end the run."""
        self._check_use()
        self.last_step = step
        if self._is_probe(step):
            self._wake(step)
        if self._is_check(step):
            self.latest = self._measure(step)
            if step > self.grace_steps:
                self._judge(step)
        if step in self.plan:
            self._freeze(self.plan[step], step)
        enough = self.enough_frozen()
        if self._is_probe(step + 1) and not enough:
            self.freezer.begin_probe()
        return enough

    def enough_frozen(self) -> bool:
        """Whether so many of the model's projection matrices, watched or not, are frozen that the run ends."""
        return policy.enough_frozen(len(self.frozen), self.num_matrices, self.config.max_frozen_ratio)

    def frozen_share(self, tower: str | None = None) -> float | None:
        """Share of the components (of a tower) that are frozen; None where there are none."""
        names = [component.name for component in self.components if tower in (None, component.tower)]
        return sum(name in self.frozen for name in names) / len(names) if names else None

    def scalars(self) -> dict[str, float]:
        """What a training log wants: the frozen shares and each tower's metric at the last check."""
        found = {"grades/frozen_share": self.frozen_share()}
        for tower in TOWERS:
            found[f"grades/frozen_share_{tower}"] = self.frozen_share(tower)
            values = [v for name, v in self.latest.items() if v is not None and self.by_name[name].tower == tower]
            found[f"grades/{self.config.metric}_{tower}"] = statistics.median(values) if values else None
            found[f"grades/{self.config.metric}_{tower}_mean"] = statistics.fmean(values) if values else None
        return {name: value for name, value in found.items() if value is not None}

    def _live(self) -> list[Component]:
        return [component for component in self.components if component.name not in self.frozen]

    def _is_check(self, step: int) -> bool:
        measuring = self.config.monitor_grace or step > self.grace_steps
        return measuring and policy.is_check(step, self.config.compute_interval)

    def _is_probe(self, step: int) -> bool:
        wanted = self.config.unfreeze_factor is not None and bool(self.frozen)
        within = self.total_steps is None or step <= self.total_steps
        return wanted and within and policy.is_check(step, self.config.probe_interval)

    def _check_use(self) -> None:
        """What would go wrong in silence: a gradient that nobody showed, a waiting freeze that nobody stops."""
        if not self._seen_backward and (self.metric.reads_gradients or self.freezer.waits):
            what = f"metric {self.config.metric}" if self.metric.reads_gradients else "a compiled or distributed model"
            raise ValueError(f"{what} needs after_backward(step) between the backward pass and the clipping")
        if self.config.unfreeze_factor is not None and self.freezer.waits:
            raise ValueError("unfreeze_factor: a compiled model cannot be probed; leave it out")
        if self.last_step == 0:
            self._check_grace()

    def _check_grace(self) -> None:
        """Raise ValueError where a tau is auto and the grace period too short to find it in."""
        checks, needed = self.grace_steps // self.config.compute_interval, self.metric.first_check
        if not self.taus and self.config.replay_history is None and checks < needed:
            raise ValueError(
                f"--alpha {self.config.alpha}: the grace period of {self.grace_steps} steps holds {checks} checks; "
                f"to find a tau of auto it must hold {needed} or more: raise --alpha or lower --compute_interval"
            )

    def _measure(self, step: int) -> dict[str, float | None]:
        values = self.metric.measure(self._live())
        values = self.scale.apply(values if self.agree is None else self.agree(values))
        self.checks.append({"step": step, "values": [values.get(component.name) for component in self.components]})
        if not self.taus and step <= self.grace_steps:
            self.grace_checks = [*self.grace_checks, self.checks[-1]][-AUTO_CHECKS:]
        self._thin_checks()
        return values

    def _thin_checks(self) -> None:
        """Of more than history_maxlen checks keep those whose number is even; then a multiple of four, and so on."""
        stride = 1
        while len(self.checks) > self.config.history_maxlen:
            stride *= 2
            self.checks = [c for c in self.checks if c["step"] // self.config.compute_interval % stride == 0]

    def _judge(self, step: int) -> None:
        """Freeze what has converged at this check, after the grace period."""
        if self.config.replay_history is not None:
            return
        self.taus = self.taus or resolve_taus(self.config, self.components, self.grace_checks)
        judged = {name: v for name, v in self.latest.items() if self.config.may_freeze(self.by_name[name].tower)}
        self.streaks = policy.count_below(self.streaks, judged, self.taus)
        self._freeze(policy.converged(judged, self.streaks, self.config.patience), step)

    def _freeze(self, names: Iterable[str], step: int) -> None:
        names = [name for name in names if name not in self.frozen]
        for name in names:
            self.frozen[name] = step
            component, value, tau = self.by_name[name], self.latest.get(name), self.taus.get(name)
            self.events.append({"step": step, "name": name, "value": value, "tau": tau})
            why = "drawn at random" if name in self.plan.get(step, []) else f"{value:.4g} < tau {tau:.4g}"
            self.log(f"step {step:,}: froze {name}, {why} ({self._count(component)})")
        self.metric.forget(names)
        self.freezer.freeze(names)

    def _wake(self, step: int) -> None:
        """Let frozen components train again whose gradient the probe of this step found too large."""
        assert self.config.unfreeze_factor is not None
        values = self.prober.measure([self.by_name[name] for name in self.frozen])
        names = policy.woken(values, self.taus, self.config.unfreeze_factor)
        for name in names:
            del self.frozen[name]
            self.streaks.pop(name, None)
            value, tau = values[name], self.taus[name]
            self.events.append({"step": step, "name": name, "value": value, "tau": tau, "unfrozen": True})
            self.log(f"step {step:,}: unfroze {name}, gradient {value:.4g} > {self.config.unfreeze_factor:g} tau")
        if names:
            self.freezer.thaw(names)

    def _count(self, component: Component) -> str:
        tower = [other for other in self.components if other.tower == component.tower]
        return f"{component.tower} {sum(other.name in self.frozen for other in tower)}/{len(tower)}"

    def _replay_plan(self) -> dict[int, list[str]]:
        if self.config.replay_history is None:
            return {}
        events = json.loads(Path(self.config.replay_history).read_text(encoding="utf-8"))["events"]
        towers = {component.name: component.tower for component in self.components}
        if odd := sorted({event["name"] for event in events} - set(towers)):
            raise ValueError(
                f"--replay_history {self.config.replay_history}: must be of a run with the same components; "
                f"there are none here named {', '.join(odd)}"
            )
        return policy.replay(events, towers, self.config.replay_seed)

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
                {"name": c.name, "tower": c.tower, "kind": c.kind, "layer": c.layer, "elements": c.elements}
                | {"tau": self.taus.get(c.name)}
                for c in self.components
            ],
            "checks": self.checks,
            "events": self.events,
        }

    def save_history(self, path: str | Path) -> None:
        """Write grades_history.json, beside its name first."""
        path = Path(path)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.history()), encoding="utf-8")
        beside.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as the uninterrupted one would; snapshots are tensors."""
        return {
            "components": [component.name for component in self.components],
            "measure": self._measure_settings(),
            "frozen": dict(self.frozen),
            "streaks": dict(self.streaks),
            "taus": dict(self.taus),
            "given": [c.name for c in self.components if self.config.tau_of(c.tower, c.part) != AUTO],
            "last_step": self.last_step,
            "checks": list(self.checks),
            "grace_checks": list(self.grace_checks),
            "events": list(self.events),
            "latest": dict(self.latest),
            "metric": self.metric.state_dict(),
            "scale": self.scale.state_dict(),
            "freezer": self.freezer.state_dict(),
        }

    def _measure_settings(self) -> dict[str, Any]:
        """The settings that give numbers their meaning."""
        return {name: getattr(self.config, name) for name in ("metric", "tau_mode", "monitor_sample")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; what was frozen is frozen again at once. Taus that the config gives hold from here on.

        Where its "metric" is None, as the weights are sharded otherwise now, nothing is judged before it was measured
        again. To be called before the model is wrapped or compiled. Raises ValueError for another model or another
        measure.
        """
        names = [component.name for component in self.components]
        if state["components"] != names:
            odd = sorted(set(state["components"]) ^ set(names))
            raise ValueError(f"the saved GradES state watches other components: {', '.join(odd) or 'another order'}")
        for name, now in self._measure_settings().items():
            if (saved := state["measure"][name]) != now:
                raise ValueError(f"--{name} {now}: the saved GradES state was measured with {saved}")
        self.frozen, self.streaks = dict(state["frozen"]), dict(state["streaks"])
        if not self.taus:  # those that are still to be found; a number that is given now holds
            given = {c.name: self.config.tau_of(c.tower, c.part) for c in self.components}
            if state["taus"] and (fixed := [name for name in given if given[name] == AUTO and name in state["given"]]):
                tower = self.by_name[fixed[0]].tower
                raise ValueError(f"--{tower}_tau auto: must be a number, as in the saved run; its grace period is over")
            self.taus = {
                name: tau if given[name] == AUTO else float(given[name]) for name, tau in state["taus"].items()
            }
        self.last_step = state["last_step"]
        self.checks, self.events = list(state["checks"]), list(state["events"])
        self.grace_checks = list(state["grace_checks"])
        self.latest = dict(state["latest"])
        if state["metric"] is not None:
            self.metric.load_state_dict(state["metric"], self.components)
        self.scale.load_state_dict(state["scale"])
        self.freezer.load_state_dict(state["freezer"])
        if self._is_probe(self.last_step + 1):
            self.freezer.begin_probe()
