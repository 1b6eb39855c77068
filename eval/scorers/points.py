"""Points and counts: F1 of points by distance or in masks, and whether a count is right.

Points are matched one to one by the least total distance, as Molmo does (allenai/molmo2 f3cb108,
olmo/eval/evaluators.py, `PointingEval`, by scipy's linear_sum_assignment). scipy is no requirement here: `assign`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.points import NONE, Point, find_points
from eval.scorers.judged import Judged, judged
from eval.scorers.text import first_number, same_text

NEAR = 50.0  # thousandths of width and height: 5 % of the picture. This project's; Molmo scores in masks alone
_TOTAL = re.compile(r"a total of (\d+)\b")
_ZERO = re.compile(r"\b(none|no|zero)\b", re.IGNORECASE)


class F1(NamedTuple):
    """All in [0, 1]."""

    f1: float
    precision: float
    recall: float


def assign(costs: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (row, column) of the least total cost, min(n, m) of them, sorted by row; float [n, m].

    The Hungarian method with potentials, O(n^2 m): each row in turn finds its shortest augmenting path. Source: H. W.
    Kuhn, The Hungarian method for the assignment problem, 1955; R. Jonker and A. Volgenant, 1987.
    """
    if costs.shape[0] > costs.shape[1]:
        return sorted((row, column) for column, row in assign(costs.T))
    n, m = costs.shape
    row_of = np.full(m + 1, -1)  # column m: where each search starts
    of_rows, of_columns = np.zeros(n), np.zeros(m + 1)  # potentials
    for row in range(n):
        row_of[m], column = row, m
        least, before = np.full(m, np.inf), np.full(m, m)
        done = np.zeros(m + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            here, free = row_of[column], ~done[:m]
            reduced = costs[here] - of_rows[here] - of_columns[:m]
            better = free & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.argmin(np.where(free, least, np.inf)))
            step = least[following]
            of_rows[row_of[done]] += step
            of_columns[done] -= step
            least[free] -= step
            column = following
        while column != m:
            row_of[column] = row_of[before[column]]
            column = before[column]
    return sorted((int(row), column) for column, row in enumerate(row_of[:m]) if row >= 0)


def _f1(hits: int, said: int, true: int) -> F1:
    """Nothing said where nothing is, is right; either alone is wrong."""
    if not said or not true:
        return F1(*[float(said == true)] * 3)
    return F1(2 * hits / (said + true), hits / said, hits / true)


def _distances(said: Sequence[Point], true: Sequence[Point], far: float) -> np.ndarray:
    """float [said, true]; `far` between points of different pictures or times."""
    ours, theirs = (np.array([[one.x, one.y] for one in points], dtype=float) for points in (said, true))
    places = [np.array([float(one.place) for one in points]) for points in (said, true)]
    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    return np.where(np.abs(places[0][:, None] - places[1][None]) < 1e-6, distances, far)


def f1_by_distance(said: Sequence[Point], true: Sequence[Point], near: float = NEAR) -> F1:
    """A pair is a hit where its distance is at most `near`, in thousandths of width and height. The pairs are those of
    the most hits, and among these of the least total distance; both in one picture or at one time."""
    if not said or not true:
        return _f1(0, len(said), len(true))
    distances = _distances(said, true, np.inf)
    # What is no hit costs more than all hits together.
    costs = np.where(distances <= near, distances, (near + 1) * (min(distances.shape) + 1))
    return _f1(sum(bool(distances[pair] <= near) for pair in assign(costs)), len(said), len(true))


def f1_in_masks(said: Sequence[Point], true: Sequence[Point], masks: Sequence[np.ndarray]) -> F1:
    """Molmo's `PointingEval`: said points are matched with true ones by the least total distance in pixels, and a pair
    is a hit where the point, rounded to a pixel, lies in the mask of the true one.

    masks: bool [height, width], one for each of `true`, all of one picture.
    """
    if not said or not true:
        return _f1(0, len(said), len(true))
    height, width = masks[0].shape
    size = np.array([width, height]) / 1000
    pixels, theirs = (np.array([[one.x, one.y] for one in points], dtype=float) * size for points in (said, true))
    pairs = assign(np.linalg.norm(pixels[:, None] - theirs[None], axis=-1))
    return _f1(sum(_is_in(pixels[one], masks[other]) for one, other in pairs), len(said), len(true))


def _is_in(pixel: np.ndarray, mask: np.ndarray) -> bool:
    column, row = (round(value) for value in pixel.tolist())
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def count_of(answer: str) -> int | None:
    """The count that an answer says: "a total of N"; else the number of its points; else its first whole number; 0 for
    none, no and zero. None where it says none of these."""
    if total := _TOTAL.search(answer):
        return int(total[1])
    if found := find_points(answer).points:
        return len(found)
    number = first_number(answer)
    if number is not None and number.is_integer() and "<" not in answer:
        return int(number)
    return 0 if number is None and _ZERO.search(answer) else None


def counted(answer: str, truth: int, within: int = 0) -> Judged:
    """Whether the count differs by at most `within`: 0 is exact, 1 off by one (`close` in Molmo's `PointCountEval`)."""
    found = count_of(answer)
    return judged(found is not None and abs(found - truth) <= within, None if found is None else str(found))


# Rules for one's own rows; their truths are answers as data.points writes them, or numbers


def is_pointing(truth: str) -> bool:
    return truth == NONE or bool(find_points(truth).points)


def pointed(answer: str, truths: Sequence[str]) -> Judged:
    """F1 by distance; exact match (same_text) where the truth has no points. An answer whose tags are all broken says
    no points, which is no "There are none."."""
    truth = truths[0]
    if not is_pointing(truth):
        return same_text(answer, truths)
    found = find_points(answer)
    parsed = " ".join(f"({one.x:.0f}, {one.y:.0f})" for one in found.points) or None
    if truth == NONE:  # empty, or an answer without any point tag: no point is said
        return Judged(float(not found.points and not found.broken), parsed)
    return Judged(f1_by_distance(found.points, find_points(truth).points).f1, parsed)


def counted_as(answer: str, truths: Sequence[str], within: int = 0) -> Judged:
    """`counted`; exact match (same_text) where the truth is no count."""
    truth = count_of(truths[0]) if is_pointing(truths[0]) or truths[0].strip().isdecimal() else None
    return same_text(answer, truths) if truth is None else counted(answer, truth, within)
