"""Sums over all elements of tensors, or estimates of them from a sample of the elements; each takes one pass.

Sums are float32 whatever the dtype of the tensors, and stay on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Elements per chunk. On a CPU a chunk stays in the cache from the first operation to the last, so that each tensor is
# read from memory once; on a GPU it is so large that the launches of its kernels do not count.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
# A sample is made of runs of this many neighbouring elements. Memory is read by cache lines, 16 elements of float32,
# but runs of 8 halve the error at the same N: neighbours in a gradient are alike.
RUN_ELEMENTS = 8
# At least this many elements of a matrix are sampled: fewer would save nothing and cost precision.
MIN_SAMPLE_ELEMENTS = 4096


class Exact:
    """Sums over all elements: float32, one per tensor, on the device of the first tensor."""

    def copy(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What `change` compares with later. into: earlier copies of the same tensors, whose memory is used again."""
        if into is not None:
            return [old.copy_(local(x).detach()) for x, old in zip(tensors, into, strict=True)]
        return [local(x).detach().clone(memory_format=torch.contiguous_format) for x in tensors]

    def change(
        self, tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], update: bool = True
    ) -> torch.Tensor:
        """The sums of |x - kept|. With update kept is a copy of x afterwards, without it is undefined."""
        pairs = zip(tensors, kept, strict=True)
        return stack([_change(local(x).detach().flatten(), old.view(-1), update) for x, old in pairs])

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums of |x|."""
        return stack([_norm(local(x).detach().flatten()) for x in tensors])

    def root(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums of sqrt(x)."""
        return stack([_sum(torch.sqrt, local(x).detach().flatten()) for x in tensors])


def _change(x: torch.Tensor, kept: torch.Tensor, update: bool) -> torch.Tensor:
    """x, kept: [elements]. The sum of |x - kept|; overwrites kept."""
    chunk = _chunk_elements(kept)
    total = torch.zeros((), device=kept.device)
    for new, old in zip(torch.split(x, chunk), torch.split(kept, chunk), strict=True):
        # In place: a buffer for the differences would take its share of the cache.
        total += old.sub_(new).abs_().sum() if old.dtype == torch.float32 else (new.float() - old).abs_().sum()
        if update:
            old.copy_(new)
    return total


def _norm(x: torch.Tensor) -> torch.Tensor:
    # On a CPU vector_norm takes three times as long.
    return _sum(torch.abs, x) if x.device.type == "cpu" else torch.linalg.vector_norm(x, 1, dtype=torch.float32)


def _sum(function: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The sum of function(x), computed chunk by chunk in one buffer that stays in the cache."""
    chunk = min(_chunk_elements(x), x.numel())
    buffer, total = torch.empty(chunk, device=x.device), torch.zeros((), device=x.device)
    for piece in torch.split(x, chunk) if chunk else ():
        part = buffer[: piece.numel()]
        total += function(part.copy_(piece) if piece.dtype != torch.float32 else piece, out=part).sum()
    return total


class Sampled(Exact):
    """Estimates of the same sums from a sample of 1/n of the elements; copies hold the sample alone.

    A matrix lies in memory as runs of RUN_ELEMENTS. They are divided into equal stretches, and of each stretch one run
    at a random place is taken, so that each run is as likely as any other. A fixed stride would meet the same columns
    again and again where it and the row length have a common divisor, and columns differ more than elements do.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.chosen: dict[tuple[int, torch.device], torch.Tensor] = {}  # indices of runs, by their number and device

    def copy(self, tensors: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        runs = [_runs(x) for x in tensors]
        places = [None] * len(runs) if into is None else into
        return [torch.index_select(x, 0, self._choose(x), out=old) for x, old in zip(runs, places, strict=True)]

    def change(
        self, tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], update: bool = True
    ) -> torch.Tensor:
        new = self.copy(tensors)
        sums = self._scaled(
            tensors,
            [a.float().sub_(b) if a.dtype != torch.float32 else b.sub_(a) for a, b in zip(new, kept, strict=True)],
        )
        if update:
            for old, fresh in zip(kept, new, strict=True):
                old.copy_(fresh)
        return sums

    def norm(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._scaled(tensors, self.copy(tensors))

    def root(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._scaled(tensors, [part.float().sqrt_() for part in self.copy(tensors)])

    @staticmethod
    def _scaled(tensors: Sequence[torch.Tensor], taken: Sequence[torch.Tensor]) -> torch.Tensor:
        # A rank's part of a small sharded matrix may be empty.
        factors = [local(x).numel() / max(1, part.numel()) for x, part in zip(tensors, taken, strict=True)]
        sums = stack([part.abs_().sum(dtype=torch.float32) for part in taken])
        return sums * torch.tensor(factors).to(sums.device, non_blocking=True)

    def _choose(self, runs: torch.Tensor) -> torch.Tensor:
        """Indices of the chosen runs [k]: the same for matrices with equally many runs, after a resume, on any rank."""
        key = (runs.shape[0], runs.device)
        if key not in self.chosen:
            total, width = runs.shape
            count = min(total, max(-(-total // self.n), MIN_SAMPLE_ELEMENTS // width))
            generator = torch.Generator().manual_seed(total)
            # A stretch has total / count runs, a fraction: rounded, some runs would be likelier than others.
            places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
            self.chosen[key] = (places * total / count).clamp_(max=total - 1).int().to(runs.device)
        return self.chosen[key]


def make_sampler(sample: int) -> Exact:
    """What sums over 1/sample of the elements; sample >= 1, 1 for all of them."""
    return Sampled(sample) if sample > 1 else Exact()


def _runs(x: torch.Tensor) -> torch.Tensor:
    """The elements as [runs, RUN_ELEMENTS] without an incomplete last run; a small matrix as [elements, 1]."""
    x = local(x).detach().flatten()
    width = RUN_ELEMENTS if x.numel() >= MIN_SAMPLE_ELEMENTS else 1
    return x[: x.numel() // width * width].view(-1, width)


def stack(sums: list[torch.Tensor]) -> torch.Tensor:
    """The sums [n] on the device of the first; a model's layers may lie on several devices."""
    return torch.stack([x.to(sums[0].device) for x in sums]) if sums else torch.empty(0)


def local(x: Any) -> Any:
    """This rank's shard of a sharded tensor (DTensor), else the tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def _chunk_elements(x: torch.Tensor) -> int:
    return CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"])
