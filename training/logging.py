"""What a run says and writes: console, log.txt, metrics.jsonl, dropped.jsonl, progress bar, and a tracker."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from data.drops import DROPPED, MAX_RECORDS
from data.values import printable
from grades.files import write_text
from training.trackers import NoTracker, Tracker

LINE_INTERVAL_S = 60.0  # between two lines of progress where no bar can be drawn


class RunLog:
    """One run's console lines, log.txt, metrics.jsonl, dropped.jsonl and progress bar."""

    def __init__(self, folder: Path, total_steps: int, resumes: bool = False):
        """total_steps: for the bar. resumes: continue the files that are there."""
        self.folder = folder
        self.tracker: Tracker = NoTracker()
        mode: Literal["a", "w"] = "a" if resumes else "w"

        def opened(name: str) -> TextIO:  # "backslashreplace": a row may be named after a file whose name is no UTF-8
            return (folder / name).open(mode, encoding="utf-8", errors="backslashreplace", newline="\n")

        self.text, self.metrics, self.dropped = map(opened, ("log.txt", "metrics.jsonl", DROPPED))
        self.files = (self.text, self.metrics, self.dropped)
        self.known_drops: dict[str, set[str]] = {}  # of each split and reason the rows that are in dropped.jsonl
        self.tracker_id: str | None = None  # of the run that is resumed
        self.total_steps = total_steps
        self.bar: tqdm | None = None
        self.first_step, self.started, self.line_due = 0, 0.0, math.inf  # seconds of time.monotonic
        self.disk_is_full = False

    def start_bar(self, step: int = 0) -> None:
        """Begin to show progress at step: a bar in a terminal; in a file or pipe a line a minute, the first at once."""
        self.first_step, self.started, self.line_due = step, time.monotonic(), 0.0
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5)

    def say(self, line: str) -> None:
        """A line to the console, above the progress bar, and to log.txt."""
        tqdm.write(printable(line))
        self.detail(line)

    def detail(self, line: str) -> None:
        """A line to log.txt alone."""
        self._write(self.text, line)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl and a point in the tracker. A value that is None or not finite becomes null."""
        values = {name: value if _is_finite(value) else None for name, value in values.items()}
        self._write(self.metrics, json.dumps({"step": step, **values}))
        self.tracker.log({name: value for name, value in values.items() if value is not None}, step)

    def write_page(self, name: str, page: str) -> None:
        """A file of the run folder. One that the disk refuses is named, and the run continues."""
        try:
            write_text(self.folder / name, page)
        except OSError as error:
            self.say(f"{self.folder / name} could not be written: {error.strerror}")

    def record_drops(self, records: Iterable[dict[str, str]]) -> None:
        """A line of dropped.jsonl for each row that is not there yet, up to MAX_RECORDS for each split and reason."""
        for record in records:
            if self._is_new(record):
                self._write(self.dropped, json.dumps(record, ensure_ascii=False))

    def _is_new(self, record: dict[str, str]) -> bool:
        rows = self.known_drops.setdefault(f"{record['split']}/{record['reason']}", set())
        if record["row"] in rows or len(rows) >= MAX_RECORDS:
            return False
        rows.add(record["row"])
        return True

    def _write(self, file: TextIO, line: str) -> None:
        """With a full disk the line waits in the file's buffer, as long as there is room, and the run continues."""
        try:
            file.write(line + "\n")
            file.flush()
            self.disk_is_full = False
        except OSError as error:
            if not self.disk_is_full:
                tqdm.write(f"{file.name}: {error.strerror}; lines may be missing from here on", file=sys.stderr)
            self.disk_is_full = True

    def state_dict(self) -> dict[str, Any]:
        """Bytes of the files, which are on the disk then, where it has room; and the tracker's id."""
        for file in self.files:
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        sizes = {Path(file.name).name: os.fstat(file.fileno()).st_size for file in self.files}
        return {"bytes": sizes, "tracker_id": self.tracker.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut off what came after that state, and what a full disk has left of a last line; remember which run of the
        tracker continues."""
        self.tracker_id = state["tracker_id"]
        for file in self.files:
            path = Path(file.name)
            kept = path.read_bytes()[: state["bytes"].get(path.name, 0)]
            file.truncate(kept.rfind(b"\n") + 1)
        self.known_drops = {}
        # Not splitlines: JSON leaves U+0085, U+2028 and U+2029 as they are.
        for line in Path(self.dropped.name).read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):  # what a full disk has left of a line
                self._is_new(json.loads(line))

    def show(self, step: int, **postfix: str) -> None:
        """Move the progress to step. postfix: what stands behind it."""
        if self.bar is not None:
            self.bar.set_postfix(postfix, refresh=False)
            self.bar.update(step - self.bar.n)
        elif (now := time.monotonic()) >= self.line_due:
            self.line_due = now + LINE_INTERVAL_S
            numbers = ", ".join(f"{name}={value}" for name, value in postfix.items())
            elapsed, first = now - self.started, self.first_step
            line = tqdm.format_meter(
                step, self.total_steps, elapsed, ncols=0, unit="step", postfix=numbers, initial=first
            )
            print(line.strip(), file=sys.stderr, flush=True)

    def close_bar(self) -> None:
        """End the progress; lines may follow."""
        self.line_due = math.inf
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Close bar and files."""
        self.close_bar()
        for file in self.files:
            with contextlib.suppress(OSError):  # what the disk has refused before
                file.close()


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of a method that says or writes something."""


class NoLog(RunLog):
    """The log of a rank that says and writes nothing."""

    start_bar = say = detail = record = write_page = record_drops = load_state_dict = show = close_bar = close = (
        _nothing
    )

    def __init__(self) -> None:
        self.tracker = NoTracker()

    def state_dict(self) -> dict[str, Any]:
        return {}


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
