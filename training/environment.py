"""What made a run's result: machine, versions, commit and command, without what is private to its user."""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from grades.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchvision", "transformers", "numpy", "datasets", "tokenizers", "safetensors", "pillow", "peft",
)  # fmt: skip


def record_environment(folder: Path, device: torch.device, dtype: str, step: int = 0) -> None:
    """Write environment.json: a list with what `describe_environment` finds for each start of the run, with its step.

    step: steps that were done before; entries of later steps belong to what the run has left behind.
    """
    path = folder / "environment.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else []
    starts = [entry for entry in earlier if entry["step"] < step]
    write_json(path, [*starts, {"step": step, **describe_environment(device, dtype)}])


def describe_environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """dtype: of the matrix products, as it came out. What is not known is None; no host name, user or home folder."""
    is_cuda = device.type == "cuda"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_private([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(ROOT),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device.type,
        "dtype": dtype,
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "gpu_memory_gib": _gib(torch.cuda.get_device_properties(device).total_memory) if is_cuda else None,
        "cuda": torch.version.cuda if is_cuda else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _gib(_memory_bytes()),
    }


def without_private(words: list[str]) -> list[str]:
    """The words with ~ for the home folder and USER for the user's name where it is part of a path."""
    home = rf"(?<![\w.]){re.escape(str(Path.home()))}(?=[/\\]|$)"
    words = [re.sub(home, "~", word) for word in words]
    try:
        user = re.escape(getpass.getuser())
    except (KeyError, OSError):  # a container's user without a name
        return words
    return [re.sub(rf"(?<=[/\\]){user}(?=[/\\]|$)", "USER", word) for word in words]


def commit(root: Path) -> dict[str, Any] | None:
    """{"id": ..., "is_dirty": whether tracked files differ}; None where root is no checkout or git is absent."""
    top, identity = _output("git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD").splitlines() or ["", ""]
    if not top or Path(top).resolve() != root:  # a folder in somebody else's checkout
        return None
    status = _output("git", "-C", str(root), "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {"id": identity, "is_dirty": bool(status)}


def _output(*command: str) -> str:
    """What the command prints; nothing where it is absent, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else ""
    else:
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    return name or platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows does not say
        return None


def _gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / 2**30, 1)
