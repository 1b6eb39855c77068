"""Batches in order: endless and shuffled for training, one pass in fixed order for evaluation."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data.collators import PromptCollator, TrainCollator
from data.datasets import DropCounter, Questions, Sample, VQADataset
from data.sources import RowStream
from models.config import TrainConfig

SHUFFLE_BUFFER_ROWS = 1000


def _init_worker(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the main one shall act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train_batches(
    dataset: VQADataset, collator: TrainCollator, train_cfg: TrainConfig, start_epoch: int = 0
) -> Iterator[dict]:
    """Endless batches of batch_size rows; each epoch is a new seeded permutation.

    The rows that do not fill a batch at the end of an epoch are left out, but where a batch is larger than the data
    set it goes on into the next epoch. A batch is smaller by its dropped rows, and a batch of dropped rows is skipped,
    its counts going into the next. A stream is shuffled within a buffer, and at most one worker reads it.
    Raises ValueError if no row of an epoch can be used.
    """
    streaming = isinstance(dataset.rows, RowStream)
    workers = min(train_cfg.num_workers, 1) if streaming else train_cfg.num_workers
    options = {
        "collate_fn": collator,
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": _init_worker,
    }
    if streaming:
        loader = DataLoader(_Stream(dataset, start_epoch), batch_size=train_cfg.batch_size, **options)
        return _used(loader, None)
    order = EpochOrder(len(dataset), train_cfg.batch_size, train_cfg.seed, start_epoch)
    return _used(DataLoader(dataset, batch_sampler=order, **options), order.batches_per_epoch)


def _used(loader: DataLoader, batches_per_epoch: int | None) -> Iterator[dict]:
    """The batches that hold a row; each `dropped` includes those of the batches skipped before it."""
    skipped, epoch, usable = DropCounter(), DropCounter(), False  # counts since the last batch, and of the epoch
    for number, batch in enumerate(loader, start=1):
        skipped.update(batch["dropped"])
        epoch.update(batch["dropped"])
        if batch["input_ids"] is not None:
            yield batch | {"dropped": dict(skipped)}
            skipped, usable = DropCounter(), True
        if batches_per_epoch and number % batches_per_epoch == 0:
            if not usable:
                raise _nothing_left(epoch)
            epoch, usable = DropCounter(), False


def _nothing_left(dropped: DropCounter) -> ValueError:
    return ValueError(f"no row of a whole epoch of training data can be used: {dropped.summary()}")


class EpochOrder:
    """Endless lists of batch_size keys (epoch, index) of a VQADataset."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, start_epoch: int = 0):
        if num_rows == 0:
            raise ValueError("the training data has no rows")
        self.num_rows, self.batch_size, self.seed, self.start_epoch = num_rows, batch_size, seed, start_epoch
        self.batches_per_epoch = max(num_rows // batch_size, 1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys: list[tuple[int, int]] = []
        for epoch in count(self.start_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
            keys += [(epoch, index) for index in order.tolist()]
            while len(keys) >= self.batch_size:
                yield keys[: self.batch_size]
                keys = keys[self.batch_size :]
            if self.num_rows >= self.batch_size:
                keys = []


class _Stream(IterableDataset):
    """Endless samples of a RowStream."""

    def __init__(self, dataset: VQADataset, start_epoch: int):
        self.dataset, self.start_epoch = dataset, start_epoch

    def __iter__(self) -> Iterator[Sample]:
        for epoch in count(self.start_epoch):
            dropped, usable = DropCounter(), False
            for row in _shuffled(self.dataset.rows, f"{self.dataset.cfg.seed}/{epoch}"):
                sample = self.dataset.sample(row, f"{epoch}/{row['id']}")
                dropped.update(sample.dropped)
                usable = usable or bool(sample.conversations)
                yield sample
            if not usable:
                raise _nothing_left(dropped)


def _shuffled(rows: RowStream, seed: str) -> Iterator[dict]:
    """The rows, each in place of a random one of a buffer."""
    rng = random.Random(seed)
    buffer: list[dict] = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER_ROWS:
            buffer.append(row)
            continue
        place = rng.randrange(SHUFFLE_BUFFER_ROWS)
        yield buffer[place]
        buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer


def eval_batches(
    dataset: VQADataset, collator: TrainCollator, train_cfg: TrainConfig, dropped: DropCounter | None = None
) -> Iterator[dict]:
    """Every conversation once, in order, eval_batch_size conversations in a batch; batches as train_batches'.

    dataset: made with train=False. `dropped` gets the counts of what cannot be used (the batches' own is empty).
    """
    rows = _counted(_in_order(dataset, train_cfg.num_workers, questions=False), dropped)
    for chunk in _chunks(rows, ("conversations",), train_cfg.eval_batch_size):
        yield collator(chunk)


def prompt_batches(
    dataset: VQADataset, collator: PromptCollator, train_cfg: TrainConfig, dropped: DropCounter | None = None
) -> Iterator[tuple[dict, list[str], list[str | None], list[str]]]:
    """(batch, answers, sources, row ids) for every question once, in order, eval_batch_size questions in a batch.

    The questions of a row share its images. `dropped` gets the counts of what cannot be asked.
    """
    rows = _counted(_in_order(dataset, train_cfg.num_workers, questions=True), dropped)
    for chunk in _chunks(rows, ("prompts", "answers", "sources"), train_cfg.eval_batch_size):
        answers = [answer for row in chunk for answer in row.answers]
        sources = [source for row in chunk for source in row.sources]
        yield collator(chunk), answers, sources, [row.id for row in chunk for _ in row.prompts]


class _InOrder(Dataset):
    """The samples or questions of a VQADataset by index."""

    def __init__(self, dataset: VQADataset, questions: bool):
        self.dataset, self.questions = dataset, questions

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | Questions:
        return self.dataset.questions(index) if self.questions else self.dataset[0, index]


def _in_order(dataset: VQADataset, workers: int, questions: bool) -> Iterator[Sample | Questions]:
    if isinstance(dataset.rows, RowStream):
        return map(dataset.questions_of if questions else dataset.sample, dataset.rows)
    rows = _InOrder(dataset, questions)
    if dataset.prepared is not None or workers == 0:  # a worker's cache would be lost with it
        return (rows[index] for index in range(len(rows)))
    # Tensors come as files: as descriptors, the default, a large batch of rows would exceed what a process may open.
    torch.multiprocessing.set_sharing_strategy("file_system")
    return iter(
        DataLoader(rows, batch_size=None, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_init_worker)
    )


def _as_it_is(row):
    return row


def _counted(rows: Iterator[Sample | Questions], dropped: DropCounter | None) -> Iterator[Sample | Questions]:
    """The rows with their drops moved to `dropped`."""
    for row in rows:
        if dropped is not None:
            dropped.update(row.dropped)
        yield replace(row, dropped={})


def _chunks(rows: Iterator, parallel: tuple[str, ...], size: int) -> Iterator[list]:
    """Lists of rows with `size` items in all, the last one with fewer; a row that does not fit whole is divided.

    parallel: the lists that hold one entry an item.
    """
    chunk: list = []
    room = size
    for row in rows:
        start, total = 0, len(getattr(row, parallel[0]))
        while start < total:
            stop = min(start + room, total)
            chunk.append(replace(row, **{name: getattr(row, name)[start:stop] for name in parallel}))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk
