"""Samples packed into rows of lm_max_length tokens, so that hardly a position is padding.

A packed row is filled from a window of samples whose lengths are known from texts and image headers; its images are
decoded when the row is next. Each window is packed by itself: what a row holds follows from the seed, the reader (one
per worker process) and the window's place in the epoch, so that a run can resume at any row.

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

from data.collators import Collator, branches_of
from data.datasets import PreparedSample, Sample, VQADataset
from data.drops import count_drops, drop_records
from data.message_tree import positions_of
from data.order import row_visits
from data.readers import FruitlessCounter, Place, Readers, start_of
from data.streams import EPOCH_START, EpochRows, RowStream, StreamPlace

WINDOW_ROWS = 128  # a window has the tokens of this many full rows; about one row's worth of padding is left of it
PADDING = -1  # the document id of what follows the last document of a row


def pack(lengths: list[int], images: list[int], capacity: int, max_images: int) -> list[list[int]]:
    """Indices of the samples of each row: the best of three ways to need few rows.

    lengths: tokens of each sample, at most capacity. images: of each sample; a row holds at most max_images, or a
    single sample. The three ways: the longest samples first, each into the fullest row that has room; samples with
    images first, about equally many per row, so that text fills what the limit on images leaves; one row after the
    other, each as full as can be.
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
    """Row by row the first remaining sample, and those of the others that leave the least room."""
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
    """The samples in the given order, each put into the fullest row that has room for it."""
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


class PackedCollator(Collator):
    """Packed rows to a batch of B rows of T = lm_max_length tokens; each conversation is a document of its own."""

    def __call__(self, rows: list[list[Sample]]) -> dict:
        """As TrainCollator's batch, and position_ids, int64 [B, T], from 0 in each document, and document_ids, int32
        [B, T], from 0 in each row, -1 at padding; branch_ids, int32 [B, T], where there is a message tree. Samples
        without conversations count as dropped.

        rows: the samples of each packed row.
        """
        shape = (len(rows), self.vlm_cfg.lm_max_length)
        input_ids, targets = np.full(shape, self.pad_id), np.full(shape, -100)
        position_ids, document_ids = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int32)
        branch_ids = np.zeros(shape, np.int32)
        for row, samples in enumerate(rows):
            end = 0
            conversations = (conversation for sample in samples for conversation in sample.conversations)
            branches = branches_of(samples)
            for document, (ids, labels) in enumerate(conversations):
                start, end = end, end + len(ids)
                input_ids[row, start:end], targets[row, start:end] = ids.numpy(), labels.numpy()
                position_ids[row, start:end] = positions_of(branches[document])
                document_ids[row, start:end], branch_ids[row, start:end] = document, branches[document]
        samples = [sample for row in rows for sample in row]
        used = [sample for sample in samples if sample.conversations]
        return self._inputs(input_ids, targets, used) | {
            "position_ids": torch.from_numpy(position_ids),
            "document_ids": torch.from_numpy(document_ids),
            **({"branch_ids": torch.from_numpy(branch_ids)} if branch_ids.any() else {}),
            "num_tokens": int((document_ids != PADDING).sum()),
            "ids": [sample.id for sample in used],
            "dropped": dict(count_drops(samples)),
            "drop_records": drop_records(samples),
        }


@dataclass
class Piece:
    """The part of a sample that is in one row: some of its conversations, and all its images."""

    sample: PreparedSample
    start: int  # its first conversation among the sample's
    stop: int
    load: int  # of its images: see PackedReaders._load

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sample.conversations[self.start : self.stop])

    def split(self, room: int) -> tuple[Piece, Piece]:
        """(its first conversations, as many as fit into `room` tokens; the others); either may have none."""
        lengths = (len(ids) for ids, _ in self.sample.conversations[self.start : self.stop])
        stop = self.start + sum(end <= room for end in accumulate(lengths))
        return replace(self, stop=stop), replace(self, start=stop)


class PackedReaders(Readers):
    """Endless batches of batch_size packed rows.

    In each epoch one of the readers reads each row of the data set once (or as often as --mixture_weights or
    --mixture says).
    """

    def __init__(
        self,
        dataset: VQADataset,
        collator: PackedCollator,
        start: dict | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(dataset, collator, start, rank, world_size)
        if not isinstance(dataset.rows, RowStream):
            self.order = row_visits(dataset.rows, dataset.cfg)

    def items(self, reader: int, place: Place) -> Iterator[tuple[list[Sample], Place]]:
        """(samples of a row and those dropped before it, place after it)."""
        first_epoch, offset, at, given = place
        fruitless = FruitlessCounter(place == start_of(first_epoch))
        dropped: list[Sample] = []  # since the last row
        for epoch in count(first_epoch):
            for begin, window, rows in self.windows(reader, epoch, (offset, at)):
                unusable = [self.dataset.decode(sample) for sample in window if not sample.conversations]
                if not rows:
                    dropped += fruitless.see(unusable)
                for number, pieces in islice(enumerate(rows, start=1), given, None):
                    # Each row of the window brings its share of them: a run counts them as it goes on, not at once.
                    first, last = (place * len(unusable) // len(rows) for place in (number - 1, number))
                    dropped += fruitless.see(unusable[first:last])
                    samples = [self._sample(piece) for piece in pieces]
                    dropped += fruitless.see(samples)
                    if used := [sample for sample in samples if sample.conversations]:
                        yield dropped + used, (epoch, *begin, number)
                        dropped = []
                given = 0
            offset, at = 0, EPOCH_START
            fruitless.end_epoch()

    def windows(
        self, reader: int, epoch: int, begin: tuple[int, StreamPlace] = (0, EPOCH_START)
    ) -> Iterator[tuple[tuple[int, StreamPlace], list[PreparedSample], list[list[Piece]]]]:
        """(where it begins, its samples, its rows) of each window of an epoch, from the one that begins at `begin` on.

        A beginning is the number of the epoch's samples before it, and the place in a stream.
        """
        offset, at = begin
        stream = self.stream(reader, epoch, at) if isinstance(self.dataset.rows, RowStream) else None
        samples = self._prepared(reader, epoch, offset, stream)
        while window := list(_window(samples, WINDOW_ROWS * self.collator.vlm_cfg.lm_max_length)):
            yield (offset, at), window, self._packed(window, f"{self.dataset.cfg.seed}/{epoch}/{reader}/{offset}")
            offset += len(window)
            at = stream.place if stream is not None else EPOCH_START

    def _prepared(self, reader: int, epoch: int, offset: int, stream: EpochRows | None) -> Iterator[PreparedSample]:
        """The samples of the reader's rows of an epoch: of the stream, or of a table after the first `offset`."""
        dataset = self.dataset
        if stream is not None:
            return (dataset.prepare_row(row, f"{epoch}/{row['id']}") for row in stream)
        return map(dataset.prepare, self.order.keys(epoch, reader, self.readers)[offset:])

    def _packed(self, window: list[PreparedSample], key: str) -> list[list[Piece]]:
        """The rows of a window. Their order and that of the samples in each are drawn by `key`: not by length."""
        cfg, capacity = self.dataset.cfg, self.collator.vlm_cfg.lm_max_length
        limit = cfg.max_images_per_knapsack * (cfg.tiles_per_row or 1)
        pieces = [piece for sample in window for piece in _pieces(sample, capacity, self._load(sample))]
        packed = pack([piece.tokens for piece in pieces], [piece.load for piece in pieces], capacity, limit)
        rows = _divide([[pieces[i] for i in row] for row in packed], capacity, limit)
        rng = random.Random(key)
        rng.shuffle(rows)
        return [rng.sample(row, len(row)) for row in rows]

    def _load(self, sample: PreparedSample) -> int:
        """What a sample's images take of a row's limit, which is one on images and, if there is one, on tiles.

        Of two limits the larger share counts: rows in which these sum up to the whole keep to both.
        """
        cfg, images = self.dataset.cfg, len(sample.grids)
        if not cfg.tiles_per_row:
            return images
        tiles = sum(map(self.dataset.image_processor.count, sample.grids))
        return max(images * cfg.tiles_per_row, tiles * cfg.max_images_per_knapsack)

    def _sample(self, piece: Piece) -> Sample:
        """The piece with its images decoded. What a sample has dropped counts in its first piece alone."""
        conversations = piece.sample.conversations[piece.start : piece.stop]
        branches = piece.sample.branches[piece.start : piece.stop]
        sample = self.dataset.decode(replace(piece.sample, conversations=conversations, branches=branches))
        return sample if piece.start == 0 else replace(sample, dropped={})


def _window(samples: Iterator[PreparedSample], tokens: int) -> Iterator[PreparedSample]:
    """The next samples, until they have at least this many tokens. Raises ValueError where that many rows are bad.

    A window ends with a sample that can be used, so bad rows in a row, before an epoch ends, are in one window.
    """
    fruitless = FruitlessCounter()
    while tokens > 0 and (sample := next(samples, None)) is not None:
        fruitless.see([sample])
        tokens -= sum(len(ids) for ids, _ in sample.conversations)
        yield sample


def _pieces(sample: PreparedSample, capacity: int, load: int) -> Iterator[Piece]:
    """The sample in as few pieces as its conversations need, of at most `capacity` tokens each."""
    rest = Piece(sample, 0, len(sample.conversations), load)
    while rest.start < rest.stop:
        piece, rest = rest.split(capacity)
        yield piece


def _divide(rows: list[list[Piece]], capacity: int, max_load: int) -> list[list[Piece]]:
    """The rows without the emptiest ones, as long as their conversations fit into the room of the others.

    A sample that is divided for this has all its images in each of its rows: a few more images, but one row less.
    Samples of one conversation stay whole.
    """
    while len(rows) > 1:
        emptiest = min(rows, key=_tokens)
        spread = _spread(emptiest, [row for row in rows if row is not emptiest], capacity, max_load)
        if spread is None:
            break
        rows = spread
    return rows


def _spread(pieces: list[Piece], rows: list[list[Piece]], capacity: int, max_load: int) -> list[list[Piece]] | None:
    """The rows with the pieces added, which are divided where needed; None if they do not fit."""
    rows = [list(row) for row in rows]
    rooms = [capacity - _tokens(row) for row in rows]
    loads = [max_load - sum(piece.load for piece in row) for row in rows]
    if sum(rooms) < _tokens(pieces):
        return None
    for rest in pieces:
        while rest.start < rest.stop:
            # The fullest row that has room for all of it, else the one with most room.
            open_rows = [i for i in range(len(rows)) if loads[i] >= rest.load]
            if not open_rows:
                return None
            tokens = rest.tokens
            place = min(open_rows, key=lambda i: (rooms[i] < tokens, abs(rooms[i] - tokens)))
            piece, rest = rest.split(rooms[place])
            if piece.start == piece.stop:
                return None
            rows[place].append(piece)
            rooms[place] -= piece.tokens
            loads[place] -= piece.load
    return rows


def _tokens(row: list[Piece]) -> int:
    return sum(piece.tokens for piece in row)
