"""Text to token ids and labels: the tokenizer with its checks, the chat template, the text that stands for images."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from data import easy_vqa
from data.hub import require_hub
from models.config import VLMConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tokenizer: TypeAlias = "PreTrainedTokenizerFast"
END_OF_TURN = "<|im_end|>"


def get_tokenizer(cfg: VLMConfig, folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder if it holds one, else cfg.lm_tokenizer, with the extra tokens added.

    Raises ValueError that names the flag if there is no such tokenizer, or if its size or the ids of the extra tokens
    are not those of the config.
    """
    if folder is not None and (Path(folder) / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        # Not AutoTokenizer: it would take the checkpoint's config.json for a transformers model's.
        tokenizer: Tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    elif cfg.lm_tokenizer == easy_vqa.NAME:
        tokenizer = easy_vqa.tokenizer()
    else:
        tokenizer = _pretrained_tokenizer(str(cfg.lm_tokenizer))
    _add_extra_tokens(tokenizer, cfg)
    tokenizer.chat_template = cfg.lm_chat_template
    if END_OF_TURN in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TURN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if name.endswith(".gguf"):
        convert = f"python scripts/convert_gguf.py {name} FOLDER"
        raise ValueError(f"--lm_tokenizer {name}: must be a folder; convert the file with: {convert}")
    try:  # the cache first: a known tokenizer needs no network
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:  # ImportError: an absent package for another kind of tokenizer
        if Path(name).exists():
            raise ValueError(f"--lm_tokenizer {name}: {error}") from error
    require_hub(f"--lm_tokenizer {name}", f"a local folder or {easy_vqa.NAME}")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--lm_tokenizer {name}: {error}") from error


def _add_extra_tokens(tokenizer: Tokenizer, cfg: VLMConfig) -> None:
    """Add cfg.vlm_extra_tokens after the base vocabulary, in order."""
    from tokenizers import AddedToken

    extra = list(cfg.vlm_extra_tokens.values())
    vocabulary = tokenizer.get_vocab()
    base = len(vocabulary) - sum(token in vocabulary for token in extra)
    if base != cfg.lm_base_vocab_size:
        raise ValueError(
            f"--lm_base_vocab_size {cfg.lm_base_vocab_size}: must be {base}, the number of tokens of --lm_tokenizer "
            f"{cfg.lm_tokenizer}"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in extra], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in extra]
    wanted = list(range(cfg.image_token_id, cfg.image_token_id + len(extra)))
    if ids != wanted:
        token, found, needed = next(triple for triple in zip(extra, ids, wanted, strict=True) if triple[1] != triple[2])
        raise ValueError(
            f"--vlm_extra_tokens: {token} has id {found} in --lm_tokenizer {cfg.lm_tokenizer} and must have {needed}: "
            "the extra tokens follow its own in order, and none of them may be among its own"
        )


def knows_every_word(tokenizer: Tokenizer) -> bool:
    """Whether no text becomes the unknown token, as where words are made of bytes."""
    return not unknown_words(tokenizer, "\ue000")  # a character that no vocabulary has


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of the text, in order, that become the unknown token."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [text[start:end] for token, (start, end) in places if token == tokenizer.unk_token_id]


def image_string(grids: list[tuple[int, int]], cfg: VLMConfig) -> str:
    """The text that stands for images of the given grids (rows, columns): one image token for each image embedding."""
    tokens = cfg.vlm_extra_tokens
    slots = tokens["image_token"] * cfg.mp_image_token_length
    text = ""
    for rows, cols in grids:
        if (rows, cols) == (1, 1) or "global_image_token" in tokens:
            text += tokens.get("global_image_token", "") + slots
        if (rows, cols) != (1, 1):
            text += "".join(tokens[f"r{r + 1}c{c + 1}"] + slots for r in range(rows) for c in range(cols))
    return text


def encode_conversation(
    tokenizer: Tokenizer, turns: list[dict], image_text: str, system: str = ""
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation; the images stand before the first question. The work grows linearly in turns.

    turns: {"user": str, "assistant": str} each. system: a text before them, which is not learned; where the template
    writes no system turn, it stands before the first question. labels are ids shifted left by one where the assistant
    speaks, its end-of-turn token included, and -100 elsewhere.
    """
    contents = [text for turn in turns for text in (turn["user"], turn["assistant"])]
    contents[0] = image_text + contents[0]
    system, contents[0] = _system_and_question(tokenizer, system, contents[0])
    text = _render(tokenizer, _messages(contents, system))
    frame = _frame(tokenizer, len(turns), bool(system))
    spans = frame.spans(contents, text, system) or _spoken(tokenizer, contents, system)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    starts = [start for start, _ in encoding.offsets]
    labels = [-100] * len(ids)
    for start, end in spans:
        first, last = max(bisect_left(starts, start), 1), bisect_left(starts, end)
        labels[first - 1 : last - 1] = ids[first:last]
    return ids, labels


@functools.cache
def _takes_system(tokenizer: Tokenizer, template: str) -> bool:
    """Whether the template, the tokenizer's own, writes system turns; some have none, or raise."""
    mark = "\ue000system\ue001"
    try:
        return mark in _render(tokenizer, _messages(["user", "assistant"], mark))
    except Exception:  # whatever the template raises
        return False


def _system_and_question(tokenizer: Tokenizer, system: str, question: str) -> tuple[str, str]:
    """(system, question) as the tokenizer's template can write them."""
    if not system or _takes_system(tokenizer, str(tokenizer.chat_template)):
        return system, question
    return "", f"{system}\n\n{question}"


def _messages(contents: Sequence[str], system: str = "") -> list[dict]:
    """What user and assistant say in turn, after a system text if there is one, as a chat template takes it."""
    before = [{"role": "system", "content": system}] if system else []
    return before + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _spoken(tokenizer: Tokenizer, contents: Sequence[str], system: str = "") -> list[tuple[int, int]]:
    """The characters (start, end) of the rendered conversation that the assistant says, with the end of its turn.

    Renders the conversation anew for every turn.
    """
    spans = []
    for i in range(1, len(contents), 2):
        start = len(_render(tokenizer, _messages(contents[:i], system), add_generation_prompt=True))
        text = _render(tokenizer, _messages(contents[: i + 1], system))
        spans.append((start, len(text.rstrip())))  # without the template's line break after it
    return spans


class Frame:
    """What a chat template writes around the contents of a conversation, found by rendering one of placeholders."""

    def __init__(self, tokenizer: Tokenizer, turns: int, with_system: bool):
        """turns: of the longest conversation that it serves. with_system: of those that begin with a system text."""
        marks = [f"\ue000{i}\ue001" for i in range(2 * turns)]
        system = "\ue000system\ue001" if with_system else ""
        text = _render(tokenizer, _messages(marks, system))
        spoken = _spoken(tokenizer, marks, system)
        self.head = ""  # what stands before the system text
        if system:
            self.head, _, text = text.partition(system)
        self.pieces: list[str] = []  # what stands before each content
        for mark in marks:
            piece, found, text = text.partition(mark)
            if not found or mark in text:
                self.pieces, spoken = [], []  # the template changes contents: it has no frame
                break
            self.pieces.append(piece)
        # Where the assistant's speech starts, counted back from its content, and ends, counted on from it.
        place, self.leads, self.trails = len(self.head + system), [], []
        for i, (start, end) in enumerate(spoken):
            place += len(self.pieces[2 * i]) + len(marks[2 * i]) + len(self.pieces[2 * i + 1])
            self.leads.append(place - start)
            place += len(marks[2 * i + 1])
            self.trails.append(end - place)

    def spans(self, contents: Sequence[str], text: str, system: str = "") -> list[tuple[int, int]] | None:
        """As `_spoken`; None where the text, the rendered conversation, is not the contents within this frame."""
        parts, spans, length = [self.head, system], [], len(self.head + system)
        for i, content in enumerate(contents[: len(self.pieces)]):
            parts += [self.pieces[i], content]
            length += len(self.pieces[i]) + len(content)
            if i % 2:
                spans.append((length - len(content) - self.leads[i // 2], length + self.trails[i // 2]))
        whole = "".join(parts)
        return spans if self.pieces and text.startswith(whole) and not text[spans[-1][1] :].strip() else None


@functools.cache
def _frames(tokenizer: Tokenizer) -> dict[tuple[str, int, bool], Frame]:
    return {}


def _frame(tokenizer: Tokenizer, turns: int, with_system: bool) -> Frame:
    """The frame of conversations of up to the next power of two turns, made once."""
    size = 1 << (turns - 1).bit_length()
    known, key = _frames(tokenizer), (str(tokenizer.chat_template), size, with_system)
    if key not in known:
        known[key] = Frame(tokenizer, size, with_system)
    return known[key]


def encode_prompt(tokenizer: Tokenizer, question: str, image_text: str, system: str = "") -> list[int]:
    """The ids of a question, after a system text if there is one, up to where the assistant begins to speak."""
    system, question = _system_and_question(tokenizer, system, image_text + question)
    text = _render(tokenizer, _messages([question], system), add_generation_prompt=True)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _render(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
