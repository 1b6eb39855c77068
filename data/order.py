"""In which order rows are visited: seeded permutations, one per epoch, of one data set or of a mixture of subsets."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count
from typing import Any

import numpy as np

from data.mixture import MixtureSet, sets_of, shares_of
from models.config import TrainConfig

Key = tuple[int, int]  # (epoch, index of a row)
# A share of a mixture is a whole number of this many parts of all samples, and at least one.
PARTS = 100_000


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

    is_endless = False  # an epoch ends, and the next one is another order

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

    def keys(self, epoch: int, reader: int = 0, readers: int = 1) -> list[Key]:
        """What one of several readers visits in the epoch, in order; all of them together visit all of it."""
        # Where there are fewer rows than readers, other readers have one in each epoch.
        mine = self[epoch][(reader + epoch) % readers :: readers]
        return [(epoch, index) for index in mine.tolist()]


class MixtureOrder:
    """The same for a mixture of data sets: whose turn it is follows a fixed schedule, so that after any number of
    samples each set has had its share to within one sample (between any two points within two, with two sets within
    one). Each set has a seeded order and epochs of its own.

    Several readers keep to the schedule each for itself, from places that lie apart, and divide the visits of each set.
    """

    is_endless = True  # an epoch is as many samples as there are rows; the order continues from one to the next

    def __init__(self, rows: Any, sets: Sequence[MixtureSet], seed: int):
        """rows: their subsets are the sets. Raises ValueError for a set without rows."""
        subsets = by_subset(rows)
        if empty := [one.label for one in sets if not len(subsets.get(one.label, ()))]:
            raise ValueError(
                f"--mixture: no training rows in {', '.join(empty)}; with --val_dataset_path, or a smaller --val_size, "
                "none are held out"
            )
        self.sets, self.seed, self.length = sets, seed, len(rows)
        self.indices = [subsets[one.label] for one in sets]
        self.schedule = schedule(whole_parts(shares_of(sets, [len(indices) for indices in self.indices])))
        self.turns = np.bincount(self.schedule, minlength=len(sets))  # of each set in the schedule
        self.shares = (self.turns / len(self.schedule)).tolist()

    def __len__(self) -> int:
        return self.length

    def keys(self, epoch: int, reader: int = 0, readers: int = 1) -> list[Key]:
        """As EpochIndices.keys. The epoch of a key is that of its set."""
        period, length = len(self.schedule), -(-self.length // readers)
        begin = reader * period // readers
        first = begin + epoch * length
        turns = self.schedule[np.arange(first, first + length) % period]
        found = np.empty((length, 2), dtype=np.int64)
        for number in range(len(self.sets)):
            places = np.flatnonzero(turns == number)
            before = self._turns_before(number, first) - self._turns_before(number, begin)
            found[places] = self._rows(number, (before + np.arange(len(places))) * readers + reader)
        return [(round_, index) for round_, index in found.tolist()]

    def _turns_before(self, number: int, sample: int) -> int:
        """How many of the first samples of the schedule are of this set."""
        rounds, rest = divmod(sample, len(self.schedule))
        return rounds * int(self.turns[number]) + int((self.schedule[:rest] == number).sum())

    def _rows(self, number: int, visits: np.ndarray) -> np.ndarray:
        """int64 [n, 2]: (epoch of the set, row) of its visits, int64 [n] in ascending order."""
        indices = self.indices[number]
        found = np.stack([visits // len(indices), visits % len(indices)], axis=1)
        epochs, starts = np.unique(found[:, 0], return_index=True)
        ends = [*starts.tolist()[1:], len(visits)]  # they ascend: the visits of an epoch stand side by side
        for epoch, start, end in zip(epochs.tolist(), starts.tolist(), ends, strict=False):
            order = np.random.default_rng((self.seed, number, epoch)).permutation(indices)
            found[start:end, 1] = order[found[start:end, 1]]
        return found


def row_visits(rows: Any, cfg: TrainConfig) -> EpochIndices | MixtureOrder:
    """The order in which the run visits its rows. Raises ValueError as these do."""
    if cfg.mixture:
        return MixtureOrder(rows, sets_of(cfg), cfg.seed)
    return EpochIndices(rows, cfg.mixture_weights, cfg.seed)


def whole_parts(shares: Sequence[float]) -> tuple[int, ...]:
    """The shares, which make 1, as whole numbers without a common divisor: of PARTS, each at least 1."""
    scaled = [share * PARTS for share in shares]
    parts = [max(1, math.floor(part + 1e-6)) for part in scaled]
    most_left = sorted(range(len(parts)), key=lambda i: parts[i] - scaled[i])
    for i in most_left[: max(0, PARTS - sum(parts))]:
        parts[i] += 1
    divisor = math.gcd(*parts)
    return tuple(part // divisor for part in parts)


@functools.cache
def schedule(parts: tuple[int, ...]) -> np.ndarray:
    """int64 [sum(parts)]: whose turn it is, to be repeated for ever; number i has parts[i] turns.

    After n samples number i has had n * parts[i] / sum(parts) turns, up to at most 1 - 1 / (2 * (numbers - 1)) more or
    fewer: each turn has an earliest and a latest place, and of those that may be next comes the one that must be first.
    R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), 323-330.
    """
    total, fine = sum(parts), max(2, 2 * len(parts) - 2)
    later = [
        (-(-total // (fine * part)) - 1, i) for i, part in enumerate(parts)
    ]  # (earliest place, number), of next turns
    heapq.heapify(later)
    taken = [0] * len(parts)
    ready: list[tuple[int, int]] = []  # (latest place, number)
    found = []
    for place in range(total):
        while later and later[0][0] <= place:
            i = heapq.heappop(later)[1]
            heapq.heappush(ready, (total * ((taken[i] + 1) * fine - 1) // (fine * parts[i]), i))
        i = heapq.heappop(ready)[1]
        taken[i] += 1
        found.append(i)
        # The first place after which it has this turn and not more than it may have: rounded up, and counted from 0.
        heapq.heappush(later, (-(-total * (taken[i] * fine + 1) // (fine * parts[i])) - 1, i))
    return np.array(found)


class EpochOrder:
    """Endless lists of batch_size keys of a VQADataset, one list per batch of all ranks together.

    The rows that do not fill a batch at the end of an epoch are left out; where a batch is larger than the data set,
    and of a mixture, it continues into the next epoch.
    """

    def __init__(self, visits: EpochIndices | MixtureOrder, batch_size: int, start: int = 0):
        """start: the number of lists to skip, which takes no time."""
        self.visits, self.batch_size = visits, batch_size
        num_rows = len(visits)
        self.batches_per_epoch = max(num_rows // batch_size, 1)
        self.leaves_out = num_rows >= batch_size and not visits.is_endless
        epoch_keys = self.batches_per_epoch * batch_size if self.leaves_out else num_rows
        self.start_epoch, self.start_key = divmod(start * batch_size, epoch_keys)

    def __iter__(self) -> Iterator[list[Key]]:
        keys: list[Key] = []
        for epoch in count(self.start_epoch):
            keys += self.visits.keys(epoch)[self.start_key if epoch == self.start_epoch else 0 :]
            whole = len(keys) - len(keys) % self.batch_size
            for first in range(0, whole, self.batch_size):
                yield keys[first : first + self.batch_size]
            keys = [] if self.leaves_out else keys[whole:]
