"""The record of a run as text: every component, and when it froze."""

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grades.policy import lasting
from grades.rollback import CERTAINTY

HISTORY_NAME = "grades_history.json"
NOTHING_TO_SAVE = "still learning at the end: nothing to save"


def find_history(path: Path) -> Path:
    """The history in the folder of a run or of a checkpoint, else of the run's latest checkpoint; path may be the file.

    Raises ValueError where there is none.
    """
    checkpoints = sorted(path.glob(f"checkpoint-*/{HISTORY_NAME}"), key=lambda history: history.stat().st_mtime)
    for candidate in (path, path / HISTORY_NAME, *reversed(checkpoints)):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path}: must be a folder of a run or of a checkpoint that holds {HISTORY_NAME}")


@contextlib.contextmanager
def reading_history(what: str) -> Iterator[None]:
    """Within this context an error of what is no history, or is cut off, becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: is no whole history of GradES: {type(error).__name__}: {error}") from None


def table(history: dict[str, Any]) -> str:
    """One line per component: tower, layer, name, tau, last measured value, and the step at which it froze."""
    frozen = {event["name"]: event for event in lasting(history["events"])}
    rows: list[Sequence[str]] = [("tower", "layer", "component", "tau", "last value", "frozen at step")]
    for column, component in enumerate(history["components"]):
        values = [check["values"][column] for check in history["checks"]]
        last = next((value for value in reversed(values) if value is not None), None)
        event = frozen.get(component["name"])
        last = event["value"] if event and event["value"] is not None else last
        numbers = (_number(component["tau"]), _number(last), f"{event['step']:,}" if event else "-")
        rows.append((component["tower"], str(component["layer"]), component["name"], *numbers))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """The cells side by side: words aligned on the left, numbers on the right."""
    padded = [f"{row[i]:<{width}}" if i in (0, 2) else f"{row[i]:>{width}}" for i, width in enumerate(widths)]
    return "  ".join(padded).rstrip()


def summary(history: dict[str, Any]) -> list[str]:
    """Lines: what was measured, how long the run was, and what froze in each tower."""
    config, total = history["config"], history["total_steps"]
    interval = config["compute_interval"]
    of = f" of {total:,}" if total else ""
    ending = ", ended by GradES" if history["stopped_early"] else ""
    lines = [
        f"{config['metric']} ({config['tau_mode']}), checked every {'step' if interval == 1 else f'{interval} steps'}",
        f"{history['last_step']:,}{of} steps, grace period {history['grace_steps']:,}{ending}",
    ]
    for tower in dict.fromkeys(component["tower"] for component in history["components"]):
        lines.append(_tower_line(history, tower))
    whole = total and history["last_step"] >= total and not history["stopped_early"]
    if whole and not lasting(history["events"]) and still_learning(history):
        lines.append(NOTHING_TO_SAVE)
    return lines + undecided(history)


def undecided(history: dict[str, Any]) -> list[str]:
    """A line for each tower that trained to the end because its last rollback gain was below tau, but not by its error,
    or could not be measured."""
    if history["stopped_early"] or history.get("converged_step") is not None:
        return []
    gains = next((check["gains"] for check in reversed(history["checks"]) if "gains" in check), None)
    frozen = {event["name"] for event in lasting(history["events"])}
    taus: dict[str, float] = {}  # of each tower in which something may freeze still, the highest
    for component in history["components"]:
        tower, tau = component["tower"], component["tau"]
        may_freeze = history["config"].get(f"freeze_{tower}", True) and component["name"] not in frozen
        if gains is not None and may_freeze and tau is not None:
            taus[tower] = max(taus.get(tower, -math.inf), tau)
    lines: list[str] = []
    # With freeze_order together the towers after one that was above its tau were not measured.
    config, known = history["config"], {tower: gains[tower] for tower in taus if gains and tower in gains}
    stops = config.get("freeze_order") == "together" and config.get("rollback_parts") == "towers"
    is_whole = not stops or all(gain + CERTAINTY * error < taus[tower] for tower, (gain, error) in known.items())
    for tower, tau in taus.items():
        gain, error = known.get(tower, (None, None))
        if gain is None and is_whole:
            lines.append(
                f"{tower}: no gain could be measured at the last check: the held-out rows tell nothing of it (no "
                "label, no image, no finite loss), or no update reached it"
            )
        elif gain is not None and gain < tau <= gain + CERTAINTY * error:
            times = math.ceil((CERTAINTY * error / (tau - gain)) ** 2)
            lines.append(
                f"{tower}: the last gain, {gain:.4f} \u00b1 {error:.4f} nats per 100 steps, is below tau {tau:g} but "
                f"not by its error: {times:,} times as many held-out rows could tell"
            )
    return lines


def still_learning(history: dict[str, Any]) -> bool:
    """Whether a matrix that might have frozen was last measured above its tau, after the grace period."""
    late = [check for check in history["checks"] if check["step"] > history["grace_steps"]]
    for i, component in enumerate(history["components"]):
        value = next((check["values"][i] for check in reversed(late) if check["values"][i] is not None), None)
        may_freeze = history["config"].get(f"freeze_{component['tower']}", True)
        if may_freeze and value is not None and component["tau"] is not None and value >= component["tau"]:
            return True
    return False


def _tower_line(history: dict[str, Any], tower: str) -> str:
    """How many of a tower's matrices froze, when, and at which share of its own peak each was then."""
    columns = {c["name"]: i for i, c in enumerate(history["components"]) if c["tower"] == tower}
    events = [event for event in lasting(history["events"]) if event["name"] in columns]
    line = f"{tower}: {len(events)} of {len(columns)} frozen ({len(events) / len(columns):.0%})"
    if events:
        steps = [event["step"] for event in events]
        line += f", steps {min(steps):,} to {max(steps):,}"
    shares = []
    for event in events:
        if event["value"] is not None:  # None: drawn at random before anything was measured
            measured = [check["values"][columns[event["name"]]] for check in history["checks"]]
            shares.append(event["value"] / max(value for value in [event["value"], *measured] if value is not None))
    if shares:
        line += f", at {min(shares):.0%} to {max(shares):.0%} (median {statistics.median(shares):.0%})"
        line += f" of each matrix's own peak {history['config']['metric']}"
    return line


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
