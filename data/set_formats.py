"""Rows as public data sets have them in columns of their own, made into rows of the general formats.

Each converter takes a record and returns one that data.conversations reads, or None where it is none of its kind. The
columns are those of the sets' pages on the hub; data.molmo2_sets names the sets.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

from data.places import PLACE
from data.values import IMAGE_KEYS, BadRow, dict_of, draw_by, kind_of, list_of, shown, text_of
from data.video_keys import VIDEO_KEYS, VIDEO_PLACE, video_of_id
from data.video_point_rows import local_points, local_tracks, molmo2_points, molmo2_tracks

Record = Mapping[str, Any]

SPEAKER = re.compile(r"\[(USER|ASSISTANT)\]")
POINT = "<|POINT|>"
TRANSCRIPT = "transcript:"  # the question that a spoken description answers: Molmo's name of that style
VIDEO_CAPTIONS = ("video_frame_merged_caption", "merged_caption", "video_caption")  # the longest first


def general_record(record: Record) -> tuple[str, Record]:
    """(name of the set's format, the record as a general format has it); ("", record) of any other. Raises BadRow."""
    if RARE.isdisjoint(record):
        return "", record
    for name, needs, convert in SET_FORMATS:
        if _has(record, needs) and (made := convert(record)) is not None:
            return name, made
    return "", record


def format_of_columns(columns: Iterable[str]) -> str:
    """The name of the set's format that has these columns; "" where none has."""
    there = dict.fromkeys(columns)
    return next((name for name, needs, _ in SET_FORMATS if _has(there, needs, empty=True)), "")


def _has(record: Record, needs: tuple[tuple[str, ...], ...], empty: bool = False) -> bool:
    """Whether one key of each tuple is there. empty: null counts as well."""
    return all(any(key in record and (empty or record[key] is not None) for key in keys) for keys in needs)


def _media(record: Record) -> dict[str, Any]:
    """What the row shows, under its own keys."""
    return {key: record[key] for key in (*IMAGE_KEYS, *VIDEO_KEYS) if record.get(key) is not None}


# PixMo


def _with_transcript(record: Record) -> Record:
    """The caption answers the picture, and of its spoken descriptions one, always the same, another question."""
    texts = [{"user": PLACE, "assistant": record["caption"], "source": "long_caption"}]
    said = [text_of(one, "a transcript") or "" for one in list_of(record["transcripts"])]
    if spoken := [text for text in said if text.strip()]:
        chosen = spoken[draw_by("".join(spoken), len(spoken))]
        texts.append({"user": TRANSCRIPT, "assistant": chosen, "source": "transcript"})
    return _media(record) | {"texts": texts}


def _chain(record: Record) -> Record | None:
    """ "[USER] a [ASSISTANT] b [USER] c [ASSISTANT]" with the answer to c; None of a question without these marks."""
    question = text_of(record["question"], "question") or ""
    start, *said = SPEAKER.split(question)
    if not said:
        return None
    spoken = [("USER", start)] * bool(start.strip()) + list(zip(said[::2], said[1::2], strict=True))
    if spoken[-1][0] == "ASSISTANT" and not spoken[-1][1].strip():  # where the answer goes
        spoken.pop()
    if [who for who, _ in spoken] != [("USER", "ASSISTANT")[i % 2] for i in range(len(spoken))] or len(spoken) % 2 == 0:
        raise BadRow("a chain in which somebody speaks twice", shown(question))
    texts = [text.strip() for _, text in spoken] + [record.get("answer")]
    turns = [{"user": user, "assistant": assistant} for user, assistant in zip(texts[::2], texts[1::2], strict=True)]
    return _media(record) | {"texts": turns}


def _explanation(record: Record) -> Record:
    """The text with what each point is called within it in place of its mark."""
    text = text_of(record["parsed_response"], "parsed_response") or ""
    inline, alternative = (_list(record.get(key), key) for key in ("inline_text", "alt_text"))
    pieces = text.split(POINT)
    names = [text_of(one or other, "the name of a point") or "" for one, other in zip_longest(inline, alternative)]
    if len(pieces) - 1 != len(names):
        raise BadRow(f"another number of {POINT} than of names", f"{len(pieces) - 1} and {len(names)}: {shown(text)}")
    said = "".join(piece + name for piece, name in zip(pieces, [*names, ""], strict=True))
    return _media(record) | {"question": record["question"], "answer": said}


def _list(value: Any, field: str) -> list:
    """With its nulls; [] of null."""
    if not isinstance(value, list | tuple | None):
        raise BadRow(f"{field} is {kind_of(value)}", shown(value))
    return list(value or [])


def _pairs(key: str) -> Callable[[Record], Record]:
    """A reader of questions with answers under a key: an object of lists, or a list of objects."""

    def read(record: Record) -> Record:
        asked = ("question", "Question"), ("answer", "Answer")
        turns = []
        for one in _objects(record[key], key):
            user, assistant = (next((one[name] for name in names if name in one), None) for names in asked)
            turns.append({"user": user, "assistant": assistant, "source": record.get("source")})
        return (video_of_id(record) if record.get("video_id") is not None else _media(record)) | {"texts": turns}

    return read


def _objects(value: Any, field: str) -> list[dict]:
    """A list of objects; of an object of lists, as parquet has it, its n-th object has the n-th of each."""
    if isinstance(value, Mapping):
        lists = {name: one for name, one in value.items() if isinstance(one, list | tuple)}
        if not lists:
            return [dict(value)]
        if len({len(one) for one in lists.values()}) > 1:
            raise BadRow(f"{field} has lists of several lengths", shown(value))
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRow(f"{field} is {kind_of(value)}", shown(value))
    return [dict_of(one, f"an element of {field}") for one in value]


# Academic sets


def _messages(record: Record) -> Record:
    """Several questions about one picture, each with all of its answers."""
    turns = []
    for one in _objects(record["message_list"], "message_list"):
        answers = one.get("answers") if one.get("answers") is not None else one.get("answer")
        turns.append({"user": one.get("question"), "answers": answers, "source": one.get("style")})
    return _media(record) | {"texts": turns}


def _chart(record: Record) -> Record:
    return _media(record) | {"question": record["query"], "answers": record["label"],
                             "source": record["human_or_machine"]}  # fmt: skip


# Videos


def _video_caption(record: Record) -> Record:
    """The longest of the captions is learned, the others count as well."""
    said = [record[key] for key in VIDEO_CAPTIONS if record.get(key)]
    return video_of_id(record) | {"captions": said}


def _video_choice(record: Record) -> Record:
    """Wrong answers make it multiple choice, in an order drawn by the question; without them it is open."""
    question, answer = (text_of(record[key], key) or "" for key in ("Question", "Answer"))
    made = video_of_id(record) | {"question": question, "source": record.get("Category")}
    wrong = [text_of(one, "a wrong answer") or "" for one in list_of(record.get("NegativeAnswers"))]
    wrong = [one for one in dict.fromkeys(wrong) if one.strip() != answer.strip()]
    if not wrong:
        return made | {"answer": answer}
    wrong.insert(draw_by(question + answer, len(wrong) + 1), answer)
    letter = string.ascii_uppercase[wrong.index(answer)] if len(wrong) <= 26 else answer
    return made | {"choices": wrong, "answer": letter}


def _video_question(record: Record) -> Record:
    return video_of_id(record) | {
        "question": record["question"],
        "answer": record["answer"],
        "source": record.get("source"),
    }


def _video_conversation(record: Record) -> Record | None:
    """LLaVA-Video writes <image> where the video goes; None where there are pictures too."""
    if any(record.get(key) is not None for key in IMAGE_KEYS):
        return None
    said = []
    for one in list_of(record["conversations"]):
        one = dict_of(one, "a message of conversations")
        key = next((key for key in ("value", "content") if isinstance(one.get(key), str)), "value")
        said.append(one | {key: one[key].replace(PLACE, VIDEO_PLACE)} if isinstance(one.get(key), str) else one)
    return {**record, "conversations": said}


# Name, keys (one of each tuple must be there; those of the first are what other rows do not have), converter.
SET_FORMATS: list[tuple[str, tuple[tuple[str, ...], ...], Callable[[Record], Record | None]]] = [
    ("captions with transcripts", (("transcripts",), ("caption",), IMAGE_KEYS), _with_transcript),
    ("question chains", (("image_url",), ("question",), ("answer",)), _chain),
    ("point explanations", (("parsed_response",), ("question",)), _explanation),
    ("", (("answer_points",),), lambda record: record),  # CoSyn-point, which data.point_rows reads
    ("question pairs", (("qa_pairs",),), _pairs("qa_pairs")),
    ("question pairs", (("questions",), IMAGE_KEYS), _pairs("questions")),
    ("video question pairs", (("qa_list",), ("video_id",)), _pairs("qa_list")),
    ("message lists", (("message_list",), IMAGE_KEYS), _messages),
    ("chart questions", (("human_or_machine",), ("query",), ("label",)), _chart),
    ("video points", (("two_fps_timestamps",), ("video_id",), ("points",), ("label",), ("question",)), molmo2_points),
    ("video tracks", (("frame_trajectories",), ("clip", "video"), ("expression",)), molmo2_tracks),
    ("video points", (VIDEO_KEYS, ("query",), ("points",)), local_points),
    ("video tracks", (VIDEO_KEYS, ("query",), ("tracks",)), local_tracks),
    ("video captions", (VIDEO_CAPTIONS, ("video_id",)), _video_caption),
    ("video multiple choice", (("video_id",), ("Question",), ("Answer",)), _video_choice),
    ("video questions", (("video_id",), ("question",), ("answer",)), _video_question),
    ("LLaVA conversations", (VIDEO_KEYS, ("conversations",)), _video_conversation),
]
RARE = frozenset(key for _, needs, _ in SET_FORMATS for key in needs[0])
