"""What stands at the end of a run: the pictures, and the summary in words."""

from pathlib import Path

from grades import GradESMonitor


def draw_pictures(monitor: GradESMonitor, folder: Path) -> list[Path]:
    """Write grades_history.json, and convergence.png and freezing.png drawn from it."""
    from grades.plots import draw

    history = folder / "grades_history.json"
    monitor.save_history(history)
    return draw(history)


def summary_lines(summary: dict, folder: Path, pictures: list[Path]) -> list[str]:
    """The summary for the console."""
    lines = ["", f"{summary['steps']:,} steps, {summary['total_time_s']:.0f} s in all ({summary['stop_reason']})"]
    if summary["test_exact_match"] is not None:
        by_source = ", ".join(f"{k} {percent(v)}" for k, v in summary["test_exact_match_by_source"].items())
        lines.append(f"test exact match      {percent(summary['test_exact_match'])} ({by_source})")
    if summary["question_only_exact_match"] is not None:
        unseen = percent(summary["question_only_exact_match"])
        lines.append(f"without the image     {unseen} (each question's usual answer)")
    if summary["frozen_share"] is not None:
        towers = ", ".join(f"{tower} {percent(summary[f'frozen_share_{tower}'])}" for tower in ("vision", "language"))
        freed = summary["freed_bytes"] / 2**20
        lines.append(f"frozen matrices       {percent(summary['frozen_share'])} ({towers}; {freed:.1f} MiB freed)")
    for split, counts in summary["dropped"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        lines.append(f"dropped, {split + ':':<13}{reasons}")
    lines += [f"written               {path}" for path in (folder / "summary.json", *pictures)]
    if summary["stop_reason"] != "non_finite_loss":
        lines.append(f"ask it                python generate.py --checkpoint {folder} --image IMAGE.png --prompt '...'")
    return lines


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"
