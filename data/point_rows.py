"""Rows with points: a question and an answer in data.points' text, by the formats of docs/data.md.

Coordinates are in the row's `points_unit`, or in the unit of its data set: pixmo-points, CoSyn-point and sets of
several images in percent, pixmo-count in pixels (allenai/molmo2 f3cb108 reads them so, whatever their cards say); what
lies outside the picture is moved to its edge. Without either they are in 0-1, as nanoMolmo2 has them, and none may lie
outside: pixels that nobody declared are a bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data.points import UNITS, Point, Pointing, to_scale, write
from data.values import BadRow, dict_of, draw_by, images_of, is_number, kind_of, list_of, shown, source_of, text_of

Record = Mapping[str, Any]
POINT_TO, HOW_MANY = "Point to {}.", "How many {} are there?"
BAD_POINT, BAD_UNIT, OUTSIDE = "a point is not x and y", "points_unit is not known", "a point lies outside 0-1"
COUNT_DIFFERS = "count is not the number of points"
NO_PICTURE = "a point in a picture that is not there"
PENDING = "points_in_pixels"  # of a turn whose answer needs the sizes of the images


def pointing_row(record: Record) -> tuple[list[dict], None, list]:
    """Of one's own and nanoMolmo2's: points and count, query and label. With a count it is counted."""
    label = text_of(record.get("label"), "label")
    query = text_of(record.get("query"), "query")
    is_count = record.get("count") is not None
    name = label if label is not None else query or ""
    question = query if query is not None else (HOW_MANY if is_count else POINT_TO).format(name)
    return [_turn(record, question, name, record.get("points"), record.get("count"), None)], None, []


def pixmo_points_row(record: Record) -> tuple[list[dict], None, list]:
    """Of allenai/pixmo-points: collection_method says whether to point or to count."""
    label = text_of(record["label"], "label") or ""
    is_count = record["collection_method"] == "counting"
    count = record.get("count") if is_count else None
    question = (HOW_MANY if is_count else POINT_TO).format(label)
    return [_turn(record, question, label, record["points"] or [], count, "percent")], None, []


def pixmo_count_row(record: Record) -> tuple[list[dict], None, list]:
    """Of allenai/pixmo-count; its validation and test rows have no points, where the answer is the number."""
    label = text_of(record["label"], "label") or ""
    turn = _turn(record, HOW_MANY.format(label), label, record.get("points"), record["count"], "pixels")
    return [turn], None, []


def cosyn_row(record: Record) -> tuple[list[dict], None, list]:
    """Of allenai/CoSyn-point: a turn for each of its questions."""
    questions, points = list_of(record["questions"]), list_of(record["answer_points"])
    names = list_of(record.get("names")) or questions
    if not len(questions) == len(points) == len(names):
        raise BadRow(
            "another number of questions than of answers",
            f"{len(questions)} questions, {len(points)} answer_points, {len(names)} names",
        )
    turns = []
    for question, where, name in zip(questions, points, names, strict=True):
        label = text_of(name, "a name") or ""
        turns.append(_turn(record, text_of(question, "a question") or "", label, where, None, "percent"))
    return turns, None, []


def multi_image_row(record: Record) -> tuple[list[dict], None, list]:
    """Of allenai/Molmo2-MultiImagePoint and molmo2-pixmo-multi-points: a label and a list of points for each image.

    One question for each label about all images, as Molmo2's own where it asks about all of them: an image with another
    label has none of it. Labels are the same where `normalized_labels` are. `collection_method` says whether to count;
    without it the label does, always in the same way.
    """
    labels, points = (list_of(record[key]) for key in ("labels", "points"))
    same = list_of(record.get("normalized_labels")) or [text_of(one, "a label") for one in labels]
    methods, counts = list_of(record.get("collection_method")), list_of(record.get("counts"))
    if not len(labels) == len(points) == len(same) or {len(methods), len(counts)} - {0, len(labels)}:
        raise BadRow(
            "another number of labels than of lists of points",
            f"{len(labels)} labels, {len(same)} normalized_labels, {len(points)} lists, {len(counts)} counts",
        )
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(same):
        groups.setdefault(" ".join((text_of(one, "a label") or "").lower().split()), []).append(number)
    turns = []
    for name, numbers in groups.items():
        label = text_of(labels[numbers[0]], "a label") or ""
        is_count = all(methods[n] == "counting" for n in numbers) if methods else draw_by(name, 2) == 1
        given = [dict_of(one, "a point") | {"image": n + 1} for n in numbers for one in list_of(points[n])]
        count = sum(_whole(counts[n], "a count") for n in numbers) if counts else len(given)
        if count != len(given):
            raise BadRow(COUNT_DIFFERS, f"{label}: count {count}, {len(given)} points")
        question = (HOW_MANY if is_count else POINT_TO).format(label)
        turns.append(_turn(record, question, label, given, count if is_count else None, "percent"))
    return turns, None, []


def _turn(record: Record, question: str, label: str, given: Any, count: Any, unit: str | None) -> dict:
    """A turn; its answer is written, or waits for the sizes of the images under PENDING. Raises BadRow."""
    turn = {"user": question, "assistant": None, "source": source_of(record.get("source"))}
    total = None if count is None else _whole(count, "count")
    places = [] if given is None else list(_each(given))
    if timed := [one for one in places if isinstance(one, Mapping) and one.get("timestamp") is not None]:
        raise BadRow("a point at a time, which is of a video", shown(timed[0]))
    points = [_point(one) for one in places]
    if not points and (total or given is None):  # a count alone
        return turn | {"assistant": None if total is None else str(total)}
    if (last := max((one.place for one in points), default=1)) > max(1, len(images_of(record, None))):
        raise BadRow(NO_PICTURE, f"{last} of {len(images_of(record, None))}")
    if total is not None and total != len(points):
        raise BadRow(COUNT_DIFFERS, f"count {total}, {len(points)} points")
    unit, is_said = _unit(record, unit)
    pointing = Pointing(label, tuple(points), count=total)
    size = _size(record)
    if unit == "pixels" and size is None and points:
        return turn | {PENDING: pointing}
    if not is_said and (out := [one for one in points if not (0 <= one.x <= 1 and 0 <= one.y <= 1)]):
        raise BadRow(OUTSIDE, f"({out[0].x:g}, {out[0].y:g}): points_unit must say what it is in: {', '.join(UNITS)}")
    return turn | {"assistant": answer_of(pointing, unit, lambda _: size)}


def answer_of(pointing: Pointing, unit: str, size_of: Callable[[int], tuple[float, float] | None]) -> str:
    """The text of points that are in `unit`. size_of: (width, height) of a picture by its number from 1, for pixels.
    Raises BadRow."""
    points = [
        Point(*to_scale(one.x, one.y, unit, size_of(int(one.place))), one.place, one.object_id)
        for one in pointing.points
    ]
    try:
        return write(Pointing(pointing.label, tuple(points), pointing.kind, pointing.count))
    except ValueError as error:
        raise BadRow("points that cannot be written", str(error)) from None


def with_pixel_answers(row: dict) -> dict:
    """The row with the answers that had to wait for the sizes of its images, whose headers are read. Raises BadRow."""
    if not any(PENDING in turn for turn in row["texts"]):
        return row
    from data.images import ImageDecodeError, image_size  # torch, which most rows do not need

    def size_of(number: int) -> tuple[int, int]:
        if number > len(row["images"]):
            raise BadRow(NO_PICTURE, f"{number} of {len(row['images'])}")
        try:
            return image_size(row["images"][number - 1])
        except ImageDecodeError as error:
            raise BadRow(error.kind, str(error)) from None

    turns = []
    for turn in row["texts"]:
        pointing = turn.get(PENDING)
        rest = {key: value for key, value in turn.items() if key != PENDING}
        turns.append(turn if pointing is None else rest | {"assistant": answer_of(pointing, "pixels", size_of)})
    return row | {"texts": turns}


def _unit(record: Record, unit: str | None) -> tuple[str, bool]:
    """(the unit, whether the row or its data set says so)."""
    said = text_of(record.get("points_unit"), "points_unit") or unit
    if said is not None and said not in UNITS:
        raise BadRow(BAD_UNIT, f"{shown(said)}: must be one of {', '.join(UNITS)}")
    return said or "0-1", said is not None


def _size(record: Record) -> tuple[float, float] | None:
    """That of the row's `width` and `height`, where it has them."""
    width, height = record.get("width"), record.get("height")
    if width is None or height is None:
        return None
    if not (is_number(width) and is_number(height) and float(width) > 0 and float(height) > 0):
        raise BadRow("width or height is no number above 0", f"{shown(width)}, {shown(height)}")
    return float(width), float(height)


def _each(given: Any) -> Iterable[Any]:
    """The points of a list of them, or of {"x": [...], "y": [...]}."""
    if not isinstance(given, Mapping):
        if not isinstance(given, list | tuple):
            raise BadRow(f"points is {kind_of(given)}", shown(given))
        return given
    across, down = given.get("x"), given.get("y")
    if not isinstance(across, list | tuple) or not isinstance(down, list | tuple) or len(across) != len(down):
        raise BadRow("points has not an x and a y for each", shown(given))
    return [{"x": x, "y": y} for x, y in zip(across, down, strict=True)]


def _point(given: Any) -> Point:
    """Of {"x", "y"}, with "object_id", and "image": the number of its picture, from 1; or of [x, y]."""
    if isinstance(given, list | tuple) and len(given) == 2:
        given = {"x": given[0], "y": given[1]}
    found = dict_of(given, "a point")
    values = [found.get("x"), found.get("y")]
    if not all(is_number(one) for one in values):
        raise BadRow(BAD_POINT, shown(given))
    x, y = (float(one) for one in values if one is not None)
    if not (abs(x) < float("inf") and abs(y) < float("inf")):
        raise BadRow(BAD_POINT, shown(given))
    place = _whole(found["image"], "image of a point") if found.get("image") is not None else 1
    if place < 1:
        raise BadRow("image of a point is less than 1", shown(given))
    return Point(x, y, place, found.get("object_id"))


def _whole(value: Any, field: str) -> int:
    number = float(value) if is_number(value) else None
    if number is None or not number.is_integer() or number < 0:
        raise BadRow(f"{field} is no whole number", shown(value))
    return int(number)


# Video: the text alone


def seconds_of(time: Any) -> float:
    """Of a number, or of "MM:SS.ff" or "HH:MM:SS.ff". Raises BadRow."""
    try:
        parts = [float(part) for part in str(time).split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or not all(0 <= part < float("inf") for part in parts):
        raise BadRow("a time is not seconds or MM:SS", shown(time))
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def video_points(
    times: Sequence[Any],
    points: Sequence[Sequence[Any]],
    label: str,
    unit: str,
    size: tuple[float, float] | None = None,
    count: bool = False,
) -> str:
    """The answer for points of a video, as Molmo2-VideoPoint has them: a list for each time. size: (width, height) of
    the video, for pixels; count: with their total. Raises BadRow."""
    if len(times) != len(points):
        raise BadRow("another number of times than of lists of points", f"{len(times)} times, {len(points)} lists")
    found = []
    for time, at_once in zip(times, points, strict=True):
        found += [Point(one.x, one.y, seconds_of(time)) for one in map(_point, at_once)]
    return answer_of(Pointing(label, tuple(found), count=len(found) if count else None), unit, lambda _: size)


def video_tracks(frames: Iterable[Record], label: str, unit: str, size: tuple[float, float] | None = None) -> str:
    """The answer for objects of a video: frames {"time", "points": [{"id", "point": [x, y], "occluded"}]}, as
    molmo2-track-instruction has them, or [{"x", "y", "object_id"}]. What is occluded is left out. Raises BadRow."""
    found = []
    for frame in frames:
        for given in list_of(frame["points"]):
            given = dict_of(given, "a point")
            if given.get("occluded"):
                continue
            one = _point(given.get("point", given))
            number = given.get("id", given.get("object_id"))
            found.append(Point(one.x, one.y, seconds_of(frame["time"]), text_of(number, "id of an object")))
    return answer_of(Pointing(label, tuple(found), "tracks"), unit, lambda _: size)


def by_time(points: Iterable[Record]) -> list[dict]:
    """The frames for `video_tracks` of nanoMolmo2's rows, [{"x", "y", "timestamp", "object_id"}]."""
    frames: dict[float, list] = {}
    for one in points:
        frames.setdefault(seconds_of(one["timestamp"]), []).append(one)
    return [{"time": time, "points": at_once} for time, at_once in sorted(frames.items())]
