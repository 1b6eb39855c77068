"""All the data of a run: rows to batches, for training, validation and test."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import easy_vqa
from data.bad_rows import BadRowLimit
from data.collators import TrainCollator
from data.datasets import VQADataset
from data.drops import BAD_SUBSET, DropCounter, DropRecord
from data.formats import Row, Rows, count_formats
from data.images import ImageProcessor
from data.loader import epoch_order, shares_rows, train_batches
from data.options import RowOptions
from data.readers import start_of
from data.rows import load_rows
from data.splits import split_by
from data.streams import RowStream
from data.tokenizer_checks import check_words, load_tokenizer
from data.values import Reason
from models.config import TrainConfig, VLMConfig

SOME_ROWS = 64  # at most this many are read to tell a data set from another one, and to check its words


@dataclass
class Data(Iterator[dict]):
    """The training batches of one rank, whose place is saved and restored, and what the evaluations go through.

    `start()` begins to read; each `next(data)` is a micro-batch: see TrainCollator. Its place is that after the batches
    that `used` was told of. `dropped` counts by split what could not be used; of "train" what this rank has used.
    """

    tokenizer: Any
    train_rows: Any
    val_rows: Any
    test_rows: Any | None
    train_dataset: VQADataset
    val_dataset: VQADataset
    test_dataset: VQADataset | None
    cfg: TrainConfig
    rank: int = 0
    world_size: int = 1
    split: str = ""  # how training and validation rows were divided, in words
    dropped: dict[str, DropCounter] = field(default_factory=lambda: defaultdict(DropCounter))
    position: int | dict = 0  # of the last batch that was used: see train_batches
    rows_seen: int = 0  # training rows that this rank has used or dropped; a row counts at each visit

    def __post_init__(self) -> None:
        rows = len(self.train_rows) if hasattr(self.train_rows, "__len__") else math.inf
        self.limit = BadRowLimit(self.cfg, rows)

    def start_reading(self) -> None:
        """Begin to read at the position. Raises ValueError where no row can be used."""
        dataset = self.train_dataset
        collator = TrainCollator(self.tokenizer.pad_token_id, dataset.vlm_cfg, with_keys=self.cfg.feature_cache_gib > 0)
        batches = train_batches(dataset, collator, self.cfg, self.position, self.rank, self.world_size)
        first: list[dict] = []
        # Data of which nothing can be used is an error now, not later. A batch without a row is kept: it is this rank's
        # part of a step in which others have rows.
        while not first or not first[-1]["ids"]:
            first.append(next(batches))
        self._batches = itertools.chain(first, batches)

    def drawn_validation_rows(self) -> VQADataset:
        """The validation rows as training would draw from them at a first visit: turns, answers, mirroring."""
        own = self.val_dataset
        return VQADataset(
            self.val_rows, self.tokenizer, own.image_processor, own.vlm_cfg, self.cfg, train=True, cache=False
        )

    def __next__(self) -> dict:
        """The next micro-batch, with "wait_s": the seconds that the loop has waited for it."""
        began = time.perf_counter()
        batch = next(self._batches)
        return batch | {"wait_s": time.perf_counter() - began}

    def mark_used(self, batches: list[dict]) -> None:
        """Count the batches of a step that is done; a run continues after them."""
        self.position = batches[-1]["position"]
        for batch in batches:
            self.dropped["train"].update(batch["dropped"])
            self.dropped["train"].note(batch["drop_records"])
            self.rows_seen += len(set(batch["ids"])) + DropCounter(batch["dropped"]).rows()

    def has_too_many_bad_rows(self, sum_over_ranks: Callable[..., list[float]]) -> bool:
        """Whether the run is to end, on all ranks alike: `limit.exceeded` says why. sum_over_ranks: of each value."""
        if not self.limit.is_over:
            bad, bad_val = (self.dropped.get(split, DropCounter()).bad_rows() for split in ("train", "val"))
            counts = sum_over_ranks(self.rows_seen, bad, bad_val if self.rank == 0 else 0)
            self.limit.judge(*map(int, counts))
        return self.limit.exceeded is not None

    def take_records(self) -> list[dict]:
        """The rows that could not be used since the last call, for dropped.jsonl."""
        found = [{"split": split} | one._asdict() for split, counts in self.dropped.items() for one in counts.records]
        for counts in self.dropped.values():
            counts.records = []
        return found

    def sum_over_ranks(self, gather: Callable[[dict], list[dict]]) -> None:
        """At the end of the run: let rank 0's counts be those of all ranks. gather: a value of each rank to rank 0."""
        for counts in gather(dict(self.dropped["train"]))[1:]:
            self.dropped["train"].update(counts)

    def state_dict(self) -> dict:
        """This rank's place in the training rows and its counts: plain numbers."""
        rows = self.train_rows
        return {
            "position": self.position,
            "dropped": {split: counts.plain() for split, counts in self.dropped.items()},
            "first_dropped": {split: counts.examples() for split, counts in self.dropped.items()},
            "drop_records": [list(record) for record in self.dropped.get("train", DropCounter()).records],
            "rows_seen": self.rows_seen,
            "bad_rows_judged": self.limit.has_judged,
            "batch_size": self.cfg.batch_size,
            "shares_rows": shares_rows(rows, self.cfg),
            "stream": rows.state_dict() if isinstance(rows, RowStream) else None,
        }

    def load_rank_states(self, states: list[dict]) -> None:
        """Continue where a run was, of which these are the state_dicts of all ranks. Call it before start_reading.

        It may have had another number of ranks and another batch_size: then the batches of all ranks together continue
        where its own ended. Where the rows are shared out among the workers (see shares_rows) another number of ranks
        or workers begins an epoch that the run has not been in. Raises ValueError for another number of workers alone,
        without resume_override.
        """
        if isinstance(self.train_rows, RowStream) and states[0]["stream"]:
            self.train_rows.load_state_dict(states[0]["stream"])
        self.position = self._position(states)
        same_ranks = len(states) == self.world_size
        counts = dict(states[self.rank if same_ranks else 0]["dropped"])
        if not same_ranks:  # rank 0 takes the sum
            of_ranks = states if self.rank == 0 else []
            counts["train"] = dict(sum((Counter(state["dropped"].get("train", {})) for state in of_ranks), Counter()))
        counts["train"] = counts.get("train", {}) | self.dropped["train"]  # subsets that cannot be loaded now
        own = [states[self.rank]] if same_ranks else states if self.rank == 0 else []
        self.rows_seen = sum(state.get("rows_seen", 0) for state in own)
        # Later rows are not held against a limit of the first ones. Older checkpoints do not say whether it was kept.
        has_judged = states[0].get("bad_rows_judged", True)
        seen_by_all = sum(state.get("rows_seen", 0) for state in states)
        self.limit.has_judged = has_judged and seen_by_all >= self.limit.rows_to_judge
        self.dropped.clear()
        first = states[0].get("first_dropped", {})
        for split, of_split in counts.items():
            examples = first.get(split, {})
            self.dropped[split] = DropCounter(
                {Reason(name, examples[name]) if name in examples else name: n for name, n in of_split.items()}
            )
        self.dropped["train"].note(DropRecord(*record) for state in own for record in state.get("drop_records", ()))

    def _position(self, states: list[dict]) -> int | dict:
        saved, cfg = [state["position"] for state in states], self.cfg
        if not shares_rows(self.train_rows, cfg):
            if not states[0]["shares_rows"]:  # each counts the batches of all ranks together
                return saved[0] * states[0]["batch_size"] * len(states) // (cfg.batch_size * self.world_size)
            return _new_epoch(saved) * epoch_order(self.train_rows, cfg, self.world_size).batches_per_epoch
        workers = max(1, cfg.num_workers)
        if saved[0] == 0:
            return 0
        if states[0]["shares_rows"] and len(saved) == self.world_size:
            before = len(saved[0]["places"])
            if before == workers:
                return saved[self.rank]
            if not cfg.resume_override:
                raise ValueError(
                    f"--num_workers {cfg.num_workers}: must be {before} as in the run that is resumed, or "
                    "--resume_override given: of a stream, and with --packing, each worker reads rows of its own"
                )
        return {"places": [start_of(_new_epoch(saved))] * workers, "turn": 0}


def _new_epoch(saved: list[int] | list[dict]) -> int:
    """An epoch that none of the positions has been in. One number of batches has been in at most as many epochs."""
    return 1 + max(
        number
        for position in saved
        for number in ([position] if isinstance(position, int) else [epoch for epoch, *_ in position["places"]])
    )


def some_rows(rows: Rows | RowStream) -> Iterator[Row]:
    """Up to SOME_ROWS rows: spread over a table, the first ones of a stream."""
    if isinstance(rows, RowStream):
        return itertools.islice(rows, SOME_ROWS)
    places = np.linspace(0, len(rows) - 1, min(len(rows), SOME_ROWS)).astype(int)
    return (rows[place] for place in places.tolist())


def format_names(rows: Rows | RowStream) -> list[str]:
    """The formats of the rows, the most frequent first: of some rows, or as the columns of a stream tell."""
    if isinstance(rows, RowStream):
        return list(dict.fromkeys(part.format for part in rows.parts if part.format))
    return [name for name, _ in count_formats(some_rows(rows)).most_common()]


def identify(rows: Rows | RowStream) -> dict[str, str]:
    """What tells loaded rows from others, as far as it is cheap: their "size" in words, and the "hash" of ids and texts
    of some of them. Of a stream the shards are known: their number, and the names that they are read by.
    """
    known: list[tuple]
    if isinstance(rows, RowStream):
        known = [(part.name, part.table.num_shards) for part in rows.parts]
        size = f"{sum(shards for _, shards in known):,} shards of a stream"
    else:
        known, size = [(row["id"], _texts(row)) for row in some_rows(rows)], f"{len(rows):,} rows"
    if bad_subsets := getattr(rows, "bad_subsets", ()):
        size += f" without the subsets {', '.join(bad_subsets)}"
    return {"size": size, "hash": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


def _texts(row: Row) -> Any:
    """Without the letters of choices, which stand in the question too and were not there in older runs."""
    texts = row["texts"]
    return texts and [{key: value for key, value in turn.items() if key != "letters"} for turn in texts]


def load_data(
    rows: Rows | RowStream,
    vlm: VLMConfig,
    cfg: TrainConfig,
    checkpoint: Path | None,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """rows: of the training data set, loaded. checkpoint: a folder whose tokenizer overrides vlm.lm_tokenizer.
    rank, world_size: whose batches they are (see train_batches).

    Raises ValueError or OSError where data or tokenizer cannot be used.
    """
    tokenizer, notes = load_tokenizer(vlm, checkpoint)
    train_rows, val_rows, split = rows, None, ""
    if cfg.val_dataset_path:
        val_rows = load_rows(
            cfg.val_dataset_path, split="validation", flag="val_dataset_path", options=RowOptions.of(cfg)
        )
        split = f"validation rows of {cfg.val_dataset_path}"
    else:
        train_rows, val_rows, split = split_by(rows, cfg.split_by, cfg.val_size, cfg.seed)
    test_rows = None
    if cfg.test_dataset_path:
        test_rows = load_rows(cfg.test_dataset_path, split="test", flag="test_dataset_path", options=RowOptions.of(cfg))
    elif cfg.train_data == [easy_vqa.NAME]:
        test_rows = easy_vqa.rows("test", cfg.train_dataset_name)

    def dataset(rows: Any, train: bool) -> VQADataset:
        images = ImageProcessor(vlm, cfg.truncated_images == "use")
        return VQADataset(rows, tokenizer, images, vlm, cfg, train=train, cache=cfg.cache_rows)

    test_dataset = dataset(test_rows, train=False) if test_rows is not None else None
    datasets = dataset(train_rows, train=True), dataset(val_rows, train=False), test_dataset
    data = Data(tokenizer, train_rows, val_rows, test_rows, *datasets, cfg, rank, world_size, split)
    if unknown := check_words(data.train_dataset, some_rows(rows)):
        notes.append(unknown)
    for note in notes if rank == 0 else []:
        print(f"NOTE {note}", file=sys.stderr)
    if rank == 0 and (bad_subsets := getattr(rows, "bad_subsets", ())):
        data.dropped["train"][BAD_SUBSET] = len(bad_subsets)
    return data
