"""The text of an answer as its tokens come: up to the end token or the first stop string, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HALF_LETTER = "\ufffd"  # what a tokenizer of bytes writes for a letter of which bytes are still to come


class AnswerText:
    """Takes the ids of one answer. Where it is complete, `done` is true and further ids have no effect."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), room: int | None = None):
        """stop: the answer ends before the first of these texts, wherever tokens begin. room: most tokens of it."""
        self.tokenizer, self.stop, self.room = tokenizer, stop, room
        self.ids: list[int] = []
        self.count = 0  # tokens, with the end token
        self.done = False
        self.cut: str | None = None  # the text where a stop string has ended it
        self.shown = ""

    def add(self, token: int) -> None:
        """Take the next id."""
        if self.done:
            return
        self.count += 1
        if token == self.tokenizer.eos_token_id:
            self.done = True
            return
        self.ids.append(token)
        if self.stop:
            text = self._decoded()
            if places := [place for one in self.stop if (place := text.find(one)) >= 0]:
                self.cut, self.done = text[: min(places)], True
        self.done = self.done or self.count == self.room

    @property
    def text(self) -> str:
        """What there is of the answer, without space around it."""
        return (self._decoded() if self.cut is None else self.cut).strip()

    def take(self) -> str:
        """What can be shown beyond what earlier calls returned. All these together are `text` once it is done.

        Held back are space, part of a letter, and what a stop string may begin with, until it is clear what follows.
        """
        text = self.text
        if not self.done:
            text = text.rstrip(HALF_LETTER)
            text = text[: len(text) - max((_begun(text, one) for one in self.stop), default=0)].rstrip()
        if not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of the text are the first ones of the stop string, short of all of it."""
    # Space at the end of a text is stripped, so that a stop string may go on with some.
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Speed:
    """How fast answers came; a batch counts as one, its tokens as those of all its answers. Times in seconds."""

    first_s: list[float] = field(default_factory=list)  # from the prompt to the first token, of each batch
    tokens: int = 0
    later_tokens: int = 0  # those after the first of each answer
    later_s: float = 0.0

    def begin(self) -> None:
        """A prompt is about to be read."""
        self.is_first, self.last = True, time.perf_counter()

    def add(self, tokens: int) -> None:
        """So many answers got their next token."""
        now = time.perf_counter()
        self.tokens += tokens
        if self.is_first:
            self.first_s.append(now - self.last)
        else:
            self.later_tokens += tokens
            self.later_s += now - self.last
        self.is_first, self.last = False, now

    def __str__(self) -> str:
        first = sum(self.first_s) / len(self.first_s) if self.first_s else None
        said = [] if first is None else [f"first token after {first:.3f} s"]
        said += [f"then {self.later_tokens / self.later_s:.1f} tokens/s"] if self.later_tokens else []
        return ", ".join([*said, f"{self.tokens} token{'s' * (self.tokens != 1)}"])
