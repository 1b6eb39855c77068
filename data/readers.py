"""Readers of rows, one in each worker process of every rank, that each read a share of their own.

Used for streams and for packing, where a batch cannot be named by the indices of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.datasets import PreparedSample, Sample, VQADataset
from data.drops import DropCounter, nothing_usable
from data.streams import EPOCH_START, EpochRows, RowStream, StreamPlace

# Where a reader continues: its epoch; the samples of the epoch that it is done with; where they end in a stream (of
# other rows EPOCH_START); and, with packing, how many rows it has given of the window that begins there.
Place = tuple[int, int, StreamPlace, int]
Seen = TypeVar("Seen", Sample, PreparedSample)

FRUITLESS = 300  # rows and epochs, one after the other, without a usable one, after which a reader gives up
FRUITLESS_ROWS = 10_000  # bad rows, one after the other, after which the rest of an epoch is not tried


def start_of(epoch: int) -> Place:
    """The place before the first row of an epoch."""
    return epoch, 0, EPOCH_START, 0


class Readers(IterableDataset):
    """Endless (batch, place after it) of the reader whose process iterates; a subclass says what a batch holds."""

    def __init__(
        self,
        dataset: VQADataset,
        collator: Callable[[list], dict],
        start: dict | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        """start: the `position` of the batch to continue after, saved with equally many workers and ranks; its
        batch_size may have been another one. None: the beginning."""
        cfg = dataset.cfg
        mine = max(1, cfg.num_workers)
        start = start or {"places": [start_of(0)] * mine, "turn": 0}
        self.dataset = dataset
        self.collator: Any = collator
        self.places, self.turn = list(start["places"]), start["turn"]  # of this rank, and whose batch comes next
        self.first, self.readers = rank * mine, world_size * mine
        if isinstance(dataset.rows, RowStream):
            dataset.rows.prepare(cfg.mixture_weights)

    def items(self, reader: int, place: Place) -> Iterator[tuple[Any, Place]]:
        """(item, place after it) of one of all `self.readers`, from a place on."""
        raise AssertionError("a subclass reads")

    def __iter__(self) -> Iterator[tuple[dict, Place]]:
        worker = get_worker_info()
        number = (self.turn + (worker.id if worker else 0)) % len(self.places)
        items = []
        for item, place in self.items(self.first + number, self.places[number]):
            items.append(item)
            if len(items) == self.dataset.cfg.batch_size:
                yield self.collator(items), place
                items = []

    def batches(self, options: dict) -> Iterator[dict]:
        """Batches with their `position`: the places of this rank's readers, and whose turn is next.

        options: of the DataLoader.
        """
        places, turn = list(self.places), self.turn
        for batch, place in DataLoader(self, batch_size=None, **options | {"collate_fn": as_it_is}):
            places[turn] = place
            turn = (turn + 1) % len(places)  # a loader takes from its workers in turn
            yield batch | {"position": {"places": list(places), "turn": turn}}

    def stream(self, reader: int, epoch: int, place: StreamPlace = EPOCH_START) -> EpochRows:
        """The reader's rows of an epoch of a stream, after a place."""
        cfg = self.dataset.cfg
        key = f"{cfg.seed}/{epoch}"
        return self.dataset.rows.epoch(key, cfg.mixture_weights, reader, self.readers, place)


class StreamReaders(Readers):
    """Batches of the samples of a RowStream's rows."""

    def items(self, reader: int, place: Place) -> Iterator[tuple[Sample, Place]]:
        first_epoch, done, at, _ = place
        fruitless = FruitlessCounter(place == start_of(first_epoch))
        for epoch in count(first_epoch):
            rows = self.stream(reader, epoch, at)
            for row in rows:
                done += 1
                sample = self.dataset.sample(row, f"{epoch}/{row['id']}")
                fruitless.see([sample])
                yield sample, (epoch, done, rows.place, 0)
            fruitless.end_epoch()
            done, at = 0, EPOCH_START


class FruitlessCounter:
    """Ends a reader that finds nothing to use.

    Its share of one epoch may be empty, or bad to the last row, by chance: few rows, many readers, small weights. So it
    takes whole epochs of more than FRUITLESS rows in all, or as many epochs; bad rows at the end of an epoch that had
    others before do not count.
    """

    def __init__(self, is_whole: bool = True) -> None:
        """is_whole: it sees its first epoch from the beginning; else there may have been rows that can be used."""
        self.was_fruitful = not is_whole  # this epoch, before the row that comes next
        self.fruitless = 0  # rows and epochs since the last row that could be used
        self.dropped, self.dropped_before = DropCounter(), DropCounter()  # in this epoch, and the one before with rows
        self.in_a_row = DropCounter()  # since the last row that could be used

    def see(self, samples: Iterable[Seen]) -> list[Seen]:
        """Count the samples; returns those that cannot be used. Raises ValueError after FRUITLESS_ROWS bad ones."""
        unusable = []
        for sample in samples:
            if sample.conversations:
                self.fruitless, self.was_fruitful = 0, True
                self.in_a_row = DropCounter()
            else:
                self.fruitless += 1
                self.dropped.update(sample.dropped)
                self.in_a_row.update(sample.dropped)
                unusable.append(sample)
                if self.in_a_row.bad_rows() > FRUITLESS_ROWS:
                    raise nothing_usable(self.in_a_row)
        return unusable

    def end_epoch(self) -> None:
        """Raises ValueError where the reader has tried enough."""
        self.fruitless = 0 if self.was_fruitful else self.fruitless + 1
        self.was_fruitful = False
        self.dropped, self.dropped_before = DropCounter(), self.dropped or self.dropped_before
        if self.fruitless > FRUITLESS:
            if self.dropped_before:
                raise nothing_usable(self.dropped_before)
            raise ValueError("the training data has no rows")


def as_it_is(item: Any) -> Any:
    """A collate_fn that changes nothing."""
    return item
