"""Tokenizers, conversations as ids and labels, and words that a tokenizer does not know."""

import copy
from pathlib import Path

import pytest
from tiny.data import TILE_TOKENS, byte_level_tokenizer, dataset, row, tiny_train, tiny_vlm, turn

from data import easy_vqa, templates
from data.rows import load_rows
from data.text import encode_conversation, encode_prompt, get_tokenizer, image_string, knows_every_word, unknown_words
from data.tokenizer_checks import check_words

RENDER = templates.render
CHATML = "<|im_start|>user\nwhat is the blue shape?<|im_end|>\n<|im_start|>assistant\ncircle<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    """Of words and of bytes, both with the tile tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    size = byte_level_tokenizer(folder)
    of_bytes = get_tokenizer(tiny_vlm(lm_tokenizer=str(folder), lm_base_vocab_size=size))
    return {"words": get_tokenizer(tiny_vlm()), "bytes": of_bytes}


# Tokenizers


def test_embedded_tokenizer_knows_all_of_easy_vqa(tokenizers):
    tokenizer = tokenizers["words"]
    assert len(tokenizer) == easy_vqa.VOCAB_SIZE + len(TILE_TOKENS)
    rows = [row for split in ("train", "test") for row in load_rows("easy-vqa", split=split)]
    texts = {text for row in rows for turn in row["texts"] for text in (turn["user"], turn["assistant"])}
    assert len(texts) > 100
    for one in [*texts, CHATML]:
        ids = tokenizer.encode(one, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == one
    assert tokenizer.decode(ids, skip_special_tokens=True).split("\n")[-2] == "circle"
    assert tokenizer.encode("What is the BLUE shape ?") == tokenizer.encode("what is the blue shape?")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a purple shape")) == ["a", "<unk>", "shape"]


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_extra_tokens_follow_the_base_vocabulary(kind, tokenizers):
    tokenizer = tokenizers[kind]
    base = len(tokenizer) - len(TILE_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(TILE_TOKENS.values())) == list(range(base, len(tokenizer)))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id is not None


TAKEN = {"image_token": "<|image|>", "global_image_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_base_vocab_size": 99}, f"--lm_base_vocab_size 99: must be {easy_vqa.VOCAB_SIZE}"),
        (
            {"vlm_extra_tokens": TAKEN, "lm_base_vocab_size": easy_vqa.VOCAB_SIZE - 1},
            r"--vlm_extra_tokens: <\|image\|> has id 36 .* must have 35",
        ),
        ({"lm_tokenizer": str(Path(__file__).parent)}, "--lm_tokenizer .*tests: "),
        ({"lm_tokenizer": "package:a/b.gguf"}, "--lm_tokenizer package:a/b.gguf: must be a folder; .*convert_gguf.py"),
    ],
)
def test_a_tokenizer_that_does_not_fit_names_the_flag(changes, message):
    with pytest.raises(ValueError, match=message):
        get_tokenizer(tiny_vlm(**changes))


def test_checkpoint_tokenizer_wins_and_is_the_same(tmp_path, tokenizers):
    tokenizer = tokenizers["words"]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vit_hidden_dim": 16}')  # a checkpoint's, not a transformers model's
    loaded = get_tokenizer(tiny_vlm(lm_tokenizer="not/there"), tmp_path)
    text = "<|im_start|>user\n<|image|><row_1_col_2>is there a red shape?<|im_end|>\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    for name in ("eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


# Conversations


def walked_labels(tokenizer, ids: list[int]) -> list[int]:
    """Labels by walking over the ids of a ChatML conversation, without a look at characters."""
    vocabulary = tokenizer.get_vocab()
    start, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    role = tokenizer.encode("assistant\n", add_special_tokens=False)
    labels = [-100] * len(ids)
    speaking = False
    i = 0
    while i < len(ids):
        if ids[i] == start:
            speaking = ids[i + 1 : i + 1 + len(role)] == role
            i += len(role) + 1 if speaking else 1
            continue
        if speaking:
            labels[i - 1] = ids[i]
        speaking = speaking and ids[i] != end
        i += 1
    return labels


CONVERSATIONS = [
    [("what is the shape?", "circle")],
    [("what?", "the shape is red.\n\nthe user is the assistant"), ("assistant\nis it?", "."), ("no", "yes  no ")],
    [("Grüße, 世界 😀", "é́ 😀😀 مرحبا"), ("\U0001f468‍\U0001f469‍\U0001f467", "ﬁ ½ \t x")],
    [(f"is {i} the shape?", "red " * i) for i in range(1, 24)],
]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_labels_against_a_walk_over_the_ids(kind, number, tokenizers):
    tokenizer = tokenizers[kind]
    turns = [turn(user, assistant) for user, assistant in CONVERSATIONS[number]]
    images = image_string([(1, 1), (2, 1)], tiny_vlm())
    ids, labels = encode_conversation(tokenizer, turns, images)
    text = "".join(
        f"<|im_start|>user\n{images if i == 0 else ''}{t['user']}<|im_end|>\n"
        f"<|im_start|>assistant\n{t['assistant']}<|im_end|>\n"
        for i, t in enumerate(turns)
    )
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert labels == walked_labels(tokenizer, ids)
    assert sum(label == tokenizer.eos_token_id for label in labels) == len(turns)
    prompt = encode_prompt(tokenizer, turns[0]["user"], images)
    assert ids[: len(prompt)] == prompt
    assert [label != -100 for label in labels].index(True) == len(prompt) - 1
    if kind == "bytes":
        spoken = tokenizer.decode([label for label in labels if label != -100])
        assert spoken == "".join(t["assistant"] + "<|im_end|>" for t in turns)


TEMPLATES = {
    "chatml": None,
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system": "<|im_start|>system\nthe image<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinks": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}is\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nis\n{% endif %}",
    "shouts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_assistant_says_is_found_by_rendering_once(template, tokenizers, monkeypatch):
    tokenizer = copy.deepcopy(tokenizers["words"])
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    for conversation in CONVERSATIONS:
        turns = [turn(user, assistant) for user, assistant in conversation]
        found = encode_conversation(tokenizer, turns, "")
        with monkeypatch.context() as patch:
            patch.setattr(templates.Frame, "starts", lambda *given: None)
            assert encode_conversation(tokenizer, turns, "") == found
    rendered = []
    monkeypatch.setattr(templates, "render", lambda *given, **flags: rendered.append(1) or RENDER(*given, **flags))
    encode_conversation(tokenizer, [turn("what is the shape?", "red")] * 20, "")
    assert len(rendered) == (22 if template == "shouts" else 1)


def test_image_string_of_grids():
    slots = "<|image|>" * 4
    whole = "<|global_image|>" + slots
    tiles = f"<row_1_col_1>{slots}<row_1_col_2>{slots}<row_2_col_1>{slots}<row_2_col_2>{slots}"
    without_global = {name: token for name, token in TILE_TOKENS.items() if name != "global_image_token"}
    assert image_string([], tiny_vlm()) == ""
    assert image_string([(1, 1), (1, 1)], tiny_vlm()) == whole * 2
    assert image_string([(2, 2)], tiny_vlm()) == whole + tiles
    assert image_string([(1, 1)], tiny_vlm(vlm_extra_tokens={"image_token": "<|image|>"})) == slots
    assert image_string([(2, 2)], tiny_vlm(vlm_extra_tokens=without_global)) == tiles
    assert image_string([(1, 1)], tiny_vlm(vlm_extra_tokens=without_global)) == "<row_1_col_1>" + slots


# Unknown words


def test_a_tokenizer_of_bytes_knows_every_word(tokenizers):
    assert knows_every_word(tokenizers["bytes"])
    assert not knows_every_word(tokenizers["words"])
    assert unknown_words(tokenizers["words"], "Is there a Skull in the İ image?") == ["Skull", "İ"]
    assert unknown_words(tokenizers["bytes"], "Is there a Skull?") == []


KNOWN = row(name="known")
SKULL = row(texts=[turn("is there a Skull?")], name="a.jsonl#3")
MIXED = row(texts=[turn("what is the shape?", "a skull"), turn()], name="mixed")
MANY = row(texts=[turn("tell me where we see all these words")], name="many")


def test_rows_with_unknown_words_are_noted_before_training():
    data = dataset([], train_cfg=tiny_train(turns_per_image=1))
    assert check_words(data, [KNOWN, KNOWN]) is None
    note = check_words(data, [KNOWN, SKULL, MIXED])
    parts = ("easy-vqa", "'Skull' (a.jsonl#3);", "2 of 3 rows", "1 row (1 word", "1 turn (1 word", "smollm2_local")
    for part in parts:
        assert part in note


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SKULL, MIXED], r"--lm_tokenizer easy-vqa: .*; 0 of 2 rows .*--config configs/smollm2_local\.yaml"),
        ([MANY], r"'tell' \(many\), 'me' .*, 'where' .*, 'we' .*, 'see' \(many\), \.\.\.; 0 of 1"),
    ],
)
def test_rows_that_all_have_unknown_words_are_an_error_that_names_five(rows, message):
    with pytest.raises(ValueError, match=message):
        check_words(dataset([]), rows)


def test_a_tokenizer_that_knows_every_word_reads_no_row(tokenizers):
    data = dataset([])
    data.tokenizer = tokenizers["bytes"]
    unread = (pytest.fail("a row was read") for _ in range(1))
    assert check_words(data, unread) is None
