"""The folder of a run: a new one with a name of its own, and the lock that lets one process at a time work in it."""

import itertools
import os
import time
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import lock_descriptor

_held: WeakValueDictionary[Path, "FolderLock"] = WeakValueDictionary()  # the locks of this process


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


class FolderLock:
    """Holds a folder until `release`, until it is garbage, or until the process ends, however that comes.

    `note` is a line for the log where the file system has no locks: then nothing is held, and the run continues.
    """

    note: str | None = None

    def __init__(self, folder: Path):
        """Raises ValueError, which names the process, where another one holds the folder."""
        self._folder = folder.resolve()
        self._file = (folder / ".lock").open("a+b", buffering=0)
        try:
            is_free = lock_descriptor(self._file.fileno(), blocking=False)
        except OSError as error:
            self.note = f"{folder} cannot be locked ({error.strerror}): start no second run in it while this one runs"
            return
        # Windows lets no other process read the locked byte, the first: the process id stands behind it.
        if not is_free:
            self._file.seek(1)
            holder = self._file.read().decode() or "unknown"
            self._file.close()
            raise ValueError(f"{folder}: process {holder} is running in it; one run at a time")
        self._file.truncate(0)
        self._file.write(f" {os.getpid()}".encode())

    def release(self) -> None:
        """Let go of the folder; on Windows it cannot be removed before."""
        self._file.close()
        _held.pop(self._folder, None)


def lock(folder: Path) -> FolderLock:
    """The lock of the folder, which this process may hold already. Raises ValueError where another process does."""
    held = _held.get(folder.resolve())
    if held is None:
        held = _held[folder.resolve()] = FolderLock(folder)
    return held


def _let_go_in_child() -> None:
    """A forked worker inherits the lock and would hold it beyond the end of the run."""
    for held in list(_held.values()):
        held._file.close()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing is inherited
    os.register_at_fork(after_in_child=_let_go_in_child)
