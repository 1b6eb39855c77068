"""<image> and <video> in the texts of a row: where what it shows stands among the words."""

from __future__ import annotations

import re
from collections import Counter

from data.values import BadRow, shown
from data.video_keys import VIDEO_PLACE

PLACE = "<image>"  # in a text, where a picture goes; after a backslash it is text
PLACES = re.compile(r"(?<!\\)<image>")
PLACES_OF_BOTH = re.compile(r"(?<!\\)<(?:image|video)>")
SPEAKERS = ("user", "assistant")


def count_places(text: str | None) -> int:
    """How many pictures the text has a place for."""
    return len(PLACES.findall(text or ""))


def place_images(
    turns: list[dict], system: str | None, images: int, videos: int | None = None
) -> tuple[list[dict], list[int]]:
    """(the turns without <image> and <video>, and with where the pictures stand: see data.formats; of each video its
    number among all that the row shows, in the order of the conversation).

    Those at the start or at the end of a question stand before it, as LLaVA reads both; any other exactly there.
    Without any <image> all images stand before the first question, and without any <video> all videos, behind these.
    videos: None where the row can have none: <video> is text then. Raises BadRow for another number of them than of
    images or videos, and for one that is not in a question.
    """
    pattern = PLACES if videos is None else PLACES_OF_BOTH
    there = {PLACE: images, VIDEO_PLACE: videos or 0}
    not_asked = [system, *(text for turn in turns for text in _not_asked(turn))]
    order = [mark for turn in turns for mark in pattern.findall(turn["user"] or "")]
    everywhere = Counter(order + [mark for text in not_asked for mark in pattern.findall(text or "")])
    for mark, count in there.items():
        if everywhere[mark] not in (0, count):
            what = mark.strip("<>")
            found = f"{everywhere[mark]} {mark} in the text, {count} {what}{'s' * (count != 1)}"
            raise BadRow(f"another number of {mark} than of {what}s", found)
    for text in not_asked:
        if place := pattern.search(text or ""):
            raise BadRow(f"{place.group()} elsewhere than in a question", shown(text))
    before = [mark for mark, count in there.items() if mark not in order for _ in range(count)]
    if order:
        turns = _placed(turns, pattern, len(before))
    else:
        turns = [turn | {"user": unescaped(turn["user"], pattern)} for turn in turns]
    if any(turn.get("image_only") for turn in turns) and not before + order:
        raise BadRow("a caption or label without an image", shown(turns[0]["assistant"]))
    numbers = [number for number, mark in enumerate(before + order) if mark == VIDEO_PLACE]
    return [_unescaped_answer(turn, pattern) for turn in turns], numbers


def _not_asked(turn: dict) -> list[str | None]:
    return [turn["assistant"], *(message.get("content") for message in turn.get("steps", []))]


def _unescaped_answer(turn: dict, pattern: re.Pattern) -> dict:
    steps = [one | {"content": unescaped(one["content"], pattern)} for one in turn.get("steps", [])]
    return turn | {"assistant": unescaped(turn["assistant"], pattern)} | ({"steps": steps} if steps else {})


def _placed(turns: list[dict], pattern: re.Pattern, before: int) -> list[dict]:
    """The turns, of which some have a place. before: how many images and videos have none, and stand before them."""
    placed, first = [], before
    for turn in turns:
        text = turn["user"]
        if count := len(pattern.findall(text or "")):
            alone = _without_places(text, count, pattern)
            text, places = (alone, [0] * count) if alone is not None else _cut(text, pattern)
        else:
            places = []
        where = {"images_before": before, "image_places": places}
        only = {"image_only": True} if count and not text else {}
        placed.append(turn | {"user": unescaped(text, pattern)} | where | only)
        before += count
    if placed[0]["image_places"] == [0] * (before - first):  # what a row without <image> means, too
        return [{key: value for key, value in turn.items() if key not in where} for turn in placed]
    return placed


def _without_places(text: str, count: int, pattern: re.Pattern) -> str | None:
    """The text without the `count` places that it begins or ends with; None where they stand elsewhere."""
    rest, found = text.strip(), 0
    while place := pattern.match(rest):
        rest, found = rest[place.end() :].strip(), found + 1
    if found == count:
        return rest
    rest, at_end = text.strip(), re.compile(f"{pattern.pattern}$")
    for _ in range(count):
        place = at_end.search(rest)
        if place is None:
            return None
        rest = rest[: place.start()].strip()
    return rest


def _cut(text: str, pattern: re.Pattern) -> tuple[str, list[int]]:
    """(the text without places and without space around it, where each of them stood in it once it is unescaped)."""
    pieces = pattern.split(text.strip())
    first = next(i for i, piece in enumerate(pieces) if piece.strip())
    pieces = [""] * first + [pieces[first].lstrip(), *pieces[first + 1 :]]
    places, length = [], 0
    for piece in pieces[:-1]:
        length += len(unescaped(piece, pattern) or "")
        places.append(length)
    return "".join(pieces), places


def unescaped(text: str | None, pattern: re.Pattern = PLACES) -> str | None:
    """The text with the words <image> and, where the pattern has it, <video> where they were escaped."""
    if text and pattern is PLACES_OF_BOTH:
        text = text.replace(f"\\{VIDEO_PLACE}", VIDEO_PLACE)
    return text and text.replace(f"\\{PLACE}", PLACE)


def with_images(turn: dict, image_texts: list[str], shown_images: int = 0) -> tuple[str, int]:
    """(the question with its images' texts, the number of images that have stood up to its end).

    image_texts: of all images of the row. shown_images: how many of them stand in the turns before it in this
    conversation; those of turns that are not in it stand before the question.
    """
    before, text = turn.get("images_before", len(image_texts)), turn["user"]
    parts, start = image_texts[shown_images:before], 0
    for number, place in enumerate(turn.get("image_places", [])):
        parts += [text[start:place], image_texts[before + number]]
        start = place
    return "".join([*parts, text[start:]]), before + len(turn.get("image_places", []))
