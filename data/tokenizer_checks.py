"""Tokenizer and chat template, checked once before any work: each problem is one sentence that names the flag."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data.datasets import VQADataset
from data.drops import count_drops, where_of
from data.templates import Frame, TemplateRefused, after_answer, end_of_answer, marks, messages_of, render
from data.text import (
    SPEAKERS,
    Tokenizer,
    encode_conversation,
    encode_prompt,
    get_tokenizer,
    knows_every_word,
    unknown_words,
)
from data.values import shortened
from models.config import VLMConfig

WORDS_TO_NAME = 5  # of those that the tokenizer does not know, in a message
ASKED = [{"user": "what is this?", "assistant": "a cat"}, {"user": "and this?", "assistant": "a dog"}]


def check_tokenizer(tokenizer: Tokenizer, cfg: VLMConfig) -> list[str]:
    """Check what get_tokenizer gave for the config. Returns notes on what is unusual and works.

    Raises ValueError with the first problem: what is wrong, and what to do.
    """
    if problem := _token_problem(tokenizer, cfg):
        raise ValueError(f"--lm_tokenizer {cfg.lm_tokenizer}: {problem}")
    if problem := _writing_problem(tokenizer) or _end_problem(tokenizer, cfg) or _label_problem(tokenizer):
        raise ValueError(f"--lm_chat_template: {problem}")
    if Frame(tokenizer, 2, False).rewrites:
        return [
            "--lm_chat_template: begins some answers in another way than its generation prompt ends (an empty think "
            "block?); each answer is trained after the prompt, as it is asked for at generation"
        ]
    return []


def load_tokenizer(cfg: VLMConfig, folder: Path | None, local_only: bool = False) -> tuple[Tokenizer, list[str]]:
    """(the tokenizer, checked, notes on it); errors as of get_tokenizer and check_tokenizer."""
    notes: list[str] = []
    tokenizer = get_tokenizer(cfg, folder, notes, local_only)
    return tokenizer, notes + check_tokenizer(tokenizer, cfg)


def _token_problem(tokenizer: Tokenizer, cfg: VLMConfig) -> str | None:
    """What is wrong with the tokens, whatever the template."""
    highest, name = max((number, token) for token, number in tokenizer.get_vocab().items())
    if highest >= (cfg.lm_vocab_size or 0):
        return (
            f"{name} has id {highest}, but the embedding has {cfg.lm_vocab_size} rows; --lm_base_vocab_size must be "
            "such that with --extra_token_amount there is a row for every token"
        )
    for i, token in enumerate(cfg.vlm_extra_tokens.values()):
        ids = tokenizer.backend_tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
        if ids.count(cfg.image_token_id + i) != 1 or len(ids) > 3:
            return f"does not keep {token} of --vlm_extra_tokens as one token; take a token that no rule of it divides"
    if tokenizer.pad_token_id is None:
        return "has no token to pad with and none that ends a text; it needs a pad_token or an eos_token"
    return None


def _writing_problem(tokenizer: Tokenizer) -> str | None:
    """Whether the template writes questions, answers and a prompt that ends where an answer begins."""
    [question, answer] = contents = marks(2)
    try:
        text = render(tokenizer, messages_of(contents))
        prompt = render(tokenizer, messages_of(contents[:1]), add_generation_prompt=True)
        plain = render(tokenizer, messages_of(contents[:1]))
        render(tokenizer, messages_of(marks(4)))
    except TemplateRefused as error:
        return f"raises on a conversation of questions and answers: {shortened(str(error))}; mend the template"
    for name, mark, where in (("question", question, text), ("answer", answer, text), ("question", question, prompt)):
        if mark not in where:
            return f"does not write the {name} of a conversation as it is; it must hold message['content'] unchanged"
    between = text.partition(question)[2].partition(answer)[0]
    asked = prompt.partition(question)[2]
    if between.startswith(asked) and (missing := between[len(asked) :].strip()):
        what = "has no add_generation_prompt" if prompt == plain else "has a generation prompt that ends too early"
        return (
            f"{what}: generation would not begin an answer; let it write {missing!r} at the end where "
            "add_generation_prompt is true"
        )
    if not Frame(tokenizer, 2, False).pieces:
        return "does not write each content of a conversation once and in order; it must"
    return None


def _end_problem(tokenizer: Tokenizer, cfg: VLMConfig) -> str | None:
    """Whether an answer ends with one token, the one at which generation stops."""
    end, rest = end_of_answer(tokenizer), (after_answer(tokenizer) or "").strip()
    if end is None and not rest:
        return "writes nothing after an answer: generation would not know where to stop; end it with {{ eos_token }}"
    if end is None:
        written = rest.split()[0][:40]
        ids = tokenizer.backend_tokenizer.encode(written, add_special_tokens=False).ids
        is_what = "unknown to it" if tokenizer.unk_token_id in ids else f"{len(ids)} of its tokens, not one special one"
        return (
            f"ends an answer with {written!r}, which --lm_tokenizer {cfg.lm_tokenizer} does not have as a token (it is "
            f"{is_what}): generation would not stop there; take the template that belongs to this tokenizer, or end an "
            f"answer with {tokenizer.eos_token!r}"
        )
    if tokenizer.eos_token != end:
        return f"ends an answer with {end!r}, but generation stops at {tokenizer.eos_token!r}; they must be the same"
    return None


def _label_problem(tokenizer: Tokenizer) -> str | None:
    """Whether in ids each answer and its end are labels, after the prompt's ids and after one token that begins."""
    ids, labels = encode_conversation(tokenizer, ASKED, "")
    prompt = encode_prompt(tokenizer, ASKED[0]["user"], "")
    if ids[: len(prompt)] != prompt or labels[len(prompt) - 1] != ids[len(prompt)]:
        return (
            "its generation prompt ends within a token of the conversation, as with a space or a second line break "
            "at the end: an answer would be generated after other tokens than it is trained after; let the prompt end "
            "earlier, and the answer begin with that space"
        )
    if labels.count(tokenizer.eos_token_id) != len(ASKED):
        return f"the end of an answer, {tokenizer.eos_token!r}, would not be learned; it must follow each answer"
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        return f"begins with {tokenizer.bos_token!r} twice; it must write it once"
    return None


def check_words(dataset: VQADataset, rows: Iterable[dict]) -> str | None:
    """Check on some rows of the training data that the tokenizer knows their words.

    A row (with turns_per_image a turn) with an unknown word is dropped: from <unk> nothing can be learned. Returns None
    if every word is known, else a note that names up to WORDS_TO_NAME others with their rows; raises ValueError with
    the same if none of the rows can be used. For a tokenizer that knows every word no row is read.
    """
    if knows_every_word(dataset.tokenizer):
        return None
    rows = list(rows)
    found: dict[str, str] = {}  # the word in lower case -> how to name it
    for row in rows:
        for text in (row.get("system") or "", *(turn[who] or "" for turn in row["texts"] for who in SPEAKERS)):
            for word in unknown_words(dataset.tokenizer, text):
                found.setdefault(word.lower(), f"{word!r} ({where_of(row)})")
    if not found:
        return None
    prepared = [dataset.prepare_row(row) for row in rows]
    usable = sum(bool(one.conversations) for one in prepared)
    named = ", ".join([*list(found.values())[:WORDS_TO_NAME], *["..."] * (len(found) > WORDS_TO_NAME)])
    note = (
        f"--lm_tokenizer {dataset.vlm_cfg.lm_tokenizer}: does not know {named}; {usable} of {len(rows)} rows that were "
        f"tried can be used ({count_drops(prepared).summary()}). Take a recipe with SmolLM2's tokenizer, which "
        "knows every word: --config configs/smollm2_local.yaml (no hub needed), or configs/nanovlm_222m.yaml with "
        "--lm_tokenizer HuggingFaceTB/SmolLM2-135M"
    )
    if not usable:
        raise ValueError(note)
    return note
