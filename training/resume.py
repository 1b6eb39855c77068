"""Which folder and which checkpoint a run begins with, and whether the settings fit it."""

import dataclasses
import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.drops import DROPPED
from models.config import TrainConfig
from training.arguments import FREE_FIELDS, Settings
from training.checkpoint_folder import (
    MANIFEST,
    STATE,
    damage,
    point,
    remove_unfinished,
    step_folder,
    step_folders,
    step_of,
)
from training.parallel import Parallel
from training.run_folder import FolderLock, lock, new_run_folder
from training.sizes import limit_tiles_of_run
from training.state import END_REASONS

FORMAT = 2  # of training_state.pt
# Settings that change nothing of what is computed.
FREE = {
    "output_dir", "run_name", "num_workers", "log_with", "log_wandb", "wandb_project", "wandb_entity", "hf_repo_name",
    "checkpoint_interval", "keep_checkpoints", "resume", "resume_override", "dry_run", "gpu_gib",
    "activation_checkpointing", "profile", "lm_eos_token_id", "image_root", "max_bad_rows", "strict", "data_root",
    "sample_questions",
}  # fmt: skip
# Settings that say what the saved state means, as does all that shapes the model.
FIXED = {
    "lm_tokenizer", "lora_rank", "lora_targets", "lora_vision", "metric", "monitor_sample", "tau_mode",
    "target_components", "watch_connector",
}  # fmt: skip


@dataclass
class RunStart:
    """The folder of a run, and the checkpoint that it resumes from."""

    folder: Path
    requested: dict[str, Any]  # the settings as they were asked for
    is_new: bool  # the folder was made for this run
    lock: FolderLock | None  # None on ranks other than 0
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)  # of the checkpoint; empty where the run starts at step 0
    notes: list[str] = field(default_factory=list)  # for the log, once it is open
    data: dict[str, str] = field(default_factory=dict)  # what tells the run's rows from others

    def __post_init__(self) -> None:
        if self.lock is not None and self.lock.note is not None:
            self.notes.append(self.lock.note)

    @property
    def identity(self) -> dict[str, Any]:
        """What a later resume compares itself with."""
        return {"settings": self.requested, "data": self.data}

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended by itself and all of it is saved."""
        summary = self.folder / "summary.json"
        if self.is_new or not self.state or not summary.exists():
            return False
        found = json.loads(summary.read_text(encoding="utf-8"))
        reason, now, before = found["stop_reason"], self.requested, self.state["settings"]
        longer = (reason == "max_training_steps" and found["steps"] < now["max_training_steps"]) or (
            reason == "early_stopping"
            and (now["es_patience"] > before["es_patience"] or not now["early_stopping"])
            and found["steps"] < now["max_training_steps"]
        )
        return reason in END_REASONS and not longer and found["steps"] == self.state["step"]

    def check_same_data(self, data: dict[str, str], cfg: TrainConfig) -> None:
        """Take what tells the training data set's rows from others (data.loader.identify). Raises ValueError where the
        checkpoint's run had others, unless resume_override."""
        self.data, before = data, self.state.get("data", data)
        if data == before:
            return
        others = ", but other ones" if data["size"] == before["size"] else ""
        line = f"--train_dataset_path {', '.join(cfg.train_data)}: {data['size']} now, the run that is resumed has "
        line += before["size"] + others
        if not cfg.resume_override:
            raise ValueError(f"{line}; --resume_override continues with those of now")
        self.notes.append(line)

    def clean_up(self, step: int | None, best_step: int | None) -> None:
        """Undo in the run folder what came after the checkpoint, which is of `step`."""
        remove_unfinished(self.folder)
        (self.folder / "summary.json").unlink(missing_ok=True)
        steps = step_folders(self.folder)
        for folder in steps[: steps.index(self.checkpoint)] if self.checkpoint in steps else []:  # all of them damaged
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
        for name, at in (("last", step), ("best", best_step)):
            if at is not None and (folder := step_folder(self.folder, at)).is_dir():
                point(folder.with_name(name), folder)

    def remove_new_folder(self) -> None:
        """Leave no folder behind that was made for this run."""
        if self.lock is not None:
            self.lock.release()
            if self.is_new:
                shutil.rmtree(self.folder, ignore_errors=True)


def open_run(settings: Settings, parallel: Parallel) -> RunStart:
    """Make the run folder, or find the one to continue in; find, verify and load the checkpoint; set
    max_tiles_per_batch where it is auto.

    Rank 0 alone changes the folder; every rank gets the checkpoint's state. Raises ValueError where there is no whole
    checkpoint, where settings differ, and where another process is running in the folder.
    """
    opened: list[RunStart] = []

    def open_and_share() -> tuple[RunStart, set[str]]:
        opened.append(_open(settings, parallel.world_size))
        return dataclasses.replace(opened[0], lock=None, state={}, is_new=False), set(settings.given)

    start, given = parallel.from_main(open_and_share)
    settings.given = frozenset(given)
    if parallel.is_main:
        (start,) = opened
    else:
        limit_tiles_of_run(settings, parallel.world_size, start.checkpoint)  # each rank for its own device
        if start.checkpoint is not None:
            start.state = load_state(start.checkpoint)
    if start.state and "split_by" not in start.state["settings"]:  # an older version, which always split by row
        start.requested["split_by"] = settings.train.split_by = "row"
    return start


def _open(settings: Settings, processes: int) -> RunStart:
    cfg = settings.train
    if cfg.resume is None:
        limit_tiles_of_run(settings, processes)
        folder = new_run_folder(cfg.output_dir, cfg.run_name, settings.recipe.stem)
        return RunStart(folder, _flat(settings), True, lock(folder))
    named = None if cfg.run_name is None else Path(cfg.output_dir) / cfg.run_name
    if cfg.resume == "auto":
        assert named is not None, "the settings' check sees to that"
        source, checkpoint = named, None
    else:
        source, checkpoint = _run_of(Path(cfg.resume))
    in_place = named is None or named.resolve() == source.resolve()
    is_new, held = not source.exists(), None
    if is_new:
        limit_tiles_of_run(settings, processes)  # what does not fit is an error before the folder is made
    if in_place:
        source.mkdir(parents=True, exist_ok=True)
        held = lock(source)
    checkpoint, state, notes = _find(source, checkpoint, settings, in_place, processes)
    requested = _flat(settings)
    if in_place:
        return RunStart(source, requested, is_new, held, checkpoint, state, notes)
    folder = new_run_folder(cfg.output_dir, cfg.run_name, settings.recipe.stem)
    for name in ("log.txt", "metrics.jsonl", DROPPED):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return RunStart(folder, requested, True, lock(folder), checkpoint, state, notes)


def _flat(settings: Settings) -> dict[str, Any]:
    """Every setting by name, those that are None too."""
    configs = (settings.vlm, settings.train, settings.grades)
    return {name: value for config in configs for name, value in dataclasses.asdict(config).items()}


def _run_of(path: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None) that --resume PATH means."""
    if (path / "checkpoints").is_dir():
        return path, None
    if (path / "config.json").is_file():
        return path.resolve().parent.parent, path.resolve()
    raise ValueError(f"--resume {path}: must be auto, a run folder with checkpoints, or a checkpoint")


def _find(
    folder: Path, checkpoint: Path | None, settings: Settings, in_place: bool, processes: int
) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(checkpoint, its state, lines for the log): the checkpoint that was asked for, else the newest whole one.

    Sets max_tiles_per_batch where it is auto, which the sizes in the checkpoint decide.
    """
    notes: list[str] = []
    if checkpoint is not None:
        if problem := damage(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: is damaged ({problem}); --resume {folder} takes the newest whole one"
            )
        newer = [other for other in step_folders(folder) if in_place and damage(other) is None]
        if newer and step_of(newer[0]) > step_of(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: its run has reached {newer[0].name} since; to begin there again as another "
                "run give a new --run_name"
            )
    else:
        checkpoint = _newest_whole(folder, notes)
    if checkpoint is None and settings.train.resume != "auto":
        raise ValueError(f"--resume {settings.train.resume}: has no checkpoint yet")
    crash, step = folder / "checkpoints" / "crash", 0
    if checkpoint is not None:
        state = load_state(checkpoint)
        step = state["step"]
        notes.append(f"resuming from {checkpoint}, after step {step:,}")
    if (crash / MANIFEST).exists() and step_of(crash) > step:
        notes.append(f"{crash} is what an error left after step {step_of(crash):,}; only --resume {crash} takes it")
    if checkpoint is None:
        limit_tiles_of_run(settings, processes)
        return None, {}, notes
    _check_settings(state, settings, processes)  # what may differ is in settings.given then, and may be a size
    limit_tiles_of_run(settings, processes, checkpoint)
    return checkpoint, state, notes + _check_settings(state, settings, processes)  # the tiles too


def _newest_whole(folder: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none at all. notes: gets the damaged ones.

    Raises ValueError where there are checkpoints but none is whole.
    """
    damaged: list[str] = []
    for checkpoint in step_folders(folder):
        if (problem := damage(checkpoint)) is None:
            notes += [f"{line}; it is skipped" for line in damaged]
            return checkpoint
        damaged.append(f"{checkpoint.name} is damaged ({problem})")
    if damaged or any((folder / "checkpoints").glob("[bl]*t/config.json")):  # best and last of an older version
        raise ValueError(f"{folder} has no checkpoint to resume from: {'; '.join(damaged) or 'weights alone'}")
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """training_state.pt, on the CPU: tensors and plain values, nothing that could run code.

    Raises ValueError where it cannot be loaded or is of an older version.
    """
    state = load_file(checkpoint / STATE)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"--resume {checkpoint}: another version of this repository wrote it; to start from its weights give "
            f"--resume_weights {checkpoint}"
        )
    return state


def load_file(path: Path) -> dict[str, Any]:
    """A file of a checkpoint that torch.save wrote. Raises ValueError where it cannot be loaded."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--resume {path.parent}: {path.name} cannot be loaded ({why})") from None


def _check_settings(state: dict[str, Any], settings: Settings, processes: int) -> list[str]:
    """A line for each setting that differs from the saved run's, where that is allowed; else ValueError with them.

    The rows of a batch may be divided among another number of processes.
    """
    saved, now, before = state["settings"], _flat(settings), state["world_size"]
    shares_rows = state["states"]["data"][0]["shares_rows"]
    free = FREE - {"num_workers"} if shares_rows and processes == before else FREE
    if saved["batch_size"] * before == now["batch_size"] * processes:
        free = free | {"batch_size"}
    if "auto" in (saved.get("compile"), now["compile"]):  # it follows the machine
        free = free | {"compile"}
    if now["max_tiles_per_batch"] == "auto":  # it has no number yet
        free = free | {"max_tiles_per_batch"}
    differing = [name for name in now if name in saved and name not in free and now[name] != saved[name]]
    lines = [f"--{name} {now[name]}: the run that is resumed has {saved[name]}" for name in differing]
    if processes != before and "batch_size" not in free and now["batch_size"] == saved["batch_size"]:
        differing.append("batch_size")
        lines.append(
            f"--batch_size {now['batch_size']}, processes {processes}: the run that is resumed has {before} processes; "
            f"the product must be {saved['batch_size'] * before} to continue as the same run"
        )
    shape = {field.name for field in dataclasses.fields(settings.vlm)} - FREE_FIELDS
    if lines and not settings.train.resume_override:
        raise ValueError("\n".join([*lines, "--resume_override continues with what is given now"]))
    if fixed := [line for name, line in zip(differing, lines, strict=True) if name in FIXED | shape]:
        raise ValueError("\n".join([*fixed, "--resume_override cannot change this in the middle of a run"]))
    settings.given |= set(differing)  # what a recipe changes now overrides the checkpoint's config too
    if processes != before:
        lines.append(f"processes: {processes} now, {before} before")
        if shares_rows:
            lines.append("the rows are divided among them again: training continues at the beginning of an epoch")
    return lines
