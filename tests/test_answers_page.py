"""answers.html: bounded, escaped, offline, wrong answers first, with the pictures that the data has."""

import base64
import html
import io
import json
import re

import pytest
from PIL import Image
from test_evaluate import opened, run, saved, table
from tiny.benchmarks import records
from tiny.pages import Page

from eval import answers_page, page_pictures
from eval.answers_page import choose, make_page
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
