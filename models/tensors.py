"""Tensors in safetensors files, and copying them into a model with everything that does not fit reported at once."""

import json
from pathlib import Path
from typing import NamedTuple

import torch


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: list[int]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder in the hub's format, by name; reads headers only.

    The folder holds model.safetensors, or shards and model.safetensors.index.json. Raises FileNotFoundError for a file
    that is missing, ValueError for a damaged one.
    """
    from safetensors import SafetensorError, safe_open

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
    from safetensors import safe_open

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
        with safe_open(file, framework="pt") as tensors:
            for key, tensor in stored.items():
                if tensor.file == file:
                    destinations[key].copy_(tensors.get_tensor(tensor.name))


def named_parameters(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters as prefix.name."""
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


@torch.no_grad()
def set_extra_rows(matrix: torch.Tensor, base: int) -> None:
    """Set rows base.. of matrix [V, C] to the mean of those before: no logit of a new token stands out."""
    matrix[base:] = matrix[:base].float().mean(dim=0).to(matrix.dtype)
