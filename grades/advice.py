"""What to know of GradES's settings before the first step of a run."""

from grades.config import ROLLBACK, GradESConfig
from grades.monitor import GradESMonitor

# Of train.py and of transformers: the learning rate does not fall before the end, or in a cooldown alone.
STEADY = ("constant", "constant_with_warmup", "wsd", "warmup_stable_decay")
SHORT_INTERVAL = 25  # steps between two checks; at less, measuring gains takes much of the time
PATIENCE = 2  # with which the rollback gain was measured


def judged_checks(total_steps: int, grace: int, interval: int, first_check: int, measures_grace: bool) -> int:
    """How many checks after the grace period can have a number. first_check: the first check that has one, from 1.

    >>> judged_checks(300, 105, 100, 2, measures_grace=False), judged_checks(300, 105, 100, 2, measures_grace=True)
    (1, 2)
    """
    before = grace // interval if measures_grace else 0
    return max(0, total_steps // interval - grace // interval - max(0, first_check - 1 - before))


def advice(monitor: GradESMonitor, schedule: str | None = None, prefix: str = "") -> list[str]:
    """Lines on settings by which this run freezes nothing, or what has not converged; empty for what was measured.

    schedule: name of the learning rate's. prefix: of a setting's name, "--" for flags.
    """
    config, total, lines = monitor.config, monitor.total_steps, []
    if not any(config.may_freeze(tower) for tower in monitor.towers) or config.replay_history is not None:
        return []
    if total is not None:
        interval, first = config.compute_interval, monitor.metric.first_check(config.compute_interval)
        count = judged_checks(total, monitor.grace_steps, interval, first, config.monitor_grace)
        if count < config.patience:
            lines.append(
                f"{count} of the checks of these {total:,} steps can be judged, and {prefix}patience is "
                f"{config.patience}: nothing can freeze. Lower {prefix}compute_interval or {prefix}alpha, or train on"
            )
    return lines + _of_rollback(config, schedule, prefix) if config.metric == ROLLBACK else lines


def _of_rollback(config: GradESConfig, schedule: str | None, prefix: str) -> list[str]:
    lines = []
    if config.patience < PATIENCE:
        lines.append(
            f"{prefix}patience {config.patience}: one check can take a plateau for the end; what was measured has "
            f"{PATIENCE}"
        )
    if config.compute_interval < SHORT_INTERVAL:
        lines.append(
            f"{prefix}compute_interval {config.compute_interval}: each check evaluates the held-out rows up to once "
            "more than there are parts; with 50 or 100 that takes little of the time"
        )
    if schedule is not None and schedule not in STEADY:
        lines.append(
            f"the learning rate falls ({schedule}): so does the gain, whether or not there is more to learn; take a "
            "constant rate with the metric rollback"
        )
    return lines
