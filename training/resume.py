"""Going on where a run ended: what a checkpoint holds besides the weights, and how the next process takes it up.

`run` is train.py's Run.
"""

import contextlib
import copy
import dataclasses
import json
import os
import pickle
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from models.config import TrainConfig
from training.arguments import FREE_FIELDS, Settings
from training.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    begin_checkpoint,
    damage,
    point,
    prune,
    remove_unfinished,
    save_checkpoint,
    step_folder,
    step_folders,
    step_of,
    unfinished,
)
from training.parallel import Parallel
from training.run_folder import FolderLock, lock, new_run_folder

# Settings that change nothing of what is computed.
FREE = {
    "output_dir", "run_name", "num_workers", "log_with", "log_wandb", "wandb_project", "wandb_entity", "hf_repo_name",
    "checkpoint_interval", "keep_checkpoints", "resume", "resume_override", "dry_run",
    "activation_checkpointing", "profile",
}  # fmt: skip
# Settings that say what the saved state means, as does all that shapes the model.
FIXED = {
    "lm_tokenizer", "lora_rank", "lora_targets", "lora_vision", "metric", "monitor_sample", "tau_mode",
    "target_components",
}  # fmt: skip
# What of the state is another one in each of several processes.
OF_A_RANK = ("position", "dropped", "flops", "rng")
# Where the weights are sharded each rank writes its part of the optimizer's state and of what the metric compares with.
OPTIMIZER = "optimizer"
METRIC = "metric_{}.pt"
# What a checkpoint holds of Run as it is.
FIELDS = (
    "step", "position", "best_val_loss", "best_step", "val", "losses", "unread_tokens", "total_tokens", "stop_reason",
    "evaluation_due", "resumed_at", "startup_time_s", "eval_time_s", "save_time_s",
)  # fmt: skip


@dataclass
class Start:
    """The folder of a run, and the checkpoint that it goes on from."""

    folder: Path
    requested: dict  # the settings as they were asked for
    is_new: bool  # the folder was made for this run
    lock: FolderLock | None  # rank 0 alone holds the folder
    checkpoint: Path | None = None
    state: dict = field(default_factory=dict)  # of the checkpoint; empty where the run starts at step 0
    notes: list[str] = field(default_factory=list)  # for the log, once it is open
    data: dict = field(default_factory=dict)  # what tells the run's rows from others

    def __post_init__(self) -> None:
        if self.lock is not None and self.lock.note is not None:
            self.notes.append(self.lock.note)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended by itself and all of it is saved."""
        summary = self.folder / "summary.json"
        if self.is_new or not self.state or not summary.exists():
            return False
        found = json.loads(summary.read_text(encoding="utf-8"))
        goes_on = found["stop_reason"] == "max_training_steps" and found["steps"] < self.requested["max_training_steps"]
        ended = found["stop_reason"] in ("frozen", "early_stopping", "max_training_steps") and not goes_on
        return ended and found["steps"] == self.state["step"]

    def compare_data(self, data: dict, cfg: TrainConfig) -> None:
        """Take what tells the training data set's rows from others. Raises ValueError where the checkpoint's run had
        others, unless resume_override."""
        self.data, before = data, self.state.get("data", data)
        if data == before:
            return
        others = ", but other ones" if data["size"] == before["size"] else ""
        line = f"--train_dataset_path {cfg.train_dataset_path}: {data['size']} now, the run that is resumed has "
        line += before["size"] + others
        if not cfg.resume_override:
            raise ValueError(f"{line}; --resume_override goes on with those of now")
        self.notes.append(line)

    def cut_off(self) -> None:
        """Undo in the run folder what came after the checkpoint."""
        remove_unfinished(self.folder)
        (self.folder / "summary.json").unlink(missing_ok=True)
        for name, size in self.state.get("logs", {"log.txt": 0, "metrics.jsonl": 0}).items():
            path = self.folder / name
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
        steps = step_folders(self.folder)
        for folder in steps[: steps.index(self.checkpoint)] if self.checkpoint in steps else []:  # damaged, all of them
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
        for name, step in (("last", self.state.get("step")), ("best", self.state.get("best_step"))):
            if step is not None and (folder := step_folder(self.folder, step)).is_dir():
                point(folder.with_name(name), folder)

    def give_up(self) -> None:
        """Leave no folder behind that was made for this run."""
        if self.is_new and self.lock is not None:
            self.lock.release()
            shutil.rmtree(self.folder, ignore_errors=True)


def open_run(settings: Settings, processes: int) -> Start:
    """Make the run folder, or find the one to go on in; find, verify and load the checkpoint.

    Raises ValueError where there is no whole checkpoint, where the settings are others, and where another process is
    running in the folder.
    """
    cfg, requested = settings.train, _flat(settings)
    if cfg.resume is None:
        folder = new_run_folder(cfg.output_dir, cfg.run_name, settings.recipe.stem)
        return Start(folder, requested, True, lock(folder))
    named = None if cfg.run_name is None else Path(cfg.output_dir) / cfg.run_name
    source, checkpoint = (named, None) if cfg.resume == "auto" else _run_of(Path(cfg.resume))
    in_place = named is None or named.resolve() == source.resolve()
    is_new, held = not source.exists(), None
    if in_place:
        source.mkdir(parents=True, exist_ok=True)
        held = lock(source)
    checkpoint, state, notes = _find(source, checkpoint, settings, in_place, processes)
    if in_place:
        return Start(source, requested, is_new, held, checkpoint, state, notes)
    folder = new_run_folder(cfg.output_dir, cfg.run_name, settings.recipe.stem)
    for name in state["logs"]:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return Start(folder, requested, True, lock(folder), checkpoint, state, notes)


def join_run(settings: Settings, parallel: Parallel) -> Start:
    """open_run on rank 0, which alone changes the folder; every rank gets the checkpoint's state, its own where they
    differ. The saved run may have had another number of processes."""
    opened: list[Start] = []

    def open_and_share() -> tuple[Start, set[str]]:
        opened.append(open_run(settings, parallel.world_size))
        return dataclasses.replace(opened[0], lock=None, state={}, is_new=False), settings.given

    start, settings.given = parallel.from_main(open_and_share)
    if parallel.is_main:
        (start,) = opened
    elif start.checkpoint is not None:
        start.state = load_state(start.checkpoint)
    if start.checkpoint is not None:
        _take_own_part(start, settings, parallel)
    return start


def _take_own_part(start: Start, settings: Settings, parallel: Parallel) -> None:
    """Make of the checkpoint's state, which is of all ranks, that of this one."""
    state = start.state
    saved, kind, grades = state.pop("ranks"), state["kind"], state["grades"]
    alike = (kind, len(saved)) == (parallel.kind, parallel.world_size)
    if grades is not None and kind == "fsdp" and alike:
        grades["metric"] = _load(start.checkpoint / METRIC.format(parallel.rank))
    elif grades is not None and "fsdp" in (kind, parallel.kind):
        grades["metric"] = None  # it is of other parts of the weights
    if len(saved) == parallel.world_size:
        state |= saved[parallel.rank]
    else:
        state |= _of_another_number(saved, parallel.rank)
    state["position"] = _position(state, [rank["position"] for rank in saved], settings, parallel.world_size)


def _of_another_number(saved: list[dict], rank: int) -> dict:
    """What a rank takes up of a run of another number of ranks: rank 0 the sums that have been counted."""
    whole = copy.deepcopy(saved[0])
    dropped, flops = whole["dropped"]["train"], whole["flops"]
    for other in saved[1:]:
        for counts, more in ((dropped, other["dropped"]["train"]), (flops, other["flops"])):
            counts |= {key: counts.get(key, 0) + count for key, count in more.items()}
    if rank > 0:
        whole["dropped"]["train"], whole["flops"] = {}, dict.fromkeys(flops, 0)
        whole["rng"] = saved[rank]["rng"] if rank < len(saved) else None
    return whole


def _position(state: dict, saved: list[int | dict], settings: Settings, processes: int) -> int | dict:
    """Where in the data this rank goes on, by the positions of the saved run's ranks."""
    batch_size, cfg = state["settings"]["batch_size"], settings.train
    if not state["workers_share_rows"]:  # position counts the batches of all ranks together
        return saved[0] * (batch_size * len(saved)) // (cfg.batch_size * processes)
    workers = max(1, cfg.num_workers)
    if saved[0] == 0 or (len(saved) == processes and (len(saved[0]["places"]) == workers or not cfg.resume_override)):
        return state["position"]
    # What a reader has read of its share says nothing about other shares: an epoch begins that none has been in.
    epoch = 1 + max(place[0] for position in saved for place in position["places"])
    return {"places": [(epoch, 0, 0)] * workers, "turn": 0}


def _flat(settings: Settings) -> dict:
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
) -> tuple[Path | None, dict, list[str]]:
    """(checkpoint, its state, lines for the log): the checkpoint that was asked for, else the newest whole one."""
    notes: list[str] = []
    if checkpoint is not None:
        if problem := damage(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: is damaged ({problem}); --resume {folder} takes the newest whole one"
            )
        newer = [other for other in step_folders(folder) if in_place and damage(other) is None]
        if newer and step_of(newer[0]) > step_of(checkpoint):
            raise ValueError(
                f"--resume {checkpoint}: its run has gone on to {newer[0].name}; to begin there again as another "
                "run give a new --run_name"
            )
    else:
        checkpoint = _newest_whole(folder, notes)
    if checkpoint is None and settings.train.resume != "auto":
        raise ValueError(f"--resume {settings.train.resume}: has no checkpoint yet")
    if checkpoint is None:
        return None, {}, []
    state = load_state(checkpoint)
    notes.append(f"going on from {checkpoint}, after step {state['step']:,}")
    crash = folder / "checkpoints" / "crash"
    if (crash / MANIFEST).exists() and step_of(crash) > state["step"]:
        notes.append(f"{crash} is what an error left after step {step_of(crash):,}; only --resume {crash} takes it")
    return checkpoint, state, notes + _compare(state, settings, processes)


def _newest_whole(folder: Path, notes: list[str]) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none at all. notes: gets the damaged ones.

    Raises ValueError where there are checkpoints but none is whole.
    """
    damaged = []
    for checkpoint in step_folders(folder):
        if (problem := damage(checkpoint)) is None:
            notes += [f"{line}; it is passed over" for line in damaged]
            return checkpoint
        damaged.append(f"{checkpoint.name} is damaged ({problem})")
    if damaged or any((folder / "checkpoints").glob("[bl]*t/config.json")):  # best and last of an older version
        raise ValueError(f"{folder} has no checkpoint to go on from: {'; '.join(damaged) or 'weights alone'}")
    return None


def load_state(checkpoint: Path) -> dict:
    """training_state.pt, on the CPU: tensors and plain values, nothing that could run code."""
    state = _load(checkpoint / STATE)
    if "data" not in state:
        raise ValueError(f"--resume {checkpoint}: an older version wrote it; this one can take its weights alone")
    return state


def _load(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--resume {path.parent}: {path.name} cannot be loaded ({why})") from None


def _compare(state: dict, settings: Settings, processes: int) -> list[str]:
    """A line for each setting that differs from the saved run's, where that is allowed; else ValueError with them.

    The rows of a batch may be divided among another number of processes.
    """
    saved, now, before = state["settings"], _flat(settings), len(state["ranks"])
    free = FREE - {"num_workers"} if state["workers_share_rows"] and processes == before else FREE
    if saved["batch_size"] * before == now["batch_size"] * processes:
        free = free | {"batch_size"}
    differing = [name for name in now if name in saved and name not in free and now[name] != saved[name]]
    lines = [f"--{name} {now[name]}: the run that is resumed has {saved[name]}" for name in differing]
    if processes != before and "batch_size" not in free and now["batch_size"] == saved["batch_size"]:
        differing.append("batch_size")
        lines.append(
            f"--batch_size {now['batch_size']}, processes {processes}: the run that is resumed has {before} processes; "
            f"the product must be {saved['batch_size'] * before} for it to go on as the same run"
        )
    shape = {field.name for field in dataclasses.fields(settings.vlm)} - FREE_FIELDS
    if lines and not settings.train.resume_override:
        raise ValueError("\n".join([*lines, "--resume_override goes on with what is given now"]))
    if fixed := [line for name, line in zip(differing, lines, strict=True) if name in FIXED | shape]:
        raise ValueError("\n".join([*fixed, "--resume_override cannot change this in the middle of a run"]))
    settings.given |= set(differing)  # what a recipe changes now goes over the checkpoint's config too
    if processes != before:
        lines.append(f"processes: {processes} now, {before} before")
        if state["workers_share_rows"]:
            lines.append("the rows are divided anew among them: training goes on at the beginning of an epoch")
    return lines


def progress(run) -> dict:
    """All of the run's state but what lies in the model, the optimizer and the monitor."""
    now = time.perf_counter()
    return {name: copy.copy(getattr(run, name)) for name in FIELDS} | {
        "settings": run.start.requested,
        "data": run.start.data,
        "kind": run.parallel.kind,
        "workers_share_rows": run.settings.train.packing or not hasattr(run.data.train_rows, "__len__"),  # a stream
        "elapsed_s": now - run.started,
        "unread_s": now - run.unread_since,
        "dropped": {split: dict(counts) for split, counts in run.data.dropped.items()},
        "early_stopping": run.early_stopping.state_dict() if run.early_stopping is not None else None,
        "flops": run.flops.state_dict(),
        "rng": _rng_state(run.device),
        "logs": run.log.sizes(),
        "wandb_id": run.log.tracker.id,
    }


def restore(run) -> None:
    """Let the run be as it was at its checkpoint, whose weights model and optimizer have.

    Last of all but compiling and wrapping. Raises ValueError where GradES watches other components.
    """
    state, run.start.state = run.start.state, {}
    for name in FIELDS:
        setattr(run, name, state[name])
    run.resumed_at.append(run.step)
    if run.stop_reason in (None, "max_training_steps"):  # the number of steps may be another now
        is_over = run.step >= run.settings.train.max_training_steps and not run.evaluation_due
        run.stop_reason = "max_training_steps" if is_over else None
    run.started -= state["elapsed_s"]
    run.unread_since = -state["unread_s"]
    for split, counts in state["dropped"].items():
        skipped = dict(run.data.dropped[split])  # subsets that cannot be loaded; most were counted then too
        run.data.dropped[split].clear()
        run.data.dropped[split].update(counts | skipped)
    run.flops.load_state_dict(state["flops"])
    for name, part in (("grades", run.monitor), ("early_stopping", run.early_stopping)):
        if part is not None and state[name] is not None:
            part.load_state_dict(state[name])
    if state["rng"] is not None:
        _set_rng_state(state["rng"], run.device)


def load_optimizer(start: Start, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel) -> None:
    """Take up the moments; peak learning rates and the like stay as the settings have them.

    Raises ValueError where other parts of the model are trained.
    """
    saved = start.state["optimizer"]
    groups = optimizer.state_dict()["param_groups"]
    if [(g["name"], g["params"]) for g in groups] != [(g["name"], g["params"]) for g in saved["param_groups"]]:
        raise ValueError("--lr_mp, --lr_vision_backbone, --lr_language_backbone: must be 0 where the saved run has 0")
    groups = [own | {"lr": other["lr"]} for own, other in zip(groups, saved["param_groups"], strict=True)]
    if "state" in saved:
        state = parallel.own_part(optimizer, saved["state"])
    else:
        state = parallel.read_optimizer(start.checkpoint / OPTIMIZER, model, optimizer)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def keep(run, model: torch.nn.Module, state: dict, name: str | None = None) -> None:
    """Write model and state as the checkpoint of this step, or `name`: rank 0 does, with what the others have."""
    folder = step_folder(run.folder, run.step) if name is None else run.folder / "checkpoints" / name
    problem = _write_parts(run, state, folder) if run.parallel.sharded is not None else None
    state["ranks"] = run.parallel.gather({key: state[key] for key in OF_A_RANK})
    run.parallel.from_main(lambda: _write(run, model, state, folder, problem))


def _write_parts(run, state: dict, folder: Path) -> str | None:
    """Let each rank write what it alone has of the state, which loses it. Returns on rank 0 why that has failed."""
    beside, problem, parallel = unfinished(folder), None, run.parallel

    def begin() -> None:
        with contextlib.suppress(OSError):
            begin_checkpoint(folder)

    parallel.from_main(begin)
    if parallel.any(not beside.is_dir()):
        problem = f"{beside} could not be made, or is not on a file system that all nodes share"
    else:
        try:
            parallel.write_optimizer(beside / OPTIMIZER, run.model, run.optimizer)
            if state["grades"] is not None:
                torch.save(state["grades"]["metric"], beside / METRIC.format(parallel.rank))
        except Exception as error:  # of a full disk each library has an exception of its own
            problem = str(error)
    state["optimizer"] = {"param_groups": state["optimizer"]["param_groups"]}
    if state["grades"] is not None:
        state["grades"]["metric"] = None
    return next(filter(None, parallel.gather(problem)), None)


def _write(run, model: torch.nn.Module, state: dict, folder: Path, problem: str | None) -> None:
    """Write the checkpoint; then the links, and the oldest go. problem: why the parts of the ranks are not there.

    Where the disk refuses, the run says so and goes on: run.unsaved holds the reason until a checkpoint is written.
    """
    try:
        if problem is not None:
            shutil.rmtree(unfinished(folder), ignore_errors=True)
            raise CheckpointError(f"{folder.name} could not be written ({problem})")
        save_checkpoint(folder, model, run.data.tokenizer, state, begun=run.parallel.sharded is not None)
        if folder.name != "crash":
            point(folder.with_name("last"), folder)
            if run.best_step == run.step:
                point(folder.with_name("best"), folder)
            prune(run.folder, run.settings.train.keep_checkpoints)
        run.unsaved = None
    except (CheckpointError, OSError) as error:
        run.unsaved = str(error)
        run.log.say(f"NOT SAVED: {error}; earlier checkpoints are as they were, the next one is tried as usual")


def _rng_state(device: torch.device) -> dict:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
    }


def _set_rng_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
