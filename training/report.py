"""What a run says about itself: its first lines, its progress, its pictures, and its summary in numbers and words."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import torch
import yaml

from data import easy_vqa
from data.drops import DROPPED, REASONS_TO_SHOW, TRUNCATED, USED
from data.mixture_rows import mixture_lines
from data.pipeline import Data, format_names
from grades import GradESMonitor, plots
from grades.advice import advice
from grades.files import write_json, write_text
from grades.report import HISTORY_NAME, NOTHING_TO_SAVE, still_learning, undecided
from grades.towers import CONNECTOR, TOWERS
from models.attention import has_compiler
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.arguments import DEFAULT_RECIPE, Settings
from training.environment import record_environment
from training.feature_cache import FeatureCache
from training.logging import RunLog
from training.memory import peak_memory_bytes, reserved_memory_bytes
from training.meter import Meter
from training.parallel import Parallel
from training.resume import RunStart
from training.state import END_REASONS, LoopState
from training.task_numbers import main_numbers
from training.trackers import make_tracker

SHARES_OF = (*TOWERS, CONNECTOR)  # whose frozen shares the summary has


def announce(settings: Settings) -> None:
    """The first line: recipe, data, and whether GradES freezes. The quickstart on its own data points to the paper's
    run; flags that have no effect are named."""
    data, is_default = ", ".join(settings.train.train_data), settings.recipe == DEFAULT_RECIPE
    recipe = "configs/quickstart.yaml (the default)" if is_default else settings.recipe
    grades = "with GradES" if settings.train.enable_grades else "without GradES (--enable_grades turns it on)"
    print(f"Recipe {recipe}, data {data}, {grades}")
    if is_default and data == easy_vqa.NAME:
        print("The paper's run (Table 10): python train.py --config configs/table10_nanovlm.yaml --enable_grades")
    ignored = sorted(settings.given & {field.name for field in dataclasses.fields(settings.grades)})
    if ignored and not settings.train.enable_grades:
        print(f"Without --enable_grades these flags have no effect: {', '.join(f'--{name}' for name in ignored)}")


def open_report(
    settings: Settings,
    start: RunStart,
    model: VisionLanguageModel,
    data: Data,
    monitor: GradESMonitor | None,
    autocast: contextlib.AbstractContextManager,
    log: RunLog,
    state: LoopState,
) -> None:
    """Before the first step: config.yaml, environment.json, the tracker, and the lines that say what is trained."""
    cfg, folder = settings.train, start.folder
    device = next(model.parameters()).device
    start.clean_up(state.step if state.resumed_at else None, state.best_step)
    write_text(folder / "config.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False))
    record_environment(folder, device, setup.dtype_in_effect(autocast), state.step)
    log.tracker = make_tracker(
        cfg, settings.as_dict(), folder, log.say, None if start.is_new else log.tracker_id, state.step
    )
    for note in start.notes:
        log.say(note)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    compiled = ", compiled" if setup.compiles(settings, device) else ""
    log.say(f"{parameters:,} parameters on {device.type}{compiled}; run folder {folder}")
    rows = {"training": data.train_rows, "validation": data.val_rows, "test": data.test_rows}
    counts = (f"{len(found):,} {name}" for name, found in rows.items() if hasattr(found, "__len__"))
    formats, split = ", ".join(format_names(data.train_rows)), data.split and f"; split {data.split}"
    for line in mixture_lines(data.train_rows, cfg):
        log.say(line)
    log.say("rows: " + (", ".join(counts) or "a stream") + (f" ({formats})" if formats else "") + split)
    if device.type == "cuda" and (cfg.packing or cfg.compile == "auto") and not has_compiler():
        log.say(
            "NOTE Triton, a C compiler or Python.h is missing: nothing compiles, packed rows are masked; it is slower"
        )
    if monitor is not None:
        towers = [component.tower for component in monitor.components]
        watched = " and ".join(f"{towers.count(tower)} {tower}" for tower in monitor.config.towers)
        log.say(
            f"GradES watches {watched} matrices every {monitor.config.compute_interval} steps; nothing freezes before "
            f"step {monitor.grace_steps + 1}; {tau_words(monitor)}"
        )
        for line in advice(monitor, cfg.lr_schedule, "--"):
            log.say(f"NOTE {line}")


def tau_words(monitor: GradESMonitor) -> str:
    """The thresholds in effect."""
    by_tower: dict[str, set[float]] = {}
    for name, tau in monitor.taus.items():
        by_tower.setdefault(monitor.by_name[name].tower, set()).add(tau)
    if not by_tower:
        return "taus are found in the grace period"
    found = {
        tower: " to ".join(dict.fromkeys(f"{tau:g}" for tau in (min(taus), max(taus))))
        for tower, taus in by_tower.items()
    }
    if len(set(found.values())) == 1:
        return f"tau {next(iter(found.values()))}"
    return ", ".join(f"tau {words} ({tower})" for tower, words in found.items())


def log_progress(
    log: RunLog,
    state: LoopState,
    meter: Meter,
    data: Data,
    optimizer: torch.optim.Optimizer,
    monitor: GradESMonitor | None,
    cache: FeatureCache | None = None,
) -> None:
    """Record and show the steps since the last time; waits for the device."""
    log_drops(log, data, meter.parallel)
    values = meter.report() | {"train/lr": max(group["lr"] for group in optimizer.param_groups)}
    shown = {
        "loss": f"{values['train/loss']:.3f}",
        "lr": f"{values['train/lr']:.1e}",
        "tok/s": f"{values['train/tokens_per_s']:,.0f}",
        "TFLOP/s": f"{values['train/tflops_per_s']:.2f}",
    }
    if values["train/mfu"] is not None:
        shown["MFU"] = f"{values['train/mfu']:.0%}"
    if values["train/peak_memory_gib"] is not None:
        shown["GiB"] = f"{values['train/peak_memory_gib']:.1f}"
    if monitor is not None:
        values |= monitor.scalars()
        shown["frozen"] = f"{monitor.frozen_share():.0%}"
    if cache is not None and cache.lookups:
        values["train/feature_cache_hit_share"] = cache.hits / cache.lookups  # of the whole run
        values["train/feature_cache_step_share"] = cache.served / max(
            1, cache.batches
        )  # of its micro-batches with images
    log.record(state.step, values)
    log.show(state.step, **shown)


def log_drops(log: RunLog, data: Data, parallel: Parallel) -> None:
    """Write to dropped.jsonl the rows that could not be used since the last time. Every rank must call it."""
    for records in parallel.gather(data.take_records()):
        log.record_drops(records)


def write_report(
    cfg: TrainConfig,
    folder: Path,
    stop_reason: str,
    test: dict[str, float | None] | None,
    state: LoopState,
    data: Data,
    model: VisionLanguageModel,
    monitor: GradESMonitor | None,
    meter: Meter,
    cache: FeatureCache | None,
    log: RunLog,
) -> None:
    """Write summary.json and pictures, and say what they hold. test: None where nothing was tested."""
    if monitor is not None:
        monitor.save_history(folder / HISTORY_NAME)
    baseline = None
    if test is not None and data.test_rows is not None and cfg.train_data == [easy_vqa.NAME]:
        baseline = easy_vqa.question_only(data.train_rows, data.test_rows)
    summary = make_summary(state, stop_reason, test, baseline, data, model, monitor, meter, cache)
    write_json(folder / "summary.json", summary)
    pictures = draw_pictures(folder, log) if monitor is not None else []
    for line in summary_lines(summary, folder, pictures):
        log.say(line)
    log.tracker.finish({name: value for name, value in summary.items() if not isinstance(value, dict)}, pictures)
    log.close()


def draw_pictures(folder: Path, log: RunLog) -> list[Path]:
    """Draw the pictures of the history in the run folder; returns their paths. What prevents it is a line in the log:
    the run is done."""
    again = f"python -m grades report {shlex.quote(str(folder))}"
    try:
        return plots.draw(folder / HISTORY_NAME)
    except ImportError:
        log.say(f"no pictures without matplotlib; install it, then: {again}")
    except Exception as error:  # as of a backend that MPLBACKEND names and matplotlib does not have
        log.say(f"no pictures ({type(error).__name__}: {error}); try: {again}")
    return []


def make_summary(
    state: LoopState,
    stop_reason: str,
    test: dict[str, float | None] | None,
    question_only: float | None,
    data: Data,
    model: VisionLanguageModel,
    monitor: GradESMonitor | None,
    meter: Meter,
    cache: FeatureCache | None,
) -> dict[str, Any]:
    """summary.json: times in seconds, shares in [0, 1], None where something was not measured."""
    seconds, flops, scores, train_s = meter.seconds, meter.flops, test or {}, meter.seconds["train"]
    of_source = "test/exact_match/"  # then its name, which may have slashes too
    peak, reserved = peak_memory_bytes(meter.device), reserved_memory_bytes(meter.device)
    return {
        "total_time_s": sum(seconds.values()),
        "startup_time_s": seconds["startup"],
        "train_time_s": train_s,
        "eval_time_s": seconds["eval"] + seconds["test"],
        "test_time_s": seconds["test"],
        "rollback_time_s": seconds["rollback"],
        "save_time_s": seconds["save"],
        "steps": state.step,
        "resumed_at_steps": state.resumed_at,
        "stop_reason": stop_reason,
        "test_cut_short": stop_reason == "interrupted" and seconds["test"] > 0,
        "stop_step": state.step if stop_reason in END_REASONS[1:] else None,
        "train_flops": flops.done,
        "train_flops_unfrozen_per_step": flops.unfrozen / state.step if state.step else None,
        "train_tflops_per_s": flops.trained / train_s / 1e12 if train_s else None,
        "peak_memory_gib": None if peak is None else peak / 2**30,
        "reserved_memory_gib": None if reserved is None else reserved / 2**30,
        "data_wait_time_s": meter.total_wait_s,
        "feature_cache_hits": cache.hits if cache else None,  # images of this process
        "feature_cache_lookups": cache.lookups if cache else None,
        "train_tokens": meter.total_tokens,
        "val_loss": state.val.get("val/loss"),
        "val_loss_averaged": state.val.get("val/loss_averaged"),
        "weights": "averaged" if state.averaged_is_better else "last",
        "metric_for_best_model": state.best_metric,
        "best_metric": state.best_value,
        "best_step": state.best_step,
        "eval_tasks": state.tasks or None,
        "eval_tasks_step": state.tasks_step or None,
        "val_exact_match": state.val.get("val/exact_match"),
        "test_exact_match": scores.get("test/exact_match"),
        "test_exact_match_by_source": {
            name.removeprefix(of_source): value for name, value in scores.items() if name.startswith(of_source)
        },
        "question_only_exact_match": question_only,
        **of_grades(monitor),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dropped": {split: counter.plain() for split, counter in data.dropped.items() if counter},
        "first_dropped": {split: first for split, counter in data.dropped.items() if (first := counter.examples())},
    }


def of_grades(monitor: GradESMonitor | None) -> dict[str, Any]:
    """What summary.json says of GradES."""
    history = monitor.history() if monitor else None
    return {
        "frozen_share": monitor.frozen_share() if monitor else None,
        **{f"frozen_share_{tower}": monitor.frozen_share(tower) if monitor else None for tower in SHARES_OF},
        "converged_step": monitor.converged_step if monitor else None,  # after which its cooldown began
        "undecided": undecided(history) if history else [],
        "still_learning": still_learning(history) if history else False,  # by the last measurement
        "freed_bytes": monitor.freed_bytes if monitor else None,
    }


def summary_lines(summary: dict, folder: Path, pictures: list[Path]) -> list[str]:
    """The summary for the console."""
    lines = ["", f"{summary['steps']:,} steps, {summary['total_time_s']:.0f} s in all ({summary['stop_reason']})"]
    if summary["test_exact_match"] is not None:
        by_source = ", ".join(f"{k} {percent(v)}" for k, v in summary["test_exact_match_by_source"].items())
        of_each = f" ({by_source})" if by_source else ""
        weights = ", averaged weights" if summary["weights"] == "averaged" else ""
        lines.append(f"test exact match      {percent(summary['test_exact_match'])}{weights}{of_each}")
    for one in main_numbers(summary["eval_tasks"] or {}):
        lines.append(f"{one.task:<21} {one.words}, step {summary['eval_tasks_step']:,}")
    if None not in (summary["val_loss"], summary["val_loss_averaged"]):
        losses = f"last {summary['val_loss']:.4g}, averaged {summary['val_loss_averaged']:.4g}"
        lines.append(f"weights               {summary['weights']} (validation loss: {losses})")
    if summary["test_cut_short"]:
        lines.append("test exact match      the test was cut short; a resumed run begins with it")
    if summary["question_only_exact_match"] is not None:
        unseen = percent(summary["question_only_exact_match"])
        lines.append(f"text-only baseline    {unseen} (most frequent answer to each question)")
    lines += _grades_lines(summary)
    if summary["train_tflops_per_s"]:
        speed = f"{summary['train_tflops_per_s']:.3g} TFLOP/s"
        if summary["peak_memory_gib"] is not None:
            speed += f", {summary['peak_memory_gib']:.2f} GiB at most"
        speed += f", {percent(summary['data_wait_time_s'] / summary['train_time_s'])} of the steps' time for data"
        lines.append(f"speed                 {speed}")
    for split, counts in summary["dropped"].items():
        for word, what in (("dropped", [r for r in counts if not r.startswith(USED)]), ("used", [TRUNCATED])):
            reasons = ", ".join(f"{counts[reason]} {reason.removeprefix(USED)}" for reason in what if reason in counts)
            lines += [f"{f'{word}, {split}:':<22}{reasons}"] if reasons else []
        first = list(summary["first_dropped"].get(split, {}).items())[:REASONS_TO_SHOW]
        lines += [f"{'':<22}{reason}, first in {found}" for reason, found in first]
    lines += [f"written               {path}" for path in (folder / "summary.json", *pictures)]
    asked = shlex.quote(str(folder))
    if summary["dropped"]:
        lines.append(f"written               {folder / DROPPED}: each row that was dropped, with file and line")
    if summary["stop_reason"] == "interrupted":
        lines.append(f"continue              with the same command and --resume {asked}")
    if summary["stop_reason"] != "non_finite_loss":
        lines.append(f"ask it                python generate.py --checkpoint {asked} --image IMAGE.png --prompt '...'")
    return lines


def percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _grades_lines(summary: dict) -> list[str]:
    """What froze, and what measuring and the feature cache did."""
    lines: list[str] = []
    if summary["frozen_share"] is not None:
        shares = {tower: summary[f"frozen_share_{tower}"] for tower in SHARES_OF}
        if shares["connector"] is None:  # not watched
            del shares["connector"]
        towers = ", ".join(f"{tower} {percent(share)}" for tower, share in shares.items())
        freed = summary["freed_bytes"] / 2**20
        lines.append(f"frozen matrices       {percent(summary['frozen_share'])} ({towers}; {freed:.1f} MiB freed)")
    if summary["converged_step"] is not None:
        lines.append(f"{'':<22}all had converged at step {summary['converged_step']:,}: the cooldown began")
    elif summary["frozen_share"] == 0 and summary["stop_reason"] == "max_training_steps" and summary["still_learning"]:
        lines.append(f"{'':<22}{NOTHING_TO_SAVE}")
    lines += [f"{'':<22}{line}" for line in summary["undecided"]]
    if summary["rollback_time_s"]:
        share = percent(summary["rollback_time_s"] / summary["total_time_s"])
        lines.append(f"measuring gains       {summary['rollback_time_s']:.1f} s, {share} of the time")
    if summary["feature_cache_lookups"]:
        hits = percent(summary["feature_cache_hits"] / summary["feature_cache_lookups"])
        lines.append(f"feature cache         {hits} of {summary['feature_cache_lookups']:,} images were not computed")
    if summary["frozen_share"] and summary["steps"]:
        share = summary["train_flops"] / (summary["train_flops_unfrozen_per_step"] * summary["steps"])
        tflop = summary["train_flops"] / 1e12
        lines.append(f"FLOPs                 {tflop:,.2f} T, {percent(share)} of as many steps without GradES")
    return lines
