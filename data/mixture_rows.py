"""The training rows of a run: one data set, or the sets of a mixture one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from data.formats import Part, Row, Rows
from data.mixture import MixtureSet, sets_of
from data.options import RowOptions
from data.order import MixtureOrder
from data.rows import load_rows
from data.streams import RowStream
from models.config import TrainConfig


class MixtureRows:
    """The rows of several data sets, one after the other; their subsets are these sets."""

    def __init__(self, sets: Sequence[MixtureSet], rows: Sequence[Rows]):
        """rows: of each set."""
        self.sets, self.rows = sets, rows
        self.ends = list(accumulate(map(len, rows)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Row:
        """The row, with its set's "loss_weight" where that has one."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        which = bisect_right(self.ends, index)
        row, weight = self.rows[which][index - (self.ends[which - 1] if which else 0)], self.sets[which].loss_weight
        return row if weight is None else row | {"loss_weight": weight}

    @property
    def parts(self) -> list[Part]:
        """The tables of all sets."""
        return [part for rows in self.rows for part in getattr(rows, "parts", ())]

    @property
    def bad_subsets(self) -> list[str]:
        """Names of the subsets that could not be loaded."""
        return [name for rows in self.rows for name in getattr(rows, "bad_subsets", ())]

    def by_subset(self) -> dict[str, np.ndarray]:
        """Label of each set -> the indices of its rows, int64."""
        starts = [0, *self.ends]
        return {one.label: np.arange(starts[i], starts[i + 1]) for i, one in enumerate(self.sets)}


def load_training_rows(cfg: TrainConfig) -> Rows | RowStream:
    """The rows of --train_dataset_path, or of all sets of --mixture, which are not streamed.

    Raises what load_rows raises.
    """
    bad = cfg.skip_bad_subsets
    if not cfg.mixture:
        path, names, streams = cfg.train_dataset_path, cfg.train_dataset_name, cfg.stream_dataset
        return load_rows(path, names, "train", streams, skip_bad_subsets=bad, options=RowOptions.of(cfg))
    sets = sets_of(cfg)
    rows = []
    for one in sets:
        options = RowOptions.of(one.config(cfg))
        found = load_rows(one.path, one.names, "train", False, "mixture", skip_bad_subsets=bad, options=options)
        assert not isinstance(found, RowStream)
        rows.append(found)
    return MixtureRows(sets, rows)


def mixture_lines(rows: Rows | RowStream, cfg: TrainConfig) -> list[str]:
    """The share of each group and set of the run's mixture in the training samples, in words; none without one."""
    if not cfg.mixture or isinstance(rows, RowStream):
        return []
    order = MixtureOrder(rows, sets_of(cfg), cfg.seed)
    lines, group = [], None
    for one, share, indices in zip(order.sets, order.shares, order.indices, strict=True):
        if one.group != group:
            group = one.group
            lines.append(f"mixture     {one.group_share:8.3%} {group}")
        counted = "" if one.size is None else f" counted as {one.size:,}"
        weight = "" if one.loss_weight is None else f", loss weight {one.loss_weight:g}"
        often = f"each row once in {len(indices) / share:,.0f} samples"
        lines.append(f"{'':<12}{share:8.3%}   {one.label}: {len(indices):,} rows{counted}, {often}{weight}")
    return lines
