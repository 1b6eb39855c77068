"""The two pictures of a run, drawn from grades_history.json alone."""

import itertools
import json
from pathlib import Path
from typing import Any

from grades.files import written_beside
from grades.policy import lasting

# From Okabe and Ito's palette, which readers with any kind of colour vision can tell apart.
COLORS = {
    "vision": "#0072B2", "language": "#D55E00", "connector": "#882255", "audio": "#009E73", "fusion": "#CC79A7",
}  # fmt: skip
OTHER_COLOR = "#56B4E9"  # of any other tower
TASK_COLORS = ("black", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
NOT_FROZEN = "#E6E6E6"
SAMPLE = "averaged weights, on the sample of the gains"
UNITS = {
    "weight_change": "L1 weight change since last check",
    "gradient_change": "L1 gradient change since last step",
    "gradient_norm": "L1 gradient norm",
    "gradient_rms": "sum of sqrt(v) of Adam",
    "rollback": "nats per 100 steps",
}


def draw(history_path: str | Path, folder: str | Path | None = None) -> list[Path]:
    """Draw convergence.png and freezing.png beside the history, or into folder; returns their paths.

    Raises ImportError where matplotlib is missing.
    """
    history = json.loads(Path(history_path).read_text(encoding="utf-8"))
    folder = Path(folder) if folder else Path(history_path).parent
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "convergence.png", folder / "freezing.png"]
    for path, figure in zip(paths, (convergence(history), freezing(history)), strict=True):
        with written_beside(path) as beside:
            figure.savefig(beside, dpi=120)
    return paths


def convergence(history: dict[str, Any]) -> Any:
    """A figure: per tower the metric's median and spread over its unfrozen components, tau, grace period and freezes.

    history: what GradESMonitor.history returns.
    """
    losses, tasks = _losses(history), _tasks(history)
    more = bool(losses) + bool(tasks)
    figure, towers = _figure(history, height_per_row=3.2, rows_more=more)
    axes = figure.subplots(len(towers) + more, 1, sharex=True, squeeze=False)[:, 0]
    if losses:
        _draw_losses(axes[0], history, losses)
    if tasks:
        _draw_tasks(axes[more - 1], history, tasks)
    for axis, tower in zip(axes[more:], towers, strict=True):
        (_draw_gain if history["config"]["metric"] == "rollback" else _draw_metric)(axis, history, tower)
        axis.axvspan(0, history["grace_steps"], color="0.93", zorder=0, label="grace period: nothing freezes")
        axis.set_title(_title(tower), loc="left", fontweight="bold")
        config = history["config"]
        unit = " / own peak" if config["tau_mode"] == "relative" else ""
        axis.set_ylabel(UNITS[config["metric"]] + unit, fontsize=8)
        axis.set_xlim(0, 1.01 * (history["total_steps"] or history["last_step"] or 1))  # what is at the end is whole
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axes[-1].set_xlabel("optimizer step")
    return figure


def _losses(history: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, nats) of the validation losses by name; empty where neither weights were averaged nor gains measured."""
    validation = history.get("validation", [])
    names = {"loss": "last weights", "loss_averaged": "averaged weights"}
    found = {
        label: [(known["step"], known[key]) for known in validation if known.get(key) is not None]
        for key, label in names.items()
    }
    sampled = [check for check in history["checks"] if "loss" in check]
    for label, is_whole in ((SAMPLE, True), (f"{SAMPLE}: a quarter of it", False)):
        checks = [check for check in sampled if check.get("is_whole", True) == is_whole]
        found[label] = [(check["step"], check["loss"]) for check in checks]
    return {label: points for label, points in found.items() if points} if found["averaged weights"] or sampled else {}


def _tasks(history: dict[str, Any]) -> dict[str, list[tuple[int, float, float]]]:
    """(step, value, standard error) of each benchmark's number by name; empty where none was asked."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for known in history.get("validation", []):
        for name, (value, error) in known.get("tasks", {}).items():
            if value is not None:
                found.setdefault(name, []).append((known["step"], value, error or 0.0))
    return found


def _draw_tasks(axis: Any, history: dict[str, Any], tasks: dict[str, list[tuple[int, float, float]]]) -> None:
    for (label, points), color in zip(tasks.items(), itertools.cycle(TASK_COLORS), strict=False):
        steps, values, errors = zip(*points, strict=True)
        axis.errorbar(
            steps, values, yerr=errors, color=color, marker="o", markersize=4, capsize=3, elinewidth=1, label=label
        )
    towers = {component["name"]: component["tower"] for component in history["components"]}
    labelled: set[str] = set()
    for tower, step in dict.fromkeys((towers[one["name"]], one["step"]) for one in lasting(history["events"])):
        label = f"a {tower} matrix froze"
        axis.axvline(
            step, color=_color(tower), linewidth=1, alpha=0.35, zorder=0, label=None if label in labelled else label
        )
        labelled.add(label)
    axis.set_title("benchmarks, ± one standard error", loc="left", fontweight="bold")
    axis.set_ylabel("score", fontsize=8)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _draw_losses(axis: Any, history: dict[str, Any], losses: dict[str, list[tuple[int, float]]]) -> None:
    for label, points in losses.items():
        color = "0.6" if label == "last weights" else "black"
        style = (":" if label == SAMPLE else "") if label.startswith(SAMPLE) else "-"
        fill = "white" if label.startswith(SAMPLE) else color
        axis.plot(
            *zip(*points, strict=True), color=color, linestyle=style, marker="o" if style else "x", markersize=3,
            markerfacecolor=fill,
            label=label,
        )  # fmt: skip
    last, converged = history["last_step"], history.get("converged_step")
    if converged is not None and converged < last:
        axis.axvline(converged, color="black", linestyle="-.", linewidth=1, label=f"cooldown, step {converged:,}")
    if history["stopped_early"]:
        axis.axvline(last, color="black", linestyle=":", label=f"end, step {last:,}")
    _make_logarithmic(axis)
    axis.set_title("validation loss", loc="left", fontweight="bold")
    axis.set_ylabel("nats", fontsize=8)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _make_logarithmic(axis: Any) -> None:
    """With plain numbers at 1, 2 and 5 of each decade, as a picture may span less than one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _draw_metric(axis: Any, history: dict[str, Any], tower: str) -> None:
    import numpy as np

    columns = [i for i, component in enumerate(history["components"]) if component["tower"] == tower]
    counts = _frozen_counts(history, tower)
    steps: list[int] = []
    low: list[float] = []
    median: list[float] = []
    high: list[float] = []
    for check in history["checks"]:
        values = [check["values"][i] for i in columns if check["values"][i] is not None]
        frozen = next(count for step, count in reversed(counts) if step < check["step"])
        if values or frozen == len(columns):  # while the whole tower is frozen the lines have a gap
            steps.append(check["step"])
            for series, quantile in ((low, 5), (median, 50), (high, 95)):
                series.append(np.percentile(values, quantile) if values else np.nan)
    color = _color(tower)
    axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label="5-95 % of its unfrozen matrices")
    axis.plot(steps, median, color=color, linewidth=1.8, label="median of its unfrozen matrices")
    found = {history["components"][i]["tau"] for i in columns} - {None, 0}  # 0: never measured in the grace period
    taus = [] if history["config"]["replay_history"] else sorted(found)
    for tau in taus:
        spread = f"tau = {taus[0]:.3g}" + (f" to {taus[-1]:.3g}, by matrix" if len(taus) > 1 else "")
        label = spread if tau == taus[0] else None
        axis.axhline(tau, color="black", linestyle="--", linewidth=1.2 if len(taus) < 3 else 0.5, label=label)
    _draw_events(axis, history, tower)
    if any(value > 0 for value in high):
        _make_logarithmic(axis)
    axis.grid(axis="y", color="0.9")


def _draw_gain(axis: Any, history: dict[str, Any], tower: str) -> None:
    """The tower's rollback gain with its standard error, against tau."""
    measured = [
        (check["step"], *check["gains"][tower]) for check in history["checks"] if tower in check.get("gains", {})
    ]
    color = _color(tower)
    if measured:
        steps, gains, errors = zip(*measured, strict=True)
        axis.errorbar(
            steps, gains, yerr=errors, color=color, linewidth=1.8, marker="o", markersize=4, capsize=3, elinewidth=1,
            label="rollback gain ± standard error",
        )  # fmt: skip
    tau = next(c["tau"] for c in history["components"] if c["tower"] == tower)
    axis.axhline(0, color="0.7", linewidth=0.8)
    if tau is not None:
        axis.axhline(tau, color="black", linestyle="--", linewidth=1.2, label=f"tau = {tau:.3g}")
        axis.set_yscale("symlog", linthresh=max(tau, 1e-3))
    axis.yaxis.set_major_formatter("{x:g}")
    shown: set[tuple[int, bool]] = set()
    for event in history["events"]:
        thawed = bool(event.get("unfrozen"))
        if event["name"] in {c["name"] for c in history["components"] if c["tower"] == tower}:
            if (event["step"], thawed) not in shown:
                label = f"{_title(tower)} " + ("trains again" if thawed else f"frozen, step {event['step']:,}")
                axis.axvline(event["step"], color=color, linestyle="-" if not thawed else ":", alpha=0.6, label=label)
            shown.add((event["step"], thawed))
    axis.grid(axis="y", color="0.9")


def _draw_events(axis: Any, history: dict[str, Any], tower: str) -> None:
    """A triangle down for each freeze, a triangle up for each matrix that trains again, at the value that caused it."""
    names = {component["name"] for component in history["components"] if component["tower"] == tower}
    _, last = _frozen_counts(history, tower)[-1]
    for unfrozen, marker, fill in ((False, "v", _color(tower)), (True, "^", "white")):
        events = [e for e in history["events"] if e["name"] in names and bool(e.get("unfrozen")) == unfrozen]
        points = [(event["step"], event["value"]) for event in events if event["value"] is not None]
        if points:
            label = "trains again" if unfrozen else f"matrix frozen ({last} of {len(names)})"
            axis.plot(
                *zip(*points, strict=True), linestyle="none", marker=marker, markersize=6, color=fill,
                markeredgecolor="black", markeredgewidth=0.7, label=label,
            )  # fmt: skip


def _frozen_counts(history: dict[str, Any], tower: str) -> list[tuple[int, int]]:
    """(step, number of the tower's frozen matrices after it): (0, 0), then one for each event."""
    names = {component["name"] for component in history["components"] if component["tower"] == tower}
    counts = [(0, 0)]
    for event in history["events"]:
        if event["name"] in names:
            counts.append((event["step"], counts[-1][1] + (-1 if event.get("unfrozen") else 1)))
    return counts


def freezing(history: dict[str, Any]) -> Any:
    """A figure: the frozen share of each tower over steps, and a map of layers x matrices by the step of freezing.

    history: what GradESMonitor.history returns.
    """
    figure, towers = _figure(history, height_per_row=0)
    layers = max(component["layer"] for component in history["components"]) + 1
    map_height = 1.4 + max(1.2, 0.24 * layers)
    figure.set_size_inches(10, 3.2 + map_height)
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.2, map_height])
    _draw_shares(top.subplots(), history, towers)
    widths = [len(_kinds(history, tower)) for tower in towers]
    axes = bottom.subplots(1, len(towers), width_ratios=widths, squeeze=False)[0]
    for axis, tower in zip(axes, towers, strict=True):
        image = _draw_map(axis, history, tower)
    bar = bottom.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02)
    bar.set_label("optimizer step of freezing")
    if len(lasting(history["events"])) < len(history["components"]):
        bottom.supxlabel("grey: trained to the end", fontsize=9)
    return figure


def _draw_shares(axis: Any, history: dict[str, Any], towers: list[str]) -> None:
    end = history["last_step"]
    for tower in towers:
        total = sum(component["tower"] == tower for component in history["components"])
        steps, counts = zip(*_frozen_counts(history, tower), strict=True)
        shares = [100 * count / total for count in counts]
        label = f"{tower}: {counts[-1]} of {total} frozen ({shares[-1]:.0f} %)"
        axis.step([*steps, end], [*shares, shares[-1]], where="post", color=_color(tower), linewidth=2, label=label)
    axis.axvspan(0, history["grace_steps"], color="0.93", zorder=0)
    if history["grace_steps"]:
        axis.text(history["grace_steps"] / 2, 50, "grace period", ha="center", va="center", color="0.4")
    total_steps = history["total_steps"] or end or 1
    if history["stopped_early"]:
        axis.axvline(end, color="black", linestyle=":", linewidth=1)
        side = "left" if end <= 0.75 * total_steps else "right"  # of the line; there is room
        axis.text(end, 4, f" stopped at {end:,} ", ha=side, fontsize=9)
    axis.set_xlim(0, total_steps)
    axis.set_ylim(-4, 108)
    axis.set_title("share of each tower's matrices that is frozen", loc="left", fontweight="bold")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("frozen (%)")
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axis.grid(axis="y", color="0.9")


def _color(tower: str) -> str:
    return COLORS.get(tower, OTHER_COLOR)


def _title(tower: str) -> str:
    return tower if tower == "connector" else f"{tower} tower"


def _kinds(history: dict[str, Any], tower: str) -> list[str]:
    """The tower's kinds of matrices, in the order of the model."""
    return list(dict.fromkeys(c["kind"] for c in history["components"] if c["tower"] == tower))


def _draw_map(axis: Any, history: dict[str, Any], tower: str) -> Any:
    import matplotlib
    import numpy as np

    kinds = _kinds(history, tower)
    members = [component for component in history["components"] if component["tower"] == tower]
    step_of = {event["name"]: event["step"] for event in lasting(history["events"])}
    grid = np.full((max(c["layer"] for c in members) + 1, len(kinds)), np.nan)
    for component in members:
        grid[component["layer"], kinds.index(component["kind"])] = step_of.get(component["name"], np.nan)
    colormap = matplotlib.colormaps["viridis"].with_extremes(bad=NOT_FROZEN)
    last = history["total_steps"] or history["last_step"] or 1
    image = axis.imshow(
        np.ma.masked_invalid(grid), cmap=colormap, vmin=history["grace_steps"], vmax=last, aspect="auto"
    )
    if len(grid) <= 8:
        for (row, column), step in np.ndenumerate(grid):
            ink = "white" if step < (history["grace_steps"] + last) / 2 else "black"
            axis.text(
                column, row, "" if np.isnan(step) else f"{step:.0f}", ha="center", va="center", fontsize=8, color=ink
            )
    axis.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", fontsize=8)
    stride = -(-len(grid) // 16)
    axis.set_yticks(range(0, len(grid), stride))
    axis.set_xticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(grid) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="minor", length=0)
    axis.set_ylabel("layer")
    axis.set_title(_title(tower), loc="left", fontweight="bold", color=_color(tower))
    return image


def _figure(history: dict[str, Any], height_per_row: float, rows_more: int = 0) -> tuple[Any, list[str]]:
    """An empty figure that needs no display, and the towers that the history has."""
    from matplotlib.figure import Figure

    known = dict.fromkeys(component["tower"] for component in history["components"])
    towers = [*(tower for tower in COLORS if tower in known), *(tower for tower in known if tower not in COLORS)]
    return Figure(figsize=(10, max(1.0, height_per_row * (len(towers) + rows_more))), layout="constrained"), towers
