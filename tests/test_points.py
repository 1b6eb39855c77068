"""Point texts: written, read back, and why a broken one is broken."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.points import NONE, Point, Pointing, PointsError, canonical, find_points, parse, to_scale, write

LABELS = st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), max_size=12)
COORDINATES = st.floats(-50, 1050)
# No limit on time, also none on that of drawing, which a busy machine would exceed.
SETTINGS = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@st.composite
def pointings(draw):
    places = draw(st.sampled_from([st.integers(1, 5), st.floats(0, 99)]))
    points = draw(st.lists(st.builds(Point, COORDINATES, COORDINATES, places), max_size=6))
    kind = draw(st.sampled_from(["points", "tracks"]))
    if kind == "tracks":  # no object twice at one time
        seen: dict = {}
        for one in points:
            seen.setdefault((round(one.place, 1), draw(st.integers(0, 4))), one)
        points = [Point(one.x, one.y, one.place, number) for (_, number), one in seen.items()]
    return Pointing(draw(LABELS), tuple(points), kind, draw(st.sampled_from([None, len(points)])))


@SETTINGS
@given(pointings())
def test_what_is_written_is_read_back(pointing):
    text = write(pointing)
    assert parse(text) == canonical(pointing)
    assert write(parse(text)) == text
    found = find_points(f"Well: {text} I think.")
    assert found.broken == []
    assert found.points == list(parse(text).points)


@SETTINGS
@given(st.text(alphabet='<points/>coords=" 0123456789.;Counting thesw', max_size=60), st.integers(0, 60))
def test_no_text_is_read_as_what_would_not_be_written_so(noise, cut):
    for text in (noise, (_DOGS[:cut] + noise + _DOGS[cut:])):
        find_points(text)  # raises nothing
        try:
            found = parse(text)
        except PointsError:
            continue
        assert write(found) == text


_DOGS = '<points coords="1 1 532 204 2 640 981">dogs</points>'
TWO = (Point(640, 980.6), Point(532.2, 204))
WRITTEN = [
    (Pointing("dogs", TWO), _DOGS),
    (Pointing("dogs", TWO, count=2), f"Counting the {_DOGS} shows a total of 2."),
    (Pointing("dogs", ()), NONE),
    (Pointing("dogs", (), count=0), NONE),
    (Pointing("a", (Point(900, 800), Point(900, 700))), '<points coords="1 1 900 700 2 900 800">a</points>'),
    (Pointing("a", (Point(-3, 1002), Point(7, 1000, 2))), '<points coords="1 1 000 1000;2 2 007 1000">a</points>'),
    (Pointing("a", (Point(5, 5, 2.04), Point(9, 9, 0.0))), '<points coords="0.0 1 009 009;2.0 2 005 005">a</points>'),
    (
        Pointing("a", tuple(Point(x, y, t, i) for t, i, x, y in [
            (0.0, "cat", 10.2, 30), (0.0, "dog", 10.4, 20), (5.0, "cat", 100, 100), (5.0, "dog", 200, 200),
        ]), "tracks"),
        '<tracks coords="0.0 1 010 020 2 010 030;5.0 1 200 200 2 100 100">a</tracks>',
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pointing", "text"), WRITTEN)
def test_texts(pointing, text):
    assert write(pointing) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is neither"),
        (f"{_DOGS}.", "is neither"),
        ("Counting the dogs shows a total of 2.", "is neither"),
        (f"Counting the {_DOGS} shows a total of 3.", "counts 3, but has 2"),
        ('<points coords="1 1 532 204">a</tracks>', "is closed by </tracks>"),
        ('<points coords="">a</points>', "is not a picture or time"),
        ('<points coords="1 1 532">a</points>', "'1 1 532' is not"),
        ('<points coords="1 1 53 204">a</points>', "is not"),
        ('<points coords="1 1 532 1001">a</points>', "more than 1000"),
        ('<points coords="1 1 640 981 2 532 204">a</points>', "not sorted"),
        ('<points coords="1 2 532 204">a</points>', "numbered"),
        ('<points coords="1 1 532 204;1.5 2 532 204">a</points>', "all be in pictures or all at times"),
        ('<points coords="0 1 532 204">a</points>', "from 1"),
        ('<tracks coords="1.0 1 532 204 1 533 204">a</tracks>', "object 1 is twice at 1.0"),
    ],
)
def test_a_broken_text_says_why(text, why):
    with pytest.raises(PointsError, match=why):
        parse(text)


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="must not contain"):
        write(Pointing("a<b", TWO))
    with pytest.raises(ValueError, match="must have an object id"):
        write(Pointing("a", TWO, "tracks"))


FREE = [
    (f"Here: {_DOGS} and {_DOGS}", [(532, 204, 1, 1), (640, 981, 1, 2)] * 2),
    ('<points coords="1 2 640 981 7 5 20\t2 1 1000 0"/>', [(640, 981, 1, 2), (5, 20, 1, 7), (1000, 0, 2, 1)]),
    ('<points alt="a > b" coords="0.5 1 640 981">x</points>', [(640, 981, 0.5, 1)]),
    ('<point x="10.5" y="20.1" alt="dog">dog</point>', [(105, 201, 1, 1)]),
    ('<points x1="10.5" y1="20.1" x2="3" y2="100" alt="d">d</points>', [(105, 201, 1, 1), (30, 1000, 1, 2)]),
    ("<point 0.25, 0.5, 3> <point 1.5, 0.25, 1, 4>", [(250, 500, 1, 3), (250, 1000, 1.5, 4)]),
    ("There are none.", []),
]


@pytest.mark.parametrize(("text", "points"), FREE)
def test_free_text_and_older_forms(text, points):
    found = find_points(text)
    assert found.broken == []
    flat = [value for one in found.points for value in (one.x, one.y, one.place, one.object_id)]
    assert flat == pytest.approx([value for one in points for value in one])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('<points coords="1 1 532 204', "is not closed by >"),
        ('<points coords="1 1 532 204">dogs', "has no </points>"),
        ('<points coords="">dogs</points>', "coords is empty"),
        ('<points coords="1 1 532">dogs</points>', "is not a picture or time"),
        ('<points coords="1 1 5.5 20">dogs</points>', "no number, or a fraction"),
        ('<points coords="1 1 2000 204">dogs</points>', "more than 1000"),
        ('<points x1="1" y2="3">dogs</points>', "not an x and a y"),
        ('<point x="101" y="3">dogs</point>', "must be in 0-100"),
        ('<point x="ten" y="3">dogs</point>', "is no number"),
        ("<point 12, 0.5, 1>", "must be in 0-1"),
        ("<point 0.1, 0.5, 1.5>", "whole number"),
    ],
)
def test_a_broken_tag_says_why_and_costs_no_other(text, why):
    found = find_points(f"{text} {_DOGS}" if text.endswith(">") else f"{_DOGS} {text}")
    assert len(found.broken) == 1
    assert why in found.broken[0]
    assert len(found.points) == 2


def test_units():
    assert to_scale(0.5, 2, "0-1") == (500, 1000)
    assert to_scale(50, -1, "percent") == (500, 0)
    assert to_scale(50, 7, "0-1000") == (50, 7)
    assert to_scale(50, 50, "pixels", (100, 200)) == (500, 250)
