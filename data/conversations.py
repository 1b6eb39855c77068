"""The formats of rows, each recognised by its keys, row by row: a record becomes images and turns.

The order of FORMATS decides where a record has the keys of several. docs/data.md has an example of each.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data import point_rows
from data.places import PLACE, PLACES, PLACES_OF_BOTH, count_places, place_images, unescaped
from data.set_formats import format_of_columns, general_record
from data.tools import calls_of, result_of, tools_of
from data.values import (
    IMAGE_KEYS,
    BadRow,
    dict_of,
    image_of,
    images_of,
    is_number,
    kind_of,
    list_of,
    shown,
    source_of,
    text_of,
)
from data.video_keys import VIDEO_KEYS, VIDEO_PLACE, videos_of

Record = Mapping[str, Any]
Turns = list[dict]
# What a format gives: the turns, the system text (None without), and images that stand in the turns themselves, None
# for one that stands beside them.
Found = tuple[Turns, str | None, list]

SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    "tool": "tool",
}
SPOKEN = ("LLaVA conversations", "OpenAI messages")
# Formats of which a turn may rest on those before it ("And its color?"); of others each is an annotation by itself.
CHAINED = (*SPOKEN, "question chains")
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
PART_KEYS = ("image_url", "image", "video_url", "video", "url", "path", "base64", "bytes")


def read_record(record: Record, folder: Path | None) -> dict:
    """{"images", "texts", "format"} of a record, and what else it has: see data.formats.

    folder: where relative image paths start. Raises BadRow with what was found.
    """
    set_name, record = general_record(record)
    name, read = recognise(record)
    turns, system, own = read(record)
    in_turns = [one for one in own if isinstance(one, OwnVideo)]
    own = [one for one in own if not isinstance(one, OwnVideo)]
    if given := [one.value for one in in_turns if one.value is not None]:
        record = {**record, "videos": given}
    images, videos = images_of(record, folder), videos_of(record, folder)
    if own:
        beside = iter(images)
        images = [next(beside, None) if one is None else image_of(one, folder) for one in own]
        images = [one for one in images if one is not None] + list(beside)
    may_have_videos = bool(in_turns) or any(key in record for key in VIDEO_KEYS)
    turns, numbers = place_images(
        turns, system, len(images), len(videos.get("videos", [])) if may_have_videos else None
    )
    row = {"images": images, "texts": turns, "format": set_name or name, **videos}
    row |= {"video_numbers": numbers} if videos else {}
    tools = tools_of(record) if name in SPOKEN else []
    return (
        row
        | ({"system": unescaped(system, PLACES_OF_BOTH if may_have_videos else PLACES)} if system else {})
        | ({"tools": tools} if tools else {})
    )


class OwnVideo(NamedTuple):
    """A video that stands in a message. value: None where it stands beside."""

    value: Any


def format_of(columns: Iterable[str]) -> str:
    """The name of the format that has these columns. Raises BadRow where none has."""
    columns = list(columns)
    return format_of_columns(columns) or recognise(dict.fromkeys(columns))[0]


def recognise(record: Record) -> tuple[str, Callable[[Record], Found]]:
    """(name, reader) of a record's general format. Raises BadRow where it has none."""
    filled = {key for key, value in record.items() if value is not None}
    for keys in (filled, set(record)):  # null in place of the turns is a row without text
        for name, needs, read in FORMATS:
            if all(any(key in keys for key in alternatives) for alternatives in needs):
                return name, read
    raise BadRow("no known format", f"it has the keys {', '.join(map(str, record)) or 'none'}")


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
        if turn and not {"user", "assistant", "answers"} & set(turn):
            raise BadRow("a turn has neither user nor assistant", f"it has the keys {', '.join(map(str, turn))}")
        user, assistant = (text_of(turn.get(who), f"{who} of a turn") for who in ("user", "assistant"))
        made = _turn(user, assistant, source_of(turn.get("source"), record.get("source")))
        if assistant is None and turn.get("answers") is not None:
            made = _answered(made, _answers(turn, ("answers",), "answer"))
        turns.append(made)
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
                raise BadRow("a role is none of system, user, assistant and tool", shown(role))
            text, images = _content(message)
            own += images
            if speaker == "system":
                if turns or system is not None:
                    raise BadRow("a system message elsewhere than at the beginning", shown(text))
                system = text
            else:
                _say(turns, speaker, text, message, source)
        return turns, system, own

    return read


def _say(turns: Turns, speaker: str, text: str | None, message: dict, source: str | None) -> None:
    """Add a message to the turns: a question begins one, an answer ends it, tool calls and results are its steps."""
    is_open = bool(turns) and turns[-1]["assistant"] is None
    if speaker == "user":
        turns.append(_turn(text, None, source))
    elif speaker == "tool":
        if not is_open or "steps" not in turns[-1]:
            raise BadRow("a tool message that follows no tool call", shown(text))
        turns[-1]["steps"].append(result_of(message, text))
    elif calls := calls_of(message):
        if not is_open or turns[-1]["user"] is None:
            raise BadRow("tool calls that follow no question", shown(message.get("tool_calls")))
        turns[-1].setdefault("steps", []).append({"role": "assistant", "content": text or "", "tool_calls": calls})
    elif is_open:
        turns[-1]["assistant"] = text
    else:
        turns.append(_turn(None, text, source))


def _content(message: dict) -> tuple[str | None, list]:
    """(a message's text with <image> and <video> for what is in it, this: of an image its value, None where it stands
    beside, of a video an OwnVideo)."""
    content = next((message[name] for name in ("value", "content", "text") if message.get(name) is not None), None)
    if not isinstance(content, list | tuple):
        text = text_of(content, "a message")
        return text, [None] * count_places(text)
    texts: list[str] = []
    images: list[Any] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else dict_of(part, "a part of a message")
        kind = part.get("type")
        value = next((part[name] for name in PART_KEYS if part.get(name) is not None), None)
        if kind in IMAGE_PARTS:
            images.append(value)
            texts.append(PLACE)
        elif kind in VIDEO_PARTS:
            images.append(OwnVideo(value))
            texts.append(VIDEO_PLACE)
        elif kind in TEXT_PARTS:
            texts.append(text_of(part.get("text"), "a part of a message") or "")
            images += [None] * count_places(texts[-1])
        else:
            raise BadRow("a part of a message is neither text nor image nor video", shown(part))
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
    turn = _turn("\n".join(lines), None, source_of(record.get("source"))) | {"letters": letters}
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


_SHOWN = (*IMAGE_KEYS, *VIDEO_KEYS)
# Name, keys (one of each tuple must be there), reader.
FORMATS: list[tuple[str, tuple[tuple[str, ...], ...], Callable[[Record], Found]]] = [
    ("the_cauldron turns", (("texts",),), _turns),
    ("LLaVA conversations", (("conversations",),), _conversation("conversations")),
    ("OpenAI messages", (("messages",),), _conversation("messages")),
    ("multi-image points", (("counts", "normalized_labels"), ("labels",), ("points",)), point_rows.multi_image_row),
    ("pixmo-points", (("points",), ("label",), ("collection_method",)), point_rows.pixmo_points_row),
    ("pixmo-count", (("image_url",), ("image_sha256",), ("count",), ("label",)), point_rows.pixmo_count_row),
    ("CoSyn-point", (("questions",), ("answer_points",)), point_rows.cosyn_row),
    ("multiple choice", (("question",), ("choices", "options")), _choice),
    ("questions and answers", (("question",), ("answer", "answers")), _question),
    ("captions", (_SHOWN, ("caption", "captions", "text")), _said_of(("caption", "captions", "text"), "caption")),
    ("points", (("points",), ("query",)), point_rows.pointing_row),
    ("points", (("points",), ("label",)), point_rows.pointing_row),
    ("points", (("count",), ("query",)), point_rows.pointing_row),
    ("labels", (IMAGE_KEYS, ("label",)), _said_of(("label",), "label")),
]
