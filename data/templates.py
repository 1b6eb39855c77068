"""Chat templates: what they write around the texts of a conversation, and where the assistant's speech stands in it.

Everything is found out by rendering conversations of marks, which no text holds; nothing is assumed of a template.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokenizer: TypeAlias = "PreTrainedTokenizerFast"
SYSTEM_MARK = "\ue000system\ue001"
TOOL_MARKS = ("qzname", "qzkey", "qzvalue", "qzresult", "qztool")  # letters alone: JSON leaves them as they are
Span = tuple[int, int]  # characters of a text: start, end


class TemplateRefused(ValueError):
    """A conversation that the chat template does not write, and why."""


def marks(count: int) -> list[str]:
    """Texts that stand for those of a conversation."""
    return [f"\ue000{i}\ue001" for i in range(count)]


def messages_of(contents: Sequence[str], system: str = "") -> list[dict]:
    """What user and assistant say in turn, after a system text if there is one, as a chat template takes it."""
    before = [{"role": "system", "content": system}] if system else []
    return before + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def render(
    tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool = False, tools: list[dict] | None = None
) -> str:
    """The text of the messages. A template that can think is told not to: an answer follows its prompt at once.

    Raises TemplateRefused.
    """
    if _needs_parts(tokenizer, str(tokenizer.chat_template)):
        messages = [_in_parts(message) for message in messages]
    return _apply(tokenizer, messages, add_generation_prompt, tools)


def _apply(
    tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool = False, tools: list[dict] | None = None
) -> str:
    options: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False, **options
            )
        )
    except Exception as error:  # a template may raise anything, as any code
        raise TemplateRefused(f"{type(error).__name__}: {error}") from error


def _in_parts(message: dict) -> dict:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@functools.cache
def _needs_parts(tokenizer: Tokenizer, template: str) -> bool:
    """Whether the template, the tokenizer's own, writes a content only where it is a list of parts."""
    [mark] = marks(1)
    plain = messages_of([mark])
    try:
        if mark in _apply(tokenizer, plain):
            return False
    except TemplateRefused:  # a string is no list
        pass
    try:
        return mark in _apply(tokenizer, [_in_parts(message) for message in plain])
    except TemplateRefused:
        return False


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the template writes a system text before the first question; some have none, raise, or write it before
    the last question, where it would move as a conversation grows."""
    return _takes_system(tokenizer, str(tokenizer.chat_template))


@functools.cache
def _takes_system(tokenizer: Tokenizer, template: str) -> bool:
    contents = marks(4)
    try:
        text = render(tokenizer, messages_of(contents, SYSTEM_MARK))
    except TemplateRefused:
        return False
    return 0 <= text.find(SYSTEM_MARK) < text.find(contents[0])


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the template writes the tools there are, the assistant's calls with their arguments, and the results."""
    return _knows_tools(tokenizer, str(tokenizer.chat_template))


@functools.cache
def _knows_tools(tokenizer: Tokenizer, template: str) -> bool:
    name, key, value, result, tool = TOOL_MARKS
    call = {"type": "function", "function": {"name": name, "arguments": {key: value}}}
    messages: list[dict] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
    ]
    tools = [{"type": "function", "function": {"name": tool, "description": "", "parameters": {"type": "object"}}}]
    try:
        text = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    except TemplateRefused:
        return False
    return all(mark in text for mark in TOOL_MARKS)


def after_answer(tokenizer: Tokenizer) -> str | None:
    """What the template writes after the last answer, without space before it; None where it writes no answer."""
    contents = marks(2)
    _, found, rest = render(tokenizer, messages_of(contents)).rpartition(contents[1])
    return rest.lstrip() if found else None


def end_of_answer(tokenizer: Tokenizer) -> str | None:
    """The token with which the template ends an answer; None where what stands there is not one added token."""
    return _end_of_answer(tokenizer, str(tokenizer.chat_template))


@functools.cache
def _end_of_answer(tokenizer: Tokenizer, template: str) -> str | None:
    try:
        rest = after_answer(tokenizer)
    except TemplateRefused:
        return None
    ids = tokenizer.backend_tokenizer.encode(rest, add_special_tokens=False).ids if rest else []
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return str(token.content) if rest and token and rest.startswith(token.content) else None


class Frame:
    """What a chat template writes around the contents of a conversation, found by rendering one of marks.

    Where an answer does not begin as the generation prompt ends (an empty think block in one of them), the frame is the
    prompt's: what is trained is what is asked for at generation.
    """

    def __init__(self, tokenizer: Tokenizer, turns: int, with_system: bool):
        """turns: of the longest conversation that it serves. with_system: of those that begin with a system text."""
        contents, system = marks(2 * turns), SYSTEM_MARK if with_system else ""
        text = render(tokenizer, messages_of(contents, system))
        self.head = ""  # what stands before the system text
        if system:
            self.head, _, text = text.partition(system)
        self.pieces: list[str] = []  # what stands before each content
        for mark in contents:
            piece, found, text = text.partition(mark)
            if not found or mark in text:
                self.pieces = []  # the template changes contents: it has no frame
                break
            self.pieces.append(piece)
        self.tail = text
        self.leads: list[int] = []  # characters between the prompt and the content of each answer
        self.added: set[str] = set()  # ends of generation prompts with which the template does not begin an answer
        for i in range(1, len(self.pieces), 2):
            prompt = render(tokenizer, messages_of(contents[:i], system), add_generation_prompt=True)
            before = prompt.rpartition(contents[i - 1])[2]
            if not self.pieces[i].startswith(before):
                self.added.add(before[_same(before, self.pieces[i]) :])
                self.pieces[i] = before
            self.leads.append(len(self.pieces[i]) - len(before))

    @property
    def rewrites(self) -> bool:
        """Whether some answer does not begin as its generation prompt ends."""
        return bool(self.added)

    def compose(self, contents: Sequence[str], system: str = "") -> str:
        """The contents within the frame, which is that of as many turns."""
        parts = [self.head, system]
        for piece, content in zip(self.pieces, contents, strict=True):
            parts += [piece, content]
        return "".join([*parts, self.tail])

    def starts(self, contents: Sequence[str], text: str, system: str = "") -> list[int] | None:
        """Where each answer begins in the text, the rendered conversation; None where the contents are not within this
        frame."""
        parts, starts, length = [self.head, system], [], len(self.head + system)
        for i, content in enumerate(contents[: len(self.pieces)]):
            parts += [self.pieces[i], content]
            length += len(self.pieces[i]) + len(content)
            if i % 2:
                starts.append(length - len(content) - self.leads[i // 2])
        return starts if self.pieces and text.startswith("".join(parts)) else None


@functools.cache
def _frames(tokenizer: Tokenizer) -> dict[tuple[str, int, bool], Frame]:
    return {}


def frame_of(tokenizer: Tokenizer, turns: int, with_system: bool) -> Frame:
    """The frame of conversations of up to the next power of two turns, made once; of this number if it rewrites."""

    def made(size: int) -> Frame:
        known, key = _frames(tokenizer), (str(tokenizer.chat_template), size, with_system)
        if key not in known:
            known[key] = Frame(tokenizer, size, with_system)
        return known[key]

    frame = made(1 << (turns - 1).bit_length())
    return made(turns) if frame.rewrites else frame


def conversation_text(tokenizer: Tokenizer, contents: Sequence[str], system: str = "") -> tuple[str, list[Span]]:
    """(text, where the assistant speaks in it) of what user and assistant say in turn. The work grows linearly in turns
    unless the template changes contents: then each answer is found by rendering what stands before it.

    Raises TemplateRefused. Each span is an answer with its end token; there is none where the template has no such
    token.
    """
    frame = frame_of(tokenizer, len(contents) // 2, bool(system))
    text = frame.compose(contents, system) if frame.rewrites else render(tokenizer, messages_of(contents, system))
    starts = frame.starts(contents, text, system)
    if starts is None:
        return messages_text(tokenizer, messages_of(contents, system), None, frame)
    return _ended(tokenizer, text, starts)


def messages_text(
    tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None, frame: Frame | None = None
) -> tuple[str, list[Span]]:
    """The same of messages in any order, tool calls and results among them. Renders them again for each answer.

    frame: of the template, where there is one already. Raises TemplateRefused.
    """
    text = render(tokenizer, messages, tools=tools)
    added = (frame or frame_of(tokenizer, 2, False)).added
    parts, starts, done, length = [], [], 0, 0  # `done` characters of the text are in the parts, which have `length`
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True, tools=tools)
        ends = (end for end in ("", *added) if prompt.endswith(end) and text.startswith(prompt.removesuffix(end)))
        if (end := next(ends, None)) is None:
            raise TemplateRefused("what stands before an answer is not how the conversation begins")
        same = len(prompt) - len(end)
        parts += [text[done:same], end]
        length += same - done + len(end)
        done = same
        starts.append(length)
    return _ended(tokenizer, "".join([*parts, text[done:]]), starts)


def _same(one: str, other: str) -> int:
    """How many letters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ended(tokenizer: Tokenizer, text: str, starts: list[int]) -> tuple[str, list[Span]]:
    """(the text, up to the end of the last answer and the space after it; spans from each start to the next end token).

    No content holds an end token: see VQADataset."""
    end = end_of_answer(tokenizer)
    if end is None:
        return text, []
    found = [(start, text.find(end, start)) for start in starts]
    spans = [(start, place + len(end)) for start, place in found if place >= 0]
    last = spans[-1][1] if spans else len(text)
    rest = text[last:]
    return text[: len(text) - len(rest.lstrip())], spans
