"""Points as text: what Molmo2 writes ("html-v2"), read and written; the forms of older data, read alone.

    <points coords="1 1 532 204 2 640 981">dogs</points>            picture 1: point 1 at (532, 204), point 2
    <points coords="1 1 532 204;2 2 100 100">dogs</points>          of two pictures
    <points coords="0.5 1 532 204;1.0 2 100 100">dogs</points>      of a video, at 0.5 s and 1.0 s
    <tracks coords="0.0 1 532 204;0.5 1 540 204">the dog</tracks>   an object keeps its number
    Counting the <points ...>dogs</points> shows a total of 3.      There are none.

x and y are thousandths of the picture's width and height, from the top left corner, with at least three digits. Points
are sorted by x, then y, after rounding, and numbered through all pictures. Objects of a track are numbered as they
appear, those of one time by x, then y; each time has them in the order of their numbers. What lies outside is moved to
the edge. Pictures and times without a point are not written. Nothing is escaped, so that a label has no "<".
Source: allenai/molmo2 f3cb108, olmo/preprocessing/point_formatter.py, `UnifiedPointFormatter`, read, not copied. It
differs in this: a picture without points is written there as its number alone, as in "2 ".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

SCALE = 1000
# What a coordinate at the right or lower edge is in each unit; pixels need the picture's size.
UNITS = {"0-1": 1.0, "percent": 100.0, "0-1000": 1000.0, "pixels": math.nan}
NONE = "There are none."
_COUNTED = re.compile(r"Counting the (<.*>) shows a total of (\d+)\.", re.DOTALL)
_TAG = re.compile(r'<(points|tracks) coords="([^"]*)">([^<]*)</(points|tracks)>')
_GROUP = re.compile(r"(0|[1-9]\d*)(\.\d)?((?: [1-9]\d* \d{3,4} \d{3,4})+)")


class PointsError(ValueError):
    """A text that is no point text; says why."""


@dataclass(frozen=True)
class Point:
    """x, y: thousandths of width and height. place: the number of its picture, from 1, or a time of a video in
    seconds, which is a float. object_id: of tracks, the same for one object at all times; of points its number."""

    x: float
    y: float
    place: int | float = 1
    object_id: int | str | None = None


@dataclass(frozen=True)
class Pointing:
    """An answer. count: the total that the text says; None where it says none. Without points: "There are none."."""

    label: str = ""
    points: tuple[Point, ...] = ()
    kind: Literal["points", "tracks"] = "points"
    count: int | None = None


@dataclass(frozen=True)
class Found:
    """The point tags of a free text. broken: of each that cannot be read, why."""

    pointings: list[Pointing] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        return [point for pointing in self.pointings for point in pointing.points]


def to_scale(x: float, y: float, unit: str, size: tuple[float, float] | None = None) -> tuple[float, float]:
    """A coordinate in one of UNITS as thousandths, moved to the edge where it lies outside. size: the picture's (width,
    height) in pixels, for "pixels"."""
    if unit == "pixels":
        assert size is not None, "pixels need the picture's size"
    across, down = size if unit == "pixels" and size else (UNITS[unit], UNITS[unit])
    return _clipped(x / across * SCALE), _clipped(y / down * SCALE)


def _clipped(value: float) -> float:
    return min(max(value, 0.0), float(SCALE))


def canonical(pointing: Pointing) -> Pointing:
    """The answer as its text says it: rounded, clipped, sorted, numbered. Raises ValueError for a track with an object
    twice at one time or without an id, and for places that are not all numbers of pictures or all times."""
    points = [replace(one, x=round(_clipped(one.x)), y=round(_clipped(one.y))) for one in pointing.points]
    if len({type(one.place) for one in points}) > 1:
        raise ValueError("points must all be in pictures or all at times")
    points = [replace(one, place=round(one.place, 1) + 0.0) if isinstance(one.place, float) else one for one in points]
    for one in points:
        if one.place < (0.0 if isinstance(one.place, float) else 1):
            raise ValueError(f"{one.place}: must be a picture's number from 1, or a time >= 0")
    if not points:
        return Pointing()
    points.sort(key=lambda one: (one.place, one.x, one.y))
    points = _numbered_objects(points) if pointing.kind == "tracks" else _numbered(points)
    return replace(pointing, points=tuple(points), count=None if pointing.count is None else len(points))


def _numbered(points: Sequence[Point]) -> list[Point]:
    return [replace(one, object_id=number) for number, one in enumerate(points, 1)]


def _numbered_objects(points: Sequence[Point]) -> list[Point]:
    numbers: dict[int | str, int] = {}
    seen = set()
    for one in points:
        if one.object_id is None:
            raise ValueError("a point of a track must have an object id")
        if (one.place, one.object_id) in seen:
            raise ValueError(f"object {one.object_id} is twice at {one.place}")
        seen.add((one.place, one.object_id))
        numbers.setdefault(one.object_id, len(numbers) + 1)
    numbered = [(one.place, numbers[one.object_id], one) for one in points if one.object_id is not None]
    return [replace(one, object_id=number) for _, number, one in sorted(numbered, key=lambda of: of[:2])]


def write(pointing: Pointing) -> str:
    """The text of an answer, of its canonical form. Raises ValueError as `canonical`, and for a label with "<"."""
    if "<" in pointing.label:
        raise ValueError(f'label {pointing.label!r}: must not contain "<"')
    pointing = canonical(pointing)
    if not pointing.points:
        return NONE
    groups: dict[int | float, list[str]] = {}
    for one in pointing.points:
        groups.setdefault(one.place, []).append(f"{one.object_id} {one.x:03.0f} {one.y:03.0f}")
    coords = ";".join(f"{_place_text(place)} {' '.join(texts)}" for place, texts in groups.items())
    tag = f'<{pointing.kind} coords="{coords}">{pointing.label}</{pointing.kind}>'
    return tag if pointing.count is None else f"Counting the {tag} shows a total of {pointing.count}."


def _place_text(place: int | float) -> str:
    return f"{place:.1f}" if isinstance(place, float) else str(place)


def parse(text: str) -> Pointing:
    """The answer that `write` would write as this very text. Raises PointsError for any other text."""
    if text == NONE:
        return Pointing()
    counted = _COUNTED.fullmatch(text)
    match = _TAG.fullmatch(counted[1] if counted else text)
    if match is None:
        raise PointsError(f"is neither a point tag, nor a count, nor {NONE!r}")
    kind, coords, label, closed = match.groups()
    if kind != closed:
        raise PointsError(f"<{kind}> is closed by </{closed}>")
    found = Pointing(
        label, tuple(_groups(coords.split(";"))), "tracks" if kind == "tracks" else "points",
        int(counted[2]) if counted else None,
    )  # fmt: skip
    if found.count not in (None, len(found.points)):
        raise PointsError(f"counts {found.count}, but has {len(found.points)} points")
    try:
        as_written = write(found)
    except ValueError as error:
        raise PointsError(str(error)) from None
    if as_written != text:
        raise PointsError("points are not sorted by x and y, or not numbered from 1")
    return found


def _groups(groups: Iterable[str]) -> Iterable[Point]:
    """The points of each picture or time. Raises PointsError."""
    for group in groups:
        match = _GROUP.fullmatch(group)
        if match is None:
            raise PointsError(f"{group!r} is not a picture or time and then number, x, y of each point")
        place = float(match[1] + match[2]) if match[2] else int(match[1])
        values = [int(one) for one in match[3].split()]
        for number, x, y in zip(values[::3], values[1::3], values[2::3], strict=True):
            if max(x, y) > SCALE:
                raise PointsError(f"{number} {x} {y}: a coordinate is more than {SCALE}")
            yield Point(x, y, place, number)


def has_points(turns: Iterable[dict]) -> bool:
    """Whether a question or an answer of a row holds a point tag."""
    return any(text and _BEGIN.search(text) for turn in turns for text in (turn.get("user"), turn.get("assistant")))


# Free text and older forms

_BEGIN = re.compile(r"<(points|tracks|point)\b")
_NUMBER = r"\d+(?:\.\d+)?"
_ATTRIBUTE = re.compile(r'([a-z]+)(\d*)\s*=\s*"([^"]*)"')
_BARE = re.compile(rf"\s+({_NUMBER}(?:\s*,\s*{_NUMBER}){{2,3}})\s*/?>")
_SEPARATORS = re.compile(r"\s*[;\t]\s*")


def find_points(text: str) -> Found:
    """All point tags of a model's free text or of older data, in their order.

    Besides what `parse` takes, it takes: text around; points in any order and with any numbers; one to four digits;
    a tab between pictures ("html-v1"); further attributes, as alt; a tag that ends in "/>", without a label; and
    Molmo 1's `<point x="10.5" y="20.1" alt="...">label</point>` and `<points x1="..." y1="..." x2=...>`, in percent;
    nanoMolmo2's `<point x, y, id>` and, with a time, `<point t, x, y, id>`, with 0-1.
    A tag that is broken in any other way is left out whole, with its reason in `broken`.
    """
    found = Found()
    for match in _BEGIN.finditer(text):
        try:
            found.pointings.append(_read_tag(text[match.start() :], match[1]))
        except PointsError as error:
            found.broken.append(f"<{match[1]}> at letter {match.start()}: {error}")
    return found


def _read_tag(text: str, name: str) -> Pointing:
    """The tag with which the text begins. Raises PointsError."""
    if bare := _BARE.match(text, len(name) + 1):
        return Pointing("", (_bare_point([float(one) for one in bare[1].split(",")]),))
    end = re.compile(r'(?:[^<>"]|"[^"]*")*>').match(text, len(name) + 1)
    if end is None:
        raise PointsError("is not closed by >")
    inside, label = text[len(name) + 1 : end.end() - 1], ""
    if not inside.endswith("/"):
        label, closed, _ = text[end.end() :].partition(f"</{name}>")
        if not closed or "<" in label:
            raise PointsError(f"has no </{name}>")
    attributes = {(key, number): value for key, number, value in _ATTRIBUTE.findall(inside)}
    coords = attributes.get(("coords", ""))
    points = _percent_points(attributes) if coords is None else _any_points(coords)
    return Pointing(label.strip(), tuple(points), "tracks" if name == "tracks" else "points")


def _bare_point(values: list[float]) -> Point:
    """Of nanoMolmo2: (x, y, id) or (time, x, y, id)."""
    *time, x, y, number = values
    if max(x, y) > 1:
        raise PointsError(f"({x:g}, {y:g}): coordinates must be in 0-1")
    if not number.is_integer():
        raise PointsError(f"{number:g}: the id must be a whole number")
    return Point(*to_scale(x, y, "0-1"), time[0] if time else 1, int(number))


def _percent_points(attributes: dict[tuple[str, str], str]) -> list[Point]:
    """Of Molmo 1."""
    numbers = [number for key, number in attributes if key == "x"]
    if not numbers or {number for key, number in attributes if key == "y"} != set(numbers):
        raise PointsError("has no coords, and not an x and a y for each point")
    points = []
    for order, number in enumerate(numbers, 1):
        try:
            x, y = float(attributes["x", number]), float(attributes["y", number])
        except ValueError:
            raise PointsError(f"x{number} or y{number} is no number") from None
        if not (0 <= x <= 100 and 0 <= y <= 100):
            raise PointsError(f"({x:g}, {y:g}): coordinates must be in 0-100")
        points.append(Point(*to_scale(x, y, "percent"), 1, int(number) if number else order))
    return points


def _any_points(coords: str) -> list[Point]:
    """Of coords in any order, with one to four digits."""
    if not coords.strip():
        raise PointsError("coords is empty")
    points: list[Point] = []
    for group in _SEPARATORS.split(coords.strip()):
        words = group.split()
        if len(words) % 3 != 1 or len(words) < 4:
            raise PointsError(f"{group!r} is not a picture or time and then number, x, y of each point")
        if not re.fullmatch(_NUMBER, words[0]) or not all(re.fullmatch(r"\d{1,9}", word) for word in words[1:]):
            raise PointsError(f"{group!r} holds something that is no number, or a fraction")
        x_and_y = zip(words[1::3], words[2::3], words[3::3], strict=True)
        place = float(words[0]) if "." in words[0] else int(words[0])
        points += [Point(int(x), int(y), place, int(number)) for number, x, y in x_and_y]
    if any(max(one.x, one.y) > SCALE for one in points):
        raise PointsError(f"a coordinate is more than {SCALE}")
    return points
