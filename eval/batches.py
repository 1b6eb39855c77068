"""Batches of questions: of about the same length, and smaller ones once the device has run out of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from data.datasets import Questions

WINDOW = 8  # batches among which questions are sorted by length
FIRST_BATCH = {"cuda": 64, "cpu": 16}  # where --batch_size auto begins; out of memory halves it
Row = TypeVar("Row")
Key = TypeVar("Key")
Asked = TypeVar("Asked", bound=Questions | str)  # what the model gets, or why it cannot be asked
Result = TypeVar("Result")


class Batches:
    """Lists of at most `size` rows."""

    def __init__(self, size: int | None, device: torch.device):
        """size: None begins with FIRST_BATCH, and halves it where the device runs out of memory."""
        self.is_fixed = size is not None
        self.size = size or FIRST_BATCH.get(device.type, FIRST_BATCH["cpu"])
        self.device = device

    def run(self, rows: list[Row], ask: Callable[[list[Row]], Result]) -> Iterator[tuple[list[Row], Result]]:
        """(rows of a batch, what `ask` gives for them), batch after batch. Raises ValueError where not even the
        smallest one fits into memory."""
        while rows:
            batch = rows[: self.size]
            try:
                result = ask(batch)
            except torch.OutOfMemoryError:
                if self.is_fixed or len(batch) == 1:
                    message = f"--batch_size {self.size}: out of memory; take fewer, or --batch_size auto"
                    raise ValueError(message) from None
                self.size = len(batch) // 2
            else:
                rows = rows[len(batch) :]
                yield batch, result
                continue
            # Here, as the error has let go of what it held.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"out of memory: going on with batches of {self.size}", file=sys.stderr)

    def sorted_by_length(self, questions: Iterable[tuple[Key, Asked]]) -> Iterator[list[tuple[Key, Asked]]]:
        """Lists of WINDOW batches, the longest prompts first: what does not fit into memory shows at once. Last, what
        cannot be asked."""
        return sorted_by_length(questions, WINDOW * self.size)


def sorted_by_length(questions: Iterable[tuple[Key, Asked]], window: int) -> Iterator[list[tuple[Key, Asked]]]:
    """Lists of `window` questions, the longest prompts first and what cannot be asked last."""
    group: list[tuple[Key, Asked]] = []
    for one in questions:
        group.append(one)
        if len(group) == window:
            yield sorted(group, key=_length, reverse=True)
            group = []
    yield sorted(group, key=_length, reverse=True)


def _length(one: tuple[object, Questions | str]) -> int:
    return -1 if isinstance(one[1], str) else len(one[1].prompts[0])
