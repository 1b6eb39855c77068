"""Checkpoints that a crash at any moment leaves whole: written beside their place, then renamed, under checksums.

A run's folder `checkpoints` holds one folder a step (step_00000400), the links `last` and `best` to two of them, and
`crash` where the run has ended in an error. A name that ends in .tmp is unfinished, in .old about to be replaced.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch

MANIFEST = "manifest.json"
STATE = "training_state.pt"


class CheckpointError(Exception):
    """A checkpoint could not be written."""


def begin_checkpoint(folder: Path) -> Path:
    """Make the empty folder beside, where parts of the checkpoint are written before save_checkpoint is called."""
    beside = unfinished(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def save_checkpoint(folder: Path, model, tokenizer, training_state: dict | None = None, begun: bool = False) -> None:
    """Write model (config.json, model.safetensors), tokenizer and, where given, training_state.pt into folder.

    begun: begin_checkpoint was called, and what lies there since is part of the checkpoint. manifest.json, with size
    and SHA-256 of every other file, comes last. A checkpoint that is already there is replaced only once the new one is
    complete. Raises CheckpointError, and leaves nothing unfinished, where the disk refuses.
    """
    beside = unfinished(folder)
    previous = folder.with_name(folder.name + ".old")
    try:
        if not begun:
            begin_checkpoint(folder)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if training_state is not None:
            torch.save(training_state, beside / STATE)
        write_manifest(beside, (training_state or {}).get("step"))
        _flush_to_disk(beside)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        beside.rename(folder)
        _sync(folder.parent)
    except Exception as error:  # of a full disk each library has an exception of its own
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{folder.name} could not be written ({error})") from error
    shutil.rmtree(previous, ignore_errors=True)


def unfinished(folder: Path) -> Path:
    """Where a checkpoint lies until it is whole."""
    return folder.with_name(folder.name + ".tmp")


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:08d}"


def step_folders(run_folder: Path) -> list[Path]:
    """The checkpoints of a run's steps, whole or not, the newest first."""
    found = []
    for path in (run_folder / "checkpoints").glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)(\.old)?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def point(link: Path, folder: Path) -> None:
    """Let the link lead to the folder beside it, at once."""
    beside = link.with_name(link.name + ".tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(folder.name)
    beside.replace(link)


def prune(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best."""
    best = (run_folder / "checkpoints" / "best").resolve()
    for folder in step_folders(run_folder)[keep:]:
        if folder.resolve() != best:
            doomed = folder.rename(folder.with_name(folder.name + ".tmp"))  # so that no half of it counts as damaged
            shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(run_folder: Path) -> None:
    """What a killed run has left behind."""
    for path in (run_folder / "checkpoints").glob("*.tmp"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(path: str | Path) -> Path | str:
    """The checkpoint that path means: itself, or of a run folder the best, else the newest; else path as it is."""
    root = Path(path)
    named = [root / "checkpoints" / name for name in ("best", "last", "crash")]
    for place in (root, *named[:2], *step_folders(root), named[2]):
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place
    if root.is_dir():
        raise FileNotFoundError(f"{root} holds no checkpoint (config.json and model.safetensors)")
    return path


def write_manifest(folder: Path, step: int | None) -> None:
    """Write manifest.json of the files that are there."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
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


def write_text(path: Path, text: str) -> None:
    """Write the file, beside its name first."""
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(folder: Path) -> None:
    """A rename may reach the disk before the data of the files it names; after this it cannot."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
