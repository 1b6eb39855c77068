"""Rollback gain: what training a part still brings, in nats. Not in the paper.

Put one part of the averaged weights back to its average of N steps ago and see by how much the loss on held-out rows
rises. Kin: layers put back to earlier values as an analysis (arXiv:1902.01996).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn as nn

from grades.averaging import AVERAGE, OLDER, AveragedWeights, exchange
from grades.components import Component, block_of, clean_name
from grades.config import ROLLBACK, GradESConfig
from grades.metrics import Metric, make_metric
from grades.towers import CONNECTOR, VISION, Towers

PER_STEPS = 100  # a gain is told per this many steps
CERTAINTY = 1.0  # standard errors that are added to a gain before it is compared with tau
SCREEN_CERTAINTY = 3.0  # standard errors by which a gain on the first rows must be above its limit to do without others
SCREEN_ROWS = 16  # of fewer the standard error is not known well enough
RISE_CERTAINTY = 2.0  # standard errors by which the loss must be above its lowest since a freeze to thaw it
SMALLEST = 1e-9  # a gain below it counts as it: pictures have logarithmic axes

Losses = Sequence[tuple[float, int]]  # of each held-out row: summed loss in nats, number of label tokens
# Which weights the vision tower has, for the features of images, which may serve again: "new", the averages of this
# check, whose features are to be kept; "same", those of the "new" call for the same rows; "before", those of the "new"
# call at the check before, asked once; "other". A resumed run asks for features that it does not have.
VisionIs: TypeAlias = Literal["new", "same", "before", "other"]
# Gives the losses of a part of a fixed sample of held-out rows under the model's present weights. Its arguments: which
# weights the vision tower has; and which part of the rows it is: True the first one, every fourth batch; False the
# others. Its method `next_check`, if it has one, is called at the end of a check with what the "new" tower will be at
# the next one: "same", "before", or "other", whose features are not asked for.
Evaluate = Callable[[VisionIs, bool], Losses]
FIRST, OTHERS = True, False
KEPT = ("gains", "scale", "older_at", "is_measured", "is_whole")  # with the state, as they are


@dataclass(frozen=True)
class Part:
    """Components that are put back together, with all other weights around them: norms, embeddings."""

    name: str
    tower: str
    components: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


class Rollback(Metric):
    """The gain of a component's part since the previous check, plus its standard error, in nats per 100 steps.

    The standard error is that over rows: nothing counts as converged on noise. At a check the loss is evaluated once,
    and once more for each part in which something trains; with `limits`, parts are measured until one is above its own,
    and the first of them on a quarter of the rows where that leaves no doubt. What cannot be measured has no value: a
    part that no update has reached, or of which the losses tell nothing (NaN, no label, no difference at all).
    """

    is_of_shards = False  # the older averages are in the optimizer's state, and all ranks know the same losses

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component],
        averages: AveragedWeights | None,
        evaluate: Evaluate | None,
        parts: str = "towers",
        limits: Mapping[str, float] | None = None,
        freeze_to: str = "average",
    ) -> None:
        """parts: see `find_parts`. limits: of each tower, the value that keeps all towers from freezing. freeze_to: the
        value that a part keeps. Raises ValueError where averages or evaluate are missing."""
        super().__init__()
        if averages is None or evaluate is None:
            raise ValueError(
                "metric rollback: needs averaged weights and held-out rows: with train.py --average_weights 0.99; in a "
                "loop of your own the arguments averages and evaluate of GradESMonitor (docs/grades.md)"
            )
        self.model, self.components, self.averages, self.evaluate = model, components, averages, evaluate
        self.level, self.limits, self.freeze_to = parts, dict(limits or {}), freeze_to
        self.scale = 1.0  # from the steps since the older averages to PER_STEPS
        self.older_at: int | None = None  # updates of the averages when the older ones were kept
        self.gains: dict[str, tuple[float, float]] = {}  # by part, at the last check: (gain, standard error), nats
        self.is_measured = False  # whether the last check evaluated anything
        self.is_whole = True  # whether it evaluated all rows
        self.losses: Losses = ()  # at the last check that did, under the averaged weights, of the rows that it needed
        self.lowest: dict[str, Losses] = {}  # by frozen component, since its freeze
        self.next_check: Callable[[VisionIs], None] = getattr(evaluate, "next_check", lambda vision: None)
        vision, averaged = Towers(model).of, set(averages.parameters)
        self.vision = [p for name, p in model.named_parameters() if vision(clean_name(name)) == VISION]
        self.is_averaged = all(p in averaged for p in self.vision if p.requires_grad)  # else it is never put back whole
        self.seen: set[bool] = set()  # parts of the rows of which the features of the vision tower of now are kept
        self.before: set[bool] = set()  # and of that of the check before

    def first_check(self, compute_interval: int) -> int:
        return 2

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> dict[str, float | None]:
        """None at the first check, which has nothing to put back and evaluates nothing."""
        parts = find_parts(self.model, components, self.level)
        known = [part for part in parts if self._can_go_back(part)]
        bounds: dict[str, list[float]] = {}
        self.gains, self.is_measured = {}, bool(known)
        if not known:
            self.before.clear()
            self._remember()
            return dict.fromkeys((component.name for component in components), None)
        assert self.older_at is not None
        vision_trains = any(parameter.requires_grad for parameter in self.vision)
        if vision_trains:
            self.seen.clear()  # an error may have ended the check before
        self.scale = PER_STEPS / (self.averages.updates - self.older_at)
        with self.averages.applied():
            known.sort(key=lambda part: part.tower == VISION)  # the dear one to measure is the last
            self.losses, first = self._screen(known[0])
            for part in known:
                gain, error = paired_difference(self.losses, first if part is known[0] else self._put_back(part))
                if not math.isfinite(gain + error) or gain == error == 0:
                    continue
                self.gains[part.name] = gain, error
                bound = max(SMALLEST, self.scale * (gain + CERTAINTY * error))
                for name in part.components:
                    bounds.setdefault(name, []).append(bound)
                if bound >= self.limits.get(part.name, math.inf):
                    break  # nothing can freeze at this check
        self.before = set()
        if vision_trains:
            if self.is_averaged and any(part.name == VISION for part in parts):
                self.before |= self.seen
            self.seen.clear()
        self.next_check("before" if self.before else "other" if vision_trains else "same")
        self._remember()
        return {c.name: min(bounds[c.name]) if c.name in bounds else None for c in components}

    def _screen(self, part: Part) -> tuple[Losses, Losses]:
        """The losses now and with the part put back: of the first rows alone where its gain is above its limit there
        beyond doubt, so that nothing can freeze at this check; else of all rows."""
        limit, self.is_whole = self.limits.get(part.name), True
        if limit is None or self.lowest:  # with something frozen all rows tell whether the loss has risen since
            return self._evaluate(FIRST, OTHERS), self._put_back(part)
        now, back = self._evaluate(FIRST), self._put_back(part, FIRST)
        gain, error = paired_difference(now, back)
        if len(now) >= SCREEN_ROWS and self.scale * (gain - SCREEN_CERTAINTY * error) > limit:
            self.is_whole = False
            return now, back
        return [*now, *self._evaluate(OTHERS)], [*back, *self._put_back(part, OTHERS)]

    def _evaluate(self, *parts: bool) -> Losses:
        """The losses of these parts of the rows."""
        losses: list[tuple[float, int]] = []
        for part in parts:
            losses += self.evaluate("same" if part in self.seen else "new", part)
            self.seen.add(part)
        return losses

    def _can_go_back(self, part: Part) -> bool:
        averaged = self._averaged(part)
        since = 0 if self.older_at is None else self.averages.updates - self.older_at
        return since > 0 and bool(averaged) and all(OLDER in self.averages.state[p] for p in averaged)

    def details(self) -> dict[str, Any]:
        """For the history: the mean loss in nats, of how many rows, whether these are all, and (gain, standard error)
        of each part in nats per 100 steps."""
        if not self.is_measured:
            return {}
        loss, _ = mean_and_error(self.losses)
        gains = {part: [self.scale * value for value in pair] for part, pair in self.gains.items()}
        found = {"loss": loss} if math.isfinite(loss) else {}  # JSON has no NaN
        return found | {"rows": len(self.losses), "is_whole": self.is_whole, "gains": gains}

    def risen(self) -> list[str]:
        """The frozen components since whose freeze the loss has risen by more than its error: they are to thaw.

        It is compared with its lowest since then, as other parts that train on lower it.
        """
        if not self.is_measured:
            return []
        tokens = [count for _, count in self.losses]
        for name, before in self.lowest.items():
            if [count for _, count in before] != tokens:  # unknown or of other rows: it is compared from here on
                self.lowest[name] = self.losses
        rises = {id(before): paired_difference(before, self.losses) for before in self.lowest.values()}
        found = []
        for name, before in self.lowest.items():
            rise, error = rises[id(before)]
            if rise > RISE_CERTAINTY * error > 0:
                found.append(name)
            elif rise < 0:
                self.lowest[name] = self.losses
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Remember the losses at which these froze, if they are known: where they keep their last values, it was
        measured with others, and the next check tells."""
        names = list(names)
        if names and (self.freeze_to != "average" or self.averages.updates != self.older_at):
            self.before.clear()  # what froze is not as it was measured
        if self.losses:
            self.lowest |= dict.fromkeys(names, self.losses if self.freeze_to == "average" else ())

    def thaw(self, names: Iterable[str]) -> None:
        """These train again."""
        self.seen.clear()
        for name in names:
            self.lowest.pop(name, None)

    def _averaged(self, part: Part) -> list[nn.Parameter]:
        return [p for p in part.parameters if AVERAGE in self.averages.state.get(p, ())]

    def _put_back(self, part: Part, *rows: bool) -> Losses:
        """The losses of these parts of the rows, of all where none is named, with the part at its older average."""
        losses: list[tuple[float, int]] = []
        done: list[nn.Parameter] = []
        try:
            for parameter in self._averaged(part):
                exchange(parameter, self.averages.state[parameter][OLDER])
                done.append(parameter)
            for row_part in rows or (FIRST, OTHERS):
                losses += self.evaluate(self._vision_with(part, row_part), row_part)
            return losses
        finally:  # an error must not leave the older average in place of the average
            for parameter in done:
                exchange(parameter, self.averages.state[parameter][OLDER])

    def _vision_with(self, part: Part, rows: bool) -> VisionIs:
        """Which weights the vision tower has, with the part put back."""
        if part.tower != VISION:
            return "same"
        return "before" if part.name == VISION and rows in self.before else "other"

    def _remember(self) -> None:
        """Let the averages of now be the older ones of the next check."""
        for parameter in self.averages.averaged:
            state = self.averages.state[parameter]
            if OLDER not in state:
                state[OLDER] = torch.empty_like(state[AVERAGE])
            state[OLDER].copy_(state[AVERAGE])
        self.older_at = self.averages.updates

    def state_dict(self) -> dict[str, Any]:
        """The older averages are in the parameters' state."""
        return {
            "losses": list(self.losses),
            "lowest": dict(self.lowest),
            "seen": sorted(self.seen),
            "before": sorted(self.before),
            **{name: getattr(self, name) for name in KEPT},
        }

    def load_state_dict(self, state: dict[str, Any], components: Sequence[Component]) -> None:
        lowest = state["lowest"] if "lowest" in state else state["at_freeze"]  # of an older checkpoint
        self.losses, self.lowest = state["losses"], dict(lowest)
        self.seen, self.before = set(state.get("seen", ())), set(state.get("before", ()))
        for name in KEPT:
            if name in state:  # older checkpoints have none: the first check measures nothing then
                setattr(self, name, state[name])


def metric_of(
    config: GradESConfig,
    model: nn.Module,
    components: Sequence[Component],
    optimizer: torch.optim.Optimizer | None,
    averages: AveragedWeights | None,
    evaluate: Evaluate | None,
) -> Metric:
    """The metric of the settings, this one or another."""
    if config.metric != ROLLBACK:
        return make_metric(config.metric, config.monitor_sample, optimizer)
    limits = config.rollback_limits({(c.tower, c.part) for c in components})
    return Rollback(model, components, averages, evaluate, config.rollback_parts, limits, config.freeze_to)


def find_parts(model: nn.Module, components: Sequence[Component], level: str = "towers") -> list[Part]:
    """The parts of which components (those that train) remain.

    level: "towers"; "prefixes", with besides each tower the first half of its blocks in which something trains; or
    "blocks", with besides each tower each block.
    """
    parameters = [(clean_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    tower_of = Towers(model).of
    parts = []
    for tower in dict.fromkeys(component.tower for component in components):
        own = [component for component in components if component.tower == tower]
        parts.append(
            Part(tower, tower, tuple(c.name for c in own), tuple(p for n, p in parameters if tower_of(n) == tower))
        )
        blocks = list(dict.fromkeys((component.stack, component.layer) for component in own))
        groups: dict[str, list[list[tuple[str, int]]]] = {"towers": [], "prefixes": [blocks[: len(blocks) // 2]]}
        groups["blocks"] = [[block] for block in blocks]
        several = len({stack for stack, _ in blocks}) > 1  # encoder and decoder
        for group in groups[level] if tower != CONNECTOR else []:
            inside = [component for component in own if (component.stack, component.layer) in group]
            if inside:
                roots = {f"{block_of(component.name)[0]}." for component in inside}
                weights = tuple(p for name, p in parameters if any(name.startswith(root) for root in roots))
                labels = [f"{stack}.{layer}" if several else str(layer) for stack, layer in (group[0], group[-1])]
                name = f"{tower} {'-'.join(dict.fromkeys(labels))}"
                parts.append(Part(name, tower, tuple(c.name for c in inside), weights))
    return parts


def paired_difference(before: Losses, after: Losses) -> tuple[float, float]:
    """By how much the mean loss per label token is higher after than before, and the standard error over rows: nats."""
    differences = [(b - a, tokens) for (a, tokens), (b, _) in zip(before, after, strict=True)]
    return mean_and_error(differences)


def mean_and_error(rows: Losses) -> tuple[float, float]:
    """Mean per token of (sum, tokens) of rows, and its standard error (of a ratio, over rows), which one row lacks."""
    tokens = sum(count for _, count in rows)
    if not tokens:
        return math.nan, math.nan
    mean = math.fsum(total for total, _ in rows) / tokens
    square = math.fsum((total - mean * count) ** 2 for total, count in rows)
    n = sum(count > 0 for _, count in rows)
    return mean, math.sqrt(square * n / (n - 1)) / tokens if n > 1 else math.inf
