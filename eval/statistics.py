"""Standard errors and paired tests for numbers made from rows, of which some may share an image (a cluster).

Every number is a function of sums over the rows, which are all that a resampling needs. Letters: N rows, K parts of a
row, G clusters, M sets of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, CHUNK = 10_000, 250  # of the bootstrap; so many at once
MAX_DRAWN = 2 * 10**8  # clusters drawn in all: fewer draws where there are many clusters
SIGNIFICANT = 0.05  # p below which a verdict is given
Z_95 = 1.959963985  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Metric:
    """A number of a set of rows: `value` of the sums of `parts`.

    parts: float [N, K]; value: [M, K] -> [M]. is_mean: the mean of the rows' scores, so that what guessing scores can
    be said; rows that are not part of it have zeros.
    """

    name: str
    parts: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    is_mean: bool = False

    @property
    def rows(self) -> int:
        """How many rows it is about."""
        return int(self.parts.any(axis=1).sum())


def divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below != 0)


def mean_metric(name: str, scores: Sequence[float] | np.ndarray, among: np.ndarray | None = None) -> Metric:
    """The mean of the scores; among: bool [N], of these rows."""
    values = np.asarray(scores, dtype=float)
    mask = np.ones(len(values)) if among is None else among.astype(float)
    return Metric(name, np.stack([values * mask, mask], 1), lambda sums: divided(sums[:, 0], sums[:, 1]), is_mean=True)


def ratio_metric(name: str, above: np.ndarray, below: np.ndarray) -> Metric:
    """sum(above) / sum(below), 0 where there is nothing below."""
    parts = np.stack([above, below], 1).astype(float)
    return Metric(name, parts, lambda sums: divided(sums[:, 0], sums[:, 1]))


def mean_of_means(name: str, scores: Sequence[float] | np.ndarray, labels: Sequence[str | None]) -> Metric:
    """The mean over the labels of the mean score of the rows with that label; rows without one do not count."""
    values, names = np.asarray(scores, dtype=float), sorted({one for one in labels if one is not None})
    masks = np.array([[label == one for one in names] for label in labels], dtype=float).reshape(len(values), -1)
    parts = np.concatenate([values[:, None] * masks, masks], 1)

    def value(sums: np.ndarray) -> np.ndarray:
        above, below = sums[:, : len(names)], sums[:, len(names) :]
        return divided(divided(above, below).sum(1), (below != 0).sum(1).astype(float))  # a label may be left out

    return Metric(name, parts, value, is_mean=True)


def estimate(metric: Metric, clusters: Sequence[str]) -> tuple[float | None, float | None]:
    """(the number, its standard error by the jackknife that leaves out one cluster at a time), None for neither.

    For the mean of rows without shared images this is the standard deviation over the square root of their number.
    """
    sums = _cluster_sums(metric.parts, clusters)
    if not len(sums):
        return None, None
    total = sums.sum(0, keepdims=True)
    return float(metric.value(total)[0]), _jackknife(metric.value(total - sums))


def _cluster_sums(parts: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """[G, K]: the parts summed over each cluster with rows that count."""
    counts = parts.any(axis=1)
    if not counts.any():
        return np.empty((0, parts.shape[1]))
    _, which = np.unique(np.asarray(clusters)[counts], return_inverse=True)
    return np.stack([np.bincount(which, weights=column) for column in parts[counts].T], 1)


def _jackknife(left_out: np.ndarray) -> float | None:
    count = len(left_out)
    if count < 2:
        return None
    return float(math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))


def mcnemar(only_first: int, only_second: int) -> float:
    """p of McNemar's exact test, two-sided: the rows that only one of two got right are a fair coin's."""
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


def bootstrap_p(first: Metric, second: Metric, clusters: Sequence[str], seed: int = 0) -> float:
    """p of no difference, two-sided, by the paired bootstrap over clusters; at least 1 / draws."""
    width = first.parts.shape[1]
    sums = _cluster_sums(np.concatenate([first.parts, second.parts], 1), clusters)
    rng, count = np.random.default_rng(seed), len(sums)
    draws = max(1000, min(DRAWS, MAX_DRAWN // max(1, count)))
    below = above = 0
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        drawn = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        mixed = weights @ sums
        difference = second.value(mixed[:, width:]) - first.value(mixed[:, :width])
        below, above = below + int((difference <= 0).sum()), above + int((difference >= 0).sum())
    return min(1.0, max(2 * min(below, above), 1) / draws)


def paired(first: Metric, second: Metric, clusters: Sequence[str]) -> dict:
    """The difference second - first on the same rows: "difference", its "stderr", "low" and "high" of 95 %, "p" and the
    "test" that gave it.

    McNemar's exact test where all scores are 0 or 1, the number is their plain mean and no two rows share an image;
    else the paired bootstrap over images.
    """
    width = first.parts.shape[1]
    sums = _cluster_sums(np.concatenate([first.parts, second.parts], 1), clusters)
    total = sums.sum(0, keepdims=True)

    def difference(of: np.ndarray) -> np.ndarray:
        return second.value(of[:, width:]) - first.value(of[:, :width])

    value, error = float(difference(total)[0]), _jackknife(difference(total - sums))
    result = {"difference": value, "stderr": error, "low": None, "high": None, "p": None, "test": None}
    if error is None:
        return result
    result |= {"low": value - Z_95 * error, "high": value + Z_95 * error}
    rows = first.parts.any(axis=1)
    scores = [metric.parts[rows, 0] for metric in (first, second)]
    if (
        first.is_mean
        and width == 2
        and len(sums) == rows.sum()
        and all(set(np.unique(one)) <= {0, 1} for one in scores)
    ):
        right, other = scores[0] == 1, scores[1] == 1
        p = mcnemar(int((right & ~other).sum()), int((other & ~right).sum()))
        return result | {"p": p, "test": "McNemar, exact"}
    return result | {"p": bootstrap_p(first, second, clusters), "test": "paired bootstrap"}
