"""Readers, one in each worker process of every rank, that each read rows of their own: of streams and for packing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.datasets import DropCounter, Sample, VQADataset, nothing_usable
from data.sources import RowStream

# Where a reader stands: its epoch, samples of the epoch that it is done with, and, with packing, how many rows it has
# given of the window that begins after them.
Place = tuple[int, int, int]

FRUITLESS = 300  # rows and epochs, one after the other, that a reader tries before it gives up


class Readers(IterableDataset):
    """Endless (batch, place after it) of the reader that asks; `items` says what a batch holds."""

    def __init__(self, dataset: VQADataset, collator, start: dict | None, rank: int = 0, world_size: int = 1):
        """start: the `position` of the batch to go on after. Of another batch_size it is the same rows."""
        cfg = dataset.cfg
        mine = max(1, cfg.num_workers)
        start = start or {"places": [(0, 0, 0)] * mine, "turn": 0}
        if len(start["places"]) != mine:
            raise ValueError(
                f"--num_workers {cfg.num_workers}: must be {len(start['places'])} as in the run that goes on, or "
                "--resume_override given: of a stream, and with --packing, each worker reads rows of its own"
            )
        self.dataset, self.collator = dataset, collator
        self.places, self.turn = list(start["places"]), start["turn"]  # of this rank, and whose batch comes next
        self.first, self.readers = rank * mine, world_size * mine
        if isinstance(dataset.rows, RowStream):
            dataset.rows.prepare(cfg.mixture_weights)

    def items(self, reader: int, place: Place) -> Iterator[tuple[object, Place]]:
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
        """Batches with their `position`: the places of this rank's readers, and whose turn is next. options: of the
        DataLoader."""
        places, turn = list(self.places), self.turn
        for batch, place in DataLoader(self, batch_size=None, **options | {"collate_fn": as_it_is}):
            places[turn] = place
            turn = (turn + 1) % len(places)  # a loader takes from its workers in turn
            yield batch | {"position": {"places": list(places), "turn": turn}}

    def stream(self, reader: int, epoch: int, offset: int) -> Iterator[dict]:
        """The reader's rows of an epoch of a stream, after the first `offset` of them."""
        cfg = self.dataset.cfg
        rows = self.dataset.rows.epoch(f"{cfg.seed}/{epoch}", cfg.mixture_weights, reader, self.readers)
        return islice(rows, offset, None)


class Patience:
    """Ends a reader that finds nothing to use.

    Its share of one epoch may be empty, or bad to the last row, by chance: few rows, many readers, small weights.
    """

    def __init__(self):
        self.fruitless = 0  # rows and epochs since the last row that could be used
        self.dropped, self.dropped_before = DropCounter(), DropCounter()  # in this epoch, and the one before with rows

    def see(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those of the samples that cannot be used."""
        unusable = []
        for sample in samples:
            if sample.conversations:
                self.fruitless = 0
            else:
                self.fruitless += 1
                self.dropped.update(sample.dropped)
                unusable.append(sample)
        return unusable

    def end_epoch(self) -> None:
        """Raises ValueError where it was the last to be tried."""
        self.fruitless += 1
        self.dropped, self.dropped_before = DropCounter(), self.dropped or self.dropped_before
        if self.fruitless > FRUITLESS:
            if self.dropped_before:
                raise nothing_usable(self.dropped_before)
            raise ValueError("the training data has no rows")


def as_it_is(item):
    return item
