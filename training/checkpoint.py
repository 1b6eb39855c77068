"""Checkpoints that a crash at any moment leaves whole: written beside their place, then renamed."""

import json
import os
import shutil
from pathlib import Path

import torch


def save_checkpoint(folder: Path, model, tokenizer, training_state: dict | None = None) -> None:
    """Write model (config.json, model.safetensors), tokenizer and, where given, training_state.pt into folder.

    A checkpoint that is already there is replaced only once the new one is complete.
    """
    beside = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if training_state is not None:
        torch.save(training_state, beside / "training_state.pt")
    _flush_to_disk(beside)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    beside.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def find_checkpoint(path: str | Path) -> Path | str:
    """The checkpoint that path means: itself, or the best, else the last one of a run folder; else path as it is."""
    root = Path(path)
    places = [root] + [root / "checkpoints" / name for name in ("best", "best.old", "last", "last.old", "crash")]
    for place in places:
        if (place / "config.json").is_file() and (place / "model.safetensors").is_file():
            return place
    if root.is_dir():
        raise FileNotFoundError(f"{root} holds no checkpoint (config.json and model.safetensors)")
    return path


def write_text(path: Path, text: str) -> None:
    """Write the file, beside its name first."""
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _flush_to_disk(folder: Path) -> None:
    """A rename may reach the disk before the data of the files it names; after this it cannot."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
