"""Make rows of NLVR: sentences that people wrote about drawn pictures, each of them true or false of its picture.

    git clone https://github.com/lil-lab/nlvr
    python scripts/prepare_nlvr.py nlvr --output nlvr_rows
    python train.py --config configs/nlvr.yaml --enable_grades

NLVR (Suhr et al. 2017, A Corpus of Natural Language for Visual Reasoning, aclanthology.org/P17-2034) is licensed under
CC-BY-4.0. A picture is three boxes; it is drawn six times, once in each order of the boxes. A row has the three boxes
as three images, the sentence as the question and true or false as the answer; its source is the kind of picture,
towers or scattered. Its cluster is its sentence with all the pictures that it was written for, so that standard errors
do not take six orders of the same boxes for six samples.

Writes train.jsonl, val.jsonl, test.jsonl, boxes/ and tokenizer/, which has a token for each word. With NLVR's
train.json the splits are the published ones, train, dev and test, and hidden.jsonl is the test that was hidden until
2022. Without it (it is large, and some copies of the repository lack it) the training and validation rows are made of
dev and hidden: no sentence and no picture of theirs is in the test rows. Published models had eight times as much.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from data import easy_vqa

URL = "https://github.com/lil-lab/nlvr"
SPLITS = ("train", "dev", "test", "hidden")  # as the folders of NLVR
ORDERS = 6  # of the three boxes
BOX, LEFT_EDGES = 100, (0, 150, 300)  # pixels: width and height of a box, and where the boxes begin
TOWER_X = 40  # x_loc of every block of a tower
VAL_SHARE = 5  # one in so many sentences, where train.json is missing
VOCAB_SIZE = 512  # of the tokenizer: lm_base_vocab_size of configs/nlvr.yaml
CHATML_WORDS = ("\n", "system", "user", "assistant")
ANSWERS = ("true", "false")


@dataclass(frozen=True)
class Example:
    """A sentence with one picture in its six orders."""

    split: str
    identifier: str  # n-m: presentation, and picture in it
    sentence: str
    answer: str
    boxes: tuple[str, ...]  # what is in them, in a fixed order of the boxes
    is_tower: bool

    @property
    def text(self) -> str:
        """The sentence without case and what may end it, by which sentences are compared."""
        return " ".join(re.findall(r"\w+", self.sentence.lower()))

    @property
    def cluster(self) -> str:
        return f"{self.split}-{self.identifier.split('-')[0]}"

    @property
    def pictures(self) -> list[str]:
        """The names of its six files."""
        return [f"{self.split}-{self.identifier}-{order}.png" for order in range(ORDERS)]


def read_split(clone: Path, split: str) -> list[Example]:
    """The examples of a split, [] where its file is not there. Raises ValueError that names the line."""
    path = clone / "nlvr" / split / f"{split}.json"
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_example(split, json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: is no example of NLVR: {error!r}") from None
    return found


def _example(split: str, record: dict[str, Any]) -> Example:
    boxes = record["structured_rep"]
    answer = str(record["label"]).lower()
    if answer not in ANSWERS:
        raise ValueError(f"label {answer}")
    drawn = tuple(sorted(json.dumps(box, sort_keys=True) for box in boxes))
    is_tower = all(item["x_loc"] == TOWER_X for box in boxes for item in box)
    return Example(split, str(record["identifier"]), str(record["sentence"]).strip(), answer, drawn, is_tower)


def make_splits(found: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The published splits; without train.json, train and val made of dev and hidden."""
    if found["train"]:
        return {"train": found["train"], "val": found["dev"], "test": found["test"], "hidden": found["hidden"]}
    texts = sorted({example.text for example in found["dev"]})
    chosen = {texts[i] for i in range(0, len(texts), VAL_SHARE)}
    rest = found["dev"] + found["hidden"]
    val = without([example for example in rest if example.text in chosen], found["test"])
    return {"train": without(rest, [*val, *found["test"]]), "val": val, "test": found["test"]}


def without(examples: Iterable[Example], others: Sequence[Example]) -> list[Example]:
    """Those that share neither sentence nor picture with the others."""
    texts, drawn = {one.text for one in others}, {one.boxes for one in others}
    return [one for one in examples if one.text not in texts and one.boxes not in drawn]


class Pictures:
    """The pictures of a clone. Each different box is written once, as a file of 100 x 100 pixels named by its content.

    The six orders of a picture need not be in the same numbered folder, so that their names are looked up.
    """

    def __init__(self, clone: Path, folder: Path):
        """folder: for the boxes."""
        self.clone, self.folder = clone, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.paths = {path.name: path for path in (clone / "nlvr").glob("*/images/*/*.png")}
        self.written: set[str] = set()

    def boxes(self, name: str) -> list[str]:
        """The paths of a picture's boxes, from left to right, relative to the rows. Raises ValueError, OSError."""
        if name not in self.paths:
            raise FileNotFoundError(f"{self.clone}: has no picture {name}; it must be a whole clone of {URL}")
        with Image.open(self.paths[name]) as opened:
            whole = opened.convert("RGB")
        if whole.size != (LEFT_EDGES[-1] + BOX, BOX):
            raise ValueError(f"{self.paths[name]}: {whole.size[0]} x {whole.size[1]} pixels; NLVR's have 400 x 100")
        return [self._write(whole.crop((left, 0, left + BOX, BOX))) for left in LEFT_EDGES]

    def _write(self, box: Image.Image) -> str:
        name = f"{hashlib.sha256(box.tobytes()).hexdigest()[:16]}.png"
        if name not in self.written:
            box.save(self.folder / name)
            self.written.add(name)
        return f"{self.folder.name}/{name}"


def row_of(example: Example, name: str, pictures: Pictures) -> dict[str, Any]:
    """The row of one of the example's pictures."""
    return {
        "id": name.removesuffix(".png"),
        "images": pictures.boxes(name),
        "question": example.sentence,
        "answer": example.answer,
        "source": "towers" if example.is_tower else "scattered",
        "cluster": example.cluster,
    }


def words_of(examples: Iterable[Example]) -> list[str]:
    """The tokenizer's words, always VOCAB_SIZE with its special tokens: ChatML's, the answers, those of the sentences,
    the most frequent first, and unused ones."""
    room = VOCAB_SIZE - 1 - len(easy_vqa.SPECIAL_TOKENS)
    counts = Counter(word for one in examples for word in re.findall(r"\w+|[^\w\s]", one.sentence.lower()))
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    words = list(dict.fromkeys([*CHATML_WORDS, *ANSWERS, *frequent]))[:room]
    return words + [f"<unused{i}>" for i in range(room - len(words))]


def prepare(clone: Path, output: Path) -> list[str]:
    """Write the rows and the tokenizer; returns what was made, in lines. Raises ValueError, OSError."""
    found = {split: read_split(clone, split) for split in SPLITS}
    if not found["test"] or not found["dev"]:
        raise FileNotFoundError(
            f"{clone}: no nlvr/dev/dev.json or no nlvr/test/test.json in it; must be a clone of {URL}"
        )
    splits = make_splits(found)
    lines = [f"{clone}: made of NLVR (Suhr et al. 2017), CC-BY-4.0"]
    if not found["train"]:
        lines.append(
            "no nlvr/train/train.json: train and val are made of dev and hidden; none of their sentences and pictures "
            "is in test. Published models had eight times as many training rows"
        )
    pictures = Pictures(clone, output / "boxes")
    for split, examples in splits.items():
        # Order by order, so that the first rows of a file are about as many sentences as there can be.
        rows = [row_of(one, one.pictures[order], pictures) for order in range(ORDERS) for one in examples]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text(text, encoding="utf-8")
        share = Counter(row["answer"] for row in rows)["true"] / len(rows) if rows else 0
        lines.append(
            f"{split:<7} {len(rows):>6} rows, {len({one.text for one in examples})} sentences, {share:.1%} of the "
            "answers true"
        )
    easy_vqa.tokenizer(words_of(one for examples in found.values() for one in examples)).save_pretrained(
        output / "tokenizer"
    )
    return [*lines, f"{len(pictures.written)} boxes in {pictures.folder}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, metavar="CLONE", help=f"a clone of {URL}")
    parser.add_argument("--output", type=Path, required=True, help="folder for the rows")
    given = parser.parse_args(argv)
    try:
        print("\n".join(prepare(given.clone.expanduser(), given.output.expanduser())))
    except (ValueError, OSError) as error:
        print(f"prepare_nlvr.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
