"""Where the values of a JSON file lie, found by reading it once from its beginning, a part at a time."""

from __future__ import annotations

import json
from array import array
from typing import Any, BinaryIO

import numpy as np

CHUNK_BYTES = 8 * 2**20
SKIMMER = json.JSONDecoder(parse_int=len, parse_float=len, strict=False)  # to find an end: it makes no numbers


def array_starts(file: BinaryIO) -> np.ndarray:
    """Where the elements of a JSON array start; the file stands behind its bracket.

    Memory: the longest element, or CHUNK_BYTES, a few times. An array that breaks off ends with a bad row. Raises
    ValueError where it is not JSON before its end: from there on nobody can tell what a row is.
    """
    return _elements(Window(file))


def member_places(file: BinaryIO) -> dict[str, Any]:
    """The members of the one JSON object that the file holds from where it stands: of an array where its elements start
    and the last one ends, int64 [n + 1]; of any other value its text where it is a string, else None.

    Memory: as array_starts, for the longest element of an array and the longest other value. Empty where there is no
    object; of an object that breaks off or is not JSON the members before that place.
    """
    window = Window(file)
    found: dict[str, Any] = {}
    if not window.passes("{"):
        return {}
    try:
        while window.letter() not in ("}", ""):
            key = window.string(":")
            if key is None or not window.passes(":"):
                break
            if window.passes("["):
                found[key] = _elements(window)
                if not window.passes("]"):
                    break
            elif window.letter() == '"':
                found[key] = window.string(",}")
            else:
                found[key] = None
                if not window.skip_value(",}"):
                    break
            if not window.passes(","):
                break
    except ValueError:
        pass
    return found


def _elements(window: Window) -> np.ndarray:
    starts = array("q")
    while True:
        window.skip_space()
        if window.letter() in ("]", ""):
            break
        starts.append(window.offset)
        if not window.skip_value():
            break
        window.passes(",")
    return with_end(starts, window.offset)


def with_end(starts: array, end: int) -> np.ndarray:
    return np.append(np.array(starts, dtype=np.int64), end)


class Window:
    """A part of a file as letters, one per byte, so that a letter's place is its byte's; JSON's own signs are ASCII."""

    def __init__(self, file: BinaryIO):
        self.file, self.base, self.text, self.place = file, file.tell(), "", 0

    @property
    def offset(self) -> int:
        return self.base + self.place

    def letter(self) -> str:
        """The one at the place; "" at the end of the file."""
        if self.place == len(self.text):
            self.grow()
        return self.text[self.place : self.place + 1]

    def grow(self) -> bool:
        """Forget what lies before the place and read on, twice as much as is left; False at the end of the file."""
        left = self.text[self.place :]
        more = self.file.read(max(CHUNK_BYTES, len(left))).decode("latin-1")
        self.base, self.text, self.place = self.offset, left + more, 0
        return bool(more)

    def skip_space(self) -> None:
        while self.letter() in (" ", "\t", "\r", "\n"):
            self.place += 1

    def passes(self, letter: str) -> bool:
        """Move behind the letter if it comes next, and behind the space around it; whether it does."""
        self.skip_space()
        if self.letter() != letter:
            return False
        self.place += 1
        self.skip_space()
        return True

    def string(self, ends: str) -> str | None:
        """Move behind a string, which is returned; None where something else stands here, or the file ends."""
        start = self.offset
        if self.letter() != '"' or not self.skip_value(ends):
            return None
        return json.loads(self.text[start - self.base : self.place].encode("latin-1"), strict=False)

    def skip_value(self, ends: str = ",]") -> bool:
        """Move behind a JSON value that one of `ends` follows; False, and to the end, where the file ends first.

        Raises ValueError where there is none.
        """
        ended = False  # nothing of the file is left to read
        while True:
            problem = f"no {' or '.join(ends)} follows"
            at = self.place
            try:
                at = SKIMMER.raw_decode(self.text, self.place)[1]
                behind = self.text[at : at + 1]
                if behind not in ends:
                    behind = self.text[at:].lstrip(" \t\r\n")[:1]
                if behind and behind in ends:
                    self.place = at
                    return True
                broken = bool(behind) and (ended or at < len(self.text) - 16)  # else it may be a part of a number
            except json.JSONDecodeError as error:
                problem, at = error.msg, error.pos
                broken = not problem.startswith("Unterminated") and at < len(self.text) - 16
            except RecursionError:
                problem, broken = "nested too deeply", True
            if broken:
                raise ValueError(
                    f"is not a JSON array at byte {self.base + at:,}: {problem}. In a .jsonl file, one row per line, "
                    "such a row would be the only one that is lost"
                )
            if ended:
                self.place = len(self.text)
                return False
            ended = not self.grow()
