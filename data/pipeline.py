"""All the data of a run: rows to batches, for training, validation and test."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.collators import TrainCollator
from data.datasets import BAD_SUBSET, DropCounter, VQADataset, check_words
from data.images import ImageProcessor
from data.loader import train_batches
from data.sources import load_rows, split_rows
from data.text import get_tokenizer
from models.config import TrainConfig, VLMConfig

SOME_ROWS = 64  # at most this many are read to tell a data set from another one, and to check its words


@dataclass
class Data:
    """Batches for training, and what the evaluations go through."""

    tokenizer: object
    train_rows: object
    val_rows: object
    test_rows: object | None
    open: object
    val_dataset: VQADataset
    test_dataset: VQADataset | None
    cfg: TrainConfig
    rank: int
    world_size: int
    dropped: dict[str, DropCounter] = field(default_factory=lambda: defaultdict(DropCounter))  # by split
    position: int | dict = 0

    def start(self) -> None:
        batches = self.open(self.position)
        first: list[dict] = []
        while not first or not first[-1]["ids"]:  # data of which nothing can be used is an error now, not later
            first.append(next(batches))
        self.batches = itertools.chain(first, batches)

    def __next__(self):
        return next(self.batches)

    def used(self, batches):
        self.position = batches[-1]["position"]
        for batch in batches:
            self.dropped["train"].update(batch["dropped"])

    def add_up_ranks(self, gather):
        for counts in gather(dict(self.dropped["train"]))[1:]:
            self.dropped["train"].update(counts)

    def state_dict(self):
        return {
            "position": self.position,
            "dropped": {s: dict(c) for s, c in self.dropped.items()},
            "batch_size": self.cfg.batch_size,
            "workers_share_rows": self.cfg.packing or not hasattr(self.train_rows, "__len__"),
        }

    def load_rank_states(self, states):
        same = len(states) == self.world_size
        state = states[self.rank if same else 0]
        saved = [s["position"] for s in states]
        if not state["workers_share_rows"]:
            self.position = saved[0] * (state["batch_size"] * len(states)) // (self.cfg.batch_size * self.world_size)
        elif saved[0] == 0 or (
            same and (len(saved[0]["places"]) == max(1, self.cfg.num_workers) or not self.cfg.resume_override)
        ):
            self.position = state["position"]
        else:
            epoch = 1 + max(place[0] for position in saved for place in position["places"])
            self.position = {"places": [(epoch, 0, 0)] * max(1, self.cfg.num_workers), "turn": 0}
        skipped = {split: dict(c) for split, c in self.dropped.items()}
        for split, counts in state["dropped"].items():
            self.dropped[split].clear()
            self.dropped[split].update(counts)
            self.dropped[split].update({k: v for k, v in skipped.get(split, {}).items() if k not in counts})
        if not same:
            self.dropped["train"].clear()
            if self.rank == 0:
                for s in states:
                    self.dropped["train"].update(s["dropped"].get("train", {}))


def some_rows(rows) -> Iterator[dict]:
    """Up to SOME_ROWS rows: spread over a table, the first ones of a stream."""
    if not hasattr(rows, "__len__"):
        return itertools.islice(rows, SOME_ROWS)
    places = np.linspace(0, len(rows) - 1, min(len(rows), SOME_ROWS)).astype(int)
    return (rows[place] for place in places.tolist())


def identify(rows) -> dict[str, str]:
    """What tells loaded rows from others, as far as it is cheap: their "size" in words, and the "hash" of ids and texts
    of some of them. Of a stream the shards are known: their number, and the names that they are read by.
    """
    if hasattr(rows, "__len__"):
        known, size = [(row["id"], row["texts"]) for row in some_rows(rows)], f"{len(rows):,} rows"
    else:
        known = [(part.name, part.table.num_shards) for part in rows.parts]
        size = f"{sum(shards for _, shards in known):,} shards of a stream"
    if bad_subsets := getattr(rows, "bad_subsets", ()):
        size += f" without the subsets {', '.join(bad_subsets)}"
    return {"size": size, "hash": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


def load_data(
    rows, vlm: VLMConfig, cfg: TrainConfig, checkpoint: Path | None, rank: int = 0, world_size: int = 1
) -> Data:
    """rows: of the training data set, loaded. checkpoint: a folder whose tokenizer goes before vlm.lm_tokenizer.
    start: training goes on after so many batches; rank, world_size: whose batches they are (see train_batches).

    Raises ValueError or OSError where data or tokenizer cannot be used, before any training.
    """
    tokenizer = get_tokenizer(vlm, checkpoint)
    train_rows, val_rows = split_rows(rows, cfg.val_size, cfg.seed)
    test_rows = None
    if test_path := cfg.test_dataset_path or ("easy-vqa" if cfg.train_dataset_path == "easy-vqa" else None):
        test_rows = load_rows(test_path, split="test", flag="test_dataset_path")

    def dataset(rows, train: bool) -> VQADataset:
        return VQADataset(rows, tokenizer, ImageProcessor(vlm), vlm, cfg, train=train, cache=cfg.cache_rows)

    train_dataset = dataset(train_rows, train=True)
    note = check_words(train_dataset, some_rows(rows))
    if note and rank == 0:
        print(f"NOTE {note}", file=sys.stderr)

    def open(position):
        return train_batches(train_dataset, TrainCollator(tokenizer.pad_token_id, vlm), cfg, position, rank, world_size)

    dropped = defaultdict(DropCounter)
    bad_subsets = getattr(rows, "bad_subsets", ())
    if bad_subsets and rank == 0:
        dropped["train"][BAD_SUBSET] = len(bad_subsets)
    return Data(
        tokenizer=tokenizer,
        train_rows=train_rows,
        val_rows=val_rows,
        test_rows=test_rows,
        open=open,
        cfg=cfg,
        rank=rank,
        world_size=world_size,
        val_dataset=dataset(val_rows, train=False),
        test_dataset=dataset(test_rows, train=False) if test_rows is not None else None,
        dropped=dropped,
    )
