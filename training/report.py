"""What a run says about itself: its first lines, its pictures, and its summary in numbers and in words.

`run` is train.py's Run.
"""

import dataclasses
from pathlib import Path

from grades import GradESMonitor
from training.arguments import DEFAULT_RECIPE, Settings


def announce(settings: Settings) -> None:
    """The first line: recipe, data, and whether GradES freezes. The quickstart on its own data points to the paper's
    run; flags that have no effect are named."""
    data, is_default = settings.train.train_dataset_path, settings.recipe == DEFAULT_RECIPE
    recipe = "configs/quickstart.yaml (the default)" if is_default else settings.recipe
    grades = "with GradES" if settings.train.enable_grades else "without GradES (--enable_grades turns it on)"
    print(f"Recipe {recipe}, data {data}, {grades}")
    if is_default and data == "easy-vqa":
        print("The paper's run (Table 10): python train.py --config configs/table10_nanovlm.yaml --enable_grades")
    ignored = sorted(settings.given & {field.name for field in dataclasses.fields(settings.grades)})
    if ignored and not settings.train.enable_grades:
        print(f"Without --enable_grades these flags have no effect: {', '.join(f'--{name}' for name in ignored)}")


def describe(run) -> None:
    """What is trained on what, and what GradES watches."""
    parameters = sum(p.numel() for p in run.model.parameters())
    run.log.say(f"{parameters:,} parameters on {run.device.type}; run folder {run.folder}")
    data = {"training": run.data.train_rows, "validation": run.data.val_rows, "test": run.data.test_rows}
    counts = (f"{len(rows):,} {name}" for name, rows in data.items() if hasattr(rows, "__len__"))
    run.log.say("rows: " + (", ".join(counts) or "a stream"))
    if run.monitor is not None:
        towers = [component.tower for component in run.monitor.components]
        run.log.say(
            f"GradES watches {towers.count('vision')} vision and {towers.count('language')} language matrices every "
            f"{run.monitor.config.compute_interval} steps; nothing freezes before step {run.monitor.grace_steps + 1}"
        )


def draw_pictures(monitor: GradESMonitor, folder: Path) -> list[Path]:
    """Write grades_history.json, and convergence.png and freezing.png drawn from it."""
    from grades.plots import draw

    history = folder / "grades_history.json"
    monitor.save_history(history)
    return draw(history)


def make_summary(run, stop_reason: str, test: dict, question_only: float | None, total_time_s: float) -> dict:
    """summary.json: times in seconds, shares in [0, 1], None where something was not measured."""
    return {
        "total_time_s": total_time_s,
        "startup_time_s": run.startup_time_s,
        "train_time_s": run.train_time_s,
        "eval_time_s": run.eval_time_s,
        "test_time_s": run.test_time_s,
        "save_time_s": run.save_time_s,
        "steps": run.step,
        "resumed_at_steps": run.resumed_at,
        "stop_reason": stop_reason,
        "test_cut_short": stop_reason == "interrupted" and None not in (run.stop_reason, run.data.test_rows),
        "stop_step": run.step if stop_reason in ("frozen", "early_stopping") else None,
        "train_flops": run.flops.done,
        "train_flops_unfrozen_per_step": run.flops.unfrozen / run.step if run.step else None,
        "train_tokens": run.total_tokens,
        "val_loss": run.val.get("val/loss"),
        "val_exact_match": run.val.get("val/exact_match"),
        "test_exact_match": test.get("test/exact_match"),
        "test_exact_match_by_source": {
            name.split("/")[-1]: value for name, value in test.items() if name.count("/") == 2
        },
        "question_only_exact_match": question_only,
        "frozen_share": run.monitor.frozen_share() if run.monitor else None,
        "frozen_share_vision": run.monitor.frozen_share("vision") if run.monitor else None,
        "frozen_share_language": run.monitor.frozen_share("language") if run.monitor else None,
        "freed_bytes": run.monitor.freed_bytes if run.monitor else None,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "dropped": {split: dict(counter) for split, counter in run.data.dropped.items() if counter},
    }


def summary_lines(summary: dict, folder: Path, pictures: list[Path]) -> list[str]:
    """The summary for the console."""
    lines = ["", f"{summary['steps']:,} steps, {summary['total_time_s']:.0f} s in all ({summary['stop_reason']})"]
    if summary["test_exact_match"] is not None:
        by_source = ", ".join(f"{k} {percent(v)}" for k, v in summary["test_exact_match_by_source"].items())
        lines.append(f"test exact match      {percent(summary['test_exact_match'])} ({by_source})")
    if summary["test_cut_short"]:
        lines.append("test exact match      the test was cut short; the run that goes on begins with it")
    if summary["question_only_exact_match"] is not None:
        unseen = percent(summary["question_only_exact_match"])
        lines.append(f"without the image     {unseen} (each question's usual answer)")
    if summary["frozen_share"] is not None:
        towers = ", ".join(f"{tower} {percent(summary[f'frozen_share_{tower}'])}" for tower in ("vision", "language"))
        freed = summary["freed_bytes"] / 2**20
        lines.append(f"frozen matrices       {percent(summary['frozen_share'])} ({towers}; {freed:.1f} MiB freed)")
    if summary["frozen_share"] and summary["steps"]:
        share = summary["train_flops"] / (summary["train_flops_unfrozen_per_step"] * summary["steps"])
        tflop = summary["train_flops"] / 1e12
        lines.append(f"matrix products       {tflop:,.2f} TFLOP, {percent(share)} of these steps with nothing frozen")
    for split, counts in summary["dropped"].items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        lines.append(f"dropped, {split + ':':<13}{reasons}")
    lines += [f"written               {path}" for path in (folder / "summary.json", *pictures)]
    if summary["stop_reason"] == "interrupted":
        lines.append(f"go on                 with the same command and --resume {folder}")
    if summary["stop_reason"] != "non_finite_loss":
        lines.append(f"ask it                python generate.py --checkpoint {folder} --image IMAGE.png --prompt '...'")
    return lines


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"
