"""Train a small vision-language model; with --enable_grades each weight matrix freezes when it has converged.

    python train.py --enable_grades                                 # real images, minutes, no GPU, no network
    python train.py --config configs/nanovlm_222m.yaml --enable_grades

Reads from top to bottom: settings, data, model, optimizer, monitor, the loop, the report.
"""

import time

PROCESS_STARTED = time.perf_counter()

from training.arguments import Settings, parse_arguments

if __name__ == "__main__":
    SETTINGS = parse_arguments()  # before torch is imported, so that --help and a wrong flag answer at once

import contextlib
import dataclasses
import itertools
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from data.collators import PromptCollator, TrainCollator
from data.datasets import DropCounter, VQADataset
from data.loader import eval_batches, prompt_batches, train_batches
from data.processors import ImageProcessor, get_tokenizer
from data.sources import load_rows, split_rows
from eval.evaluation import exact_match, mean_loss
from eval.scoring import question_only
from grades import GradESMonitor
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.checkpoint import find_checkpoint, save_checkpoint, write_json, write_text
from training.logging import RunLog, WandbTracker, new_run_folder
from training.report import draw_pictures, summary_lines
from training.step import clip_gradients, forward_backward


@dataclass
class Data:
    """Batches for training, and what the evaluations go through."""

    tokenizer: object
    train_rows: object
    val_rows: object
    test_rows: object | None
    train: Iterator[dict]
    val_dataset: VQADataset
    test_dataset: VQADataset | None
    dropped: dict[str, DropCounter] = field(default_factory=dict)  # by split


@dataclass
class Run:
    """Everything that the loop works with."""

    settings: Settings
    folder: Path
    device: torch.device
    autocast: contextlib.AbstractContextManager
    data: Data
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    monitor: GradESMonitor | None
    log: RunLog
    stop: setup.StopSignal
    step: int = 0
    best_val_loss: float = math.inf
    val: dict = field(default_factory=dict)  # the latest validation
    eval_time_s: float = 0.0
    # Steps since the last report. Losses stay on the device until then: reading one would wait for it.
    unread: list[tuple[int, torch.Tensor, list[str]]] = field(default_factory=list)
    unread_tokens: int = 0
    unread_since: float = 0.0
    total_tokens: int = 0


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite."""


def main(settings: Settings) -> int:
    """One run from settings to summary; returns the exit code."""
    announce(settings)
    folder = None
    try:
        folder = new_run_folder(settings.train.output_dir, settings.train.run_name, settings.recipe.stem)
        run = prepare(settings, folder)
    except (ValueError, OSError, KeyboardInterrupt) as error:  # what a user can cause: a path, a flag, an absent hub
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
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
            run.log.say(f"{type(error).__name__} after step {run.step:,}; saving what there is to checkpoints/crash")
            save(run, "crash")
            raise
        report(run, stop_reason)
    return {"interrupted": 128 + run.stop.signal, "non_finite_loss": 1}.get(stop_reason, 0)


def prepare(settings: Settings, folder: Path) -> Run:
    """Everything before the first step. Raises ValueError or OSError with one clear sentence."""
    cfg = settings.train
    device = setup.pick_device()
    setup.prepare_backend(device)
    setup.set_seed(cfg.seed)
    rows = load_rows(cfg.train_dataset_path, cfg.train_dataset_name, "train", cfg.stream_dataset)
    model, checkpoint = build_model(settings)
    data = load_data(settings, rows, checkpoint)
    model.cfg.lm_eos_token_id = data.tokenizer.eos_token_id
    model.to(device)
    optimizer = setup.make_optimizer(model, cfg)
    write_text(folder / "config.yaml", yaml.safe_dump(settings.as_dict(), sort_keys=False))
    log = RunLog(folder, cfg.max_training_steps)
    monitor = None
    if cfg.enable_grades:
        monitor = GradESMonitor(settings.grades, model, optimizer, cfg.max_training_steps, log.say)
    if cfg.log_wandb:
        log.tracker = WandbTracker(cfg, settings.as_dict(), folder, log.say)
    if cfg.compile:
        setup.compile_blocks(model)
    autocast, stop = setup.autocast(device, cfg.dtype), setup.StopSignal(log.say)
    run = Run(settings, folder, device, autocast, data, model, optimizer, monitor, log, stop)
    describe(run)
    return run


def announce(settings: Settings) -> None:
    """The first line: what runs, and what the real thing would be."""
    data = settings.train.train_dataset_path
    if settings.recipe.name == "quickstart.yaml":
        print(
            f"Recipe configs/quickstart.yaml (the default): a small model from scratch, data {data}. The real thing: "
            "python train.py --config configs/table10_nanovlm.yaml --enable_grades"
        )
    else:
        print(f"Recipe {settings.recipe}, data {data}")
    ignored = sorted(settings.given & {field.name for field in dataclasses.fields(settings.grades)})
    if ignored and not settings.train.enable_grades:
        print(f"Without --enable_grades these flags do nothing: {', '.join(f'--{name}' for name in ignored)}")


def build_model(settings: Settings) -> tuple[VisionLanguageModel, Path | None]:
    """The model, from a checkpoint, from the pretrained backbones or from random weights; and the checkpoint."""
    from models.backbones import checkpoint_folder, configure_from_backbones, load_vlm_weights

    if settings.train.resume_from_vlm_checkpoint:
        checkpoint = checkpoint_folder(find_checkpoint(settings.vlm.vlm_checkpoint_path))
        settings.take_over(VLMConfig.load(checkpoint), f"--vlm_checkpoint_path {checkpoint}")
        return load_vlm_weights(VisionLanguageModel(settings.vlm), checkpoint), checkpoint
    if settings.vlm.vlm_load_backbone_weights:
        vlm = dataclasses.replace(settings.vlm)
        configure_from_backbones(vlm)
        settings.take_over(vlm, "the pretrained backbones")
    return VisionLanguageModel(settings.vlm, load_backbone=settings.vlm.vlm_load_backbone_weights), None


def load_data(settings: Settings, rows, checkpoint: Path | None) -> Data:
    cfg, vlm = settings.train, settings.vlm
    tokenizer = get_tokenizer(vlm, None if "lm_tokenizer" in settings.given else checkpoint)
    train_rows, val_rows = split_rows(rows, cfg.val_size, cfg.seed)
    test_rows = None
    if test_path := cfg.test_dataset_path or ("easy-vqa" if cfg.train_dataset_path == "easy-vqa" else None):
        test_rows = load_rows(test_path, split="test", flag="test_dataset_path")

    def dataset(rows, train: bool) -> VQADataset:
        return VQADataset(rows, tokenizer, ImageProcessor(vlm), vlm, cfg, train=train, cache=cfg.cache_rows)

    batches = train_batches(dataset(train_rows, train=True), TrainCollator(tokenizer.pad_token_id, vlm), cfg)
    first = next(batches)  # data of which nothing can be used is an error now, not later
    return Data(
        tokenizer=tokenizer,
        train_rows=train_rows,
        val_rows=val_rows,
        test_rows=test_rows,
        train=itertools.chain([first], batches),
        val_dataset=dataset(val_rows, train=False),
        test_dataset=dataset(test_rows, train=False) if test_rows is not None else None,
    )


def describe(run: Run) -> None:
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


def train(run: Run) -> str:
    """The loop. Returns why it ended: "max_training_steps", "frozen" or "interrupted"."""
    cfg = run.settings.train
    run.log.start_bar()
    run.unread_since = time.perf_counter()
    while run.step < cfg.max_training_steps:
        micro_batches = [next(run.data.train) for _ in range(cfg.gradient_accumulation_steps)]
        setup.set_learning_rate(run.optimizer, run.step + 1, cfg)

        loss = forward_backward(run.model, micro_batches, run.device, run.autocast)
        grad_norm = clip_gradients(run.model, cfg.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        enough_frozen = run.monitor is not None and run.monitor.after_step(run.step)

        remember(run, loss, micro_batches)
        evaluating = run.step % cfg.eval_interval == 0 or run.step == cfg.max_training_steps or enough_frozen
        if run.step % cfg.log_interval == 0 or evaluating or run.stop.requested:
            log_progress(run, grad_norm)
        if evaluating:
            validate_and_save(run)
        if enough_frozen or run.stop.requested:
            break
    run.log.close_bar()
    if run.stop.requested:
        save(run, "last")
        return "interrupted"
    return "frozen" if enough_frozen else "max_training_steps"


def remember(run: Run, loss: torch.Tensor, micro_batches: list[dict]) -> None:
    """Keep what the next report needs."""
    run.unread.append((run.step, loss, [row for batch in micro_batches for row in batch["ids"]]))
    tokens = sum(batch["num_tokens"] for batch in micro_batches)
    run.unread_tokens += tokens
    run.total_tokens += tokens
    for batch in micro_batches:
        run.data.dropped.setdefault("train", DropCounter()).update(batch["dropped"])


def log_progress(run: Run, grad_norm: torch.Tensor | None) -> None:
    """Read the losses since the last report, the only wait for the device; show and record the progress.

    Raises NonFiniteLossError that names the step, its rows and the last good checkpoint.
    """
    losses = torch.stack([loss for _, loss, _ in run.unread]).tolist()
    norm = None if grad_norm is None else float(grad_norm)
    for (step, _, rows), loss in zip(run.unread, losses, strict=True):
        # A finite loss whose gradient is not has spoilt the weights too; before the last step the next loss tells.
        if not math.isfinite(loss) or (step == run.step and norm is not None and not math.isfinite(norm)):
            good = run.folder / "checkpoints" / "last"
            saved = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint had been saved yet"
            what = f"loss {loss} at step {step} (gradient norm {norm if step == run.step else 'not read'})"
            raise NonFiniteLossError(f"{what}; {saved}; rows of the batch: {', '.join(rows)}")
    now = time.perf_counter()
    loss = sum(losses) / len(losses)
    tokens_per_s = run.unread_tokens / (now - run.unread_since)
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    values = {
        "train/loss": loss,
        "train/lr": lr,
        "train/tokens_per_s": tokens_per_s,
        "train/grad_norm": norm,
    }
    postfix = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "tok/s": f"{tokens_per_s:,.0f}"}
    if run.monitor is not None:
        values |= run.monitor.scalars()
        postfix["frozen"] = f"{run.monitor.frozen_share():.0%}"
    run.log.record(run.step, values)
    run.log.show(run.step, **postfix)
    run.unread, run.unread_tokens, run.unread_since = [], 0, now


def validate_and_save(run: Run) -> None:
    """Validation loss and exact match; then the last and, where it is the best so far, the best checkpoint."""
    started = time.perf_counter()
    run.data.dropped["val"] = DropCounter()
    val = {"val/loss": validation_loss(run), **ask(run, run.data.val_dataset, "val")}
    seconds = time.perf_counter() - started
    run.eval_time_s += seconds
    if not run.stop.requested:  # else it was cut short
        run.val = val
        run.log.record(run.step, val | {"val/time_s": seconds})
        run.log.say(f"step {run.step:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in val.items() if v is not None))
    save(run, "last")
    if run.val.get("val/loss") is not None and run.val["val/loss"] < run.best_val_loss:
        run.best_val_loss = run.val["val/loss"]
        save(run, "best")
    run.unread_since += time.perf_counter() - started  # does not count into tokens/s


def validation_loss(run: Run) -> float | None:
    """Mean loss over the label tokens of the validation rows."""
    collator = TrainCollator(run.data.tokenizer.pad_token_id, run.model.cfg)
    batches = eval_batches(run.data.val_dataset, collator, run.settings.train, run.data.dropped["val"])
    return mean_loss(run.model, run.stop.until(batches), run.device, run.autocast)


def ask(run: Run, dataset: VQADataset, name: str) -> dict[str, float | None]:
    """Exact match of the greedy answers to the dataset's questions, over all and by source."""
    cfg, tokenizer = run.settings.train, run.data.tokenizer
    collator = PromptCollator(tokenizer.pad_token_id, run.model.cfg)
    counter = run.data.dropped.setdefault("test", DropCounter()) if name == "test" else None  # val: by its loss
    batches = prompt_batches(dataset, collator, cfg, counter)
    scores = exact_match(run.model, tokenizer, run.stop.until(batches), cfg.max_new_tokens, run.device, run.autocast)
    return {f"{name}/exact_match" + ("" if key == "all" else f"/{key}"): value for key, value in scores.items()}


def save(run: Run, name: str) -> Path:
    """Write the checkpoint `name`; returns its folder."""
    state = {
        "step": run.step,
        "optimizer": run.optimizer.state_dict(),
        "grades": run.monitor.state_dict() if run.monitor is not None else None,
        "best_val_loss": run.best_val_loss,
    }
    folder = run.folder / "checkpoints" / name
    save_checkpoint(folder, run.model, run.data.tokenizer, state)
    return folder


def report(run: Run, stop_reason: str) -> None:
    """Test accuracy, pictures and summary.json."""
    test: dict[str, float | None] = {}
    baseline = None
    if run.data.test_dataset is not None and stop_reason in ("max_training_steps", "frozen"):
        run.log.say("Answering the test questions ...")
        started = time.perf_counter()
        test = ask(run, run.data.test_dataset, "test")
        if run.settings.train.train_dataset_path == "easy-vqa":  # goes through all rows, which are few
            baseline = question_only(run.data.train_rows, run.data.test_rows)
        run.eval_time_s += time.perf_counter() - started
        if run.stop.requested:  # cut short
            test = {}
    pictures = draw_pictures(run.monitor, run.folder) if run.monitor is not None else []
    summary = {
        "total_time_s": time.perf_counter() - PROCESS_STARTED,
        "eval_time_s": run.eval_time_s,
        "steps": run.step,
        "stop_reason": stop_reason,
        "train_tokens": run.total_tokens,
        "val_loss": run.val.get("val/loss"),
        "val_exact_match": run.val.get("val/exact_match"),
        "test_exact_match": test.get("test/exact_match"),
        "test_exact_match_by_source": {
            name.split("/")[-1]: value for name, value in test.items() if name.count("/") == 2
        },
        "question_only_exact_match": baseline,
        "frozen_share": run.monitor.frozen_share() if run.monitor else None,
        "frozen_share_vision": run.monitor.frozen_share("vision") if run.monitor else None,
        "frozen_share_language": run.monitor.frozen_share("language") if run.monitor else None,
        "freed_bytes": run.monitor.freed_bytes if run.monitor else None,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "dropped": {split: dict(counter) for split, counter in run.data.dropped.items() if counter},
    }
    write_json(run.folder / "summary.json", summary)
    for line in summary_lines(summary, run.folder, pictures):
        run.log.say(line)
    run.log.tracker.finish({name: value for name, value in summary.items() if not isinstance(value, dict)}, pictures)
    run.log.close()


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
