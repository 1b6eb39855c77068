"""Few sizes for what compiled blocks see: a compiled block is compiled again where a size is new to it."""

import torch

SIZES_PER_DOUBLING = 8


def bucket(count: int, most: int | None = None, per_doubling: int = SIZES_PER_DOUBLING) -> int:
    """The next of few sizes from `count` on: all up to 16, then eight in each doubling
    (18, 20, ..., 32, 36, ..., 64, 72, ...).

    At most an eighth is added. most: the largest size that is needed, which ends the buckets; more is left as it is.
    """
    step = max(1, (1 << (count - 1).bit_length()) // (2 * per_doubling))
    size = -(-count // step) * step
    return size if most is None else max(count, min(size, most))


def sized_alike(x: torch.Tensor) -> torch.Tensor:
    """x [N, ...] itself: what compiles its receiver shall do so once for every N, instead of for this one at first."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x
