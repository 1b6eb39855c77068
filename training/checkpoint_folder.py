"""Checkpoints on the disk, whole at every moment: written beside their place, then renamed, under checksums.

A run's folder `checkpoints` holds one folder per step (step_00000400), the links `last` and `best` to two of them, and
`crash` where the run has ended in an error. A name that ends in .tmp is unfinished, in .old about to be replaced.
Imports no torch, so that a wrong path is reported at once.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grades.files import write_json, write_text

MANIFEST = "manifest.json"
STATE = "training_state.pt"
CARD = "README.md"  # the model card, which its user may edit: without checksum
OPTIMIZER = "optimizer"  # folder of the optimizer's state where weights are sharded, each rank's part a file
SHARD = "shard_{}.pt"  # what else a rank alone has then


class CheckpointError(Exception):
    """A checkpoint could not be written."""


def unfinished(folder: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return folder.with_name(folder.name + ".tmp")


def begin(folder: Path) -> Path:
    """Make the empty folder beside, where the parts of the checkpoint are written; returns it."""
    beside = unfinished(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


@contextmanager
def finishing(folder: Path, step: int | None) -> Iterator[Path]:
    """Within this context the last parts are written into the folder that it gives; then it takes its place.

    manifest.json, with step, size and SHA-256 of every other file but the card, comes last. A checkpoint that is
    already there is replaced only once the new one is complete. Raises CheckpointError, and leaves nothing unfinished,
    where the disk refuses.
    """
    beside, previous = unfinished(folder), folder.with_name(folder.name + ".old")
    try:
        yield beside
        write_manifest(beside, step)
        for path in (*beside.rglob("*"), beside):  # a rename may reach the disk before the data it is about
            _flush_to_disk(path)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        beside.rename(folder)
        _flush_to_disk(folder.parent)
    except Exception as error:  # of a full disk each library has an exception of its own
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{folder.name} could not be written ({error})") from error
    shutil.rmtree(previous, ignore_errors=True)


def step_folder(run_folder: Path, step: int) -> Path:
    """The place of the checkpoint of a step."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def step_folders(run_folder: Path) -> list[Path]:
    """The checkpoints of a run's steps, whole or not, the newest first."""
    found = []
    for path in (run_folder / "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)(\.old)?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def point(link: Path, folder: Path) -> None:
    """Let the link lead to the folder beside it, at once; a file with its name where links cannot be made."""
    beside = link.with_name(link.name + ".tmp")
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(folder.name)
        beside.replace(link)
    except OSError:  # Windows without the right to make them
        beside.unlink(missing_ok=True)
        write_text(link, folder.name)


def follow(link: Path) -> Path:
    """The folder that `point` has made the link lead to."""
    return link.with_name(link.read_text(encoding="utf-8").strip()) if link.is_file() else link.resolve()


def prune(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    best = follow(run_folder / "checkpoints" / "best").name
    for folder in step_folders(run_folder)[keep:]:
        if folder.name != best:
            doomed = folder.rename(unfinished(folder))  # so that no half of it counts as damaged
            shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(run_folder: Path) -> None:
    """Remove what a killed run has left behind."""
    for path in (run_folder / "checkpoints").glob("*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def find_checkpoint(path: str | Path, newest: bool = False) -> Path | str:
    """The checkpoint that a path means: itself, or of a run folder the best, else the newest; else the path as it is.

    newest: of a run folder the newest, else the best. Raises FileNotFoundError for a folder without a checkpoint.
    """
    root = Path(path).expanduser()
    best, last, crash = (root / "checkpoints" / name for name in ("best", "last", "crash"))
    steps = step_folders(root)
    for place in (root, *((last, *steps, best) if newest else (best, last, *steps)), crash):
        place = follow(place) if place.is_file() else place
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place
    if root.is_dir():
        raise FileNotFoundError(f"{root} holds no checkpoint (config.json and model.safetensors)")
    return path


def write_manifest(folder: Path, step: int | None) -> None:
    """Write manifest.json of the files that are there; a model card is not among them."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, CARD)
    }
    write_json(folder / MANIFEST, {"step": step, "files": files})


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint's files; None where they are what was written. Reads all of them."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, written in files.items():
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size:,} bytes of {written['bytes']:,}"
        for name, written in files.items():
            if _sha256(folder / name) != written["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} or what it names cannot be read"
    return None


def step_of(folder: Path) -> int:
    """The step after which a whole checkpoint was written."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["step"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Ask the system to write a file's data, or a folder's names where it does that (Windows opens no folders)."""
    if path.is_dir():
        with suppress(PermissionError):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
