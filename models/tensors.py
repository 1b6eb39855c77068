"""Tensors in files of the hub, and copying them into a model with everything that does not fit reported at once."""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from models.hub import OLD_WEIGHTS


class Stored(NamedTuple):
    """A tensor in a file of safetensors or of torch.save."""

    file: Path
    name: str
    shape: list[int]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder in the hub's format, by name; reads headers only.

    The folder holds model.safetensors, or shards and model.safetensors.index.json; one without either may hold
    pytorch_model.bin, as older ones do. Raises FileNotFoundError for a file that is missing, ValueError for a
    damaged one.
    """
    from safetensors import SafetensorError, safe_open

    old = folder / OLD_WEIGHTS
    if old.exists() and not any(folder.glob("*.safetensors*")):
        return {name: Stored(old, name, list(tensor.shape)) for name, tensor in _old_tensors(old).items()}
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if absent := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(f"{folder}: no {', '.join(absent)}")
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                names = tensors.keys()
                stored |= {name: Stored(folder / file, name, tensors.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: is damaged: {error}") from error
    return stored


@torch.no_grad()
def copy_tensors(label: str, stored: dict[str, Stored], destinations: dict[str, torch.Tensor]) -> None:
    """Copy each stored tensor into the destination of the same key, cast to its dtype.

    Raises ValueError that lists, under `label`, all that are missing, left over or of another shape.
    """
    problems = [f"{key}: missing" for key in destinations if key not in stored]
    problems += [f"{key}: left over" for key in stored if key not in destinations]
    problems += [
        f"{key}: shape {tensor.shape}, must be {list(destinations[key].shape)}"
        for key, tensor in stored.items()
        if key in destinations and list(destinations[key].shape) != tensor.shape
    ]
    if problems:
        raise ValueError(f"{label}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))
    for file in sorted({tensor.file for tensor in stored.values()}):
        with _open(file) as read:
            for key, tensor in stored.items():
                if tensor.file == file:
                    destinations[key].copy_(read(tensor.name))


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """What reads a tensor of the file by name."""
    from safetensors import safe_open

    if file.name == OLD_WEIGHTS:
        yield _old_tensors(file).__getitem__
    else:
        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_tensor


def _old_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, read when they are used; no code in it is run. ValueError: damaged."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # damaged bytes raise whatever they happen to spell
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: is damaged: {reason}") from error
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def named_parameters(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters as prefix.name."""
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def set_extra_rows(matrix: torch.Tensor, base: int) -> None:
    """Set rows base.. of matrix [V, C] to the mean of those before: no logit of a new token stands out."""
    matrix[base:] = matrix[:base].float().mean(dim=0).to(matrix.dtype)
