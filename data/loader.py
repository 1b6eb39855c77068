"""Batches in order: endless and shuffled for training, one pass in fixed order for evaluation."""

from __future__ import annotations

import atexit
import itertools
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset

from data.collators import PromptCollator, TrainCollator
from data.datasets import Questions, Sample, VQADataset
from data.drops import DropCounter, drop_records, nothing_usable
from data.order import EpochOrder, row_visits
from data.packing import PackedCollator, PackedReaders
from data.readers import FRUITLESS, FRUITLESS_ROWS, StreamReaders, as_it_is
from data.streams import RowStream
from models.config import TrainConfig

# (the arguments of generate, answers, of which each in a tuple counts, their sources, row ids)
PromptBatch: TypeAlias = tuple[dict, list[str | tuple[str, ...]], list[str | None], list[str]]


def init_worker(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal, and what ends a job sends SIGTERM to every process of it. The main
    one alone shall act on them: it needs its workers to finish the step. They end when it asks them to, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Those that were not asked, or are too busy to hear it: multiprocessing would wait for them after a SIGTERM."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def shares_rows(rows: Any, cfg: TrainConfig) -> bool:
    """Whether each worker of each rank reads a share of the rows of its own, so that its position says nothing about
    other shares: of a stream, and with packing."""
    return cfg.packing or isinstance(rows, RowStream)


def epoch_order(rows: Any, cfg: TrainConfig, world_size: int = 1, start: int = 0) -> EpochOrder:
    """The order of rows that are not shared out: lists of keys for all ranks together, after the first `start`."""
    return EpochOrder(row_visits(rows, cfg), cfg.batch_size * world_size, start)


def train_batches(
    dataset: VQADataset,
    collator: TrainCollator,
    train_cfg: TrainConfig,
    start: int | dict = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict]:
    """Endless batches of batch_size rows; each epoch is a new seeded permutation.

    The rows that do not fill a batch at the end of an epoch are left out; where a batch is larger than the data set it
    continues into the next epoch. A batch is smaller by its dropped rows, and a batch of dropped rows is skipped, its
    counts going into the next. Where `shares_rows`, each worker of each rank reads rows of its own: see Readers.
    start: the `position` of the batch to continue after; 0 is the beginning. A position is the number of batches so
    far, skipped ones counted, or of Readers a dict.
    rank, world_size: the ranks' batches of one number are together the batch that a single process with world_size
    times batch_size would take. So that all ranks make as many steps, a rank whose rows are all dropped gets a batch
    without rows.
    Raises ValueError if no row can be used.
    """
    workers = train_cfg.num_workers
    options: dict[str, Any] = {
        "collate_fn": collator,
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "prefetch_factor": 4 if workers else None,
        "worker_init_fn": init_worker,
        "generator": torch.Generator(),  # else a loader draws from the one that dropout draws from
    }
    blank = collator.blank() if world_size > 1 else None
    if shares_rows(dataset.rows, train_cfg):
        place = start if isinstance(start, dict) else None
        if train_cfg.packing:
            packed = PackedCollator(collator.pad_id, collator.vlm_cfg, collator.with_keys)
            return PackedReaders(dataset, packed, place, rank, world_size).batches(options)
        return _used(StreamReaders(dataset, collator, place, rank, world_size).batches(options), None, 0, blank)
    number = start if isinstance(start, int) else 0
    order = epoch_order(dataset.rows, train_cfg, world_size, number)
    mine = slice(rank * train_cfg.batch_size, (rank + 1) * train_cfg.batch_size)
    loader = DataLoader(cast(Dataset, dataset), batch_sampler=(keys[mine] for keys in order), **options)
    return _used(loader, order.batches_per_epoch, number, blank)


def _used(loader: Iterable[dict], batches_per_epoch: int | None, start: int, blank: dict | None) -> Iterator[dict]:
    """The batches that hold a row; each `dropped` includes those of the batches skipped before it.

    batches_per_epoch: None of readers, which see to that themselves and whose batches have a position.
    blank: a batch without a row, which takes the place of skipped ones.
    """
    skipped, in_a_row = DropCounter(), DropCounter()  # since the last batch, and since the last one that holds a row
    usable = bool(batches_per_epoch and start % batches_per_epoch)  # a run continues after a batch that it has used
    epochs, patience = 0, 0 if blank is None else FRUITLESS  # without a row, one after the other; so many are no error
    for number, batch in enumerate(loader, start=start + 1):
        skipped.update(batch["dropped"])
        skipped.note(batch["drop_records"])
        in_a_row.update(batch["dropped"])
        holds_a_row = batch["input_ids"] is not None
        if holds_a_row:
            in_a_row, epochs, usable = DropCounter(), 0, True
        elif in_a_row.bad_rows() > FRUITLESS_ROWS:  # an epoch of them may take hours
            raise nothing_usable(in_a_row)
        if holds_a_row or blank is not None:
            filling = {} if holds_a_row or blank is None else blank
            drops = {"dropped": dict(skipped), "drop_records": skipped.records}
            yield {"position": number} | batch | filling | drops
            skipped = DropCounter()
        if batches_per_epoch and number % batches_per_epoch == 0:
            epochs += not usable
            # A rank's share of an epoch may be bad to the last row by chance: few rows, many ranks.
            if epochs > patience or (epochs and in_a_row.rows() > FRUITLESS_ROWS):
                raise nothing_usable(in_a_row)
            usable = False


def eval_batches(
    dataset: VQADataset, collator: TrainCollator, train_cfg: TrainConfig, dropped: DropCounter | None = None
) -> Iterator[dict]:
    """Every conversation once, in order, eval_batch_size conversations in a batch; batches as train_batches'.

    dataset: made with train=False. `dropped` gets the counts of what cannot be used (the batches' own is empty).
    """
    samples = _in_order(dataset, train_cfg.num_workers, "samples")
    return _sample_batches(_counted(samples, dropped), collator, train_cfg.eval_batch_size)


def whole_row_batches(
    dataset: VQADataset,
    collator: TrainCollator,
    train_cfg: TrainConfig,
    dropped: DropCounter,
    first: int,
    size: int,
    parts: int = 1,
) -> Iterator[dict]:
    """The first rows in order, each of them whole: blocks of `size` rows, each in so many parts, which are batches.

    A batch has besides "block", the number of its block, and "row_sizes": a list of how many conversations each of its
    rows has. Rows that cannot be used are left out; `dropped` gets their counts.
    dataset: with train=True a row's conversations are those that its first visit draws.
    """
    samples = _counted(itertools.islice(_in_order(dataset, train_cfg.num_workers, "samples"), first), dropped)
    for block in itertools.count():
        rows, length = list(itertools.islice(samples, size)), math.ceil(size / parts)
        for chunk in (rows[i : i + length] for i in range(0, len(rows), length)):
            sizes = [len(sample.conversations) for sample in chunk if sample.conversations]
            if sizes:
                yield collator(chunk) | {"row_sizes": sizes, "block": block}
        if not rows:
            return


def _sample_batches(samples: Iterator[Sample], collator: TrainCollator, size: int) -> Iterator[dict]:
    for chunk in _chunks(samples, ("conversations", "branches"), size):
        yield collator(chunk)


def prompt_batches(
    dataset: VQADataset, collator: PromptCollator, train_cfg: TrainConfig, dropped: DropCounter | None = None
) -> Iterator[PromptBatch]:
    """(batch, answers, sources, row ids) for every question once, in order, eval_batch_size questions in a batch.
    An answer is a tuple where several count as right.

    The questions of a row share its images. `dropped` gets the counts of what cannot be asked.
    """
    rows = _counted(_in_order(dataset, train_cfg.num_workers, "questions"), dropped)
    return _question_batches(rows, collator, train_cfg.eval_batch_size)


def _question_batches(rows: Iterator[Questions], collator: PromptCollator, size: int) -> Iterator[PromptBatch]:
    for chunk in _chunks(rows, ("prompts", "answers", "sources"), size):
        answers = [answer for row in chunk for answer in row.answers]
        sources = [source for row in chunk for source in row.sources]
        yield collator(chunk), answers, sources, [row.id for row in chunk for _ in row.prompts]


def batches_of_both(
    dataset: VQADataset, collator: TrainCollator, prompts: PromptCollator, train_cfg: TrainConfig, dropped: DropCounter
) -> Iterator[tuple[Iterator[dict], Iterator[PromptBatch]]]:
    """(eval_batches, prompt_batches) of the next eval_batch_size rows, up to the last: each row is decoded once."""
    size, pairs = train_cfg.eval_batch_size, _in_order(dataset, train_cfg.num_workers, "both")
    while rows := list(itertools.islice(pairs, size)):
        samples, questions = zip(*rows, strict=True)
        yield (
            _sample_batches(_counted(iter(samples), dropped), collator, size),
            _question_batches(iter(questions), prompts, size),
        )


class _InOrder(Dataset):
    """The samples, the questions, or both, of a VQADataset by index."""

    def __init__(self, dataset: VQADataset, what: str):
        self.dataset, self.what = dataset, what

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.what == "both":
            return self.dataset.both(index)
        return self.dataset.questions(index) if self.what == "questions" else self.dataset[0, index]


def _in_order(dataset: VQADataset, workers: int, what: str) -> Iterator[Any]:
    if isinstance(dataset.rows, RowStream):
        of_row: dict[str, Callable[[dict], Any]] = {
            "samples": dataset.sample,
            "questions": dataset.questions_of,
            "both": dataset.both_of,
        }
        return map(of_row[what], dataset.rows)
    rows = _InOrder(dataset, what)
    if dataset.prepared is not None or workers == 0:  # a worker's cache would be lost with it
        return (rows[index] for index in range(len(rows)))
    options: dict[str, Any] = {"worker_init_fn": init_worker, "generator": torch.Generator()}  # see train_batches
    loader = DataLoader(rows, batch_size=None, num_workers=workers, collate_fn=as_it_is, **options)
    # Tensors come as files: as descriptors, the default, a large batch of rows would exceed what a process may open.
    default = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        return iter(loader)  # starts the workers, which keep it
    finally:
        torch.multiprocessing.set_sharing_strategy(default)


def _counted(rows: Iterator[Any], dropped: DropCounter | None) -> Iterator[Any]:
    """The rows with their drops moved to `dropped`."""
    for row in rows:
        if dropped is not None:
            dropped.update(row.dropped)
            dropped.note(drop_records([row]))
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
