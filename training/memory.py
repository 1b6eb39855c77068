"""How much memory this process has needed so far."""

import contextlib
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int | None:
    """On CUDA the most that tensors have taken on the device, on a CPU the most that the whole process has.

    None where that is not known: on other devices, and on Windows without psutil.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return _windows_peak_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere


def reserved_memory_bytes(device: torch.device) -> int | None:
    """On CUDA the most that PyTorch has taken of the device, tensors or not; None elsewhere."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def _windows_peak_bytes() -> int | None:
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.Process().memory_info().peak_wset
    return None
