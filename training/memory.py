"""Memory that this process has used at most."""

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int | None:
    """Bytes: on CUDA of all tensors, elsewhere of the whole process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
