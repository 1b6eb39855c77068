"""Scores of points and counts, each by a table of cases, and as rules of one's own rows."""

import itertools
import json

import numpy as np
import pytest

from data.points import Point
from eval.own_rows import open_own_rows
from eval.results import score
from eval.scorers.points import assign, count_of, counted, counted_as, f1_by_distance, f1_in_masks, pointed


def points(*places):
    return [Point(*place) for place in places]


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (4, 4)])
def test_the_assignment_is_the_best_of_all(shape):
    for seed in range(20):
        costs = np.random.default_rng(seed).integers(0, 9, shape).astype(float)
        pairs = assign(costs)
        assert len(pairs) == min(shape)
        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == min(shape)
        tall = costs if shape[0] >= shape[1] else costs.T
        best = min(
            sum(tall[row, column] for column, row in enumerate(rows))
            for rows in itertools.permutations(range(tall.shape[0]), tall.shape[1])
        )
        assert sum(costs[pair] for pair in pairs) == best


A, B, C = (100, 100), (500, 500), (900, 100)


@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        ([], [], (1, 1, 1)),
        ([A], [], (0, 0, 0)),
        ([], [A], (0, 0, 0)),
        ([A, B], [B, A], (1, 1, 1)),
        ([(130, 140)], [A], (1, 1, 1)),  # 50 away
        ([(130, 141)], [A], (0, 0, 0)),
        ([A, C], [A, B], (0.5, 0.5, 0.5)),
        ([A], [A, B], (2 / 3, 1, 0.5)),
        ([A, A], [A], (2 / 3, 0.5, 1)),  # a true point counts once
        ([(140, 100), (60, 100)], [(100, 100), (20, 100)], (1, 1, 1)),  # the nearest pair first would find one
        ([(*A, 1)], [(*A, 2)], (0, 0, 0)),  # another picture
    ],
)
def test_f1_by_distance(said, true, expected):
    assert f1_by_distance(points(*said), points(*true)) == pytest.approx(expected)


def masks(*boxes):
    found = []
    for left, top, right, bottom in boxes:
        mask = np.zeros((100, 200), dtype=bool)
        mask[top:bottom, left:right] = True
        found.append(mask)
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], (0, 0, 0)),
        ([(100, 100), (900, 900)], (1, 1, 1)),  # pixels (20, 10) and (180, 90)
        ([(100, 100)], (2 / 3, 1, 0.5)),
        ([(100, 100), (110, 110)], (0.5, 0.5, 0.5)),
        ([(100, 300), (900, 900)], (0.5, 0.5, 0.5)),  # row 30 is below the mask
        ([(1000, 1000), (100, 100)], (0.5, 0.5, 0.5)),  # pixel (200, 100) is outside
    ],
)
def test_f1_in_masks(said, expected):
    found = f1_in_masks(points(*said), points((100, 100), (900, 900)), masks((10, 0, 30, 20), (170, 80, 200, 100)))
    assert found == pytest.approx(expected)
    assert f1_in_masks([], [], []) == (1, 1, 1)


TWO = '<points coords="1 1 100 100 2 500 500">dogs</points>'


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (f"Counting the {TWO} shows a total of 3.", 3),
        (TWO, 2),
        ("There are none.", 0),
        ("There are 4 dogs.", 4),
        ("No dogs.", 0),
        ("1.5", None),
        ("many", None),
        ('<points coords="1 1 100', None),
        ("", None),
    ],
)
def test_counts(answer, count):
    assert count_of(answer) == count
    for truth, within in itertools.product((0, 2, 3), (0, 1)):
        is_right = count is not None and abs(count - truth) <= within
        assert counted(answer, truth, within).score == is_right


@pytest.mark.parametrize(
    ("answer", "truth", "point_score", "count_score"),
    [
        (TWO, TWO, 1, 1),
        ('<points coords="1 1 100 100">dogs</points>', TWO, 2 / 3, 0),
        ('<points coords="1 1 100', TWO, 0, 0),
        ("There are none.", "There are none.", 1, 1),
        (TWO, "There are none.", 0, 0),
        ('<points coords="1 1 100', "There are none.", 0, 0),
        ("2", "2", 1, 1),
        ("a cat", "A cat.", 1, 1),
    ],
)
def test_rules(answer, truth, point_score, count_score):
    assert pointed(answer, [truth]).score == pytest.approx(point_score)
    assert counted_as(answer, [truth]).score == count_score


def test_own_rows_with_points(tmp_path):
    rows = [
        {"id": "p", "query": "Where?", "label": "dogs", "points": [[0.1, 0.1], [0.5, 0.5]]},
        {"id": "c", "query": "How many?", "count": 3},
    ]
    path = tmp_path / "my_points.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    benchmark = open_own_rows(path, None)
    _, summary = score(benchmark, {"p": TWO.replace("500 500", "900 500"), "c": "4"})
    values = {rule: found["metrics"]["accuracy"]["value"] for rule, found in summary["rules"].items()}
    assert next(iter(values)) == "points"
    assert (values["points"], values["count"], values["count within 1"]) == pytest.approx((0.25, 0.5, 1.0))
    path.write_text(json.dumps({"question": "what?", "answer": 3}))
    assert "points" not in [rule.name for rule in open_own_rows(path, None).task.rules]
