"""Rows of streamed hub data: read in order for validation, and shuffled for training with a position that is cheap.

A reader draws the rows of an epoch at random from a few open shards into blocks of BLOCK_ROWS rows, and shuffles each
block. While one block is used the next is read, so that rows come at an even pace. Every block draws from a seed of
its own; so where the open shards stood when a block began, and how many of its rows were used, is all that a run needs
to continue: it reads that block again and no row before it, and of each open shard at most one row group.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from data.formats import READ_ROWS, Part, Row
from data.order import check_mixture

BLOCK_ROWS = 500  # two blocks are in memory: the one that is used and the one that is read
OPEN_SHARDS = 4

# Where to continue in a shard: its row group, the number of the group's first row, the number of the next row.
ShardPlace = tuple[int, int, int]
# Where to continue in an epoch: the number of a block, the visits that were open when it began with their places, the
# next visit, and how many rows of the block were used. Plain numbers: it goes into checkpoints.
StreamPlace = tuple[int, list[tuple[int, ShardPlace]], int, int]

SHARD_START: ShardPlace = (0, 0, 0)
EPOCH_START: StreamPlace = (0, [], 0, 0)


@dataclass(frozen=True)
class Shard:
    """One file of a stream's table."""

    part: Part
    number: int
    skip: int = 0  # rows at its beginning that are held out

    def records(self, place: ShardPlace = SHARD_START) -> Iterator[tuple[ShardPlace, Any]]:
        """(place after it, arrow table of the row alone) for each row from a place on; `row` converts the table.

        Row groups before the place are not read. Where `datasets` cannot divide the file (it is not parquet, or
        an older `datasets`) all of it counts as one group.
        """
        group, first, start = place
        table = self.part.table.shard(self.part.table.num_shards, self.number)
        groups = table.reshard() if hasattr(table, "reshard") else table
        if group >= groups.num_shards:  # another version of datasets saved the place
            group, first = 0, 0
        start = max(start, self.skip)
        for current in range(group, groups.num_shards):
            number = first
            # Not by iterating over the table: in a worker process it would divide its shards among the workers again.
            for records in groups.shard(groups.num_shards, current).iter(READ_ROWS):
                if not self.part.options.function:
                    self.part.check_columns(records.column_names)
                for i in range(max(0, start - number), len(records)):
                    yield (current, first, number + i + 1), records.slice(i, 1)
                number += len(records)
            first = number

    def row(self, place: ShardPlace, record: Any) -> Row:
        """The row of what `records` gives."""
        shard = "" if self.part.table.num_shards == 1 else f"[{self.number}]"
        return self.part.row(record, f"{shard}#{place[2] - 1}")


@dataclass(frozen=True)
class Visit:
    """The rows that a reader takes of a shard: of those kept, from `first` on each `step`-th."""

    shard: Shard
    first: int = 0
    step: int = 1
    keep: float = 1.0  # share of the shard's rows, drawn at random

    def rows(self, key: str, place: ShardPlace = SHARD_START) -> Iterator[tuple[ShardPlace, Row]]:
        """(place after it, row) from a place on. key: draws the rows that are kept, the same for all readers."""
        kept = sum(self._is_kept(number, key) for number in range(self.shard.skip, place[2]))
        for after, record in self.shard.records(place):
            if self._is_kept(after[2] - 1, key):
                if kept % self.step == self.first:
                    yield after, self.shard.row(after, record)
                kept += 1

    def _is_kept(self, number: int, key: str) -> bool:
        if self.keep == 1.0:
            return True
        return random.Random(f"{self.shard.part.name}/{self.shard.number}/{key}/{number}").random() < self.keep


class OpenVisit:
    """A visit that rows are drawn from, and where it continues."""

    def __init__(self, number: int, visit: Visit, key: str, place: ShardPlace = SHARD_START):
        self.number, self.place = number, place
        self.rows = visit.rows(key, place)

    def next_row(self) -> Row | None:
        """None after the last one."""
        found = next(self.rows, None)
        if found is None:
            return None
        self.place, row = found
        return row


class EpochRows(Iterator[Row]):
    """A reader's rows of an epoch; `place` says where to continue after the row that came last."""

    def __init__(self, visits: list[Visit], key: str, place: StreamPlace = EPOCH_START):
        """key: seeds the order, which depends on nothing else."""
        self.visits, self.key = visits, key
        number, opened, self.next_visit, used = place
        self.opened = [OpenVisit(i, visits[i], key, at) for i, at in opened]
        self.place = place
        self.rows = self._blocks(number, used)

    def __next__(self) -> Row:
        return next(self.rows)

    def _blocks(self, number: int, used_before: int) -> Iterator[Row]:
        """The rows of all blocks from `number` on, without the first `used_before`."""
        begin = self._begin()
        block = list(self._draw(number))
        while block:
            next_begin, coming = self._begin(), self._draw(number + 1)
            random.Random(f"{self.key}/{number}/order").shuffle(block)
            next_block: list[Row] = []
            for used, row in enumerate(block, start=1):
                next_block += islice(coming, 1)
                if used > used_before:
                    self.place = (number, *begin, used)
                    yield row
            number, begin, block, used_before = number + 1, next_begin, next_block, 0

    def _begin(self) -> tuple[list[tuple[int, ShardPlace]], int]:
        """Where the open shards stand now, and the next visit."""
        return [(one.number, one.place) for one in self.opened], self.next_visit

    def _draw(self, number: int) -> Iterator[Row]:
        """The rows of block `number`, each from a random one of the open shards."""
        rng = random.Random(f"{self.key}/{number}")
        for _ in range(BLOCK_ROWS):
            row = None
            while row is None:
                self._open_shards()
                if not self.opened:
                    return
                chosen = rng.randrange(len(self.opened))
                row = self.opened[chosen].next_row()
                if row is None:
                    del self.opened[chosen]
            yield row

    def _open_shards(self) -> None:
        while self.next_visit < len(self.visits) and len(self.opened) < OPEN_SHARDS:
            self.opened.append(OpenVisit(self.next_visit, self.visits[self.next_visit], self.key))
            self.next_visit += 1


class RowStream:
    """Rows that are read one after the other, from `start` up to but without `stop`."""

    def __init__(
        self, parts: list[Part], bad_subsets: list[str] | None = None, start: int = 0, stop: int | None = None
    ):
        """parts: their tables are IterableDatasets. bad_subsets: names of the subsets that could not be loaded."""
        self.parts, self.bad_subsets, self.start, self.stop = parts, bad_subsets or [], start, stop

    def __iter__(self) -> Iterator[Row]:
        """The rows in their order."""
        records = ((shard, *record) for shard in self._all_shards() for record in shard.records())
        return (shard.row(*record) for shard, *record in islice(records, self.start, self.stop))

    def take(self, count: int) -> RowStream:
        """The first `count` rows."""
        stop = self.start + count
        stop = stop if self.stop is None else min(stop, self.stop)
        return RowStream(self.parts, self.bad_subsets, self.start, stop)

    def skip(self, count: int) -> RowStream:
        """All but the first `count` rows."""
        return RowStream(self.parts, self.bad_subsets, self.start + count, self.stop)

    def about_rows(self) -> int | None:
        """How many rows there are; None where that cannot be known without reading them.

        As the data set's description says; else an estimate for parquet: the rows of the first row group, times the
        row groups of the first shard, times the shards of all subsets.
        """
        infos: list[Any] = [(part.table.info.splits or {}).get(str(part.table.split)) for part in self.parts]
        if all(info is not None and info.num_examples for info in infos):
            return sum(info.num_examples for info in infos)
        shards = self._all_shards()
        table = shards[0].part.table
        first = table.shard(table.num_shards, 0)
        groups = first.reshard() if hasattr(first, "reshard") else first
        if groups.num_shards == 1:
            return None
        in_group = sum(len(records) for records in groups.shard(groups.num_shards, 0).iter(READ_ROWS))
        return in_group * groups.num_shards * len(shards)

    def _all_shards(self) -> list[Shard]:
        return [Shard(part, number) for part in self.parts for number in range(part.table.num_shards)]

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of the leading shards, counted by reading them as far as `start` and one row on."""
        counted: list[int] = []
        for shard in self._all_shards() if self.start else []:
            wanted = self.start + 1 - sum(counted)
            if wanted < 1:
                break
            counted.append(sum(1 for _ in islice(shard.records(), wanted)))
        return counted

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards without the rows before `start`."""
        to_skip, found = self.start, []
        for i, shard in enumerate(self._all_shards()):
            length = self.lengths[i] if i < len(self.lengths) else to_skip + 1
            if length > to_skip:  # it has rows after those
                found.append(replace(shard, skip=to_skip))
            to_skip -= min(to_skip, length)
        return found

    def state_dict(self) -> dict:
        """What would have to be counted again."""
        return {"start": self.start, "lengths": self.lengths}

    def load_state_dict(self, state: dict) -> None:
        """Of rows that begin elsewhere nothing is taken."""
        if state["start"] == self.start:
            self.lengths = state["lengths"]

    def prepare(self, weights: Mapping[str, float]) -> None:
        """Check and count here what the readers of `epoch` would each find out for themselves."""
        check_mixture(weights, [part.subset for part in self.parts])
        _ = self.shards

    def epoch(
        self, key: str, weights: Mapping[str, float], share: int = 0, shares: int = 1, place: StreamPlace = EPOCH_START
    ) -> EpochRows:
        """The rows of an epoch in an order drawn by `key`, after `place`.

        Of `shares` readers each gets other rows, all of them together each row once; with weights as often as the
        weight of its subset says, where what is left of a whole number is a share of its rows that is drawn again for
        each epoch. Each reader gets equally many whole shards of a subset. Of the remaining shards, fewer than readers,
        every reader takes each `shares`-th row. So their shares differ by a few rows, and by as much as shards do in
        length (those with held-out rows are shorter).
        """
        assert self.stop is None, "a part of a stream can be read in its order alone"
        if multiprocessing.parent_process() is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked process has the lock of its parent, but not the thread that holds it
        rng = random.Random(key)
        visits = self._visits(weights, share, shares, rng)
        rng.shuffle(visits)
        return EpochRows(visits, key, place)

    def _visits(self, weights: Mapping[str, float], share: int, shares: int, rng: random.Random) -> list[Visit]:
        """What a reader reads of the shards, as often as the weights say."""
        visits = []
        for part in self.parts:
            shards = [shard for shard in self.shards if shard.part is part]
            rng.shuffle(shards)
            whole = len(shards) // shares * shares
            mine = [Visit(shard) for shard in shards[share:whole:shares]]
            turn = share + rng.randrange(shares)  # not always the same readers have a row more than the others
            mine += [Visit(shard, (turn + i) % shares, shares) for i, shard in enumerate(shards[whole:])]
            weight = weights.get(part.subset, 1.0)
            visits += mine * int(weight)
            if weight % 1:
                visits += [replace(visit, keep=weight % 1) for visit in mine]
        return visits
