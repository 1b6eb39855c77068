"""Train a small vision-language model; with --enable_grades each weight matrix freezes when it has converged.

    python train.py --enable_grades                                 # real images, minutes, no GPU, no network
    python train.py --config configs/nanovlm_222m.yaml --enable_grades

Reads from top to bottom: settings, data, model, optimizer, monitor, the loop, the report.
"""

import time

PROCESS_STARTED = time.perf_counter()

from training.arguments import Settings, parse_arguments
from training.preflight import check_paths

if __name__ == "__main__":
    SETTINGS = check_paths(parse_arguments())  # before torch is imported, so that an error is told at once

import contextlib
import dataclasses
import math
import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from data.pipeline import Data, identify, load_data
from data.sources import load_rows
from eval.evaluation import Evaluator
from eval.scoring import question_only
from grades import GradESMonitor
from models.config import VLMConfig
from models.lora import inject_lora, load_lora_state_dict, lora_state_dict
from models.vision_language_model import VisionLanguageModel
from training import resume, setup
from training.checkpoint import find_checkpoint, write_json, write_text
from training.early_stopping import EarlyStopping, validation_interval
from training.flops import FlopCounter
from training.logging import NoLog, RunLog, WandbTracker
from training.parallel import Parallel
from training.profiling import StepProfiler
from training.progress import NonFiniteLossError, add_up_ranks, evaluate, log_progress, read_losses, remember
from training.report import announce, describe, draw_pictures, make_summary, summary_lines
from training.step import clip_gradients, forward_backward


@dataclass
class Run:
    """Everything that the loop works with."""

    settings: Settings
    parallel: Parallel
    start: resume.Start
    folder: Path
    device: torch.device
    autocast: contextlib.AbstractContextManager
    data: Data
    evaluator: Evaluator
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    monitor: GradESMonitor | None
    log: RunLog
    stop: setup.StopSignal
    flops: FlopCounter
    early_stopping: EarlyStopping | None
    workers: list = field(default_factory=multiprocessing.active_children)
    step: int = 0
    position: int | dict = 0  # in the training data: see train_batches
    stop_reason: str | None = None
    best_val_loss: float = math.inf
    best_step: int | None = None
    resumed_at: list[int] = field(default_factory=list)  # steps
    val: dict = field(default_factory=dict)  # the latest validation
    evaluation_due: bool = False  # of the step that was done last
    before_evaluation: dict | None = None  # its state then, while one is under way
    saved_step: int = -1
    unsaved: str | None = None  # why the latest checkpoint could not be written
    started: float = PROCESS_STARTED  # earlier, where other processes had a part in the run
    startup_time_s: float = 0.0
    train_time_s: float = 0.0  # in the loop, without evaluation and saving
    eval_time_s: float = 0.0
    test_time_s: float = 0.0  # of eval_time_s, after the loop
    save_time_s: float = 0.0
    # Steps since the last report. Losses stay on the device as long as can be: reading one would wait for it.
    unread: list[tuple[int, torch.Tensor, list[str], int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # those that were read before
    grad_norm: torch.Tensor | None = None  # of the latest step
    unread_tokens: int = 0
    unread_since: float = 0.0
    total_tokens: int = 0


def main(settings: Settings) -> int:
    """One run from settings to summary; returns the exit code."""
    start = None
    try:
        parallel = Parallel.start(settings.train)
        if parallel.is_main:
            announce(settings)
        if settings.train.dry_run:
            return dry_run(settings, parallel.world_size) if parallel.is_main else 0
        start = resume.join_run(settings, parallel)
        if start.is_finished:
            print(f"{start.folder} has finished: see its summary.json")
            return 0
        run = prepare(settings, start, parallel)
    except (ValueError, OSError, KeyboardInterrupt) as error:  # what a user can cause: a path, a flag, an absent hub
        if start is not None:
            start.give_up()
        interrupted = isinstance(error, KeyboardInterrupt)
        print("train.py:", "interrupted before the first step" if interrupted else f"error: {error}", file=sys.stderr)
        return 130 if interrupted else 2
    with run.stop:
        try:
            stop_reason = train(run)
        except NonFiniteLossError as error:
            run.log.say(f"stopped: {error}")
            stop_reason = "non_finite_loss"
        except Exception as error:
            run.log.close_bar()
            run.log.say(f"{type(error).__name__} after step {run.step:,}")
            if parallel.is_alone:  # else the others are somewhere in the middle of a step
                run.log.say("saving what there is to checkpoints/crash")
                save(run, "crash")
            if any(worker.exitcode for worker in run.workers):
                return fail(f"a process of --num_workers has died, as when memory runs out ({type(error).__name__})")
            raise
        try:
            stop_reason = report(run, stop_reason)
        except OSError as error:
            return fail(f"the report could not be written: {error}")
    parallel.close()
    if run.unsaved:
        return fail(f"the end of the run is not saved: {run.unsaved}")
    return {"interrupted": 128 + run.stop.signal, "non_finite_loss": 1}.get(stop_reason, 0)


def fail(reason: str) -> int:
    print(f"train.py: error: {reason}", file=sys.stderr)
    return 1


def prepare(settings: Settings, start: resume.Start, parallel: Parallel) -> Run:
    """Everything before the first step. Raises ValueError or OSError with one clear sentence."""
    cfg, folder, state = settings.train, start.folder, start.state
    device = setup.pick_device()
    setup.prepare_backend(device)
    setup.set_seed(cfg.seed)
    rows = load_rows(
        cfg.train_dataset_path, cfg.train_dataset_name, "train", cfg.stream_dataset,
        skip_bad_subsets=cfg.skip_bad_subsets,
    )  # fmt: skip
    start.compare_data(identify(rows), cfg)
    model, checkpoint = build_model(settings, start.checkpoint)
    if cfg.lora_rank:
        inject_lora(model, cfg)
        if state:
            load_lora_state_dict(model, state["lora"])
    given_tokenizer = "lm_tokenizer" in settings.given
    data = load_data(
        rows, settings.vlm, cfg, None if given_tokenizer else checkpoint, state.get("position", 0),
        parallel.rank, parallel.world_size,
    )  # fmt: skip
    model.cfg.lm_eos_token_id = data.tokenizer.eos_token_id
    setup.spare_memory(model, cfg)
    autocast = setup.autocast(device, cfg.dtype)
    parallel.shard(model.to(device), bfloat16=isinstance(autocast, torch.autocast))
    optimizer = setup.make_optimizer(model, cfg)
    if state:
        resume.load_optimizer(start, model, optimizer, parallel)
    log = NoLog()
    if parallel.is_main:
        start.cut_off()
        write_text(folder / "config.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False))
        log = RunLog(folder, cfg.max_training_steps)
    for note in start.notes:
        log.say(note)
    monitor = None
    if cfg.enable_grades:
        monitor = GradESMonitor(
            settings.grades, model, optimizer, cfg.max_training_steps, log.say, parallel.on_round, parallel.agree
        )
    if cfg.log_wandb and parallel.is_main:
        log.tracker = WandbTracker(
            cfg, settings.as_dict(), folder, log.say, None if start.is_new else state.get("wandb_id")
        )
    stop = setup.StopSignal(log.say, parallel)
    evaluator = Evaluator(model, data, cfg, device, autocast, stop.until)
    early_stopping = EarlyStopping(cfg.es_delta, cfg.es_patience) if cfg.early_stopping else None
    run = Run(
        settings, parallel, start, folder, device, autocast, data, evaluator, model, optimizer, monitor, log, stop,
        FlopCounter(model), early_stopping,
    )  # fmt: skip
    if not parallel.is_main:
        setup.set_seed(cfg.seed + parallel.rank)  # dropout of its own
    if state:
        resume.restore(run)
    if cfg.compile:
        setup.compile_blocks(model)
    describe(run)
    return run


def build_model(settings: Settings, resumed: Path | None) -> tuple[VisionLanguageModel, Path | None]:
    """The model, from a checkpoint, from the pretrained backbones or from random weights; and the checkpoint."""
    from models.backbones import load_vlm_weights

    checkpoint = resumed or take_over_sizes(settings)
    if resumed is not None:
        settings.use_model_config(VLMConfig.load(resumed), f"--resume {resumed}")
    if checkpoint is not None:
        return load_vlm_weights(VisionLanguageModel(settings.vlm), checkpoint), checkpoint
    return VisionLanguageModel(settings.vlm, load_backbone=settings.vlm.vlm_load_backbone_weights), None


def take_over_sizes(settings: Settings, local_only: bool = False) -> Path | None:
    """Let the checkpoint or the backbones say the model's sizes; returns the checkpoint.

    local_only: the hub is not asked; what is not on this machine leaves the sizes as the settings have them.
    """
    from models.backbones import checkpoint_folder, configure_from_backbones

    if settings.train.resume_from_vlm_checkpoint:
        found = find_checkpoint(settings.vlm.vlm_checkpoint_path)
        if local_only and not Path(found).is_dir():
            return None
        checkpoint = checkpoint_folder(found)
        settings.use_model_config(VLMConfig.load(checkpoint), f"--vlm_checkpoint_path {checkpoint}")
        return checkpoint
    if settings.vlm.vlm_load_backbone_weights:
        vlm = dataclasses.replace(settings.vlm)
        configure_from_backbones(vlm, local_only)
        settings.use_model_config(vlm, "the pretrained backbones")
    return None


def dry_run(settings: Settings, processes: int) -> int:
    """Print the plan of the run. No weights, no data, no network; a backbone on the hub has the sizes of the recipe."""
    from training.plan import make_plan, plan_lines

    take_over_sizes(settings, local_only=True)
    with torch.device("meta"):
        model = VisionLanguageModel(settings.vlm)
        if settings.train.lora_rank:
            inject_lora(model, settings.train)
    print("\n".join(plan_lines(make_plan(model, settings, setup.pick_device(), processes))))
    return 0


def train(run: Run) -> str:
    """The loop. Returns why it ended: "max_training_steps", "frozen", "early_stopping" or "interrupted"."""
    run.log.start_bar(run.step)
    now = time.perf_counter()
    run.startup_time_s += now - PROCESS_STARTED
    run.unread_since += now
    profiler = StepProfiler(run)
    while run.stop_reason is None and not run.stop.requested:
        if not run.evaluation_due:
            take_step(run)
            profiler.step()
        finish_step(run)
    profiler.close()
    run.log.close_bar()
    if run.stop.requested:
        if run.saved_step != run.step:
            save(run)
        return "interrupted"
    return run.stop_reason


def take_step(run: Run) -> None:
    """One optimizer step, and its line in the log where one is due."""
    cfg = run.settings.train
    micro_batches = [next(run.data.train) for _ in range(cfg.gradient_accumulation_steps)]
    setup.set_learning_rate(run.optimizer, run.step + 1, cfg)

    loss = forward_backward(run.model, micro_batches, run.device, run.autocast, run.parallel)
    run.flops.add(micro_batches)
    if run.monitor is not None:
        run.monitor.after_backward(run.step + 1)
    run.grad_norm = clip_gradients(run.model, cfg.max_grad_norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if run.monitor is not None:
        run.monitor.after_step(run.step)
    remember(run, loss, micro_batches)


def finish_step(run: Run) -> None:
    """What is due after a step: log, evaluation, checkpoint; and whether it was the last one.

    An evaluation that a signal cuts short has not been: the run that goes on makes it anew.
    """
    cfg = run.settings.train
    run.stop.agree()
    enough_frozen = run.parallel.any(run.monitor is not None and run.monitor.enough_frozen())
    loss_interval = validation_interval(cfg.es_interval, cfg.max_training_steps)
    loss_due = run.early_stopping is not None and run.step % loss_interval == 0
    evaluating = run.step % cfg.eval_interval == 0 or run.step == cfg.max_training_steps or enough_frozen
    stops_early = False
    if not run.evaluation_due and (run.step % cfg.log_interval == 0 or evaluating or loss_due):
        log_progress(run)
    if loss_due or evaluating:
        run.evaluation_due = True
        run.before_evaluation = resume.progress(run)
        val_loss = validation_loss(run) if loss_due else None
        stops_early = loss_due and run.early_stopping.update(val_loss)
        if evaluating or stops_early:
            validate(run, val_loss)
        if run.stop.requested:
            return
    run.before_evaluation, run.evaluation_due = None, False
    if run.step >= cfg.max_training_steps:
        run.stop_reason = "max_training_steps"
    run.stop_reason = "frozen" if enough_frozen else "early_stopping" if stops_early else run.stop_reason
    if evaluating or stops_early or (cfg.checkpoint_interval and run.step % cfg.checkpoint_interval == 0):
        save(run)


def validation_loss(run: Run) -> float | None:
    """The loss alone, for early stopping."""
    loss, seconds = evaluate(run, run.evaluator.loss)
    if not run.stop.requested:  # else it was cut short
        run.log.record(run.step, {"val/loss": loss, "val/time_s": seconds})
    return loss


def validate(run: Run, loss: float | None = None) -> None:
    """Validation loss, as given where this step has measured it, and exact match; and whether they are the best."""
    val, seconds = evaluate(run, lambda: run.evaluator.validate(loss))
    if run.stop.requested:  # it was cut short
        return
    run.val = val
    run.log.record(run.step, val | {"val/time_s": seconds})
    run.log.say(f"step {run.step:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in val.items() if v is not None))
    if val["val/loss"] is not None and val["val/loss"] < run.best_val_loss:
        run.best_val_loss, run.best_step = val["val/loss"], run.step


def save(run: Run, name: str | None = None) -> None:
    """Write the checkpoint of this step, or `name`. Raises NonFiniteLossError where it would not be good."""
    started = time.perf_counter()
    read_losses(run)
    model = run.parallel.whole_model(run.model)
    state = (run.before_evaluation or resume.progress(run)) | {
        "optimizer": run.optimizer.state_dict(),
        "lora": lora_state_dict(model),
        "grades": run.monitor.state_dict() if run.monitor is not None else None,
    }
    resume.keep(run, model, state, name)
    run.saved_step = run.step
    seconds = time.perf_counter() - started
    run.save_time_s += seconds
    run.unread_since += seconds  # does not count into tokens/s


def report(run: Run, stop_reason: str) -> str:
    """Test accuracy, pictures and summary.json. Returns why the run ended: a signal that cuts the test short
    interrupts the run, and the one that goes on begins with the test."""
    loop_s = time.perf_counter() - run.started - run.startup_time_s
    run.train_time_s = loop_s - run.eval_time_s - run.save_time_s
    test: dict[str, float | None] = {}
    baseline = None
    if run.data.test_dataset is not None and stop_reason in ("max_training_steps", "frozen", "early_stopping"):
        run.log.say("Answering the test questions ...")
        started = time.perf_counter()
        test = run.parallel.evaluate(lambda: run.evaluator.ask(run.data.test_dataset, "test"))
        run.stop.agree()
        if run.settings.train.train_dataset_path == "easy-vqa":  # goes through all rows, which are few
            baseline = question_only(run.data.train_rows, run.data.test_rows)
        run.test_time_s = time.perf_counter() - started
        run.eval_time_s += run.test_time_s
        if run.stop.requested:  # cut short
            test, stop_reason = {}, "interrupted"
    add_up_ranks(run)
    if not run.parallel.is_main:
        return stop_reason
    pictures = draw_pictures(run.monitor, run.folder) if run.monitor is not None else []
    summary = make_summary(run, stop_reason, test, baseline, time.perf_counter() - run.started)
    write_json(run.folder / "summary.json", summary)
    for line in summary_lines(summary, run.folder, pictures):
        run.log.say(line)
    run.log.tracker.finish({name: value for name, value in summary.items() if not isinstance(value, dict)}, pictures)
    run.log.close()
    return stop_reason


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
