"""The formats of rows, each recognised by its keys, row by row: a record becomes images and turns.

The order of FORMATS decides where a record has the keys of several. docs/data.md has an example of each.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.values import BadRow, dict_of, image_of, images_of, is_number, kind_of, list_of, shown, source_of, text_of

Record = Mapping[str, Any]
Turns = list[dict]
# What a format gives: the turns, the system text (None without), and images that stand in the turns themselves, None
# for one that stands beside them.
Found = tuple[Turns, str | None, list]

SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
PLACE = "<image>"  # in a text, where a picture goes; after a backslash it is text
PLACES, PLACE_AT_END = re.compile(r"(?<!\\)<image>"), re.compile(r"(?<!\\)<image>$")
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")


def read_record(record: Record, folder: Path | None) -> dict:
    """{"images", "texts", "format"} of a record, and "system" where it has such a text: see data.formats.

    folder: where relative image paths start. Raises BadRow with what was found.
    """
    name, read = recognise(record)
    turns, system, own = read(record)
    images = images_of(record, folder)
    if own:
        beside = iter(images)
        images = [next(beside, None) if one is None else image_of(one, folder) for one in own]
        images = [one for one in images if one is not None] + list(beside)
    turns = _place_images(turns, system, len(images))
    row = {"images": images, "texts": turns, "format": name}
    return row | {"system": _unescaped(system)} if system else row


def recognise(record: Record) -> tuple[str, Callable[[Record], Found]]:
    """(name, reader) of a record's format. Raises BadRow where it has none."""
    filled = {key for key, value in record.items() if value is not None}
    for keys in (filled, set(record)):  # null in place of the turns is a row without text
        for name, needs, read in FORMATS:
            if all(any(key in keys for key in alternatives) for alternatives in needs):
                return name, read
    raise BadRow("no known format", f"it has the keys {', '.join(map(str, record)) or 'none'}")


def _place_images(turns: Turns, system: str | None, images: int) -> Turns:
    """The turns without <image>: pictures stand before the first question, so that is where it may stand, or at the end
    of that question, which LLaVA reads the same way. Raises BadRow for any other place or number.
    """
    spoken = [turn[speaker] or "" for turn in turns for speaker in ("user", "assistant")]
    total = sum(len(PLACES.findall(text)) for text in (system or "", *spoken))
    if total and total != images:
        found = f"{total} {PLACE} in the text, {images} image{'s' * (images != 1)}"
        raise BadRow(f"another number of {PLACE} than of images", found)
    if total:
        first = _without_places((turns[0]["user"] if turns else None) or "", total)
        if first is None:
            where = next(text for text in (system or "", *spoken) if PLACES.search(text))
            raise BadRow(f"{PLACE} elsewhere than at the start or end of the first question", shown(where))
        turns = [turns[0] | {"user": first} | ({} if first else {"image_only": True}), *turns[1:]]
    if any(turn.get("image_only") for turn in turns) and not images:
        raise BadRow("a caption or label without an image", shown(turns[0]["assistant"]))
    return [turn | {who: _unescaped(turn[who]) for who in ("user", "assistant")} for turn in turns]


def _without_places(text: str, count: int) -> str | None:
    """The text without the `count` <image> that it begins or ends with; None where they stand elsewhere."""
    for is_there, cut in ((PLACES.match, str.removeprefix), (PLACE_AT_END.search, str.removesuffix)):
        rest, found = text.strip(), 0
        while is_there(rest):
            rest, found = cut(rest, PLACE).strip(), found + 1
        if found == count:
            return rest
    return None


def _unescaped(text: str | None) -> str | None:
    return text and text.replace(f"\\{PLACE}", PLACE)


def _turn(user: str | None, assistant: str | None, source: str | None) -> dict:
    return {"user": user, "assistant": assistant, "source": source}


# the_cauldron and FineVision


def _turns(record: Record) -> Found:
    turns = []
    texts = record["texts"]
    for turn in texts if isinstance(texts, list | tuple) else list_of(texts):
        if not isinstance(turn, Mapping | None):
            raise BadRow(f"texts is {kind_of(texts)}", shown(texts))
        turn = turn or {}
        if turn and not {"user", "assistant"} & set(turn):
            raise BadRow("a turn has neither user nor assistant", f"it has the keys {', '.join(map(str, turn))}")
        user, assistant = (text_of(turn.get(who), f"{who} of a turn") for who in ("user", "assistant"))
        turns.append(_turn(user, assistant, source_of(turn.get("source"), record.get("source"))))
    return turns, None, []


# LLaVA, ShareGPT and OpenAI messages


def _conversation(key: str) -> Callable[[Record], Found]:
    """A reader of the list of messages under a key."""

    def read(record: Record) -> Found:
        system: str | None = None
        turns: Turns = []
        own: list = []
        source = source_of(record.get("source"))
        for message in record[key] if isinstance(record[key], list | tuple) else list_of(record[key]):
            message = dict_of(message, f"a message of {key}")
            role = next((message[name] for name in ("from", "role") if message.get(name) is not None), None)
            speaker = SPEAKERS.get(role) if isinstance(role, str) else None
            if speaker is None:
                raise BadRow("a role is none of system, user and assistant", shown(role))
            text, images = _content(message)
            own += images
            if speaker == "system":
                if turns or system is not None:
                    raise BadRow("a system message elsewhere than at the beginning", shown(text))
                system = text
            elif speaker == "user" or not turns or turns[-1]["assistant"] is not None:
                user, assistant = (text, None) if speaker == "user" else (None, text)
                turns.append(_turn(user, assistant, source))
            else:
                turns[-1]["assistant"] = text
        return turns, system, own

    return read


def _content(message: dict) -> tuple[str | None, list]:
    """(a message's text with <image> for each picture in it, these pictures: None for one that stands beside)."""
    content = next((message[name] for name in ("value", "content", "text") if message.get(name) is not None), None)
    if not isinstance(content, list | tuple):
        return text_of(content, "a message"), []
    texts, images = [], []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else dict_of(part, "a part of a message")
        kind = part.get("type")
        if kind in IMAGE_PARTS:
            keys = ("image_url", "image", "url", "path", "base64", "bytes")
            value = next((part[name] for name in keys if part.get(name) is not None), None)
            images.append(value)
            texts.append(PLACE)
        elif kind in TEXT_PARTS:
            texts.append(text_of(part.get("text"), "a part of a message") or "")
        else:
            raise BadRow("a part of a message is neither text nor image", shown(part))
    return "".join(texts), images


# Questions


def _question(record: Record) -> Found:
    """One turn; of several answers the most frequent is learned, the first of equals, and all count at evaluation."""
    question = text_of(record["question"], "question")
    turn = _turn(question, None, source_of(record.get("source")))
    return [_answered(turn, _answers(record, ("answer", "answers"), "answer"))], None, []


def _answers(record: Record, keys: tuple[str, ...], field: str) -> list[str]:
    """The texts under the first of the keys that has some: one, a list, or a list of objects with one each."""
    found = []
    given: Any = next((record[key] for key in keys if list_of(record.get(key))), [])
    for one in list_of(given):
        if isinstance(one, Mapping) and one is not given and field in one:  # as in VQAv2
            one = one[field]
        text = text_of(one, field)
        if text and text.strip():
            found.append(text.strip())
    return found


def _answered(turn: dict, answers: list[str]) -> dict:
    counts = Counter(answers)
    best = max(counts, key=counts.__getitem__, default=None)
    others = {"answers": [best, *(one for one in counts if one != best)]} if len(counts) > 1 else {}
    return turn | {"assistant": best} | others


def _choice(record: Record) -> Found:
    """The choices stand below the question, each after its letter; the letter is learned, the text counts as well."""
    question = text_of(record["question"], "question")
    letters, choices = _choices(record)
    number = _chosen(record, letters, choices)
    lines = [question or "", *(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))]
    turn = _turn("\n".join(lines), None, source_of(record.get("source")))
    return [_answered(turn, [] if number is None else [letters[number], choices[number]])], None, []


def _choices(record: Record) -> tuple[list[str], list[str]]:
    """(letters, texts)."""
    given = record["choices"] if record.get("choices") is not None else record.get("options")
    letters: Any = None
    if isinstance(given, Mapping):  # {"label": ["A", "B"], "text": [...]}, or {"A": ..., "B": ...}
        lists = isinstance(given.get("text"), list | tuple)
        letters, given = (given.get("label"), given["text"]) if lists else (list(given), list(given.values()))
    if not isinstance(given, list | tuple) or not given:
        raise BadRow(f"choices is {kind_of(given)}", shown(given))
    choices = [text_of(one, "a choice") or "" for one in given]
    letters = string.ascii_uppercase[: len(choices)] if letters is None else letters
    names = [text_of(one, "the letter of a choice") or "" for one in letters]
    if len(names) != len(choices):
        raise BadRow("another number of choices than of letters", f"{len(choices)} choices, {len(names)} letters")
    return names, choices


def _chosen(record: Record, letters: list[str], choices: list[str]) -> int | None:
    """The number of the choice that the answer names: by its text or letter, or its number, which counts from 0."""
    answer = record.get("answer")
    text = (text_of(answer, "answer") or "").strip()
    if not text:
        return None
    bare = text.rstrip(".):").lstrip("(").lower()
    named = {i for i, choice in enumerate(choices) if choice.strip() == text}
    named |= {i for i, letter in enumerate(letters) if letter.strip().lower() == bare}
    by_number = (
        {int(text)} if len(text) < 4 and text.isascii() and text.isdigit() and int(text) < len(choices) else set()
    )
    if is_number(answer):  # among choices that are numbers it may mean one of these, or the number of one
        given = record.get("choices") if record.get("choices") is not None else record.get("options")
        named = named | by_number if any(map(is_number, list_of(given))) else by_number
    named = named or by_number
    if len(named) != 1:
        kind = "answer may mean several of the choices" if named else "answer is none of the choices"
        raise BadRow(kind, f"{shown(answer)} of {shown(choices)}")
    return named.pop()


# Captions and labels


def _said_of(keys: tuple[str, ...], field: str) -> Callable[[Record], Found]:
    """A reader of what is said of an image: the image alone is the question."""

    def read(record: Record) -> Found:
        turn = _turn("", None, source_of(record.get("source"))) | {"image_only": True}
        return [_answered(turn, _answers(record, keys, field))], None, []

    return read


_IMAGES = ("images", "image", "file_name")
# Name, keys (one of each tuple must be there), reader.
FORMATS: list[tuple[str, tuple[tuple[str, ...], ...], Callable[[Record], Found]]] = [
    ("the_cauldron turns", (("texts",),), _turns),
    ("LLaVA conversations", (("conversations",),), _conversation("conversations")),
    ("OpenAI messages", (("messages",),), _conversation("messages")),
    ("multiple choice", (("question",), ("choices", "options")), _choice),
    ("questions and answers", (("question",), ("answer", "answers")), _question),
    ("captions", (_IMAGES, ("caption", "captions", "text")), _said_of(("caption", "captions", "text"), "caption")),
    ("labels", (_IMAGES, ("label",)), _said_of(("label",), "label")),
]
