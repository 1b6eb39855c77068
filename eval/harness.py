"""Questions of another harness, answered as evaluate.py answers its own: by the same Asker, in batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.datasets import Questions
from eval.asking import Asker, Reader, Shown
from eval.batches import Batches
from eval.prompts import styled
from eval.rules import Item

MAX_NEW_TOKENS = 50  # where a task says none, as in nanoVLM
# What lmms-eval stops at where a task says nothing: the line between its few-shot examples. Like its own wrappers of
# Qwen this does not, for an answer may have paragraphs.
UNSAID_STOP = "\n\n"
SAMPLING = {"temperature": float, "top_p": float, "top_k": int}


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. sampling: names and values as the model's generate takes them; greedy without any."""

    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    sampling: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], max_new_tokens: int | None = None) -> Decoding:
        """From a task's generation_kwargs in lmms-eval; what is not about a model like this one is ignored.

        max_new_tokens: where the options have none. Raises ValueError for beams, which it cannot search.
        """
        if (beams := options.get("num_beams") or 1) != 1:
            raise ValueError(f"generation_kwargs num_beams {beams}: must be 1; answers are greedy or sampled")
        until = options.get("until") or ()
        stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one and one != UNSAID_STOP)
        tokens = options.get("max_new_tokens") or options.get("max_gen_toks") or max_new_tokens or MAX_NEW_TOKENS
        given = {name: kind(options[name]) for name, kind in SAMPLING.items() if options.get(name) is not None}
        is_greedy = not options.get("do_sample") or given.get("temperature") == 0
        # All of the distribution where nothing is said, as the model's own defaults would cut it.
        all_of_it = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return cls(int(tokens), stop, () if is_greedy else tuple(sorted((all_of_it | given).items())))


@dataclass(frozen=True)
class Request:
    """read: the question as the model gets it, made when its turn has come. name: in words, for messages."""

    read: Callable[[], Questions]
    decoding: Decoding = Decoding()
    name: str = "a question"

    def question(self, reader: Reader) -> Questions | str:
        """As the reader's `question`."""
        return reader.question(self.read, self.decoding.max_new_tokens)


def answer_requests(asker: Asker, requests: Sequence[Request], batches: Batches) -> Iterator[tuple[int, str]]:
    """(number of the request, its answer), in the order in which they are answered; alike ones in one batch.

    The answer to a question that cannot be asked is empty, and stderr says why.
    """
    alike: dict[Decoding, list[int]] = {}
    for number, request in enumerate(requests):
        alike.setdefault(request.decoding, []).append(number)
    for decoding, numbers in alike.items():

        def ask(batch: list[tuple[int, Questions]], decoding: Decoding = decoding) -> list[str]:
            questions = [question for _, question in batch]
            return asker.answer(questions, decoding.max_new_tokens, decoding.stop, **dict(decoding.sampling))

        for group in batches.sorted_by_length((number, requests[number].question(asker.reader)) for number in numbers):
            can_be_asked = []
            for number, question in group:
                if isinstance(question, str):
                    print(f"{requests[number].name} cannot be asked: {question}", file=sys.stderr)
                    yield number, ""
                else:
                    can_be_asked.append((number, question))
            for batch, texts in batches.run(can_be_asked, ask):
                yield from zip((number for number, _ in batch), texts, strict=True)


def simple_question(reader: Reader, task: str, text: str, images: Sequence[Any], style: str) -> Questions:
    """A text with its images before it, in a style of eval.prompts. Raises ValueError where it cannot be asked."""
    reader.check(text)
    prompt, prefix = styled(task, Item(text, text, {}), style)
    return reader.read({"user": prompt}, images, "", prefix)


def chat_question(reader: Reader, task: str, messages: Sequence[Mapping[str, Any]], style: str) -> Questions:
    """The last question of messages {"role", "content"}, with images where they stand.

    content: a text, or parts {"type": "text", "text"} and {"type": "image", "url"}. style: of the last text. Raises
    ValueError where they cannot be asked.
    """
    said = [(str(message["role"]), _parts(message["content"])) for message in messages]
    system = ""
    if said and said[0][0] == "system":
        system = "".join(part["text"] for part in said.pop(0)[1])
        reader.check(system)
    roles = [role for role, _ in said]
    if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError(f"{task}: user and assistant must speak in turn, the user last; there are {', '.join(roles)}")
    prefix = ""
    if texts := [part for part in said[-1][1] if part["type"] == "text"]:
        texts[-1]["text"], prefix = styled(task, Item(texts[-1]["text"], texts[-1]["text"], {}), style)
    pictures: list[Shown] = []
    contents = ["".join(_shown(reader, task, part, pictures) for part in parts) for _, parts in said]
    return reader.conversation(contents, pictures, system, prefix)


def _parts(content: Any) -> list[dict[str, Any]]:
    """Copies, of which the texts may be changed."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]


def _shown(reader: Reader, task: str, part: Mapping[str, Any], pictures: list[Shown]) -> str:
    """The text that stands for a part; pictures: gets its image."""
    if part["type"] == "text":
        reader.check(part["text"])
        return part["text"]
    if part["type"] != "image":
        raise ValueError(f"{task}: holds {part['type']}; this model sees images alone")
    pictures.append(reader.image(part["url"]))
    return pictures[-1].text
