"""What a run says and writes: console, log.txt, metrics.jsonl, progress bar, wandb."""

import contextlib
import itertools
import json
import math
import netrc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from models.config import TrainConfig


def new_run_folder(output_dir: str, run_name: str | None, recipe: str) -> Path:
    """Make a new folder: run_name as given, else recipe and time. Raises ValueError where run_name exists already."""
    name = run_name or f"{recipe}_{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        folder = Path(output_dir) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if run_name is not None:
                message = f"--run_name {run_name}: {folder} exists already; earlier runs are never overwritten"
                raise ValueError(message) from None
            continue  # another run of the same second
        return folder
    raise AssertionError("itertools.count ended")


class Tracker(Protocol):
    """Where numbers and pictures go besides the run folder."""

    id: str | None  # under which a resumed run goes on

    def log(self, values: dict[str, Any], step: int) -> None: ...

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None: ...


class NoTracker:
    """Tracks nothing."""

    id = None

    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        pass


class WandbTracker:
    """Weights & Biases; records offline where it cannot upload, and never asks."""

    def __init__(
        self,
        cfg: TrainConfig,
        settings: dict[str, Any],
        folder: Path,
        say: Callable[[str], None],
        run_id: str | None = None,
    ):
        """say: takes a line for the console. run_id: of the run to go on with.

        Raises ValueError where the package wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "--log_wandb needs the package wandb: uv sync --extra wandb, or pip install wandb"
            ) from None
        self.wandb = wandb
        self.say = say
        offline = os.environ.get("WANDB_MODE") == "offline" or not has_wandb_account()
        options = {
            "project": cfg.wandb_project,
            "entity": cfg.wandb_entity,
            "name": folder.name,
            "dir": str(folder),
            "config": settings,
        }
        if run_id is not None:
            options |= {"id": run_id, "resume": "allow"}
        quiet = wandb.Settings(silent=True, init_timeout=20, console="off")
        try:
            self.run = wandb.init(mode="offline" if offline else None, settings=quiet, **options)
        except wandb.Error as error:
            say(f"wandb: {error}; recording offline instead")
            self.run = wandb.init(mode="offline", settings=quiet, **options)
        self.id = self.run.id
        self.offline = self.run.offline
        if self.offline:
            say(f"wandb records offline; upload later with: wandb sync {Path(self.run.dir).parent}")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log(values, step=step)

    def finish(self, summary: dict[str, Any], pictures: list[Path]) -> None:
        self.run.summary.update({name: value for name, value in summary.items() if value is not None})
        if pictures:
            self.run.log({path.stem: self.wandb.Image(str(path)) for path in pictures})
        self.run.finish()
        if self.offline:
            self.say(f"wandb recorded offline; upload with: wandb sync {Path(self.run.dir).parent}")


def has_wandb_account() -> bool:
    """Whether wandb can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class RunLog:
    """One run's console lines, log.txt, metrics.jsonl and progress bar."""

    def __init__(self, folder: Path, total_steps: int):
        self.tracker: Tracker = NoTracker()
        self.text = (folder / "log.txt").open("a", encoding="utf-8")
        self.metrics = (folder / "metrics.jsonl").open("a")
        self.total_steps = total_steps
        self.bar: tqdm | None = None
        self.disk_is_full = False

    def start_bar(self, step: int = 0) -> None:
        # In a file every update is a line of its own: then one in ten seconds is enough.
        mininterval = 0.5 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=mininterval)

    def say(self, line: str) -> None:
        """A line to the console, above the progress bar, and to log.txt."""
        tqdm.write(line)
        self._write(self.text, line)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl and a point in the tracker. A value that is None or not finite becomes null."""
        values = {name: value if _is_finite(value) else None for name, value in values.items()}
        self._write(self.metrics, json.dumps({"step": step, **values}))
        self.tracker.log({name: value for name, value in values.items() if value is not None}, step)

    def _write(self, file: TextIO, line: str) -> None:
        """Where the disk is full the line waits in the file's buffer, as long as there is room, and the run goes on."""
        try:
            file.write(line + "\n")
            file.flush()
            self.disk_is_full = False
        except OSError as error:
            if not self.disk_is_full:
                tqdm.write(f"{file.name}: {error.strerror}; lines may be missing from here on", file=sys.stderr)
            self.disk_is_full = True

    def sizes(self) -> dict[str, int]:
        """Bytes of log.txt and metrics.jsonl, which are on the disk then, where it has room."""
        for file in (self.text, self.metrics):
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        return {Path(file.name).name: os.fstat(file.fileno()).st_size for file in (self.text, self.metrics)}

    def show(self, step: int, **postfix: str) -> None:
        """Move the progress bar to step."""
        if self.bar is not None:
            self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(step - self.bar.n)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        self.close_bar()
        for file in (self.text, self.metrics):
            with contextlib.suppress(OSError):  # what the disk has refused before
                file.close()


class NoLog(RunLog):
    """The log of a rank that says and writes nothing."""

    def __init__(self) -> None:
        self.tracker = NoTracker()

    def start_bar(self, step: int = 0) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def record(self, step: int, values: dict[str, Any]) -> None:
        pass

    def sizes(self) -> dict[str, int]:
        return {}

    def show(self, step: int, **postfix: str) -> None:
        pass

    def close_bar(self) -> None:
        pass

    def close(self) -> None:
        pass


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
