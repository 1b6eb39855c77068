"""GradESMonitor: measures the components, asks the policy, freezes, and records it."""

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from grades import policy
from grades.averaging import AveragedWeights
from grades.components import Component
from grades.config import AUTO, ROLLBACK, GradESConfig
from grades.files import write_text
from grades.freezing import Freezer
from grades.marks import thaw_leftovers
from grades.metrics import GradientNorm, Metric
from grades.replay import draw_replay
from grades.rollback import Evaluate, metric_of
from grades.scales import AUTO_CHECKS, make_scale, resolve_taus
from grades.watched import watched_components

HISTORY_VERSION = 2
Values = dict[str, float | None]  # by the component's name; None where nothing was measured


class GradESMonitor:
    """Watches every projection matrix of a model and freezes each one when it has converged.

    In every step call `after_backward(step)` between the backward pass and the clipping of the gradient, and
    `after_step(step)` after the optimizer step, when the gradients are cleared. A run in which nothing freezes is bit
    for bit the run without the monitor.
    """

    def __init__(
        self,
        config: GradESConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        total_steps: int | None = None,
        log: Callable[[str], None] = print,
        *,
        detail: Callable[[str], None] = lambda line: None,
        rewrap: Callable[[], None] | None = None,
        broadcast: Callable[[Values], Values] | None = None,
        averages: AveragedWeights | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        """optimizer: its state of frozen weights is freed. total_steps: of the run; may be set later, before step 1.

        log: takes one line per check and tower in which something froze. detail: takes one line per component that
        froze. rewrap: called after requires_grad has changed, for models that have to be wrapped again then (DDP).
        broadcast: given a check's numbers, returns those of rank 0, by which all ranks decide.
        averages: of the weights; what freezes takes its average. evaluate: for the metric rollback (see Rollback).
        Raises ValueError on impossible settings and where the model has no component.
        """
        config.check()
        if config.unfreeze_factor is not None and rewrap is not None:
            raise ValueError(
                f"unfreeze_factor {config.unfreeze_factor:g}: must be left out under DDP, where frozen components "
                "cannot be probed; FSDP2 works"
            )
        thaw_leftovers(model, optimizer)
        self.config = config = config.fixed()
        self.is_closed = self._seen_backward = False
        self.log, self.detail, self.broadcast = log, detail, broadcast
        self.components, self.num_matrices = watched_components(model, config)
        self.towers = tuple(dict.fromkeys(component.tower for component in self.components))
        self.by_name = {component.name: component for component in self.components}
        self.total_steps = total_steps
        self.metric = metric_of(config, model, self.components, optimizer, averages, evaluate)
        self.scale = make_scale(config.tau_mode)
        settle = None if averages is None else functools.partial(averages.settle, to=config.freeze_to)
        self.freezer = Freezer(
            model, self.components, optimizer, config.freeze_prefix, config.freeze_rounds, rewrap, settle
        )
        self.prober = GradientNorm(config.monitor_sample)
        self.taus = resolve_taus(config, self.components)  # by name; empty while one is still to be found
        self.replayed = draw_replay(config, self.components)  # step -> names
        self.frozen: dict[str, int] = {}  # name -> step of freezing
        self.streaks: dict[str, int] = {}  # name -> checks in a row below tau
        self.converged_step: int | None = None  # with on_converged cooldown, the step after which it begins
        self.has_cooled = False  # the loop says so when it ends after that cooldown
        self.last_step = 0
        self.checks: list[dict[str, Any]] = []
        self.totals: dict[str, float] = {}  # name -> sum over all checks, also those thinned out of `checks`
        self.grace_checks: list[dict[str, Any]] = []  # the last ones of the grace period, while taus are to be found
        self.events: list[dict[str, Any]] = []
        self.validation: list[dict[str, float | None]] = []  # what `note` was told
        self.latest: Values = {}  # of the last check
        if total_steps is not None:
            self._check_grace()

    def close(self) -> None:
        """Leave the model as it was before: everything trains again that was frozen here, and no hook, copy of a weight
        or average remains. What happened can still be read: `frozen`, `history()`. More calls do nothing.
        """
        if not self.is_closed:
            self.is_closed = True
            self.freezer.close()
            self.metric, self.prober = Metric(), GradientNorm()

    def __enter__(self) -> "GradESMonitor":
        """with GradESMonitor(...) as monitor: close it in the end, whatever ends the loop."""
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

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
        """Read the gradients of step `step`, counted from 1: accumulated, averaged over ranks, not yet clipped."""
        self._seen_backward = True
        if self._is_probe(step):
            self.prober.after_backward([self.by_name[name] for name in self.frozen], True, False)
            self.freezer.end_probe()
        self.freezer.drop_gradients()
        self.metric.after_backward(self._unfrozen(), self._is_check(step), self._is_check(step + 1))

    def after_step(self, step: int) -> bool:
        """Measure and freeze after optimizer step `step`, counted from 1. True: enough is frozen, end the run."""
        self._check_use()
        self.last_step = step
        self.freezer.check_prefix()
        if self._is_probe(step):
            self._unfreeze(step)
        if self._is_check(step):
            self.freezer.still.check()
            self.latest = self._measure(step)
            self._thaw(step)
            if step > self.grace_steps:
                self._judge(step)
        if step in self.replayed:
            self._freeze(self.replayed[step], step)
        enough = self.enough_frozen()
        if self._is_probe(step + 1) and not enough:
            self.freezer.begin_probe()
        return enough

    def enough_frozen(self) -> bool:
        """Whether max_frozen_ratio of the model's projection matrices, watched or not, are frozen: the run ends."""
        return policy.enough_frozen(len(self.frozen), self.num_matrices, self.config.max_frozen_ratio)

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep numbers of an evaluation after step `step` for the pictures: "loss", "loss_averaged", in nats; "tasks",
        benchmarks by name, each with its value and standard error."""
        here = next((known for known in self.validation if known["step"] == step), {})
        self.validation = [known for known in self.validation if known["step"] != step]
        self.validation.append({**here, "step": step, **values})

    def frozen_share(self, tower: str | None = None) -> float | None:
        """Share of the components (of a tower) that are frozen, in [0, 1]; None where there are none."""
        names = self._names(tower)
        return sum(name in self.frozen for name in names) / len(names) if names else None

    def scalars(self) -> dict[str, float]:
        """For a training log: the frozen shares, and of each tower the metric's median and mean at the last check."""
        found = {"grades/frozen_share": self.frozen_share()}
        for tower in self.towers:
            found[f"grades/frozen_share_{tower}"] = self.frozen_share(tower)
            values = [v for name, v in self.latest.items() if v is not None and self.by_name[name].tower == tower]
            found[f"grades/{self.config.metric}_{tower}"] = statistics.median(values) if values else None
            found[f"grades/{self.config.metric}_{tower}_mean"] = statistics.fmean(values) if values else None
        for part, (gain, _) in self.metric.details().get("gains", {}).items():
            found[f"grades/gain_{part.replace(' ', '_')}"] = gain
        return {name: value for name, value in found.items() if value is not None}

    def _names(self, tower: str | None = None) -> list[str]:
        return [component.name for component in self.components if tower in (None, component.tower)]

    def _unfrozen(self) -> list[Component]:
        return [component for component in self.components if component.name not in self.frozen]

    def _is_check(self, step: int) -> bool:
        if self.converged_step is not None:  # a cooldown decides nothing
            return False
        measuring = self.config.monitor_grace or step > self.grace_steps
        return measuring and policy.is_check(step, self.config.compute_interval)

    def _is_probe(self, step: int) -> bool:
        wanted = self.config.unfreeze_factor is not None and bool(self.frozen)
        within = self.total_steps is None or step <= self.total_steps
        return wanted and within and policy.is_check(step, self.config.probe_interval)

    def _check_use(self) -> None:
        """Raise ValueError where after_backward is not called but needed, else unnoticed, and once it is closed."""
        if self.is_closed:
            raise ValueError("this GradESMonitor is closed; a new run needs a new one")
        if not self._seen_backward and (self.metric.reads_gradients or self.freezer.waits):
            what = f"metric {self.config.metric}" if self.metric.reads_gradients else "a compiled or distributed model"
            raise ValueError(f"{what} needs after_backward(step) between the backward pass and the clipping")
        if self.config.unfreeze_factor is not None and self.freezer.waits:
            raise ValueError("unfreeze_factor: a compiled model cannot be probed; leave it out")
        if self.last_step == 0:
            self._check_grace()

    def _check_grace(self) -> None:
        """Raise ValueError where a tau is auto and the grace period too short to find it in."""
        interval = self.config.compute_interval
        checks, needed = self.grace_steps // interval, self.metric.first_check(interval)
        if not self.taus and self.config.replay_history is None and checks < needed:
            raise ValueError(
                f"alpha {self.config.alpha}: the grace period of {self.grace_steps} steps holds {checks} checks; "
                f"to find a tau of auto it must hold {needed} or more: raise alpha or lower compute_interval"
            )

    def _measure(self, step: int) -> Values:
        values = self.metric.measure(self._unfrozen())
        values = self.scale.apply(values if self.broadcast is None else self.broadcast(values))
        listed = [values.get(component.name) for component in self.components]
        self.totals = policy.add_up(self.totals, values)
        self.checks.append({"step": step, "values": listed} | self.metric.details())
        if not self.taus and step <= self.grace_steps:
            self.grace_checks = [*self.grace_checks, self.checks[-1]][-AUTO_CHECKS:]
        self.checks = policy.thin(self.checks, self.config.compute_interval, self.config.history_maxlen)
        return values

    def _judge(self, step: int) -> None:
        """Freeze what has converged at this check, after the grace period."""
        if self.config.replay_history is not None:
            return
        self.taus = self.taus or resolve_taus(self.config, self.components, self.grace_checks)
        judged = {name: v for name, v in self.latest.items() if self.config.may_freeze(self.by_name[name].tower)}
        self.streaks = policy.count_below(self.streaks, judged, self.taus)
        names = policy.converged(judged, self.streaks, self.config.patience)
        if self.config.freeze_order == "together" and len(names) < len(judged):
            return
        if self.config.freeze_order == "front":
            names = policy.front(names, self.frozen, [(c.name, c.tower, c.stack, c.layer) for c in self.components])
        frozen_then = len(set(names) | set(self.frozen))
        last = policy.enough_frozen(frozen_then, self.num_matrices, self.config.max_frozen_ratio)
        if last and self.config.on_converged == "cooldown":
            self.converged_step = step
            self.log(f"step {step:,}: all that trains has converged; the cooldown begins")
            return
        self._freeze(names, step)

    def _freeze(self, names: Iterable[str], step: int) -> None:
        names = [name for name in names if name not in self.frozen]
        events: list[dict[str, Any]] = []
        for name in names:
            self.frozen[name] = step
            events.append({"step": step, "name": name, "value": self.latest.get(name), "tau": self.taus.get(name)})
        self.metric.forget(names)
        self.freezer.freeze(names)
        self._record(events, "froze", "<")

    def _unfreeze(self, step: int) -> None:
        """Let frozen components train again whose gradient norm in the probe of this step is too large."""
        assert self.config.unfreeze_factor is not None
        values = self.prober.measure([self.by_name[name] for name in self.frozen])
        names = policy.to_unfreeze(values, self.taus, self.config.unfreeze_factor)
        self._record(self._train_again(names, values, step), "unfroze", f"> {self.config.unfreeze_factor:g} *")

    def _thaw(self, step: int) -> None:
        """Let components train again since whose freeze the loss has risen by more than its error."""
        names = [name for name in self.metric.risen() if name in self.frozen]
        if names and self.config.replay_history is None:
            self.metric.thaw(names)
            self.events += self._train_again(names, {}, step)
            self.log(f"step {step:,}: the loss has risen since {len(names)} matrices froze; they train again")

    def _train_again(self, names: Iterable[str], values: Mapping[str, float | None], step: int) -> list[dict[str, Any]]:
        """Unfreeze the components; returns the events. values: what was measured of them."""
        names = list(names)
        for name in names:
            del self.frozen[name]
            self.streaks.pop(name, None)
        if names:
            self.freezer.unfreeze(names)
        return [
            {"step": step, "name": name, "value": values.get(name), "tau": self.taus.get(name), "unfrozen": True}
            for name in names
        ]

    def _record(self, events: list[dict[str, Any]], what: str, sign: str) -> None:
        """Keep the events of a step and tell `log` and `detail`. sign: how their values compare with tau."""
        self.events += events
        drawn = "drawn at random" if self.config.replay_history is not None else ""
        for tower in self.towers:
            names = self._names(tower)
            own = [event for event in events if event["name"] in names]
            if own:
                taus = sorted({f"{event['tau']:.4g}" for event in own}, key=float) if not drawn else []
                why = drawn or f"tau {taus[0]}" + (f" to {taus[-1]}" if len(taus) > 1 else "")
                frozen = sum(name in self.frozen for name in names)
                count = f"{len(own)} of {len(names)} {tower} matrices ({frozen} frozen)"
                self.log(f"step {own[0]['step']:,}: {what} {count}: {why}")
        for event in events:
            why = drawn or f"{event['value']:.4g} {sign} tau {event['tau']:.4g}"
            self.detail(f"step {event['step']:,}: {what} {event['name']}, {why}")

    def history(self) -> dict[str, Any]:
        """Everything that happened, as JSON types: the pictures are drawn from this alone."""
        return {
            "version": HISTORY_VERSION,
            "config": asdict(self.config),
            "total_steps": self.total_steps,
            "grace_steps": self.grace_steps,
            "last_step": self.last_step,
            "stopped_early": self.enough_frozen() or self.has_cooled,
            "converged_step": self.converged_step,
            "components": [
                {"name": c.name, "tower": c.tower, "kind": c.kind, "layer": c.layer, "elements": c.elements}
                | {"tau": self.taus.get(c.name)}
                for c in self.components
            ],
            "checks": self.checks,
            "events": self.events,
            "validation": self.validation,
        }

    def save_history(self, path: str | Path) -> None:
        """Write the history as JSON."""
        write_text(Path(path), json.dumps(self.history()))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as the uninterrupted one would: tensors and plain types."""
        return {
            "components": [component.name for component in self.components],
            "measure": self._measure_settings(),
            "compute_interval": self.config.compute_interval,
            "frozen": dict(self.frozen),
            "streaks": dict(self.streaks),
            "taus": dict(self.taus),
            "given": [c.name for c in self.components if self.config.tau_of(c.tower, c.part) != AUTO],
            "last_step": self.last_step,
            "checks": list(self.checks),
            "totals": dict(self.totals),
            "grace_checks": list(self.grace_checks),
            "events": list(self.events),
            "converged_step": self.converged_step,
            "validation": list(self.validation),
            "latest": dict(self.latest),
            "metric": self.metric.state_dict(),
            "scale": self.scale.state_dict(),
            "freezer": self.freezer.state_dict(),
        }

    def _measure_settings(self) -> dict[str, Any]:
        """The settings that give the measured numbers their meaning."""
        return {name: getattr(self.config, name) for name in ("metric", "tau_mode", "monitor_sample")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; what was frozen is frozen again at once. Taus that the config gives override it.

        A "metric" of None (its tensors belong to other shards of the weights) means to measure from the beginning; so
        does another compute_interval, as a change over other steps is no change to compare with tau.
        To be called before the model is wrapped or compiled. Raises ValueError for another model or another measure.
        """
        names = [component.name for component in self.components]
        if state["components"] != names:
            odd = sorted(set(state["components"]) ^ set(names))
            raise ValueError(f"the saved GradES state is of other components: {', '.join(odd) or 'another order'}")
        for name, now in self._measure_settings().items():
            if (saved := state["measure"][name]) != now:
                raise ValueError(f"{name} {now}: the saved GradES state was measured with {saved}")
        self.frozen, self.streaks = dict(state["frozen"]), dict(state["streaks"])
        if not self.taus:  # one is auto: take what the saved run found, but keep numbers that are given now
            given = {c.name: self.config.tau_of(c.tower, c.part) for c in self.components}
            if state["taus"] and (fixed := [name for name in given if given[name] == AUTO and name in state["given"]]):
                tau = self.config.tau_name(self.by_name[fixed[0]].tower)
                raise ValueError(f"{tau} auto: must be a number, as in the saved run; its grace period is over")
            self.taus = {
                name: tau if given[name] == AUTO else float(given[name]) for name, tau in state["taus"].items()
            }
        self.last_step, self.latest = state["last_step"], dict(state["latest"])
        self.checks, self.events = list(state["checks"]), list(state["events"])
        self.grace_checks, self.totals = list(state["grace_checks"]), dict(state.get("totals", ()))
        self.converged_step, self.validation = state.get("converged_step"), list(state.get("validation", ()))
        interval = state.get("compute_interval", self.config.compute_interval)
        if state["metric"] is not None and (interval == self.config.compute_interval or self.config.metric == ROLLBACK):
            self.metric.load_state_dict(state["metric"], self.components)
        self.scale.load_state_dict(state["scale"])
        self.freezer.load_state_dict(state["freezer"])
        if self._is_probe(self.last_step + 1):
            self.freezer.begin_probe()
