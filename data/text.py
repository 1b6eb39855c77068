"""Text to token ids and labels: the tokenizer with its checks, the chat template, the text that stands for images."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from data import easy_vqa
from data.hub import require_hub
from data.layouts import FRAME, count_image_tokens, has_crops, token_rows
from data.templates import (
    Tokenizer,
    conversation_text,
    end_of_answer,
    messages_of,
    messages_text,
    render,
    takes_system,
)
from models.config import VLMConfig

SPEAKERS = ("user", "assistant")


class NotHere(LookupError):
    """A tokenizer that only the hub has."""


def get_tokenizer(
    cfg: VLMConfig, folder: str | Path | None = None, notes: list[str] | None = None, local_only: bool = False
) -> Tokenizer:
    """The tokenizer of a checkpoint folder if it holds one, else cfg.lm_tokenizer, with the extra tokens added, and
    with the end of the template's answers as its end token, at which generation stops.

    Truncation and padding that are stored with it are cleared; `notes` gets a sentence that says so. Raises ValueError
    that names the flag if there is no such tokenizer, or if its size or the ids of the extra tokens are not those of
    the config; with local_only NotHere for one that is not on this machine.
    """
    if folder is not None and (Path(folder) / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        # Not AutoTokenizer: it would take the checkpoint's config.json for a transformers model's.
        tokenizer: Tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    else:
        tokenizer = named_tokenizer(str(cfg.lm_tokenizer), local_only)
    _add_extra_tokens(tokenizer, cfg)
    tokenizer.chat_template = cfg.lm_chat_template
    if cleared := _clear_cuts(tokenizer):
        where = folder if folder is not None else f"--lm_tokenizer {cfg.lm_tokenizer}"
        (notes if notes is not None else []).append(f"{where}: its stored {cleared} would cut or fill texts; cleared")
    if end := end_of_answer(tokenizer):
        tokenizer.eos_token = end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _clear_cuts(tokenizer: Tokenizer) -> str:
    """Clear what a tokenizer.json keeps of a call that truncated or padded; returns what it was, in words."""
    backend = tokenizer.backend_tokenizer
    found = []
    if backend.truncation is not None:
        found.append(f"truncation to {backend.truncation['max_length']} tokens")
        backend.no_truncation()
    if backend.padding is not None:
        found.append("padding")
        backend.no_padding()
    return " and ".join(found)


def named_tokenizer(name: str, local_only: bool = False) -> Any:
    """The tokenizer that --lm_tokenizer names, as it is. Raises ValueError, and NotHere as get_tokenizer does."""
    if name == easy_vqa.NAME:
        return easy_vqa.tokenizer()
    from transformers import AutoTokenizer

    if name.endswith(".gguf"):
        convert = f"python scripts/convert_gguf.py {name} FOLDER"
        raise ValueError(f"--lm_tokenizer {name}: must be a folder; convert the file with: {convert}")
    if local_only and not Path(name).exists():
        from huggingface_hub import try_to_load_from_cache

        cached: Any = None
        with contextlib.suppress(ValueError):  # a path is no hub id
            cached = try_to_load_from_cache(name, "tokenizer.json")
        if not isinstance(cached, str):
            raise NotHere(f"--lm_tokenizer {name}: not on this machine")
        name = str(Path(cached).parent)  # as a name it would be asked for
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
    base = base_vocab_size(tokenizer, extra)
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


def base_vocab_size(tokenizer: Tokenizer, extra: Iterable[str]) -> int:
    """How many tokens it has besides the extra ones."""
    vocabulary = tokenizer.get_vocab()
    return len(vocabulary) - sum(token in vocabulary for token in extra)


def knows_every_word(tokenizer: Tokenizer) -> bool:
    """Whether no text becomes the unknown token, as where words are made of bytes."""
    return not unknown_words(tokenizer, "\ue000")  # a character that no vocabulary has


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of the text, in order, that become the unknown token."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [text[start:end] for token, (start, end) in places if token == tokenizer.unk_token_id]


def image_string(grids: list[tuple[int, int]], cfg: VLMConfig) -> str:
    """The text that stands for images of the given grids (rows, columns): one image token for each image embedding.

    A frame of a video stands between frame_start and frame_end, where vlm_extra_tokens have them.
    """
    kind = _crops_string if has_crops(cfg) else _tiles_string
    return "".join(_frame_string(cfg) if grid == FRAME else kind(grid, cfg) for grid in grids)


def _frame_string(cfg: VLMConfig) -> str:
    tokens = cfg.vlm_extra_tokens
    start = tokens.get("frame_start", tokens.get("global_image_token", ""))
    return start + tokens["image_token"] * count_image_tokens(FRAME, cfg) + tokens.get("frame_end", "")


def _tiles_string(grid: tuple[int, int], cfg: VLMConfig) -> str:
    """Of one image in tiles or resize: the whole image, and where there are several tiles each with its name. A single
    tile has a name where there is no global_image_token, as in nanoVLM before it had one."""
    tokens, (rows, cols) = cfg.vlm_extra_tokens, grid
    slots = tokens["image_token"] * cfg.mp_image_token_length
    whole = tokens["global_image_token"] + slots if "global_image_token" in tokens else ""
    if grid == (1, 1):
        return whole or tokens.get("r1c1", "") + slots
    return whole + "".join(tokens[f"r{r + 1}c{c + 1}"] + slots for r in range(rows) for c in range(cols))


def _crops_string(grid: tuple[int, int], cfg: VLMConfig) -> str:
    """Of one image in molmo_crops: the whole image, then the rows of all crops, each row closed."""
    tokens, (rows, columns) = cfg.vlm_extra_tokens, token_rows(grid, cfg)
    whole = tokens["low_res_im_start"] + tokens["image_token"] * cfg.mp_image_token_length + tokens["im_end"]
    row = tokens["image_token"] * columns + tokens["im_col"]
    return whole + tokens["im_start"] + row * rows + tokens["im_end"]


def encode_conversation(
    tokenizer: Tokenizer,
    turns: list[dict],
    image_text: str,
    system: str = "",
    train_on: str = "answers",
    tools: list[dict] | None = None,
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation, of which image_text stands before the first question.

    turns: {"user": str, "assistant": str} each, with "steps" where tools are called in between: see data.formats.
    system: a text before them, which is not learned; where the template writes no system turn, it stands before the
    first question. labels are ids shifted left by one where the assistant speaks, its end-of-turn token included, and
    -100 elsewhere; train_on: answers, last_answer, or all, which is every token. tools: what a template says of them.
    """
    first = image_text + (turns[0]["user"] or "")
    system, first = _system_and_question(tokenizer, system, first)
    turns = [turns[0] | {"user": first}, *turns[1:]]
    if tools or any(turn.get("steps") for turn in turns):
        text, spans = messages_text(tokenizer, _messages(turns, system), tools)
    else:
        text, spans = conversation_text(tokenizer, [turn[who] for turn in turns for who in SPEAKERS], system)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    if train_on == "all":
        return ids, [*ids[1:], -100]
    starts = [start for start, _ in encoding.offsets]
    labels = [-100] * len(ids)
    for start, end in spans[-1:] if train_on == "last_answer" else spans:
        first_id, last = max(bisect_left(starts, start), 1), bisect_left(starts, end)
        labels[first_id - 1 : last - 1] = ids[first_id:last]
    return ids, labels


def conversation_tensors(
    tokenizer: Tokenizer, spoken: tuple[tuple[str, str], ...], system: str, train_on: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """encode_conversation of (user, assistant) pairs, as int tensors."""
    turns = [{"user": user, "assistant": assistant} for user, assistant in spoken]
    ids, labels = encode_conversation(tokenizer, turns, "", system, train_on)
    return torch.tensor(ids), torch.tensor(labels)


def _messages(turns: list[dict], system: str) -> list[dict]:
    """All that is said in the turns, one message after the other."""
    messages = messages_of([], system)
    for turn in turns:
        said = [{"role": who, "content": turn[who]} for who in SPEAKERS]
        messages += [said[0], *turn.get("steps", []), *said[1:][: turn["assistant"] is not None]]
    return messages


def _system_and_question(tokenizer: Tokenizer, system: str, question: str) -> tuple[str, str]:
    """(system, question) as the tokenizer's template can write them."""
    if not system or takes_system(tokenizer):
        return system, question
    return "", f"{system}\n\n{question}"


def encode_prompt(
    tokenizer: Tokenizer,
    question: str,
    image_text: str,
    system: str = "",
    steps: list[dict] | None = None,
    tools: list[dict] | None = None,
) -> list[int]:
    """The ids of a question, after a system text if there is one, up to where the assistant begins to speak.

    steps: tool calls and results after the question. tools: what a template says of them.
    """
    system, question = _system_and_question(tokenizer, system, image_text + question)
    messages = [*messages_of([question], system), *(steps or [])]
    text = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def encode_chat(tokenizer: Tokenizer, contents: list[str], system: str = "") -> list[int]:
    """The ids of a conversation that ends with a question, up to where the assistant begins to speak, as it is trained.

    contents: what user and assistant say in turn, an odd number of texts. Raises TemplateRefused.
    """
    if len(contents) == 1:
        return encode_prompt(tokenizer, contents[0], "", system)
    system, first = _system_and_question(tokenizer, system, contents[0])
    any_answer = "."
    text, spans = conversation_text(tokenizer, [first, *contents[1:], any_answer], system)
    return tokenizer.backend_tokenizer.encode(text[: spans[-1][0]], add_special_tokens=False).ids


def spoken_call(tokenizer: Tokenizer, turn: dict, system: str, tools: list[dict] | None) -> str:
    """What the assistant writes to call a tool, where that ends the turn: the text that an answer is compared with."""
    text, spans = messages_text(tokenizer, _messages([turn], system), tools)
    start, end = spans[-1]
    return text[start:end].removesuffix(str(tokenizer.eos_token)).strip()
