"""In which order rows are visited: seeded permutations, one per epoch, of one data set or of a mixture of subsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import count
from typing import Any

import numpy as np

Key = tuple[int, int]  # (epoch, index of a row)


def by_subset(rows: Any) -> dict[str, np.ndarray]:
    """Name of each subset -> the indices of its rows, int64; {"": all} where the rows have no subsets."""
    return rows.by_subset() if hasattr(rows, "by_subset") else {"": np.arange(len(rows))}


def check_mixture(weights: Mapping[str, float], subsets: Iterable[str]) -> None:
    """Raise ValueError for a weight whose subset does not exist."""
    if missing := sorted(set(weights) - set(subsets)):
        there = ", ".join(filter(None, subsets)) or "no subsets"
        raise ValueError(
            f"--mixture_weights {', '.join(missing)}: no such subset in the training rows; there are {there}"
        )


class EpochIndices:
    """epoch -> the indices of its rows, int64 [visits], in a seeded order.

    Each row once; with weights as often as the weight of its subset says, 1 where it is not named. Of a subset with
    weight 0.5 an epoch takes the half that the epoch before has not taken.
    """

    def __init__(self, rows: Sized, weights: Mapping[str, float], seed: int):
        """Raises ValueError without rows, and for a weight whose subset does not exist."""
        if len(rows) == 0:
            raise ValueError("the training data has no rows")
        self.seed = seed
        self.length = len(rows)
        self.groups: list[tuple[np.ndarray, int]] = []  # indices of a subset, and how many of them an epoch takes
        if weights:
            subsets = by_subset(rows)
            check_mixture(weights, subsets)
            for name, indices in subsets.items():
                self.groups.append((indices, max(1, round(weights.get(name, 1.0) * len(indices)))))
            self.length = sum(taken for _, taken in self.groups)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, epoch: int) -> np.ndarray:
        if not self.groups:
            return np.random.default_rng((self.seed, epoch)).permutation(len(self))
        drawn = []
        for number, (indices, taken) in enumerate(self.groups):
            size, start, stop = len(indices), epoch * taken, (epoch + 1) * taken
            rounds = range(start // size, -(-stop // size))
            orders = [np.random.default_rng((self.seed, number, r)).permutation(indices) for r in rounds]
            drawn.append(np.concatenate(orders)[start - rounds[0] * size :][:taken])
        return np.random.default_rng((self.seed, epoch)).permutation(np.concatenate(drawn))


class EpochOrder:
    """Endless lists of batch_size keys of a VQADataset, one list per batch of all ranks together.

    The rows that do not fill a batch at the end of an epoch are left out; where a batch is larger than the data set it
    continues into the next epoch.
    """

    def __init__(self, visits: EpochIndices, batch_size: int, start: int = 0):
        """start: the number of lists to skip, which takes no time."""
        self.visits, self.batch_size = visits, batch_size
        num_rows = len(visits)
        self.batches_per_epoch = max(num_rows // batch_size, 1)
        self.fills_a_batch = num_rows >= batch_size
        epoch_keys = self.batches_per_epoch * batch_size if self.fills_a_batch else num_rows
        self.start_epoch, self.start_key = divmod(start * batch_size, epoch_keys)

    def __iter__(self) -> Iterator[list[Key]]:
        keys: list[Key] = []
        for epoch in count(self.start_epoch):
            order = self.visits[epoch].tolist()
            keys += [(epoch, index) for index in order[self.start_key if epoch == self.start_epoch else 0 :]]
            while len(keys) >= self.batch_size:
                yield keys[: self.batch_size]
                keys = keys[self.batch_size :]
            if self.fills_a_batch:
                keys = []
