"""Points drawn onto pictures, and `generate.py --draw_points`."""

import numpy as np
import pytest
from PIL import Image
from tiny.data import encoded, picture
from tiny.grades import save_answering_model

from data.points import Point, find_points
from eval import asking
from eval.drawing import COLOURS, EXPECTED, draw_points, place_points, save_drawings
from generate import main, parse_arguments

TEXT = '<points coords="1 1 250 500 2 1000 1000;2 3 500 500">dogs</points>'


def pixel(image: Image.Image, x: int, y: int) -> tuple:
    return image.convert("RGB").getpixel((x, y))


@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_point_shows_on_light_and_dark(ground):
    blank = Image.new("RGB", (400, 200), ground)
    drawn = draw_points(blank, [("dogs", [Point(250, 500, 1, 7)]), ("a cat", [Point(750, 500, 1, 8)])])
    for x, colour in zip((100, 300), COLOURS, strict=False):
        assert pixel(drawn, x, 100) == tuple(bytes.fromhex(colour[1:]))
        column = {pixel(drawn, x, y) for y in range(100, 110)}
        assert {(255, 255, 255), (0, 0, 0)} <= column  # both rings
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(blank)).sum(axis=-1) > 0
    assert changed[90:110, 110:125].any()  # the number beside the disc
    assert changed[:40, :60].any()  # the labels
    assert not changed[150:].any()
    assert pixel(blank, 100, 100) == pixel(blank, 0, 0)  # the picture itself is as it was


def test_a_point_is_in_the_picture_or_the_frame_that_it_names():
    text = '<points coords="1 1 250 500;3 2 100 100">a</points> <tracks coords="0.4 1 100 100;1.1 1 300 300">b</tracks>'
    placed = place_points(find_points(text + ' <points coords="1.9 1 500 500">c</points> <point>'), 2, [0.0, 1.0])
    places = [[(label, [(one.x, one.y) for one in points]) for label, points in each] for each in placed.images]
    assert places == [[("a", [(250, 500)])], []]
    places = [[(label, [(one.x, one.y) for one in points]) for label, points in each] for each in placed.frames]
    assert places == [[("b", [(100, 100)])], [("b", [(300, 300)])]]
    assert (placed.count, placed.elsewhere, len(placed.broken)) == (3, 2, 1)
    assert place_points(find_points('<points coords="1.0 1 5 5">c</points>'), 1).elsewhere == 1  # a time, no picture


def test_a_ring_is_open(tmp_path):
    blank = Image.new("RGB", (400, 200), "white")
    drawn = draw_points(blank, [], [("dogs", [Point(250, 500)])])
    assert pixel(drawn, 100, 100) == (255, 255, 255)
    assert tuple(bytes.fromhex(EXPECTED[1:])) in {pixel(drawn, x, 100) for x in range(100, 115)}


def test_several_images_are_several_files(tmp_path):
    images = [encoded(picture(60, 40)), encoded(picture(40, 60, "L"))]
    found = find_points(TEXT + ' <points coords="3 4 001 001">x</points> <points>')
    notes = save_drawings(found, images, [tmp_path / "o_1.png", tmp_path / "o_2.png"])
    assert "not drawn" in notes[0]
    assert notes[1:] == [
        f"{tmp_path / 'o_1.png'}: 2 points", f"{tmp_path / 'o_2.png'}: 1 points",
        "not drawn: 1 points in pictures that are not there",
    ]  # fmt: skip
    assert [Image.open(tmp_path / f"o_{n}.png").size for n in (1, 2)] == [(60, 40), (40, 60)]


def test_generate_draws_what_it_answers(tmp_path, monkeypatch, capsys):
    save_answering_model(tmp_path / "model")
    (tmp_path / "0.png").write_bytes(encoded(picture(80, 80)))
    monkeypatch.setattr(asking.Asker, "answer", lambda *given, **more: [TEXT])
    flags = ["--checkpoint", tmp_path / "model", "--prompt", "Point to dogs.", "--image", tmp_path / "0.png"]
    main(parse_arguments([str(one) for one in (*flags, "--dtype", "float32", "--draw_points", tmp_path / "out.png")]))
    out, err = capsys.readouterr()
    assert out == f"{TEXT}\n"
    assert f"{tmp_path / 'out.png'}: 2 points" in err
    assert pixel(Image.open(tmp_path / "out.png"), 20, 40) == tuple(bytes.fromhex(COLOURS[0][1:]))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--draw_points", "a.png"], "needs --image and --prompt"),
        (["--draw_points", "a.txt", "--image", "0.png"], "must be a file that ends in .png"),
        (["--draw_points", ".", "--image", "0.png", "1.png"], "must be a file that ends in .png"),
        (["--draw_points", "absent/a.png", "--image", "0.png"], "no such folder absent"),
        (["--draw_points", "a.png", "--image", "0.png", "--generations", "2"], "one answer"),
    ],
)
def test_what_cannot_be_drawn(flags, problem, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", "absent", "--prompt", "a", *flags])
    assert problem in capsys.readouterr().err


def test_pictures_that_are_shown_are_not_overwritten(tmp_path, capsys):
    save_answering_model(tmp_path / "model")
    (tmp_path / "clip").mkdir()
    shots = [tmp_path / "shot_1.png", tmp_path / "shot_2.png", tmp_path / "clip" / "1.png"]
    for path in shots:
        path.write_bytes(encoded(picture(8, 8)))
    flags = ["--checkpoint", str(tmp_path / "model"), "--prompt", "a", "--image", str(shots[0])]
    for more, target in (
        ([str(shots[1]), "--draw_points", str(tmp_path / "shot.png")], "shot_1.png"),
        (["--draw_points", str(tmp_path / "clip" / ".." / "shot_1.png")], "shot_1.png"),
        (["--video", str(tmp_path / "clip"), "--draw_points", str(shots[2])], "1.png"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([*flags, *more])
        assert f"{target}, which is shown" in capsys.readouterr().err
    assert parse_arguments([*flags, str(shots[1]), "--draw_points", str(tmp_path / "points.png")])
    assert parse_arguments([*flags, "--draw_points", str(shots[1])]), "a picture of an earlier answer"
