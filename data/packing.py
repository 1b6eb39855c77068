"""Samples packed into rows of lm_max_length tokens, so that hardly a position is padding.

A row is filled from a window of samples whose lengths are known from texts and image headers; its images are decoded
when it is its turn. A window is packed by itself: what a row holds follows from the seed, the reader (one in each
worker process) and the place of the window in the epoch, so that a run can go on from any row.

Shapes: B rows, T lm_max_length, K image slots, L labels.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice

import numpy as np
import torch

from data.collators import TrainCollator
from data.datasets import Plan, Sample, VQADataset, count_drops
from data.readers import Patience, Place, Readers
from data.sources import EpochIndices, RowStream

WINDOW_ROWS = 128  # tokens of so many full rows are packed together; a row's worth of padding is what is left of them
PADDING = -1  # the document id of what follows the last document of a row


def pack(lengths: list[int], images: list[int], capacity: int, max_images: int) -> list[list[int]]:
    """Indices of the samples of each row, in as few rows as one of three ways comes to.

    lengths: tokens, at most capacity. images: of each sample; a row holds max_images or a single sample.
    The longest first, each into the fullest row that has room; those with images first, about as many into each row,
    so that text can fill up what the limit on images leaves; the fullest row that can be made, one after the other.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    images_first = sorted(by_length, key=lambda i: images[i] == 0)
    evenly = math.ceil(capacity * sum(images) / max(1, sum(lengths))) + 1  # in a full row; one more, as none is
    evenly = min(max_images, max(evenly, *images, 0))
    ways = [
        _best_fit(by_length, lengths, images, capacity, max_images),
        _best_fit(images_first, lengths, images, capacity, evenly),
    ]
    fullest = _fullest(by_length, lengths, capacity)
    if all(len(row) == 1 or sum(images[i] for i in row) <= max_images for row in fullest):
        ways.append(fullest)
    return min(ways, key=len)


def _fullest(order: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Row by row the first sample that is left, and those of the others that leave the least room."""
    rows, left = [], order
    while left:
        first, *others = left
        room = capacity - lengths[first]
        reached = [1]  # bit t of entry n: some of the first n of the others have t tokens together
        for sample in others:
            reached.append((reached[-1] | reached[-1] << lengths[sample]) & ((1 << room + 1) - 1))
        tokens, row = reached[-1].bit_length() - 1, [first]
        for number in reversed(range(len(others))):
            if not reached[number] >> tokens & 1:  # only with this one
                row.append(others[number])
                tokens -= lengths[others[number]]
        rows.append(row)
        left = [sample for sample in others if sample not in row]
    return rows


def _best_fit(
    order: list[int], lengths: list[int], images: list[int], capacity: int, max_images: int
) -> list[list[int]]:
    """The samples in the given order, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    images_in: list[int] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), ascending
    for sample in order:
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


@dataclass
class Piece:
    """What of a sample lies in one row: some of its conversations, and all its images."""

    plan: Plan
    start: int  # of its conversations among the plan's
    stop: int

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.plan.conversations[self.start : self.stop])

    @property
    def images(self) -> int:
        return len(self.plan.grids)

    def split(self, room: int) -> tuple[Piece, Piece]:
        """Its first conversations, as many as there is room for, and the rest; either may have none."""
        lengths = (len(ids) for ids, _ in self.plan.conversations[self.start : self.stop])
        stop = self.start + sum(end <= room for end in accumulate(lengths))
        return replace(self, stop=stop), replace(self, start=stop)


class PackedReaders(Readers):
    """Endless batches of batch_size packed rows.

    Each epoch every row of the data set comes once (or as --mixture_weights says), in one of the readers.
    """

    def __init__(
        self, dataset: VQADataset, collator: PackedCollator, start: dict | None, rank: int = 0, world_size: int = 1
    ):
        super().__init__(dataset, collator, start, rank, world_size)
        if not isinstance(dataset.rows, RowStream):
            self.order = EpochIndices(dataset.rows, dataset.cfg.mixture_weights, dataset.cfg.seed)

    def items(self, reader: int, place: Place) -> Iterator[tuple[list[Sample], Place]]:
        """(samples of a row and those dropped before it, place after it)."""
        first_epoch, offset, given = place
        patience = Patience()
        dropped: list[Sample] = []  # since the last row
        for epoch in count(first_epoch):
            for begin, window, rows in self.windows(reader, epoch, offset):
                if given == 0:
                    dropped += patience.see(self.dataset.decode(plan) for plan in window if not plan.conversations)
                for number, pieces in islice(enumerate(rows, start=1), given, None):
                    samples = [self._sample(piece) for piece in pieces]
                    dropped += patience.see(samples)
                    if used := [sample for sample in samples if sample.conversations]:
                        yield dropped + used, (epoch, begin, number)
                        dropped = []
                given = 0
            offset = 0
            patience.end_epoch()

    def windows(self, reader: int, epoch: int, offset: int) -> Iterator[tuple[int, list[Plan], list[list[Piece]]]]:
        """(samples of the epoch before it, its plans, its rows) of each window after the first `offset` samples."""
        plans = self._plans(reader, epoch, offset)
        while window := list(_window(plans, WINDOW_ROWS * self.collator.vlm_cfg.lm_max_length)):
            yield offset, window, self._packed(window, f"{self.dataset.cfg.seed}/{epoch}/{reader}/{offset}")
            offset += len(window)

    def _plans(self, reader: int, epoch: int, offset: int) -> Iterator[Plan]:
        """The plans of the reader's rows of an epoch, after the first `offset` of them."""
        dataset = self.dataset
        if isinstance(dataset.rows, RowStream):
            return (dataset.plan_row(row, f"{epoch}/{row['id']}") for row in self.stream(reader, epoch, offset))
        # Of fewer rows than readers not always the same readers have one.
        mine = self.order[epoch][(reader + epoch) % self.readers :: self.readers]
        return (dataset.plan((epoch, index)) for index in mine[offset:].tolist())

    def _packed(self, window: list[Plan], key: str) -> list[list[Piece]]:
        """The rows of a window, in an order drawn by `key`, as are the samples in each: not by their length."""
        capacity, limit = self.collator.vlm_cfg.lm_max_length, self.dataset.cfg.max_images_per_knapsack
        pieces = [piece for plan in window for piece in _pieces(plan, capacity)]
        rows = pack([piece.tokens for piece in pieces], [piece.images for piece in pieces], capacity, limit)
        rows = _divide([[pieces[i] for i in row] for row in rows], capacity, limit)
        rng = random.Random(key)
        rng.shuffle(rows)
        return [rng.sample(row, len(row)) for row in rows]

    def _sample(self, piece: Piece) -> Sample:
        """What is dropped of a row counts in its first piece."""
        sample = self.dataset.decode(
            replace(piece.plan, conversations=piece.plan.conversations[piece.start : piece.stop])
        )
        return sample if piece.start == 0 else replace(sample, dropped={})


def _window(plans: Iterator[Plan], tokens: int) -> Iterator[Plan]:
    """The next plans, until they have so many tokens."""
    while tokens > 0 and (plan := next(plans, None)) is not None:
        tokens -= sum(len(ids) for ids, _ in plan.conversations)
        yield plan


def _pieces(plan: Plan, capacity: int) -> Iterator[Piece]:
    """The plan, in parts where a row cannot hold all its conversations."""
    rest = Piece(plan, 0, len(plan.conversations))
    while rest.start < rest.stop:
        piece, rest = rest.split(capacity)
        yield piece


def _divide(rows: list[list[Piece]], capacity: int, max_images: int) -> list[list[Piece]]:
    """Fewer rows, where the conversations of the emptiest go into the room that the others have.

    A sample that is divided for it is seen as often as it has rows, with all its images: a few more images for a row
    less. Samples of one conversation stay whole.
    """
    while len(rows) > 1:
        emptiest = min(rows, key=_tokens)
        spread = _spread(emptiest, [row for row in rows if row is not emptiest], capacity, max_images)
        if spread is None:
            break
        rows = spread
    return rows


def _spread(pieces: list[Piece], rows: list[list[Piece]], capacity: int, max_images: int) -> list[list[Piece]] | None:
    """The rows with the pieces in them, divided as need be; None if they do not fit."""
    rows = [list(row) for row in rows]
    rooms = [capacity - _tokens(row) for row in rows]
    images = [max_images - sum(piece.images for piece in row) for row in rows]
    if sum(rooms) < _tokens(pieces):
        return None
    for rest in pieces:
        while rest.start < rest.stop:
            # The fullest row that takes all of it, else the one that takes most.
            places = [place for place in range(len(rows)) if images[place] >= rest.images]
            place = min(places, key=lambda i: (rooms[i] < rest.tokens, abs(rooms[i] - rest.tokens)), default=None)
            piece, rest = rest.split(0 if place is None else rooms[place])
            if piece.start == piece.stop:
                return None
            rows[place].append(piece)
            rooms[place] -= piece.tokens
            images[place] -= piece.images
    return rows


def _tokens(row: list[Piece]) -> int:
    return sum(piece.tokens for piece in row)
