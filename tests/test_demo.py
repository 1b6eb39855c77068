"""demo.py: its flags, what it draws, and the page in a real browser."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny.browser import CHROMIUM, Browser
from tiny.data import encoded, picture, tiny_vlm
from tiny.families import FAMILIES
from tiny.grades import save_answering_model
from tiny.video import write_clip

import demo
from data.images import ImageProcessor
from eval.asking import Asker
from eval.demonstration import GAP, drawn, grids, show_answer
from eval.drawing import COLOURS
from training.setup import autocast, pick_device

ROOT = Path(__file__).resolve().parents[1]


def asker_of(folder: Path, **fields) -> Asker:
    return Asker(save_answering_model(folder, **fields), torch.device("cpu"), autocast(torch.device("cpu"), "float32"))


def test_everything_wrong_with_the_flags_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    for port, problem in ((70_000, "--port 70000: must be in"), (80, "--port 80: cannot listen there")):
        host = "127.0.0.1" if port > 2**16 else "192.0.2.1"  # an address that no machine has
        with pytest.raises(SystemExit):
            demo.parse_arguments([f"--checkpoint={tmp_path}", f"--port={port}", f"--host={host}"])
        told = capsys.readouterr().err
        assert problem in told
        assert f"--checkpoint {tmp_path}" in told
        assert "uv sync --extra demo" in told


def test_a_port_in_use_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    save_answering_model(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(SystemExit):
            demo.parse_arguments([f"--checkpoint={tmp_path}", f"--port={taken.getsockname()[1]}"])
        assert "cannot listen there" in capsys.readouterr().err
    assert demo.parse_arguments([f"--checkpoint={tmp_path}", "--port=0"]).folder == tmp_path


def test_a_device_that_is_not_here_is_told(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: not on this machine"):
        pick_device("mps")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(("family", "tokens"), [("nanovlm", "4 image tokens of 15"), ("nanomolmo2", "16 image tokens "),
                                                ("molmo2", "14 image tokens of 31")])  # fmt: skip
def test_the_last_of_what_is_shown_is_the_answer(tmp_path, family, tokens):
    """Of crops: 4 image tokens of the whole, 2 x 5 of the 4 x 10 patches of 1 x 4 crops."""
    asker = asker_of(tmp_path, **FAMILIES[family])
    first, *_, last = show_answer(asker, [encoded(picture(40, 16))], "what color?", 4)
    assert first.answer == ""
    assert first.numbers.startswith(tokens)
    assert first.seen is not None
    question = asker.reader.read({"user": "what color?"}, [picture(40, 16)])
    assert last.answer == asker.answer([question], 4)[0] != ""
    assert "first token after" in last.numbers
    alone = list(show_answer(asker, [], "what color?", 4))
    assert alone[0].seen is None
    for images, text, longest, problem in (
        ([], " ", 4, "a question, a picture or a video is needed"),
        ([b"no image"], "what?", 4, "image does not decode"),
        ([], "what <|im_end|> is it?", 4, "must not stand in it"),
        ([], "what color?", 8192, "more than the model's 8192 positions"),
    ):
        with pytest.raises(ValueError, match=problem):
            next(show_answer(asker, images, text, longest))


POINTED = '<points coords="1 1 500 500">a</points> <points coords="0.5 1 250 750;9.0 2 5 5">b</points> <point>'


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A model that answers POINTED, about a video of 1.1 s and a picture."""
    asker = asker_of(tmp_path / "model")
    monkeypatch.setattr(asker, "stream", lambda *given, **more: (piece for piece in (POINTED[:9], POINTED[9:])))
    return asker, write_clip(tmp_path / "a.mp4", 11)


def test_the_points_of_an_answer_are_drawn_on_picture_and_frame(answering):
    asker, clip = answering
    *before, last = show_answer(asker, [encoded(picture(80, 40))], "where?", 4, str(clip))
    assert [one.pointed for one in before] == [[], [], []]
    assert [what for _, what in last.pointed] == ["points in picture 1", "points at 0.5 s"]
    assert [image.size for image, _ in last.pointed] == [(80, 40), (64, 48)]
    for (image, _), place in zip(last.pointed, ((40, 20), (16, 36)), strict=True):
        assert image.getpixel(place) == tuple(bytes.fromhex(COLOURS[0][1:]))
    assert "; 1 points are in nothing that is shown; <point> at letter" in last.numbers
    assert last.seen.width > last.seen.height  # the picture's tile above the three frames


def test_a_video_that_cannot_be_shown_is_told(answering, tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="video does not decode"):
        next(show_answer(answering[0], [], "what?", 4, tmp_path / "b.mp4"))


def test_tiles_are_drawn_at_their_places():
    processor = ImageProcessor(tiny_vlm())
    tiles, grid = processor(picture(64, 32))
    canvas = drawn([grids(tiles, grid), grids(*processor(picture(16, 64, seed=1)))])
    cell = (canvas.width - 5 * GAP - GAP) // 5  # the whole, four columns, and a wider gap between them
    assert grid == (2, 4)
    assert canvas.height == 6 * (cell + GAP) + GAP
    for row, col in ((0, 0), (1, 3)):
        left, top = (1 + col) * (cell + GAP) + 2 * GAP, row * (cell + GAP)
        shown = canvas.crop((left, top, left + cell, top + cell)).resize((16, 16), 0)
        wanted = tiles[1 + 4 * row + col].permute(1, 2, 0)
        assert shown.tobytes() == wanted.numpy().tobytes()


def test_the_freezes_of_the_run_are_found(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    assert demo.find_freezes(checkpoint) is None
    (tmp_path / "grades_history.json").write_text('{"last_step": 8}')
    assert demo.find_freezes(checkpoint) == {"last_step": 8}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra demo")
@pytest.mark.skipif(CHROMIUM is None or find_spec("tornado") is None, reason="needs Chromium and tornado")
def test_a_browser_asks_and_reads_the_answer_without_a_network(tmp_path):
    asker, image = asker_of(tmp_path / "model"), tmp_path / "a.png"
    image.write_bytes(encoded(picture(40, 30)))
    command = [sys.executable, "demo.py", "--checkpoint", tmp_path / "model", "--port=0", "--dtype=float32"]
    no_proxy = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=no_proxy)
    browser = None
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        browser = Browser(tmp_path / "profile")
        browser.send("Page.navigate", url=url)
        browser.wait_for("document.querySelector('#picture input[type=file]') && document.querySelector('#ask')")
        browser.choose_file("#picture input[type=file]", image)
        browser.wait_for("document.querySelector('#picture img')")
        browser.type_into("#question textarea, #question input", "what color?")
        browser.run("window.seen = []; setInterval(() => {"
                    "const said = document.querySelector('#answer textarea').value;"
                    "if (said && said !== window.seen.at(-1)) window.seen.push(said) }, 5); 0")  # fmt: skip
        browser.run("document.querySelector('#ask').click()")
        browser.wait_for("document.querySelector('#numbers textarea, #numbers input').value.includes('tokens/s')")
        question = asker.reader.read({"user": "what color?"}, [picture(40, 30)])
        wanted = json.dumps(asker.answer([question], 50)[0])
        browser.wait_for(f"document.querySelector('#answer textarea').value == {wanted}")
        browser.wait_for("document.querySelector('#seen img')")
        assert len(browser.run("window.seen")) > 1  # it came in pieces
        clip = write_clip(tmp_path / "a.mp4", 11)
        *_, wanted = show_answer(asker, [encoded(picture(40, 30))], "what color?", 50, str(clip))
        browser.choose_file("#video input[type=file]", clip)
        browser.wait_for("document.querySelector('#video').innerText.includes('KB')")
        browser.run("document.querySelector('#ask').click()")
        browser.wait_for("document.querySelector('#numbers textarea, #numbers input').value.startsWith('16 image')")
        browser.wait_for(f"document.querySelector('#answer textarea').value == {json.dumps(wanted.answer)}")
        outside = [one for one in browser.asked if not one.startswith((url, "data:", "blob:", "about:"))]
        assert len(browser.asked) > 5
        assert outside == []
    finally:
        if browser:
            browser.close()
        server.terminate()
        server.wait(20)
