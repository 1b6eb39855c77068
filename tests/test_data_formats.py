"""What rows look like in files: every format and container, and what is found in a bad row."""

import base64
import gzip
import json
import pickle
import random
import re
import tarfile
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.anything import changed
from tiny.data import dataset, drawn, encoded, picture, tiny_train, tiny_vlm, turn

from data import json_places, text_files
from data.collators import TrainCollator
from data.drops import DropCounter
from data.formats import Part, count_formats
from data.loader import prompt_batches, train_batches
from data.pipeline import load_data
from data.rows import load_rows, split_rows
from data.streams import RowStream
from data.values import Reason

PNG = encoded(picture())
PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
TURN = turn("what is the shape?", "red")
RED = [{"user": "what is the shape?", "assistant": "red"}]
Q = {"question": "what is the shape?", "answer": "red"}


@pytest.fixture(autouse=True)
def images(tmp_path):
    for name in ("a.png", "b.png", "cat.jpg"):
        (tmp_path / name).write_bytes(PNG)


@pytest.fixture
def read(tmp_path):
    """read(record, ...) is what these lines of a file are as rows; a str or bytes is a line as it is."""

    def write(*lines, name: str = "rows.jsonl") -> list[dict]:
        whole = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
                 for line in lines]  # fmt: skip
        (tmp_path / name).write_bytes(b"\n".join(whole))
        rows = load_rows(str(tmp_path / name))
        return [rows[i] for i in range(len(rows))]

    return write


def turns(row: dict) -> list[tuple]:
    return [(one["user"], one["assistant"]) for one in row["texts"]]


def bad(row: dict) -> tuple[str, str]:
    return str(row["bad"]), row["bad"].first


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
    "a part of a message is neither text nor image": {"messages": [
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


def test_nothing_usable_names_the_first_row_of_each_reason(read):
    rows = read(*[{"texts": ["what is the shape?", "red"]}] * 3)
    with pytest.raises(
        ValueError, match=r'3 texts is a list of strings.*\n.*rows.jsonl, line \d: \["what is the shape'
    ):
        next(train_batches(dataset(rows), TrainCollator(1, dataset(rows).vlm_cfg), tiny_train(batch_size=1)))


def test_a_reason_is_its_kind_and_keeps_the_first_row():
    counts = DropCounter()
    for found in ("a#1: x", "a#2: y"):
        counts.update({Reason("no such file", found): 1})
    sent = pickle.loads(pickle.dumps(counts))
    assert sent == {"no such file": 2}
    assert sent.examples() == {"no such file": "a#1: x"}
    assert all(type(name) is str for name in sent.plain())


# Files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_lines_as_people_have_them(tmp_path, name):
    lines = [
        "\ufeff" + json.dumps(Q),
        "",
        "   ",
        json.dumps(Q | {"answer": "zwölf 😀"}, ensure_ascii=False),
        "\t" + json.dumps(Q),
    ]
    for end in ("\n", "\r\n"):
        (tmp_path / name).write_bytes(end.join([*lines, '{"question": "cut o']).encode())
        rows = load_rows(str(tmp_path / name))
        assert [turns(rows[i])[0][1] for i in range(3)] == ["red", "zwölf 😀", "red"]
        assert bad(rows[3])[1].startswith(f"{name}, line 6: ")
        assert len(rows) == 4


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_is_the_same_whatever_is_read_at_once(tmp_path, monkeypatch, chunk, indent):
    for module in (text_files, json_places):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    records = [Q | {"answer": answer} for answer in ("[{", "}]\\", 'ü"', "😀", ", ]", "x" * 300, "")]
    array = json.dumps(records, indent=indent, ensure_ascii=False)
    files = {
        "array.json": f"\n{array}\n", "cut.json": array[:-4], "lines.jsonl": "\n \n".join(map(json.dumps, records))
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows = load_rows(str(tmp_path / name))
        read = [(turns(rows[i])[0][1] or "") if rows[i]["texts"] else "" for i in range(len(rows))]
        assert read == [record["answer"].strip() for record in records[:-1]] + [""]
        assert ("bad" in rows[6]) == (name == "cut.json")


def test_an_array_of_other_things(tmp_path, read):
    (tmp_path / "rows.json").write_text("[]")
    assert len(load_rows(str(tmp_path / "rows.json"))) == 0
    path = tmp_path / "broken.json"
    path.write_text("[" + json.dumps(Q) + ", {]" + " " * 50)
    with pytest.raises(ValueError, match=r"broken.json: cannot be read: is not a JSON array at byte \d+"):
        load_rows(str(path))
    rows = read(json.dumps([Q, 12, "a", None, [Q]]), name="x.json")
    assert [str(row.get("bad")) for row in rows] == [
        "None", "row is a number", "row is a string", "row is null", "row is a list of objects"
    ]  # fmt: skip
    assert bad(rows[1])[1] == 'x.json, row 2: "12"'


@pytest.mark.parametrize(("name", "comma"), [("rows.csv", ","), ("rows.csv", ";"), ("rows.tsv", "\t")])
def test_tables_of_text(read, tmp_path, name, comma):
    lines = ["image,question,answer", 'a.png,"is it, or\nnot?",007', "", ',"say ""yes""",1.0', "a.png,what?",
             'a.png,"a"b,c', "a.png,5 inches\" big,ja", "a.png,open,", 'a.png,"open,x']  # fmt: skip
    rows = read(*[line.replace(",", comma) for line in lines], name=name)
    assert [turns(row)[0] if row["texts"] else str(row["bad"]) for row in rows] == [
        (f"is it{comma} or\nnot?", "007"), ('say "yes"', "1.0"), "another number of cells than of columns", "not CSV",
        ('5 inches" big', "ja"), ("open", None), "not CSV",
    ]  # fmt: skip
    assert [row["images"] for row in rows[:2]] == [[str(tmp_path / "a.png")], []]
    assert [bad(row)[1].split(":")[0] for row in rows if "bad" in row] == [f"{name}, line {n}" for n in (6, 7, 10)]


def test_one_object_over_several_lines_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [Q]}, indent=2))
    with pytest.raises(ValueError, match=r"--train_dataset_path .*rows.json: .* is one object over several lines"):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps({"data": [Q]}))
    with pytest.raises(ValueError, match=r"rows.json: has the columns data; it needs images"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, text in {
        "a.jsonl": json.dumps(Q | {"image": "a.png"}) + "\n{",
        "a.csv": "question,answer\na,b\n",
    }.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        for _ in range(2):
            rows = load_rows(str(path))
            assert rows[0]["id"] == f"{name}.gz#0"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{name}.gz: cannot be read: is not a whole gzip file"):
            load_rows(str(path))
        if name == "a.jsonl":
            assert rows[0]["images"] == [str(tmp_path / "a.png")]
            assert bad(rows[1])[1].startswith("a.jsonl.gz, line 2: ")
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 2


def test_what_lies_beside_rows_is_not_read(tmp_path):
    for name, text in {"a/rows.jsonl": json.dumps(Q), "a/results.csv": "x\n1\n", "images/all.tar": "",
                       "b/rows.csv": "question,answer\n?,yes\n"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = load_rows(str(tmp_path))
    assert {name: len(found) for name, found in rows.by_subset().items()} == {"a": 1, "b": 1}
    (tmp_path / "b/rows.csv").write_text("question, answer,answer\n")
    with pytest.raises(ValueError, match=r"rows.csv: .* names a column twice: answer"):
        load_rows(str(tmp_path))


def test_a_folder_of_classes_and_one_with_metadata(tmp_path):
    for file in ("pets/train/cat/1.png", "pets/train/dog/2.JPG", "pets/test/cat/3.png", "pets/.cache/x/4.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(PNG)
    rows = load_rows(str(tmp_path / "pets"))
    assert [(row["images"], turns(row)) for row in map(rows.__getitem__, range(len(rows)))] == [
        ([str(tmp_path / "pets/train/cat/1.png")], [("", "cat")]),
        ([str(tmp_path / "pets/train/dog/2.JPG")], [("", "dog")]),
    ]
    assert len(load_rows(str(tmp_path / "pets"), split="test")) == 1
    (tmp_path / "pets/train/5.png").write_bytes(PNG)
    (tmp_path / "pets/5.png").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"--train_dataset_path .*pets: holds images, .*metadata.jsonl"):
        load_rows(str(tmp_path / "pets"))
    for split, lines in (("train", 2), ("test", 1)):
        (tmp_path / f"pets/{split}/metadata.csv").write_text("file_name,text\n" + "cat/1.png,a red shape\n" * lines)
        rows = load_rows(str(tmp_path / "pets"), split=split)
        assert (len(rows), turns(rows[0])) == (lines, [("", "a red shape")])
    assert rows[0]["images"] == [str(tmp_path / "pets/test/cat/1.png")]


def test_samples_of_a_tar_file(tmp_path):
    members = {
        "d/1.jpg": PNG, "d/1.json": json.dumps(Q).encode(), "d/2.png": PNG, "d/2.txt": "é".encode(), "d/3.png": PNG,
        "d/3.cls": b"7", "d/4.0.png": PNG, "d/4.1.png": PNG, "d/4.json": json.dumps(Q | {"image": "x"}).encode(),
        "d/5.json": b"{", "d/6.txt": b"\xff", "d/7.npy": b"",
    }  # fmt: skip
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    rows = load_rows(str(tmp_path / "rows.tar"))
    rows = [rows[i] for i in range(len(rows))]
    assert [row["images"] for row in rows[:4]] == [[PNG]] * 3 + [[PNG, PNG]]
    assert [turns(row)[0] for row in rows[:4]] == [("what is the shape?", "red"), ("", "é"), ("", "7"), TURN_PAIR]
    assert [str(row["bad"]) for row in rows[4:]] == ["not JSON", "not UTF-8", "no known format"]
    assert bad(rows[4])[1].startswith("rows.tar, sample d/5: ")
    (tmp_path / "rows.tar").write_bytes((tmp_path / "rows.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"rows.tar: cannot be read: is not a whole tar file"):
        load_rows(str(tmp_path / "rows.tar"))


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


def test_a_shuffled_file_with_bad_rows_resumes_and_reaches_workers(tmp_path):
    lines = [json.dumps(Q | {"image": "a.png"}) if i % 4 else "{" for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    train, val = split_rows(load_rows(str(tmp_path / "rows.jsonl")), 4, seed=0)
    assert (len(train), len(val)) == (12, 4)
    assert pickle.loads(pickle.dumps(train))[3] == train[3]

    def batches(count: int, start: int = 0, workers: int = 0) -> list:
        cfg = tiny_train(batch_size=2, num_workers=workers)
        data = dataset(train, train_cfg=cfg)
        found = islice(train_batches(data, TrainCollator(1, data.vlm_cfg), cfg, start), count)
        return [(batch["ids"], batch["dropped"], batch["position"]) for batch in found]

    whole = batches(9)
    assert whole == batches(9, workers=2)
    assert whole[4:] == batches(5, start=whole[3][2])
    assert sum(dropped.get("not JSON", 0) for _, dropped, _ in whole) >= 3


def test_the_first_row_of_each_reason_outlives_a_checkpoint(read, tmp_path):
    read(*[Q] * 6, "{", "{", Q)
    cfg = tiny_train(batch_size=3, val_size=0)

    def begin():
        return load_data(load_rows(str(tmp_path / "rows.jsonl")), tiny_vlm(), cfg, None)

    run, again = begin(), begin()
    run.start_reading()
    drawn(run, 3)
    file = BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    again.load_rank_states([torch.load(file, weights_only=True)])
    first = run.dropped["train"].examples()
    assert first["not JSON"].startswith(("rows.jsonl, line 7: ", "rows.jsonl, line 8: "))
    assert again.dropped["train"].examples() == first
    again.start_reading()
    drawn(again, 6)
    assert again.dropped["train"].examples() == first
    assert again.dropped["train"]["not JSON"] > run.dropped["train"]["not JSON"]


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


def test_the_index_of_a_file_takes_eight_bytes_per_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(Q) + "\n") * 1000)
    table = load_rows(str(path)).parts[0].table
    assert table.starts.nbytes == 8 * 1001
    assert table.starts.dtype == np.int64
    assert len(pickle.dumps(table)) < 9000
