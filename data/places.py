"""<image> in the texts of a row: where its pictures stand among the words."""

from __future__ import annotations

import re

from data.values import BadRow, shown

PLACE = "<image>"  # in a text, where a picture goes; after a backslash it is text
PLACES, PLACE_AT_END = re.compile(r"(?<!\\)<image>"), re.compile(r"(?<!\\)<image>$")
SPEAKERS = ("user", "assistant")


def count_places(text: str | None) -> int:
    """How many pictures the text has a place for."""
    return len(PLACES.findall(text or ""))


def place_images(turns: list[dict], system: str | None, images: int, videos: int = 0) -> list[dict]:
    """The turns without <image>, and with where the pictures stand: see data.formats.

    Those at the start or at the end of a question stand before it, as LLaVA reads both; any other exactly there.
    Without any <image> all stand before the first question. Raises BadRow for another number of them than of images,
    and for one that is not in a question.
    """
    said = [text for turn in turns for text in _not_asked(turn)]
    total = sum(map(count_places, [system, *said, *(turn["user"] for turn in turns)]))
    if total and total != images:
        found = f"{total} {PLACE} in the text, {images} image{'s' * (images != 1)}"
        raise BadRow(f"another number of {PLACE} than of images", found)
    if where := next((text for text in (system, *said) if count_places(text)), None):
        raise BadRow(f"{PLACE} elsewhere than in a question", shown(where))
    turns = _placed(turns) if total else [turn | {"user": unescaped(turn["user"])} for turn in turns]
    if any(turn.get("image_only") for turn in turns) and not images + videos:
        raise BadRow("a caption or label without an image", shown(turns[0]["assistant"]))
    return [_unescaped_answer(turn) for turn in turns]


def _not_asked(turn: dict) -> list[str | None]:
    return [turn["assistant"], *(message.get("content") for message in turn.get("steps", []))]


def _unescaped_answer(turn: dict) -> dict:
    steps = [one | {"content": unescaped(one["content"])} for one in turn.get("steps", [])]
    return turn | {"assistant": unescaped(turn["assistant"])} | ({"steps": steps} if steps else {})


def _placed(turns: list[dict]) -> list[dict]:
    """The turns, of which some have an <image>."""
    placed, before = [], 0
    for turn in turns:
        text = turn["user"]
        if count := count_places(text):
            alone = _without_places(text, count)
            text, places = (alone, [0] * count) if alone is not None else _cut(text)
        else:
            places = []
        where = {"images_before": before, "image_places": places}
        placed.append(turn | {"user": unescaped(text)} | where | ({"image_only": True} if count and not text else {}))
        before += count
    if placed[0]["image_places"] == [0] * before:  # what a row without <image> means, too
        return [{key: value for key, value in turn.items() if key not in where} for turn in placed]
    return placed


def _without_places(text: str, count: int) -> str | None:
    """The text without the `count` <image> that it begins or ends with; None where they stand elsewhere."""
    for is_there, cut in ((PLACES.match, str.removeprefix), (PLACE_AT_END.search, str.removesuffix)):
        rest, found = text.strip(), 0
        while is_there(rest):
            rest, found = cut(rest, PLACE).strip(), found + 1
        if found == count:
            return rest
    return None


def _cut(text: str) -> tuple[str, list[int]]:
    """(the text without <image> and without space around it, where each of them stood in it once it is unescaped)."""
    pieces = PLACES.split(text.strip())
    first = next(i for i, piece in enumerate(pieces) if piece.strip())
    pieces = [""] * first + [pieces[first].lstrip(), *pieces[first + 1 :]]
    places, length = [], 0
    for piece in pieces[:-1]:
        length += len(unescaped(piece) or "")
        places.append(length)
    return "".join(pieces), places


def unescaped(text: str | None) -> str | None:
    """The text with the word <image> where it was escaped."""
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
