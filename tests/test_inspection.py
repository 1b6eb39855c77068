"""inspect_data.py: what it prints of data, and its page, parsed and where there is a browser opened."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny.data import encoded, picture, row, stream, tiny_train, tiny_vlm, turn
from tiny.pages import Page
from tiny.runs import arguments
from tiny.video import write_clip

import inspect_data
from data.images import ImageProcessor
from data.inspection import fact_lines, measure
from data.inspection_page import make_page
from data.pipeline import load_data
from data.web_images import WebImage
from training.arguments import parse_arguments
from training.look import dry_run_lines

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page_of(data, rows: int = 4) -> Page:
    data.start_reading()
    text = make_page("a <title>", ["a <fact>"], data, data.tokenizer, data.train_dataset.vlm_cfg, rows)
    found = Page(text)
    assert all(one.startswith("data:image/") for one in found.references)
    assert not found.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"url\(|@import|https?:", text)
    return found


def pixels(page: Page) -> list[np.ndarray]:
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one.split(",")[1])))) for one in page.references]


def loaded(rows, vlm=None, **settings):
    return load_data(rows, vlm or tiny_vlm(), tiny_train(val_size=0, **settings), None)


def test_the_page_shows_tokens_labels_padding_and_the_tiles_as_they_were_cut():
    rows = [
        row([encoded(picture(40, 60, seed=1))], name="<b>tiled"),
        row([], [turn("is there a red shape? " * 3, "red")], name="text"),
    ]
    page = page_of(loaded(rows, batch_size=2))
    assert sorted(page.of("label")[1:]) == ["<|im_end|>", "<|im_end|>", "red", "yes"]  # the first is the legend
    assert "".join(page.of("prompt")).count("<|im_start|>") == 4  # one epoch
    assert any("<b>tiled" in text for text in page.of("h2"))  # as text, not as a tag
    tiles = ImageProcessor(tiny_vlm())(rows[0]["images"][0])[0]
    assert all(
        (ours == theirs.permute(1, 2, 0).numpy()).all() for ours, theirs in zip(pixels(page), tiles, strict=True)
    )
    assert [text for text in page.of("image") if "tokens" in text] == [
        f"tile {i + 1}: 4 tokens" for i in range(len(tiles))
    ]
    padding = [text for text in page.of("padding") if "of padding" in text]
    assert len(padding) == 1
    first = next(title for title in page.titles if title.startswith("position 0"))
    assert re.fullmatch(r"position 0, id \d+", first)


def test_packed_documents_have_their_own_positions():
    rows = [row(name=f"row{i}", texts=[turn(assistant="red")]) for i in range(8)]
    page = page_of(
        loaded(
            rows,
            tiny_vlm(lm_max_length=1024),
            packing=True,
            batch_size=1,
            max_sample_length=256,
            max_images_per_knapsack=8,
        ),
        1,
    )
    assert page.of("document") == [f"document {i}" for i in range(8)]
    starts = [title for title in page.titles if ", 0 in its document" in title]
    assert len(starts) == 8
    assert all(f"row{i}" in page.of("h2")[0] for i in range(8))


def test_rows_are_escaped_and_dropped_ones_are_named(tmp_path):
    rows = [row([b"junk"], name="</section><script>alert(1)</script>"), row(name="<img src=x>"), row(name="good")]
    page = page_of(loaded(rows, batch_size=3))
    assert any("</section><script>" in text for text in page.of("dropped"))


def test_the_facts_count_what_is_there():
    pair = encoded(picture(20, 16, seed=5))
    rows = [row([pair], name=str(i)) for i in range(8)]  # the same question of the same image
    rows += [row([encoded(picture(64, 48, seed=i))], [turn("is there a zeppelin?")], name=f"z{i}") for i in range(2)]
    rows += [row([b"junk"], name="bad"), row([], [turn("is there a red shape? " * 100)], name="long")]
    facts = measure(loaded(rows))
    assert facts.sampled == 12
    assert facts.dropped == {"word not in the vocabulary": 2, "image does not decode": 1, "too long": 1}
    assert (facts.dropped.bad_rows(), facts.duplicates) == (3, 7)
    assert facts.sizes == {(20, 16): 8}
    assert facts.unknown["zeppelin"] in ("z0", "z1")
    assert (len(facts.tokens), facts.labels) == (8, 16)
    lines = "\n".join(fact_lines(facts))
    for words in (
        "12 training",
        "3 of 12 rows cannot be used",
        "1 rows, as the flags say",
        "'zeppelin' (z",
        "20 x 16",
    ):
        assert words in lines, words


def test_the_facts_count_videos(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", 11)
    rows = [
        row([], name="a") | {"videos": [str(clip)], "video_numbers": [0]},
        row([encoded(picture(16, 16))], name="b"),
    ]
    facts = measure(loaded(rows))
    assert (facts.images, facts.videos) == ([0, 1], [1, 0])
    assert any(line.startswith("videos      of a row: 0 in 1, 1 in 1;") for line in fact_lines(facts))


def test_a_leak_between_training_and_validation_is_found(tmp_path):
    def lines(path, images):
        rows = [{"image": f"{i}.png", "question": "is there a red shape?", "answer": "yes"} for i in images]
        path.write_text("\n".join(map(json.dumps, rows)))
        for i in images:
            (tmp_path / f"{i}.png").write_bytes(encoded(picture(seed=i)))
        return str(path)

    from data.rows import load_rows

    own = lines(tmp_path / "a.jsonl", range(6))
    for others, leaks in ((range(4, 9), 2), (range(10, 13), 0)):
        cfg = tiny_train(val_dataset_path=lines(tmp_path / "b.jsonl", others))
        facts = measure(load_data(load_rows(own), tiny_vlm(), cfg, None))
        (found,) = facts.overlaps
        assert (found.split, found.rows, found.same_question, found.same_image) == (
            "validation",
            len(others),
            leaks,
            leaks,
        )
        assert ("LEAK" in "\n".join(fact_lines(facts))) == (leaks > 0)


def test_the_same_question_of_other_images_on_the_web_is_no_leak(monkeypatch):
    monkeypatch.setattr("data.images.fetched", lambda url: io.BytesIO(encoded(picture())))
    rows = [row([WebImage(f"https://example.org/{i // 2}.png")], name=str(i)) for i in range(10)]
    data = load_data(rows, tiny_vlm(), tiny_train(val_size=4), None)
    facts = measure(data)
    assert (data.split, facts.duplicates) == ("by image, 5 of them: none is in both", 3)
    assert [(found.same_question, found.same_image) for found in facts.overlaps] == [(0, 0)]
    data = load_data(rows, tiny_vlm(), tiny_train(val_size=1, split_by="row"), None)
    assert [(found.same_question, found.same_image) for found in measure(data).overlaps] == [(1, 1)]


def test_a_stream_is_looked_at_from_its_beginning():
    facts = measure(loaded(stream(10)), 3)
    assert (facts.sampled, facts.rows["training"], facts.compared_rows) == (3, None, 0)
    assert "a stream" in fact_lines(facts)[0]


@pytest.fixture
def rows_file(data) -> Path:
    return data / "rows.jsonl"


def test_the_command_reads_as_train_py_does(rows_file, tmp_path, capsys):
    page = tmp_path / "page.html"
    flags = ["--val_size", "4", "--rows", "0", "--html", str(page), "--page_rows", "3", "--num_workers", "2"]
    assert inspect_data.main([str(rows_file), *flags]) == 0
    said = capsys.readouterr().out
    assert "12 training, 4 validation" in said
    assert "--num_workers 2" in said
    assert len(Page(page.read_text(encoding="utf-8")).of("h2")) == 3
    with pytest.raises(SystemExit):  # before anything is read
        inspect_data.main([str(rows_file), "--html", str(tmp_path / "nowhere" / "page.html")])
    assert "--html" in capsys.readouterr().err
    assert inspect_data.main([str(tmp_path / "nothing.jsonl")]) == 2
    assert "--train_dataset_path" in capsys.readouterr().err


def test_names_of_rows_that_are_no_utf8_are_printed(data, capsys):
    try:
        (data / "rows.jsonl").rename(data / "caf\udce9.jsonl")
    except OSError:
        pytest.skip("this file system has no such names")
    assert inspect_data.main([str(data), "--val_size", "0"]) == 0
    assert r"first in rows/caf\udce9.jsonl, line 4" in capsys.readouterr().out


def test_a_dry_run_says_the_same_of_a_few_rows(data, tmp_path):
    lines = dry_run_lines(parse_arguments(arguments(data, tmp_path, "run", dry_run=True)), [])
    assert "12 training, 4 validation" in lines[0]
    assert any("cannot be used" in line for line in lines)
    (line,) = dry_run_lines(parse_arguments(arguments("someone/rows", tmp_path, "run", dry_run=True)), None)
    assert "not looked at" in line
    assert "--train_dataset_path someone/rows" in line
    assert "--lm_tokenizer" in line
    (line,) = dry_run_lines(parse_arguments(arguments(tmp_path / "rows" / "3.png", tmp_path, "run", dry_run=True)), [])
    assert "cannot be used: --train_dataset_path" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_the_page(tmp_path):
    data = loaded([row([encoded(picture(40, 60, seed=1))], name="tiled"), row(name="plain")], batch_size=2)
    data.start_reading()
    text = make_page("page", ["fact"], data, data.tokenizer, tiny_vlm(), 2)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,900",
    ]  # fmt: skip
    subprocess.run([BROWSER, *flags, (tmp_path / "page.html").as_uri()], check=True, capture_output=True, timeout=120)
    drawn = np.array(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0xBF, 0xE8, 0xC5), (0xE8, 0xEC, 0xF4), (0xF7, 0xDB, 0xA7)):  # label, prompt, image
        assert (drawn == colour).all(axis=1).sum() > 100, colour
