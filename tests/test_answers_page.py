"""answers.html: bounded, escaped, offline, wrong answers first, with the pictures that the data has."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_evaluate import opened, run, saved, table
from tiny.benchmarks import records
from tiny.pages import Page
from tiny.video import write_clip

from eval import answers_page, page_pictures
from eval.answers_page import choose, make_page
from eval.drawing import COLOURS, EXPECTED
from eval.own_rows import open_own_rows, show_frames
from eval.page_pictures import chosen_frames
from eval.results import score

EVIL = "</article><script>alert('&')</script> \ud800 \"' <img src=http://x.example/y.png>"


def page_of(benchmark, answers, model="a <model>"):
    rows, summary = score(benchmark, answers)
    name = benchmark.task.name
    results = {"model": model, "tasks": {name: summary | {"decoding": {"greedy": True}}}}
    return make_page(results, {name: rows}, {name: benchmark})


def ids(page: Page) -> list[str]:
    return [one.split(" · ")[0] for one in page.of("h2")]


def test_wrong_answers_come_first_each_with_all_that_was_scored(tmp_path):
    benchmark = opened(saved(tmp_path, "mmstar"), "mmstar")
    answers = dict(zip([one.id for one in benchmark.questions], "ABCXABCX", strict=True))
    page = Page(page_of(benchmark, answers))
    assert ids(page) == ["3", "7", "0", "1", "2", "4", "5", "6"]
    assert page.of("answer") == ["X", "X", *"ABCABC"]
    assert page.of("rule")[0].startswith("nothing that can be read: score 0 by ")
    assert any(one.startswith('"A": score 1 by') for one in page.of("rule"))
    assert next(words for _, words in page.texts if words.startswith("What is this")).startswith("What is this (3)?")
    assert {"wrong (2)", "right (6)", "category: math (4)", "l2_category: part 3 (2)"} <= set(page.of("option"))
    assert "75.00 ± 16.37" in page.of("td")  # 6 of 8, and sqrt(0.75 * 0.25 / 7)
    assert page.of("h1") == ["Answers of a <model>"]


def test_nothing_on_the_page_is_taken_for_html_or_refers_outside(tmp_path):
    folder = tmp_path / "mmstar"
    folder.mkdir()
    record = records("mmstar", 1)[0] | {"question": EVIL.replace("\ud800", ""), "category": EVIL.replace("\ud800", "")}
    (folder / "val.jsonl").write_text(json.dumps({k: v for k, v in record.items() if k != "image"}), encoding="utf-8")
    benchmark = opened(folder, "mmstar")
    text = page_of(benchmark, {"0": EVIL})
    page = Page(text)
    assert page.of("answer") == [EVIL.replace("\ud800", "\\ud800")]
    assert page.references == []  # with --answers the data need hold no images
    assert "The data holds no pictures." in page.of("note")
    assert len(re.findall(r"<script>", text)) == 1
    assert text.encode("utf-8")
    groups = json.loads(html.unescape(re.search(r'data-groups="([^"]*)"', text)[1]))
    assert groups[0] == "category: " + EVIL.replace("\ud800", "")
    assert "default-src 'none'" in text


def test_pictures_are_small_jpegs_within_the_page(tmp_path):
    rows = records("mmstar", 4)
    buffer = io.BytesIO()
    Image.effect_noise((900, 450), 60).save(buffer, "PNG")
    for row in rows:
        row["image"] = {"bytes": buffer.getvalue(), "path": None}
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    benchmark = opened(saved_rows(tmp_path, rows), "mmstar")
    page = Page(page_of(benchmark, {one.id: "A" for one in benchmark.questions}))
    assert len(page.references) == 3
    for one in page.references:
        assert one.startswith("data:image/jpeg;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))).size == (224, 112)
    assert sum(one.startswith("no picture: ") for one in page.of("note")) == 1
    assert "900 x 450 pixels" in page.titles


def saved_rows(folder, rows):
    made = table("mmstar", len(rows)).remove_columns("image")
    made.add_column("image", [row["image"] for row in rows]).to_parquet(folder / "val.parquet")
    return folder


def test_the_page_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(page_pictures, "PAGE_BYTES", 1000)
    monkeypatch.setattr(answers_page, "LETTERS", 20)
    benchmark = opened(saved(tmp_path, "mmstar"), "mmstar")
    page = Page(page_of(benchmark, {one.id: "A" * 1000 for one in benchmark.questions}))
    assert 1 <= len(page.references) < 8
    assert any(f"{8 - len(page.references)} left out" in one for one in page.of("note"))
    assert all(len(one) < 60 for one in page.of("answer"))


@pytest.mark.parametrize(
    ("wrong", "right", "expected"),
    [(1000, 1000, (150, 50)), (1000, 10, (190, 10)), (20, 1000, (20, 180)), (3, 4, (3, 4))],
)  # fmt: skip
def test_rows_are_drawn_from_all_of_the_data(wrong, right, expected):
    rows = [{"id": n, "rules": {"first": {"score": float(n >= wrong)}}} for n in range(wrong + right)]
    found = choose(rows, 200)
    counts = [sum(row["rules"]["first"]["score"] == one for row in found) for one in (0.0, 1.0)]
    assert tuple(counts) == expected
    chosen = [row["id"] for row in found if row["rules"]["first"]["score"] == 0.0]
    assert chosen == sorted(set(chosen))
    assert max(chosen) >= wrong * 0.98 - 1


def test_evaluate_writes_it_for_several_tasks(tmp_path, capsys):
    for task in ("mmstar", "pope"):
        saved(tmp_path, task)
    lines = [{"task": "mmstar", "id": str(n), "answer": "A"} for n in range(8)]
    lines += [
        {"task": "pope", "id": one.id, "answer": "yes"} for one in opened(tmp_path, "pope", alone=False).questions
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run("--answers", tmp_path / "answers.jsonl", "--tasks", "mmstar,pope", "--data_root", tmp_path,
        "--output", tmp_path / "out")  # fmt: skip
    page = Page((tmp_path / "out/answers.html").read_text(encoding="utf-8"))
    assert len(page.of("answer")) == len(page.references) == 16
    assert {"task: mmstar (8)", "task: pope (8)"} <= set(page.of("option"))
    assert sum("task: pope" in one for one in page.of("h2")) == 8


def own_page(folder, records, answers):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = open_own_rows(folder / "rows.jsonl", None)
    show_frames([rows], 4)
    return Page(page_of(rows, answers))


def pixels(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")


def shows(image: Image.Image, colour: str) -> bool:
    """Whether there is something of about that colour in it."""
    away = np.abs(np.asarray(image).astype(int) - list(bytes.fromhex(colour[1:]))).max(axis=-1)
    return bool((away < 40).any())


def test_a_video_is_a_strip_of_its_frames_with_times_and_points(tmp_path):
    write_clip(tmp_path / "a.mp4", 31)  # 0 to 3 s, of which four frames are seen
    points = [{"x": 0.75, "y": 0.25, "timestamp": time_s} for time_s in (1.0, 2.9)]
    record = {"id": "a", "video": "a.mp4", "query": "the cat", "points": points}
    said = '<points coords="1.1 1 750 250;2.0 2 700 300;9.0 3 700 300">cat</points> <points coords="x">'
    page = own_page(tmp_path, [record], {"a": said})
    assert page.of("figcaption") == ["0.0 s", "1.0 s", "2.0 s", "3.0 s"]
    frames = [pixels(one) for one in page.references]
    assert {frame.size for frame in frames} == {(64, 48)}
    assert [shows(frame, EXPECTED) for frame in frames] == [False, True, False, True]
    assert [shows(frame, COLOURS[0]) for frame in frames] == [False, True, True, False]
    assert {" answer: 2", ", 1 elsewhere, 1 that cannot be read"} <= {text for _, text in page.texts}
    assert any(one.startswith("4 frames, at most 128 pixels") for one in page.of("note"))


def test_points_are_drawn_on_the_picture_that_they_are_in(tmp_path):
    for name, size in (("0.png", (300, 150)), ("1.png", (20, 10))):
        Image.new("RGB", size, "grey").save(tmp_path / name)
    record = {"image": ["0.png", "1.png"], "query": "cats", "points": [{"x": 0.5, "y": 0.5, "image": 1}]}
    right = {"image": ["0.png"], "question": "what?", "answer": "red", "id": "b"}
    answers = {"a": '<points coords="2 1 500 500">cats</points>', "b": "red"}
    page = own_page(tmp_path, [record | {"id": "a"}, right], answers)
    images = [pixels(one) for one in page.references]
    assert [image.size for image in images] == [(224, 112), (220, 110), (224, 112)]  # the small one 11 times as large
    assert [shows(image, EXPECTED) for image in images] == [True, False, False]
    assert [shows(image, COLOURS[0]) for image in images] == [False, True, False]
    assert page.titles == ["300 x 150 pixels", "20 x 10 pixels", "300 x 150 pixels"]


def test_a_video_that_cannot_be_shown_says_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"<b>no video</b>" * 20)
    page = own_page(tmp_path, [{"id": "a", "video": "a.mp4", "question": "?", "answer": "!"}], {"a": "!"})
    assert page.references == []
    assert any(one.startswith("no picture: ") for one in page.of("pictures note"))


@pytest.mark.parametrize(
    ("count", "wanted", "most", "expected"),
    [(4, [], 8, [0, 1, 2, 3]), (100, [], 3, [0, 50, 99]), (100, [7], 3, [0, 7, 99]), (9, [1, 2, 3, 4], 2, [1, 4]),
     (9, [3, 4], 2, [3, 4]), (1, [0], 1, [0])],
)  # fmt: skip
def test_frames_with_points_are_shown_before_others(count, wanted, most, expected):
    assert chosen_frames(count, wanted, most) == expected
