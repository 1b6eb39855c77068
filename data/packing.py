"""Samples packed into rows of lm_max_length tokens, so that hardly a position is padding.

A row is filled from a window of samples whose lengths are known from texts and image headers; its images are decoded
when it is its turn. A window is packed by itself: what a row holds follows from the seed, the reader (one a worker
process) and the place of the window in the epoch, so that a run can go on from any row.

Shapes: B rows, T lm_max_length, K image slots, L labels.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.collators import TrainCollator
from data.datasets import Plan, Sample, VQADataset, count_drops, nothing_usable
from data.sources import EpochIndices, RowStream

WINDOW_ROWS = 128  # tokens of so many full rows are packed together; a row's worth of padding is what is left of them
PADDING = -1  # the document id of what follows the last document of a row


def pack(lengths: list[int], images: list[int], capacity: int, max_images: int) -> list[list[int]]:
    """Indices of the samples of each row: from the longest on, each into the fullest row that has room for it.

    lengths: tokens, at most capacity. images: of each sample; a row holds max_images or a single sample.
    """
    rows: list[list[int]] = []
    images_in: list[int] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), ascending
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[sample], 0))
        while place < len(rooms) and images_in[rooms[place][1]] + images[sample] > max_images:
            place += 1
        if place == len(rooms):
            rows.append([])
            images_in.append(0)
            rooms.append((capacity, len(rows) - 1))
        room, row = rooms.pop(place)
        rows[row].append(sample)
        images_in[row] += images[sample]
        insort(rooms, (room - lengths[sample], row))
    return rows


class PackedCollator(TrainCollator):
    """Packed rows to a batch of B rows of T = lm_max_length tokens, every conversation a document of its own."""

    def __call__(self, rows: list[list[Sample]]) -> dict:
        """As TrainCollator's batch, and position_ids, int64 [B, T], counting from 0 in every document, and
        document_ids, int32 [B, T], counting from 0 in every row, -1 at padding. Samples without conversations are
        counted as dropped."""
        shape = (len(rows), self.vlm_cfg.lm_max_length)
        input_ids, targets = np.full(shape, self.pad_id), np.full(shape, -100)
        position_ids, document_ids = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int32)
        for row, samples in enumerate(rows):
            end = 0
            conversations = (conversation for sample in samples for conversation in sample.conversations)
            for document, (ids, labels) in enumerate(conversations):
                start, end = end, end + len(ids)
                input_ids[row, start:end], targets[row, start:end] = ids.numpy(), labels.numpy()
                position_ids[row, start:end] = np.arange(len(ids))
                document_ids[row, start:end] = document
        samples = [sample for row in rows for sample in row]
        used = [sample for sample in samples if sample.conversations]
        return self._inputs(input_ids, targets, used) | {
            "position_ids": torch.from_numpy(position_ids),
            "document_ids": torch.from_numpy(document_ids),
            "num_tokens": int((document_ids != PADDING).sum()),
            "ids": [sample.id for sample in used],
            "dropped": dict(count_drops(samples)),
        }


# Where a reader stands: epoch, samples of the epoch before its window, rows of the window that were given.
Place = tuple[int, int, int]


def packed_batches(
    dataset: VQADataset, collator: PackedCollator, start: dict | None, options: dict, rank: int = 0, world_size: int = 1
) -> Iterator[dict]:
    """Endless batches of batch_size packed rows, as train_batches gives them.

    start: the `position` of the batch to go on after. options: of the DataLoader, with num_workers.
    Each epoch every row of the data set comes once (or as --mixture_weights says), in one of the readers: worker
    processes times ranks. Raises ValueError if no row of a reader's epoch can be used.
    """
    readers = max(1, options["num_workers"])
    start = start or {"places": [(0, 0, 0)] * readers, "turn": 0}
    if len(start["places"]) != readers:
        raise ValueError(
            f"--num_workers {options['num_workers']}: must be {len(start['places'])} as in the run that goes on: with "
            "--packing each worker fills rows of its own"
        )
    places, turn = list(start["places"]), start["turn"]
    source = _PackedBatches(dataset, collator, places, turn, rank * readers, world_size * readers)
    for batch, place in DataLoader(source, batch_size=None, **options | {"collate_fn": _as_it_is}):
        places[turn] = place
        turn = (turn + 1) % readers  # a loader takes from its workers in turn
        yield batch | {"position": {"places": list(places), "turn": turn}}


def _as_it_is(item):
    return item


class _PackedBatches(IterableDataset):
    """Endless (batch, place after it) of the reader that asks."""

    def __init__(
        self, dataset: VQADataset, collator: PackedCollator, places: list[Place], turn: int, first: int, readers: int
    ):
        """places: where the readers of this process begin; turn: which of them comes first; first: the number of its
        first reader among the `readers` of all ranks."""
        self.dataset, self.collator, self.places, self.turn = dataset, collator, list(places), turn
        self.first, self.readers = first, readers
        rows, cfg = dataset.rows, dataset.cfg
        if isinstance(rows, RowStream):
            rows.prepare(cfg.mixture_weights)
        else:
            self.order = EpochIndices(rows, cfg.mixture_weights, cfg.seed)

    def __iter__(self) -> Iterator[tuple[dict, Place]]:
        worker = get_worker_info()
        number = (self.turn + (worker.id if worker else 0)) % len(self.places)
        rows = []
        for row, place in self._rows(self.first + number, *self.places[number]):
            rows.append(row)
            if len(rows) == self.dataset.cfg.batch_size:
                yield self.collator(rows), place
                rows = []

    def _rows(self, reader: int, first_epoch: int, offset: int, given: int) -> Iterator[tuple[list[Sample], Place]]:
        """(samples of a row and those dropped before it, place after it) from a place on."""
        dropped: list[Sample] = []  # since the last row
        for epoch in count(first_epoch):
            usable = offset + given > 0
            plans = self._plans(reader, epoch, offset)
            while window := list(_window(plans, WINDOW_ROWS * self.collator.vlm_cfg.lm_max_length)):
                if given == 0:
                    dropped += [self.dataset.decode(plan) for plan in window if not plan.conversations]
                rows = self._packed(window, f"{self.dataset.cfg.seed}/{epoch}/{reader}/{offset}")
                for number, plans_of_row in islice(enumerate(rows, start=1), given, None):
                    samples = [self.dataset.decode(plan) for plan in plans_of_row]
                    dropped += [sample for sample in samples if not sample.conversations]
                    if used := [sample for sample in samples if sample.conversations]:
                        yield dropped + used, (epoch, offset, number)
                        dropped, usable = [], True
                offset, given = offset + len(window), 0
            offset = 0
            if not usable:
                raise nothing_usable(count_drops(dropped))

    def _plans(self, reader: int, epoch: int, offset: int) -> Iterator[Plan]:
        """The plans of the reader's rows of an epoch, after the first `offset` of them."""
        dataset, cfg = self.dataset, self.dataset.cfg
        if isinstance(dataset.rows, RowStream):
            rows = dataset.rows.epoch(f"{cfg.seed}/{epoch}", cfg.mixture_weights, reader, self.readers)
            return (dataset.plan_row(row, f"{epoch}/{row['id']}") for row in islice(rows, offset, None))
        mine = self.order[epoch][reader % len(self.order) :: self.readers]
        return (dataset.plan((epoch, index)) for index in mine[offset:].tolist())

    def _packed(self, window: list[Plan], key: str) -> list[list[Plan]]:
        """The rows of a window, in an order drawn by `key`, as are the samples in each: not by their length."""
        capacity, limit = self.collator.vlm_cfg.lm_max_length, self.dataset.cfg.max_images_per_knapsack
        pieces = [piece for plan in window for piece in _pieces(plan, capacity)]
        rows = pack([_tokens(piece) for piece in pieces], [len(piece.grids) for piece in pieces], capacity, limit)
        rng = random.Random(key)
        rng.shuffle(rows)
        return [[pieces[i] for i in rng.sample(row, len(row))] for row in rows]


def _tokens(plan: Plan) -> int:
    return sum(len(ids) for ids, _ in plan.conversations)


def _window(plans: Iterator[Plan], tokens: int) -> Iterator[Plan]:
    """The next plans, until they have so many tokens."""
    while tokens > 0 and (plan := next(plans, None)) is not None:
        tokens -= _tokens(plan)
        yield plan


def _pieces(plan: Plan, capacity: int) -> list[Plan]:
    """The plan, in parts where a row cannot hold all its conversations; each part has the images."""
    pieces: list[Plan] = []
    room = 0
    for conversation in plan.conversations:
        if len(conversation[0]) > room:
            pieces.append(replace(plan, conversations=[], dropped={} if pieces else plan.dropped))
            room = capacity
        pieces[-1].conversations.append(conversation)
        room -= len(conversation[0])
    return pieces
