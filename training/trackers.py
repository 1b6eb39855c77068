"""Where a run's numbers and pictures go besides its folder: Weights & Biases, TensorBoard or trackio.

Each package is imported only where it is asked for. None of them ever asks a question, and none ends a run.
"""

import contextlib
import importlib.util
import io
import json
import netrc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from models.config import TrainConfig

Say = Callable[[str], None]  # takes a line for the console


class Tracker(Protocol):
    """Takes numbers at steps, and a summary and pictures at the end."""

    @property
    def id(self) -> str | None:
        """Under which a resumed run continues."""

    def log(self, values: dict[str, Any], step: int) -> None: ...

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """rows: of texts, None, and pictures, uint8 [H, W, 3]."""

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None: ...


def tracker_name(cfg: TrainConfig) -> str | None:
    """wandb, tensorboard, trackio or None. --log_wandb means wandb; WANDB_DISABLED means none in place of wandb."""
    name = cfg.log_with or ("wandb" if cfg.log_wandb else None)
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return None if name == "wandb" and (is_off or os.environ.get("WANDB_MODE") == "disabled") else name


def check_tracker(cfg: TrainConfig) -> None:
    """Raise ValueError with the command that installs the tracker, where its package is absent. Imports nothing."""
    if (name := tracker_name(cfg)) is None:
        return
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder `wandb` of earlier runs looks like a package without a file
        flag = f"--log_with {name}" if cfg.log_with else "--log_wandb"
        raise ValueError(f"{flag}: needs the package {name}: uv sync --extra {name}, or pip install {name}")


def make_tracker(
    cfg: TrainConfig, settings: dict[str, Any], folder: Path, say: Say, run_id: str | None = None, step: int = 0
) -> Tracker:
    """The tracker that the settings name; NoTracker where they name none.

    settings: all of them, flat, to be shown beside the run. run_id: the id of the run to continue, after `step` steps.
    Raises ValueError where the package is not installed or cannot begin.
    """
    check_tracker(cfg)
    name = tracker_name(cfg)
    try:
        if name == "wandb":
            return GuardedTracker(WandbTracker(cfg, settings, folder, say, run_id), say)
        if name == "tensorboard":
            return GuardedTracker(TensorBoardTracker(settings, folder, say, step), say)
        if name == "trackio":
            return GuardedTracker(TrackioTracker(cfg, settings, folder, say, run_id), say)
    except Exception as error:  # each package has exceptions of its own
        raise ValueError(f"{name} cannot begin to record ({type(error).__name__}: {error})") from error
    return NoTracker()


class NoTracker:
    """Tracks nothing."""

    id: str | None = None

    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        pass

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        pass


class GuardedTracker:
    """Another tracker up to its first error (a full disk, say), which is told in a line and ends the tracking alone."""

    def __init__(self, tracker: Tracker, say: Say):
        self.tracker, self.say, self.id = tracker, say, tracker.id

    def log(self, values: dict[str, Any], step: int) -> None:
        self._call(lambda: self.tracker.log(values, step))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self._call(lambda: self.tracker.table(name, columns, rows, step))

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        self._call(lambda: self.tracker.finish(summary, pictures))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # each package has exceptions of its own
            name, self.tracker = type(self.tracker).__name__, NoTracker()
            self.say(f"{name} failed ({type(error).__name__}: {error}); the run continues without it")


class WandbTracker:
    """Weights & Biases, as its environment variables and settings files say; offline where it has no account."""

    def __init__(self, cfg: TrainConfig, settings: dict[str, Any], folder: Path, say: Say, run_id: str | None = None):
        import wandb

        self.wandb, self.say = wandb, say
        quiet = wandb.Settings(silent=True, init_timeout=20, console="off")
        found = wandb.setup().settings
        is_off = found.mode == "disabled"  # by a settings file
        is_offline = not is_off and (found.mode in ("offline", "dryrun") or not has_wandb_account(found.base_url))
        if is_offline:  # of the process, not of the run alone: wandb's own telemetry asks these settings
            found.mode = "offline"
        options: dict[str, Any] = {
            "project": cfg.wandb_project, "entity": cfg.wandb_entity, "name": folder.name, "dir": str(folder),
            "config": settings, "settings": quiet,
        }  # fmt: skip
        if run_id is not None:
            options |= {"id": run_id, "resume": "allow"}
        try:
            self.run = wandb.init(mode="offline" if is_offline else None, **options)
        except wandb.Error as error:
            say(f"wandb: {error}; recording offline instead")
            self.run = wandb.init(mode="offline", **options)
        self.run.define_metric("*", step_metric="step")
        self.id = self.run.id
        self.upload = f"wandb sync {quoted(Path(self.run.dir).parent)}" if self.run.offline else None
        if self.upload:
            say(f"wandb records offline; upload later with: {self.upload}")

    def log(self, values: dict[str, Any], step: int) -> None:
        # Not as wandb's own step: of that a resumed run may log nothing more, where the earlier process has ended.
        self.run.log(values | {"step": step})

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        image = self.wandb.Image
        cells = [[image(cell) if hasattr(cell, "shape") else cell for cell in row] for row in rows]
        self.log({name: self.wandb.Table(columns=list[str | int](columns), data=cells)}, step)

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        self.run.summary.update({name: value for name, value in summary.items() if value is not None})
        if pictures:
            self.log({path.stem: self.wandb.Image(str(path)) for path in pictures}, summary["steps"])
        self.run.finish()
        if self.upload:
            self.say(f"wandb recorded offline; upload with: {self.upload}")


def has_wandb_account(server: str) -> bool:
    """Whether wandb can log in there without asking: a key or a token in the environment, or one in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named, home = os.environ.get("NETRC"), Path.home()
    for path in [Path(named).expanduser()] if named else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc(str(path)).authenticators(urlsplit(server).netloc) is not None
    return False


class TensorBoardTracker:
    """Event files in the run folder's `tensorboard`."""

    id = None  # the folder is the run

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say, step: int = 0):
        """step: of the checkpoint that the run continues from. TensorBoard is told to leave out what an earlier process
        has recorded from that step on, as its evaluation is made again. What is not, metrics.jsonl has kept."""
        from torch.utils.tensorboard import SummaryWriter

        target, metrics = folder / "tensorboard", folder / "metrics.jsonl"
        resumes = target.exists()
        self.writer = SummaryWriter(str(target), purge_step=step if resumes else None, flush_secs=10)
        self.writer.add_text("settings", as_table(settings), step)
        for line in metrics.read_text(encoding="utf-8").split("\n") if resumes and metrics.exists() else ():
            if line and (values := json.loads(line)).pop("step") == step:
                self.log({name: value for name, value in values.items() if value is not None}, step)
        say(f"TensorBoard shows the run with: tensorboard --logdir {quoted(target)}")

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Without the pictures, which its text cannot hold."""
        shown = [number for number, column in enumerate(columns) if column != "picture"]
        lines = [[columns[i] for i in shown], ["---"] * len(shown), *([row[i] for i in shown] for row in rows)]
        cells = (["" if cell is None else markdown_cell(cell) for cell in line] for line in lines)
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_text("summary", as_table(summary), summary["steps"])
        for path in pictures:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.writer.add_image(path.stem, pixels, summary["steps"], dataformats="HWC")
        self.writer.close()


class TrackioTracker:
    """trackio, on this machine; on a server or Space only where its own environment variables name one."""

    def __init__(self, cfg: TrainConfig, settings: dict[str, Any], folder: Path, say: Say, run_id: str | None = None):
        """run_id: of the run to continue, whose points after the checkpoint stay: trackio cannot remove any."""
        import trackio

        self.trackio, name = trackio, run_id or folder.name
        with contextlib.redirect_stdout(io.StringIO()):  # a screen of its own
            self.run = trackio.init(
                project=cfg.wandb_project, name=name, config=settings, resume="never" if run_id is None else "allow",
                embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self.id = self.run.name  # another one where an earlier run has that of the folder
        say(f"trackio shows the run with: trackio show --project {quoted(cfg.wandb_project)}")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log(values, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """samples.html of the run folder holds it; trackio's tables take pandas."""

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        values = {f"summary/{name}": value for name, value in summary.items() if value is not None}
        images = {path.stem: self.trackio.Image(str(path)) for path in pictures}
        self.run.log(values | images, step=summary["steps"])
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


def markdown_cell(value: str) -> str:
    """A text that stands in a cell of a table in Markdown."""
    return value.replace("|", "\\|").replace("\n", " ")


def as_table(values: dict[str, Any]) -> str:
    """Names and values as a table in Markdown."""
    return "\n".join(["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def quoted(word: Path | str) -> str:
    """The word as a shell takes it, in double quotes where it has spaces: so does Windows."""
    return subprocess.list2cmdline([str(word)])
