"""Rows with points: the answer that each format becomes, and what makes a row bad."""

import json
import re
from pathlib import Path

import pytest
from tiny.data import dataset, encoded, picture, row, tiny_train, turn

from data.options import RowOptions
from data.point_rows import by_time, video_points, video_tracks
from data.points import has_points
from data.rows import load_rows
from data.values import BadRow


@pytest.fixture
def read(tmp_path):
    """What records in a file are as rows; a.png is 200 wide and 100 high."""
    (tmp_path / "a.png").write_bytes(encoded(picture(200, 100)))

    def write(*records, **options):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
        rows = load_rows(str(tmp_path / "rows.jsonl"), options=RowOptions(**options))
        return [rows[i] for i in range(len(rows))]

    return write


def tag(coords: str, label: str = "dogs") -> str:
    return f'<points coords="{coords}">{label}</points>'


def total(coords: str, count: int, label: str = "dogs") -> str:
    return f"Counting the {tag(coords, label)} shows a total of {count}."


TWO = [{"x": 0.64, "y": 0.981, "object_id": 4}, {"x": 0.5321, "y": 0.204}]
PIXMO = {"image_url": "a.png", "image_sha256": "0", "label": "dogs"}
COUNTED = {"x": [20, 10], "y": [100, 1]}
COSYN = {"image": "a.png", "id": "1"}
BOTH = "1 1 532 204 2 640 981"
CASES = {
    "points": [
        (
            {"image_path": "a.png", "query": "Where are dogs?", "points": TWO},
            "Where are dogs?",
            tag(BOTH, "Where are dogs?"),
        ),
        (
            {"image": "a.png", "label": "dogs", "points": [[50, 120]], "points_unit": "percent"},
            "Point to dogs.",
            tag("1 1 500 1000"),
        ),
        ({"image": "a.png", "query": "any?", "label": "dogs", "points": []}, "any?", "There are none."),
    ],
    "points counted": [
        (
            {"image": "a.png", "query": "How many?", "label": "dogs", "count": 2, "points": TWO},
            "How many?",
            total(BOTH, 2),
        ),
        ({"image": "a.png", "query": "How many?", "count": 7}, "How many?", "7"),
        ({"image": "a.png", "label": "dogs", "count": 0, "points": []}, "How many dogs are there?", "There are none."),
    ],
    "points in pixels": [
        (
            {"image": "a.png", "label": "dogs", "points": [[50, 50]], "points_unit": "pixels"},
            "Point to dogs.",
            tag("1 1 250 500"),
        ),
        (
            {
                "image": "a.png",
                "label": "dogs",
                "points": [[50, 50]],
                "points_unit": "pixels",
                "width": 100,
                "height": 50,
            },
            "Point to dogs.",
            tag("1 1 500 1000"),
        ),
        (
            {
                "images": ["a.png"] * 2,
                "label": "dogs",
                "points": [{"x": 50, "y": 50, "image": 2}],
                "points_unit": "pixels",
            },
            "Point to dogs.",
            tag("2 1 250 500"),
        ),
    ],
    "pixmo-points": [
        (
            PIXMO | {"points": [{"x": 50.04, "y": 101.5}], "count": 1, "collection_method": "pointing"},
            "Point to dogs.",
            tag("1 1 500 1000"),
        ),
        (
            PIXMO | {"points": [{"x": 1, "y": 2}], "count": 1, "collection_method": "counting"},
            "How many dogs are there?",
            total("1 1 010 020", 1),
        ),
        (PIXMO | {"points": [], "count": 0, "collection_method": "pointing"}, "Point to dogs.", "There are none."),
    ],
    "pixmo-count": [
        (PIXMO | {"count": 2, "points": COUNTED}, "How many dogs are there?", total("1 1 050 010 2 100 1000", 2)),
        (PIXMO | {"count": 3, "points": None}, "How many dogs are there?", "3"),
        (PIXMO | {"count": 0, "points": {"x": [], "y": []}}, "How many dogs are there?", "There are none."),
    ],
    "CoSyn-point": [
        (
            COSYN | {"questions": ["Where?"], "answer_points": [{"x": [50.0], "y": [2.0]}], "names": ["dogs"]},
            "Where?",
            tag("1 1 500 020"),
        ),
        (
            COSYN | {"questions": ["Where?"], "answer_points": [{"x": [], "y": []}], "names": ["dogs"]},
            "Where?",
            "There are none.",
        ),
        (
            COSYN | {"questions": ["Where?"], "answer_points": [{"x": [9, 1], "y": [2, 2]}]},
            "Where?",
            tag("1 1 010 020 2 090 020", "Where?"),
        ),
    ],
}


@pytest.mark.parametrize("kind", CASES)
def test_formats(kind, read):
    rows = read(*[record for record, _, _ in CASES[kind]])
    assert [str(row["bad"]) for row in rows if "bad" in row] == []
    assert [(row["texts"][0]["user"], row["texts"][0]["assistant"]) for row in rows] == [one[1:] for one in CASES[kind]]
    assert {row["format"] for row in rows} == {kind.split()[0]}
    assert all(set(row["texts"][0]) == {"user", "assistant", "source"} for row in rows)
    assert all(row["images"] for row in rows)


def test_the_rows_of_the_page_become_what_it_says(read):
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(\{.*\})` \| `(.*)` \| `(.*)` \|$", page, re.MULTILINE)
    assert len(examples) == 6
    rows = read(*[json.loads(record) for record, _, _ in examples])
    assert [(row["texts"][0]["user"], row["texts"][0]["assistant"]) for row in rows] == [one[1:] for one in examples]


def test_a_cosyn_row_has_a_turn_for_each_question(read):
    (found,) = read(COSYN | {"questions": ["a?", "b?"], "answer_points": [COUNTED, COUNTED], "names": ["a", "b"]})
    assert [one["user"] for one in found["texts"]] == ["a?", "b?"]


ROW = {"image": "a.png", "label": "dogs"}
BAD = [
    (ROW | {"points": [[50, 50]]}, "lies outside 0-1", "points_unit must say"),
    (ROW | {"points": [[1, 1]], "points_unit": "inches"}, "points_unit is not known", "0-1, percent, 0-1000, pixels"),
    (ROW | {"points": [[0.1, 0.2]], "count": 2}, "count is not the number of points", "count 2, 1 points"),
    (ROW | {"points": [{"x": 1}]}, "a point is not x and y", ""),
    (ROW | {"points": "0.1 0.2"}, "points is a string", ""),
    (ROW | {"points": [{"x": 0.1, "y": 0.1, "image": 2}]}, "a picture that is not there", "2 of 1"),
    (ROW | {"points": [[0.1, 0.2]], "label": "a<b"}, "cannot be written", "must not contain"),
    (ROW | {"image": "absent.png", "points": [[1, 2]], "points_unit": "pixels"}, "no such file", "absent.png"),
    (ROW | {"image": "https://a.b/c.png", "points": [[1, 2]], "points_unit": "pixels"}, "--fetch_images", "a.b"),
    (ROW | {"points": [[1, 2]], "points_unit": "pixels", "width": 0, "height": 5}, "width or height", ""),
    (COSYN | {"questions": ["a?"], "answer_points": []}, "another number of questions", "1 questions, 0"),
    (
        {"image": "a.png", "query": "?", "points": [{"x": 0, "y": 0, "timestamp": 1}]},
        "which is of a video",
        "timestamp",
    ),
    ({"image": "a.png", "query": "?", "count": 1.5}, "count is no whole number", "1.5"),
]


@pytest.mark.parametrize(("record", "reason", "found"), BAD)
def test_bad_rows(record, reason, found, read):
    (found_row,) = read(record)
    assert reason in found_row["bad"]
    assert found in found_row["bad"].first


def test_a_label_with_a_count_stays_a_label(read):
    assert read(ROW | {"count": 3})[0]["format"] == "labels"


def test_columns_of_ones_own(read):
    record = {"bild": "a.png", "orte": [[50, 50]], "was": "dogs", "einheit": "percent", "count": 1}
    columns = {"image": "bild", "points": "orte", "label": "was", "points_unit": "einheit"}
    (found,) = read(record, columns=columns)
    assert found["texts"][0]["assistant"] == total("1 1 500 500", 1)


def test_a_row_with_points_is_never_mirrored(monkeypatch):
    def mirrored() -> list[bool]:
        data = dataset([row()], train_cfg=tiny_train(flip_images=True))
        return [data[epoch, 0].mirrored for epoch in range(20)]

    assert any(mirrored())
    # The words of the tests' tokenizer are no point text.
    monkeypatch.setattr("data.datasets.has_points", lambda turns: turns == [turn()])
    assert not any(mirrored())


@pytest.mark.parametrize(
    ("user", "assistant", "expected"),
    [
        ("Where?", tag(BOTH), True),
        ("Where?", "There are none.", False),
        ("Is <point 0.1, 0.2, 1> red?", "yes", True),
        (None, "<pointer>", False),
    ],
)
def test_which_turns_have_points(user, assistant, expected):
    assert has_points([turn("a", "b"), turn(user, assistant)]) == expected


def test_videos():
    assert video_points(["00:01.50", 2], [[[1, 2]], [[50, 60], [5, 6]]], "dogs", "percent", count=True) == total(
        "1.5 1 010 020;2.0 2 050 060 3 500 600", 3
    )
    frames = [
        {"time": 0.0, "points": [{"id": 7, "point": [50, 20], "occluded": False}, {"id": 3, "point": [10, 20]}]},
        {"time": "00:00.50", "points": [{"id": 3, "point": [10, 20], "occluded": True}, {"id": 7, "point": [9, 9]}]},
    ]
    text = video_tracks(frames, "dogs", "pixels", (100, 100))
    assert text == '<tracks coords="0.0 1 100 200 2 500 200;0.5 2 090 090">dogs</tracks>'
    flat = [{"x": 0.1, "y": 0.2, "timestamp": time, "object_id": "a"} for time in (1, 0.5)]
    assert video_tracks(by_time(flat), "it", "0-1") == '<tracks coords="0.5 1 100 200;1.0 1 100 200">it</tracks>'
    with pytest.raises(BadRow, match="another number of times"):
        video_points([1], [], "dogs", "percent")
    with pytest.raises(BadRow, match="not seconds"):
        video_points(["soon"], [[[1, 2]]], "dogs", "percent")
