"""What rows look like in files: every format and container, and what is found in a bad row."""

import base64
import functools
import json
import random
import re
from pathlib import Path

import pytest
from tiny.anything import changed
from tiny.data import dataset, tiny_train, turn
from tiny.lines import PNG, Q, bad, read_lines, turns

from data.drops import DropCounter
from data.formats import Part, count_formats
from data.loader import prompt_batches
from data.rows import load_rows
from data.streams import RowStream

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
TURN = turn("what is the shape?", "red")
RED = [{"user": "what is the shape?", "assistant": "red"}]


@pytest.fixture
def read(tmp_path):
    """read(record, ...) is what these lines of a file are as rows; a str or bytes is a line as it is."""
    return functools.partial(read_lines, tmp_path)


# Formats


def test_the_rows_of_the_page_are_read_as_it_says(tmp_path, read):
    examples = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({name for name, _ in examples}) == 7
    rows = read(*[row for _, row in examples])
    assert [row.get("format", row.get("bad")) for row in rows] == [name for name, _ in examples]
    assert {str(row["images"]) for row in rows} == {str([str(tmp_path / "cat.jpg")])}
    assert [turns(row) for row in rows] == [
        *[[("What is this?", "A cat.")]] * 4,
        [("How many cats are there?", "1")],
        [("What is this?", "cat")],
        [("What is this?\nA. a dog\nB. a cat", "B")],
        [("", "A cat on a mat.")],
        [("", "cat")],
    ]
    assert rows[2]["system"] == "Be brief."
    assert rows[5]["texts"][0]["answers"] == ["cat", "kitten"]
    assert rows[6]["texts"][0]["answers"] == ["B", "a cat"]
    assert count_formats(rows)["OpenAI messages"] == 2


def conversation(*texts: str, **more) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"image": "a.png", "conversations": said} | more


TAKEN = {
    "a single turn": ({"images": ["a.png"], "texts": RED[0]}, [TURN]),
    "one image as a string": ({"images": "a.png", "texts": RED}, [TURN]),
    "one image as a list": ({"image": ["a.png"], "texts": RED}, [TURN]),
    "more keys": ({"image": "a.png", "texts": [RED[0] | {"score": 1, "of": {}}], "id": 3}, [TURN]),
    "source of a turn": ({"image": "a.png", "texts": [RED[0] | {"source": 0}]}, [TURN | {"source": "0"}]),
    "source of a row": ({"image": "a.png", "texts": RED, "source": "web"}, [TURN | {"source": "web"}]),
    "a source that is none": ({"image": "a.png", "texts": RED, "source": ["web"]}, [TURN]),
    "several turns": (
        conversation("<image>\nwhat is the shape?", "red", "is it?", "yes"),
        [turn("\nwhat is the shape?".strip(), "red"), turn("is it?", "yes")],
    ),
    "image at the end": (conversation("what is the shape?\n<image>", "red"), [TURN]),
    "image before the word": (conversation("<image> is \\<image>", "red"), [turn("is <image>", "red")]),
    "image after the word": (conversation("is \\<image> <image>", "red"), [turn("is <image>", "red")]),
    "image alone": (conversation("<image>", "red"), [turn("", "red") | {"image_only": True}]),
    "two images": (
        conversation("<image> <image> what is the shape?", "red", image=["a.png", "b.png"]), [TURN]
    ),
    "the word": (conversation("what is \\<image>?", "red"), [turn("what is <image>?", "red")]),
    "no answer yet": (conversation("what is the shape?", "red", "is it?"), [TURN, turn("is it?", None)]),
    "roles": (
        {"image": "a.png", "conversations": [{"role": "user", "content": TURN["user"]},
                                             {"role": "model", "text": "red"}]}, [TURN]
    ),
    "image_url": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is the shape?"},
                      {"type": "image_url", "image_url": {"url": "a.png"}}]},
                      {"role": "assistant", "content": "red"}]}, [TURN]
    ),
    "images beside parts": (
        {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, "what is the shape?"]},
                                           {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]}, [TURN]
    ),
    "VQAv2": (
        Q | {"image": "a.png", "answer": None, "answers": [{"answer": "red", "id": 1}, {"answer": "red"}]}, [TURN]
    ),
    "captions": ({"image": "a.png", "captions": ["red", "it"]},
                 [turn("", "red") | {"image_only": True, "answers": ["red", "it"]}]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_unambiguous_is_taken(read, name, tmp_path):
    record, wanted = TAKEN[name]
    [row] = read(record)
    assert "bad" not in row, row["bad"].first
    assert [one | {"user": one["user"].strip()} for one in row["texts"]] == wanted
    count = 2 if name == "two images" else 1
    assert row["images"] == [str(tmp_path / name) for name in ("a.png", "b.png")][:count]


@pytest.mark.parametrize("letters", ["3", "3.0", "1e3", "-0", "12345678901234567890123", "true", "false"])
def test_numbers_and_booleans_keep_their_letters(read, letters):
    texts = '{"texts": [{"user": 3, "assistant": 3}]}'
    plain, asked = (
        row for one in (texts, '{"question": "?", "answers": [3, "x", 3]}') for row in read(one.replace("3", letters))
    )
    assert turns(plain) == [(letters, letters)]
    assert turns(asked) == [("?", letters)]
    assert type(plain["texts"][0]["user"]) is str


def test_one_row_changes_no_other(read):
    """A number among answers, a date, null, a key that appears late, and formats one after the other."""
    texts = ["a few", 2, "2023-07-05", None, "007"]
    rows = read(
        *[{"images": None, "texts": [{"user": "how many", "assistant": text}]} for text in texts],
        Q,
        conversation("is it?", "yes"),
        {"texts": [{"user": "how many", "assistant": "\u00e9\n"}], "late": {"key": 1}},
    )
    assert [turns(row)[0][1] for row in rows] == ["a few", "2", "2023-07-05", None, "007", "red", "yes", "é\n"]
    assert count_formats(rows) == {"the_cauldron turns": 6, "questions and answers": 1, "LLaVA conversations": 1}


BAD = {
    "texts is a list of strings": {"texts": ["what is the shape?", "red"]},
    "texts is a number": {"texts": 3},
    "assistant of a turn is an object": {"texts": [{"user": "?", "assistant": {"a": 1}}]},
    "user of a turn is a list of strings": {"texts": [{"user": ["?"], "assistant": "a"}]},
    "a turn has neither user nor assistant": {"texts": [{"human": "?", "bot": "a"}]},
    "answer is an object": {"question": "?", "answer": {"text": "red"}},
    "answer is a list": {"question": "?", "answers": [["red", 1]]},
    "answer is no number": '{"question": "?", "answer": NaN}',
    "question is a list of strings": {"question": ["?"], "answer": "red"},
    "user of a turn holds half of a surrogate pair": '{"texts": [{"user": "\\ud83d", "assistant": "a"}]}',
    "relevance_ratings holds a string": {"texts": RED, "relevance_ratings": ["good"]},
    "no known format": {"text": "red", "img": "a.png"},
    "row is a list": [1, 2],
    "not JSON": '{"question": "what", ',
    "not UTF-8": '{"question": "what", "answer": "r\xe9d"}'.encode("latin-1"),
    "image is a number": Q | {"image": 3},
    "image is a list of strings": Q | {"image": [["a.png"]]},
    "image is null": Q | {"images": [None]},
    "image is an empty string": Q | {"image": ""},
    "image is an object without bytes, path and url": Q | {"image": {"id": 3}},
    "image is not base64": Q | {"image": "data:image/png;base64,???"},
    "image is a URL, which --fetch_images fetches": Q | {"image": "https://a.org/b.png"},
    "a caption or label without an image": {"image": None, "caption": "red"},
    "another number of <image> than of images": conversation("<image> <image> what?", "red"),
    "<image> elsewhere than in a question": conversation("is it red?", "yes <image>"),
    "a role is none of system, user, assistant and tool": conversation("what?", "red") | {
        "conversations": [{"from": "observation", "value": "?"}]},
    "a system message elsewhere than at the beginning": {"messages": [
        {"role": "user", "content": "?"}, {"role": "system", "content": "no"}]},
    "a message of messages is a string": {"messages": ["?"]},
    "a part of a message is neither text nor image nor video": {"messages": [
        {"role": "user", "content": [{"type": "audio"}]}]},
    "a message is an object": {"messages": [{"role": "user", "content": {"type": "text"}}]},
    "choices is a string": {"question": "?", "choices": "a, b", "answer": "a"},
    "answer is none of the choices": {"question": "?", "choices": ["a b", "c d"], "answer": "e"},
    "answer may mean several of the choices": {"question": "?", "choices": ["b", "c"], "answer": "B".lower()},
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_what_can_mean_nothing_is_one_bad_row_with_its_line(read, reason):
    before, row, after = read(Q, BAD[reason], Q)
    assert turns(before) == turns(after) == [("what is the shape?", "red")]
    kind, first = bad(row)
    assert kind == reason
    assert first.startswith("rows.jsonl, line 2: ")
    assert (row["images"], row["texts"], row["id"]) == ([], [], "rows.jsonl#1")
    json.dumps(first).encode()
    assert len(first) < 250


def test_a_bad_row_says_what_was_found(read):
    two = conversation("<image> <image> is it?", "no")
    rows = read(
        Q, two, "", "  ", {"texts": ["a", "b"]}, '{"question": "?"', '{"question": "?", "answer": 1, "image": 3.50}'
    )
    assert [bad(row)[1] for row in rows[1:]] == [
        "rows.jsonl, line 2: 2 <image> in the text, 1 image",
        'rows.jsonl, line 5: ["a", "b"]',
        """rows.jsonl, line 6: Expecting ',' delimiter, column 17 of {"question": "?\"""",
        'rows.jsonl, line 7: "3.50"',
    ]


@pytest.mark.parametrize(
    ("choices", "answer", "wanted"),
    [
        (["a dog", "a cat"], 1, "B"),
        (["a dog", "a cat"], "a cat", "B"),
        (["a dog", "a cat"], "(b)", "B"),
        (["a dog", "a cat"], "1", "B"),
        (["1", "2", "3"], "2", "B"),
        (["1", "2", "3"], 2, "C"),
        ([7, 8], 1, "B"),
        ({"label": ["x", "y"], "text": ["a dog", "a cat"]}, "y", "y"),
        ({"A": "a dog", "B": "a cat"}, "B", "B"),
        (["a dog", "a cat"], None, None),
    ],
)
def test_an_answer_names_a_choice_by_letter_number_or_text(read, choices, answer, wanted):
    [row] = read({"question": "what?", "options": choices, "answer": answer})
    assert turns(row)[0][1] == wanted


# Images


def test_every_kind_of_image_is_the_same_picture(read, tmp_path):
    letters = base64.b64encode(PNG).decode()
    path = tmp_path / "a.png"
    given = ["a.png", str(path), path.as_uri(), letters, f"data:image/png;base64,{letters}",
             {"path": "a.png"}, {"bytes": letters, "path": None}, {"url": "a.png"}]  # fmt: skip
    rows = read(*[Q | {"image": one} for one in given])
    tiles = dataset([row | {"images": [PNG]} for row in rows[:1]])[0, 0].images
    for row in rows:
        assert (dataset([row])[0, 0].images == tiles).all()


def test_a_missing_file_and_a_url_are_told_apart(read, tmp_path):
    given = ["a.png", "none.png", "https://example.org/a.png", "a.png/b.png"]
    rows = read(*[{"images": [one], "texts": RED} for one in given])
    dropped = DropCounter()
    for i in range(len(rows)):
        dropped.update(dataset(rows)[0, i].dropped)
    assert dropped["no such file"] == 2
    assert sum(dropped.values()) == 3
    assert dropped.examples() == {
        "no such file": f"rows.jsonl, line 2: {tmp_path / 'none.png'}",
        "image is a URL, which --fetch_images fetches": ('rows.jsonl, line 3: "https://example.org/a.png"'),
    }


# From rows to batches


def test_a_caption_is_the_answer_to_the_image_alone_and_no_text_forges_a_token(read):
    rows = read(
        {"image": "a.png", "caption": "red"},
        {
            "messages": [
                {"role": "system", "content": "<|im_end|>"},
                *[{"role": "user", "content": "what is the shape?"}],
            ]
        },
        {"image": "a.png", "caption": "red <|image|>"},
    )
    data = dataset(rows, train_cfg=tiny_train(turns_per_image=1))
    [(ids, labels)] = data[0, 0].conversations
    assert data.tokenizer.decode(ids, skip_special_tokens=True) == "user\n\nassistant\nred\n"
    assert data.tokenizer.decode(labels[labels != -100]) == "red<|im_end|>"
    assert [data[0, i].dropped for i in (1, 2)] == [{"control token in text": 1}, {"image token in text": 1}]


SYSTEM = {"role": "system", "content": "the shape is red"}
ASKED = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_system_text_stands_in_the_prompt_and_is_not_learned(read):
    rows = read({"messages": [SYSTEM, *ASKED * 3]})
    data = dataset(rows, train=False)
    for template, begins in (
        (data.tokenizer.chat_template, "system\nthe shape is red\nuser\nwhat?\n"),
        (NO_SYSTEM, "user\nthe shape is red\n\nwhat?\n"),
    ):
        data.tokenizer.chat_template = template
        [(ids, labels)] = data[0, 0].conversations
        assert data.tokenizer.decode(ids, skip_special_tokens=True).startswith(begins)
        assert data.tokenizer.decode(labels[labels != -100]).split() == ["red<|im_end|>"] * 3
        prompt = data.questions(0).prompts[0]
        assert ids[: len(prompt)].tolist() == prompt
        assert data.tokenizer.decode(prompt, skip_special_tokens=True) == f"{begins}assistant\n"


def test_all_answers_count_at_evaluation(read):
    from data.collators import PromptCollator
    from eval.scoring import score

    rows = read(Q, Q | {"answer": None, "answers": ["red", "blue", "red"]})
    data = dataset(rows, train=False)
    [(_, expected, sources, _)] = prompt_batches(data, PromptCollator(1, data.vlm_cfg), data.cfg)
    assert expected == ["red", ("red", "blue")]
    assert score(zip(["blue", "Blue."], expected, sources, strict=True))["all"] == 0.5


TURN_PAIR = ("what is the shape?", "red")


def test_parquet_and_saved_tables_know_the_same_formats(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [conversation("<image>\nis it?", "yes"), conversation("is <image>?", "no")]
    labels = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    tables = {
        "llava": datasets.Dataset.from_list(records),
        "messages": datasets.Dataset.from_list([{"images": ["a.png"], "messages": [SYSTEM, *ASKED]}]),
        "answer": datasets.Dataset.from_list([{"question": "?", "answer": n} for n in (3, 4)]),
        "label": datasets.Dataset.from_list([{"image": {"bytes": PNG, "path": None}, "label": 1}], features=labels),
        "bytes": datasets.Dataset.from_list([{"question": "?", "answer": b"red"}]),
    }
    found = {}
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        table.save_to_disk(tmp_path / name)
        rows = [load_rows(str(tmp_path / path)) for path in (f"{name}.parquet", name)]
        one, other = ([turns(of[i]) or str(of[i]["bad"]) for i in range(len(of))] for of in rows)
        assert one == other
        found[name] = one
    assert found == {
        "llava": [[("is it?", "yes")], [("is ?", "no")]],
        "messages": [[("what?", "red")]],
        "answer": [[("?", "3")], [("?", "4")]],
        "label": [[("", "dog")]],
        "bytes": ["answer is bytes"],
    }


def test_a_stream_knows_the_same_formats():
    import datasets

    records = [conversation("<image>\nis it?", "yes"), conversation("is <image>?", "no"), conversation("is it?", "no")]
    table = datasets.Dataset.from_list(records).to_iterable_dataset(num_shards=3).with_format("arrow")
    rows = list(RowStream([Part("stream", table)]))
    assert [turns(row) for row in rows] == [[("is it?", "yes")], [("is ?", "no")], [("is it?", "no")]]
    assert [row["texts"][0].get("image_places") for row in rows] == [None, [3], None]


def test_any_value_at_any_place_of_a_row_is_used_or_counted(read):
    examples = re.findall(r"^\| [^|]+ \| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rng = random.Random(0)
    records = [changed(json.loads(rng.choice(examples)), rng) for _ in range(5000)]
    rows = read(Q, *map(json.dumps, records))
    assert len(rows) == 5001
    data = dataset(rows)
    kinds = DropCounter()
    for i, row in enumerate(rows):
        assert ("bad" in row) != ("format" in row)
        for one in row["texts"]:
            assert all(one[who] is None or type(one[who]) is str for who in ("user", "assistant", "source"))
        sample = data.prepare((0, i))
        assert bool(sample.conversations) or sample.dropped
        kinds.update(sample.dropped)
    assert 20 < len(kinds) < 150
