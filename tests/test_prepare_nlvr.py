"""prepare_nlvr.py on a small made-up clone: rows, splits that share nothing, and the tokenizer of its words."""

import itertools
import json

import pytest
from PIL import Image, ImageDraw

from data.rows import load_rows
from data.text import unknown_words
from eval.own_rows import open_own_rows
from scripts import prepare_nlvr

COLORS = {"Black": (0, 0, 0), "Yellow": (255, 255, 0), "#0099ff": (0, 153, 255)}


def item(color, x=40, size=20):
    return {"x_loc": x, "y_loc": 80, "type": "square", "color": color, "size": size}


def picture(boxes):
    """400 x 100 pixels: three grey boxes with their squares."""
    made = Image.new("RGB", (400, 100), (128, 128, 128))
    draw = ImageDraw.Draw(made)
    for left, box in zip((0, 150, 300), boxes, strict=True):
        draw.rectangle((left, 0, left + 99, 99), fill=(211, 211, 211))
        for one in box:
            x, y, size = left + one["x_loc"], one["y_loc"], one["size"]
            draw.rectangle((x, y, x + size - 1, y + size - 1), fill=COLORS[one["color"]])
    return made


def write_split(clone, split, examples):
    """examples: (identifier, sentence, label, boxes) each; half of their pictures in another folder."""
    folder = clone / "nlvr" / split
    folder.mkdir(parents=True)
    lines = []
    for identifier, sentence, label, boxes in examples:
        record = {"sentence": sentence, "identifier": identifier, "label": label, "structured_rep": boxes}
        lines.append(json.dumps(record))
        for order, arranged in enumerate(itertools.permutations(boxes)):
            path = folder / "images" / str(order % 2) / f"{split}-{identifier}-{order}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(arranged).save(path)
    (folder / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def boxes(number):
    """Three boxes that no other number has."""
    return [[item("Black", 40), item("Yellow", 2 * number)], [item("Yellow")], [item("#0099ff", 40)]]


@pytest.fixture
def clone(tmp_path):
    made = tmp_path / "clone"
    test = [("1-0", "There is a blue block.", "true", boxes(1)), ("1-1", "There is a blue block.", "false", boxes(2))]
    dev = [(f"{n}-0", f"There are {n} towers", "true", boxes(n)) for n in range(10, 20)]
    hidden = [
        ("30-0", "there is a BLUE block", "true", boxes(30)),  # a sentence of test
        ("31-0", "Nothing is red", "false", list(reversed(boxes(2)))),  # a picture of test
        ("32-0", "There is a tower.", "false", [[item("Black")], [item("Yellow")], []]),
    ]
    for split, examples in {"test": test, "dev": dev, "hidden": hidden}.items():
        write_split(made, split, examples)
    return made


def rows_in(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_without_the_training_file_no_sentence_and_no_picture_is_in_two_splits(clone, tmp_path, capsys):
    output = tmp_path / "rows"
    assert prepare_nlvr.main([str(clone), "--output", str(output)]) == 0
    assert "no nlvr/train/train.json: train and val are made of dev and hidden" in capsys.readouterr().out
    rows = {split: rows_in(output, split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 6 * 9, "val": 6 * 2, "test": 6 * 2}
    assert not (output / "hidden.jsonl").exists()
    for one, other in itertools.combinations(rows.values(), 2):
        assert not {row["question"].lower().strip(".") for row in one} & {row["question"].lower() for row in other}
        assert not {frozenset(row["images"]) for row in one} & {frozenset(row["images"]) for row in other}
    assert not {row["cluster"] for row in rows["train"]} & {"hidden-30", "hidden-31"}
    assert {row["source"] for row in rows["train"]} == {"towers", "scattered"}


def test_a_row_has_its_boxes_from_left_to_right_and_its_cluster(clone, tmp_path):
    output = tmp_path / "rows"
    prepare_nlvr.main([str(clone), "--output", str(output)])
    first, *_ = rows_in(output, "test")
    assert (first["id"], first["answer"], first["cluster"]) == ("test-1-0-0", "true", "test-1")
    whole = Image.new("RGB", (400, 100), (128, 128, 128))
    for left, path in zip((0, 150, 300), first["images"], strict=True):
        whole.paste(Image.open(output / path), (left, 0))
    assert whole.tobytes() == picture(boxes(1)).tobytes()
    benchmark = open_own_rows(output / "test.jsonl", None)
    assert len(benchmark.questions) == 12
    assert {one.cluster for one in benchmark.questions} == {"test-1"}  # two pictures of one sentence
    assert len(load_rows(str(output / "train.jsonl"))) == 54


def test_with_the_training_file_the_splits_are_the_published_ones(clone, tmp_path, capsys):
    from transformers import AutoTokenizer

    write_split(clone, "train", [("5-0", "There isn't a square, is there?", "true", boxes(5))])
    output = tmp_path / "rows"
    assert prepare_nlvr.main([str(clone), "--output", str(output)]) == 0
    assert "made of dev" not in capsys.readouterr().out
    counts = {split: len(rows_in(output, split)) for split in ("train", "val", "test", "hidden")}
    assert counts == {"train": 6, "val": 60, "test": 12, "hidden": 18}
    tokenizer = AutoTokenizer.from_pretrained(str(output / "tokenizer"))
    assert len(tokenizer.get_vocab()) == prepare_nlvr.VOCAB_SIZE
    assert unknown_words(tokenizer, "There isn't a square, is there? true") == []
    assert unknown_words(tokenizer, "a circle") == ["circle"]


def test_what_is_no_clone_is_one_sentence(clone, tmp_path, capsys):
    output = ["--output", str(tmp_path / "rows")]
    assert prepare_nlvr.main([str(tmp_path), *output]) == 2
    assert "must be a clone of https://github.com/lil-lab/nlvr" in capsys.readouterr().err
    gone = next((clone / "nlvr" / "test" / "images").glob("*/*.png"))
    gone.unlink()
    assert prepare_nlvr.main([str(clone), *output]) == 2
    assert f"has no picture {gone.name}" in capsys.readouterr().err
    (clone / "nlvr" / "dev" / "dev.json").write_text('{"sentence": "x"}\n', encoding="utf-8")
    assert prepare_nlvr.main([str(clone), *output]) == 2
    assert "dev.json, line 1" in capsys.readouterr().err
