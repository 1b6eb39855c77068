"""Train a small vision-language model; with --enable_grades what has converged freezes, and then the run ends.

    python train.py --enable_grades                                 # real images, minutes, no GPU, no network
    python train.py --config configs/nanovlm_222m.yaml --enable_grades

`main` reads the settings, `run` sets up data, model, optimizer and GradES, `train` is the loop.
"""

import os
import sys
import time

PROCESS_STARTED = time.perf_counter()

from training.arguments import Settings, as_flags, parse_arguments
from training.preflight import check_paths

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may hold letters that the console cannot print
    SETTINGS = check_paths(parse_arguments())  # before torch is imported, so that errors show at once
    # CUDA memory of ever new sizes, as the number of tiles changes, then leaves no holes that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import contextlib

import torch

from data.mixture_rows import load_training_rows
from data.pipeline import Data, identify, load_data
from eval.benchmarks import Benchmark
from eval.evaluation import Evaluator
from eval.samples import SampleQuestions
from eval.task_evaluation import TaskEvaluator, open_eval_tasks
from grades import GradESMonitor
from grades.averaging import AveragedWeights
from grades.config import ROLLBACK
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.build import build_model, compile_model
from training.checkpoint import Checkpointer, MonitorState
from training.evaluation import EvaluationSchedule, HeldOutLosses
from training.feature_cache import FeatureCache
from training.flops import FlopCounter
from training.logging import NoLog, RunLog
from training.look import dry_run
from training.meter import Meter, NonFiniteLossError
from training.model_card import ModelCard
from training.parallel import Parallel
from training.profiling import StepProfiler
from training.report import announce, log_drops, log_progress, open_report, write_report
from training.resume import RunStart, open_run
from training.schedule import set_learning_rate
from training.signals import StopSignal
from training.state import END_REASONS, LoopState
from training.step import clip_gradients, forward_backward


def main(settings: Settings) -> int:
    """One run from settings to summary; returns the exit code."""
    start = None
    try:
        parallel = Parallel.start(settings.train)
        if parallel.is_main:
            announce(settings)
        benchmarks = open_eval_tasks(settings.train)
        if settings.train.dry_run:
            return dry_run(settings, parallel.world_size) if parallel.is_main else 0
        start = open_run(settings, parallel)
        if start.is_finished:
            print(f"{start.folder} has finished: see its summary.json")
            return 0
        return run(settings, start, parallel, benchmarks)
    # Of the set-up, which a user can cause: a path, a flag, an absent hub. The loop handles its own signals and errors.
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if start is not None:
            start.remove_new_folder()
        interrupted = isinstance(error, KeyboardInterrupt)
        what = "interrupted before the first step" if interrupted else f"error: {as_flags(str(error))}"
        print("train.py:", what, file=sys.stderr)
        return 130 if interrupted else 2


def run(settings: Settings, start: RunStart, parallel: Parallel, benchmarks: list[Benchmark]) -> int:
    """Set up, train, test and report; returns the exit code. Raises ValueError or OSError during the set-up only."""
    cfg = settings.train
    device = setup.pick_device()
    setup.prepare_backend(device)
    setup.set_seed(cfg.seed)
    setup.compiles(settings, device)  # what cannot be is an error now, not after the data

    # The data, and the model on its device
    rows = load_training_rows(cfg)
    start.check_same_data(identify(rows), cfg)
    model, checkpoint = build_model(settings, start)
    tokenizer_folder = None if "lm_tokenizer" in settings.given else checkpoint  # None: that of the flag
    data = load_data(rows, settings.vlm, cfg, tokenizer_folder, parallel.rank, parallel.world_size)
    model.cfg.lm_eos_token_id = data.tokenizer.eos_token_id
    autocast = setup.autocast(device, cfg.dtype)
    parallel.shard(model.to(device), bfloat16=isinstance(autocast, torch.autocast))

    # What the loop works with
    optimizer = setup.make_optimizer(model, cfg)
    averages = AveragedWeights(model.parameters(), optimizer, cfg.average_weights) if cfg.average_weights else None
    log = RunLog(start.folder, cfg.max_training_steps, bool(start.state)) if parallel.is_main else NoLog()
    stop = StopSignal(log.say, parallel)
    meter = Meter(FlopCounter(model, parallel.rank, parallel.world_size), parallel, device)
    evaluator = Evaluator(model, data, cfg, device, autocast, stop.until, parallel.place, parallel.complete)
    monitor = watch(settings, model, optimizer, averages, evaluator, meter, parallel, log)
    tasks, samples = TaskEvaluator.of(evaluator, benchmarks, parallel.share), SampleQuestions.of(evaluator)
    evaluations = EvaluationSchedule(cfg, evaluator, monitor, parallel, stop, meter, log, averages, tasks, samples)
    if not parallel.is_main:
        setup.set_seed(cfg.seed + parallel.rank)  # each rank has its own dropout

    # What a checkpoint holds; `load` restores it when a run resumes
    state = LoopState(best_metric=cfg.best_metric)
    cache = FeatureCache.of_run(model, cfg, start.notes.append)
    parts = {"loop": state, "data": data, "meter": meter, "evaluation": evaluations, "samples": samples, "log": log,
             "averages": averages, "random": setup.RandomState(device, parallel.rank), "cache": cache,
             # With sharded weights each rank saves its part of the earlier ones that the metric compares with.
             "grades": MonitorState(monitor) if (monitor and parallel.sharded) else monitor}  # fmt: skip
    stateful = {name: part for name, part in parts.items() if part is not None}
    card = ModelCard(settings, start.folder, model, data, monitor) if parallel.is_main else None
    checkpoints = Checkpointer(
        start, model, optimizer, data.tokenizer, stateful, cfg.keep_checkpoints, parallel, log.say, averages, card
    )
    checkpoints.load()
    data.start_reading()
    compile_model(model, settings, device)
    if parallel.is_main:
        open_report(settings, start, model, data, monitor, autocast, log, state)
        evaluations.show_samples()

    with stop, checkpoints.saved_on_error(state, log):  # a signal ends the run in order, an error leaves a checkpoint
        checkpoints.save_beginning(state)
        try:
            stop_reason = train(cfg, state, data, model, optimizer, averages, monitor, meter, evaluations,
                                checkpoints, cache, log, stop, parallel, device, autocast)  # fmt: skip
        except NonFiniteLossError as error:
            log.say(f"stopped: {error}; {checkpoints.last_saved()}")
            stop_reason = "non_finite_loss"
        return test_and_report(stop_reason, cfg, state, data, model, monitor, meter, evaluations, checkpoints,
                               cache, log, stop, parallel)  # fmt: skip


def watch(
    settings: Settings,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    averages: AveragedWeights | None,
    evaluator: Evaluator,
    meter: Meter,
    parallel: Parallel,
    log: RunLog,
) -> GradESMonitor | None:
    """GradES on the model; None without --enable_grades."""
    cfg = settings.train
    if not cfg.enable_grades:
        return None
    held_out = HeldOutLosses(evaluator, cfg.rollback_rows, parallel, meter)
    if settings.grades.metric == ROLLBACK:
        held_out.check(settings.grades.freeze_vision and cfg.lr_vision_backbone > 0, log.say)
    return GradESMonitor(
        settings.grades,
        model,
        optimizer,
        cfg.max_training_steps,
        log.say,
        detail=log.detail,
        rewrap=parallel.on_requires_grad_change,  # DDP is wrapped again after a freeze
        broadcast=parallel.same_on_all,  # all ranks freeze alike
        averages=averages,
        evaluate=held_out,
    )


def train(
    cfg: TrainConfig,
    state: LoopState,
    data: Data,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    averages: AveragedWeights | None,
    monitor: GradESMonitor | None,
    meter: Meter,
    evaluations: EvaluationSchedule,
    checkpoints: Checkpointer,
    cache: FeatureCache | None,
    log: RunLog,
    stop: StopSignal,
    parallel: Parallel,
    device: torch.device,
    autocast: contextlib.AbstractContextManager,
) -> str:
    """The loop. Returns why it ended: one of END_REASONS, "bad_rows" or "interrupted"."""
    profiler = StepProfiler(cfg.profile if parallel.is_main else 0, checkpoints.folder, device, log.say)
    log.start_bar(state.step)
    meter.start(PROCESS_STARTED)
    while True:
        # A step is evaluated after it was saved (below), so that a run interrupted in an evaluation resumes here.
        if evaluations.due(state) and not stop.requested:
            evaluations.run(state)
            checkpoints.mark_best(state)
        if stop.requested or data.has_too_many_bad_rows(parallel.sum) or evaluations.end_reason(state):
            break

        batches = [next(data) for _ in range(cfg.gradient_accumulation_steps)]
        cooldown_start = monitor.converged_step if monitor is not None else None  # of --on_converged cooldown
        set_learning_rate(optimizer, state.step + 1, cfg, cooldown_start)
        loss = forward_backward(model, batches, device, autocast, parallel, cache)
        meter.add(state.step + 1, loss, batches)  # read when it is logged; NaN ends the run then
        if monitor is not None:
            monitor.after_backward(state.step + 1)  # GradES reads gradients, before they are clipped
        meter.grad_norm = clip_gradients(model, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        if averages is not None:
            averages.update()
        data.mark_used(batches)
        if monitor is not None:
            monitor.after_step(state.step)  # GradES measures, and freezes what has converged
        profiler.step()
        stop.share()  # all ranks learn of a signal

        if state.step % cfg.log_interval == 0 or evaluations.due(state):
            log_progress(log, state, meter, data, optimizer, monitor, cache)
        if evaluations.checkpoint_due(state):
            with meter.clock("save"):
                checkpoints.save(state)
    profiler.close()
    log.close_bar()
    if checkpoints.saved_step != state.step:
        with meter.clock("save"):
            checkpoints.save(state)
    return "interrupted" if stop.requested else data.limit.reason or str(evaluations.end_reason(state))


def test_and_report(
    stop_reason: str,
    cfg: TrainConfig,
    state: LoopState,
    data: Data,
    model: VisionLanguageModel,
    monitor: GradESMonitor | None,
    meter: Meter,
    evaluations: EvaluationSchedule,
    checkpoints: Checkpointer,
    cache: FeatureCache | None,
    log: RunLog,
    stop: StopSignal,
    parallel: Parallel,
) -> int:
    """Answer the test questions; write pictures and summary. Returns the exit code.

    A signal during the test interrupts the run: once resumed it runs the test again.
    """
    scores = None
    if monitor is not None:
        monitor.has_cooled = stop_reason == "converged"
    if data.test_dataset is not None and stop_reason in END_REASONS:
        scores = evaluations.test(state)
        stop_reason = "interrupted" if stop.requested else stop_reason
        checkpoints.describe(state, scores)
    meter.sum_over_ranks()
    data.sum_over_ranks(parallel.gather)
    log_drops(log, data, parallel)
    failed = data.limit.exceeded if stop_reason == "bad_rows" else None
    if checkpoints.error is not None:
        failed = f"the end of the run is not saved: {checkpoints.error}"
    if parallel.is_main:
        try:
            write_report(cfg, checkpoints.folder, stop_reason, scores, state, data, model, monitor, meter, cache, log)
        except OSError as error:
            failed = f"the report could not be written: {error}"
    parallel.close()
    if failed:
        if parallel.is_main:
            print(f"train.py: error: {failed}", file=sys.stderr)
        return 1
    return {"interrupted": 128 + stop.signal, "non_finite_loss": 1}.get(stop_reason, 0)


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
