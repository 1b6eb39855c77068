"""Draw data for the three stages of nanoMolmo2 at a tiny size, without a network: pictures, points and short videos.

    python scripts/make_shapes.py --output shapes_rows
    python scripts/train_stages.py configs/nanomolmo2_tiny
    python evaluate.py --checkpoint grades_output/nanomolmo2_tiny_stage3/checkpoints/last \
        --tasks shapes_rows/test.jsonl --output results/shapes

A picture has two or three coloured shapes, each near the middle of one of 4 x 4 cells. A video is a folder of four
pictures in which one shape moves a cell at a time and another one stays. For training there is a file for each group
of the recipes' mixtures: captions.jsonl, points.jsonl and questions.jsonl have a row for each picture, the latter two
with several annotations of it; videos.jsonl has the videos. text.jsonl has no pictures: questions of all kinds about
scenes that are not shown, each with the answer that is right there. The best that can be learned of them is the most
frequent answer, which is what evaluate.py --without_image then measures.

Writes these, stage1_val.jsonl and so on with a row for each question of a stage, test.jsonl with all kinds, pictures/,
videos/ and tokenizer/. No scene comes twice, so that no test picture was trained on. The source of a row is its kind.
The same --seed and --scale make the same files.
"""

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw

from data import easy_vqa
from data.conversations import read_record

SIDE, CELLS = 48, 4  # pixels of a picture; cells a side
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUND = (245, 245, 245)
# Scenes and videos at --scale 1.
SIZES = {"train": (3000, 1200), "text": (500, 500), "val": (50, 50), "test": (150, 150)}
VOCAB_SIZE = 192  # of the tokenizer: lm_base_vocab_size of configs/nanomolmo2_tiny_*.yaml
WHAT_IS_THERE, POINT_TO, HOW_MANY = "What is there?", "Point to the {}.", "How many {} are there?"
# Each is a token with and without a blank before it; digits are tokens one by one.
WORDS = (
    "system", "user", "assistant", "points", "tracks", "coords", "Counting", "the", "shows", "a", "total", "of",
    "There", "are", "none", "Point", "to", "How", "many", "there", "What", "color", "is", "Is", "Which", "way", "does",
    "move", "moves", "yes", "no", "and", "shapes", *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *DIRECTIONS,
)  # fmt: skip
SIGNS = (*"0123456789", *'.,?<>/="', "'", ":", ";", "-")
BLANKS = ("\n", " ")

Row = dict[str, Any]


@dataclass(frozen=True, order=True)
class Thing:
    """A shape in a cell, counted from the top left corner."""

    row: int
    column: int
    color: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def point(self) -> dict[str, float]:
        """The middle of its cell, in percent."""
        return {"x": 100 * (self.column + 0.5) / CELLS, "y": 100 * (self.row + 0.5) / CELLS}


def draw(things: Iterable[Thing], rng: random.Random) -> Image.Image:
    """RGB, SIDE x SIDE; each shape up to a pixel beside the middle of its cell, with a radius of 4 or 5."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for one in things:
        x, y = (int((place + 0.5) * SIDE / CELLS) + rng.randint(-1, 1) for place in (one.column, one.row))
        r, fill = rng.randint(4, 5), COLORS[one.color]
        if one.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif one.shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    return image


def make_scene(rng: random.Random) -> tuple[Thing, ...]:
    """Two or three things in different cells, from the top left to the bottom right."""
    cells = rng.sample(range(CELLS * CELLS), rng.randint(2, 3))
    return tuple(Thing(*divmod(cell, CELLS), rng.choice(list(COLORS)), rng.choice(SHAPES)) for cell in sorted(cells))


@dataclass(frozen=True)
class Video:
    """What moves, from its first cell, which way; and what stays."""

    mover: Thing
    direction: str
    other: Thing

    def frames(self) -> list[tuple[Thing, Thing]]:
        across, down = DIRECTIONS[self.direction]
        mover = self.mover
        return [
            (Thing(mover.row + n * down, mover.column + n * across, mover.color, mover.shape), self.other)
            for n in range(CELLS)
        ]


def make_video(rng: random.Random) -> Video:
    """The mover crosses the whole picture; the other thing has another name and stands beside its way."""
    direction, lane, stand = rng.choice(list(DIRECTIONS)), *rng.sample(range(CELLS), 2)
    mover_name, other_name = rng.sample(list(itertools.product(COLORS, SHAPES)), 2)
    start = 0 if direction in ("right", "down") else CELLS - 1
    along = rng.randrange(CELLS)
    if direction in ("left", "right"):
        return Video(Thing(lane, start, *mover_name), direction, Thing(stand, along, *other_name))
    return Video(Thing(start, lane, *mover_name), direction, Thing(along, stand, *other_name))


# Rows of a scene


def listed(names: list[str]) -> str:
    """As "a red circle, a blue square and a red square"."""
    named = [f"a {name}" for name in names]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def caption_row(things: tuple[Thing, ...], rng: random.Random) -> Row:
    """With a question, so that it can be asked without the picture too."""
    return {"question": WHAT_IS_THERE, "answer": f"{listed([one.name for one in things])}.", "source": "caption"}


def _asked(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, list[Thing]]:
    """(what to point to or to count, the things it means): a shape, a color, or all; one time in four any of them."""
    kinds = {f"{shape}s": [one for one in things if one.shape == shape] for shape in SHAPES}
    kinds |= {f"{color} shapes": [one for one in things if one.color == color] for color in COLORS}
    kinds["shapes"] = list(things)
    here = [label for label, found in kinds.items() if found]
    label = rng.choice(here if rng.random() < 0.75 else list(kinds))
    return label, kinds[label]


def pointing_row(things: tuple[Thing, ...], rng: random.Random) -> Row:
    label, found = _asked(things, rng)
    points = [one.point for one in found]
    row = {"query": POINT_TO.format(label), "label": label, "points": points, "points_unit": "percent"}
    return row | {"source": "pointing"}


def counting_row(things: tuple[Thing, ...], rng: random.Random) -> Row:
    label, found = _asked(things, rng)
    points = [one.point for one in found]
    row = {"query": HOW_MANY.format(label), "label": label, "count": len(found), "points": points}
    return row | {"points_unit": "percent", "source": "counting"}


def color_row(things: tuple[Thing, ...], rng: random.Random) -> Row:
    """Of a shape that is there once; without such a shape, whether there is something."""
    counts = Counter(one.shape for one in things)
    single = [one for one in things if counts[one.shape] == 1]
    if not single:
        return yes_no_row(things, rng)
    one = rng.choice(single)
    return {"question": f"What color is the {one.shape}?", "answer": one.color, "source": "color"}


def yes_no_row(things: tuple[Thing, ...], rng: random.Random) -> Row:
    """Half of them yes."""
    here = sorted({one.name for one in things})
    absent = [
        f"{color} {shape}" for color, shape in itertools.product(COLORS, SHAPES) if f"{color} {shape}" not in here
    ]
    answer = rng.choice(("yes", "no"))
    name = rng.choice(here if answer == "yes" else absent)
    return {"question": f"Is there a {name}?", "answer": answer, "source": "yes_no"}


def direction_row(video: Video) -> Row:
    question = f"Which way does the {video.mover.name} move?"
    return {"question": question, "answer": video.direction, "source": "video"}


MAKERS = {"caption": caption_row, "pointing": pointing_row, "counting": counting_row, "color": color_row,
          "yes_no": yes_no_row}  # fmt: skip
# The annotations of a picture in the rows of each file for training; of two with the same question one stays.
SETS = {"captions": ("caption",), "points": ("pointing", "counting") * 2, "questions": ("color", "yes_no") * 2}
VAL_KINDS = {1: ("caption", "pointing", "counting"), 2: (*MAKERS, "video"), 3: (*MAKERS, "video")}


class Maker:
    """Writes pictures and videos of scenes that were not there before."""

    def __init__(self, output: Path, seed: int):
        self.output, self.rng, self.seen = output, random.Random(seed), set[Any]()
        for name in ("pictures", "videos"):
            (output / name).mkdir(parents=True, exist_ok=True)

    def new(self, make: Any) -> Any:
        while (found := make(self.rng)) in self.seen:
            pass
        self.seen.add(found)
        return found

    def picture(self, split: str, number: int) -> tuple[tuple[Thing, ...], Row]:
        """(a new scene, what all rows of its picture have)."""
        things = self.new(make_scene)
        path = f"pictures/{split}_{number}.png"
        draw(things, self.rng).save(self.output / path)
        return things, {"image": path, "cluster": f"{split}-{number}"}

    def video_row(self, split: str, number: int) -> Row:
        """The row of a new video."""
        video, path = self.new(make_video), f"videos/{split}_{number}"
        (self.output / path).mkdir(exist_ok=True)
        for n, things in enumerate(video.frames()):
            draw(things, self.rng).save(self.output / path / f"{n}.png")
        return {"id": f"{split}-video-{number}", "video": path} | direction_row(video)

    def training_rows(self, scenes: int, videos: int) -> dict[str, list[Row]]:
        """The rows of each file that has pictures or videos."""
        found: dict[str, list[Row]] = {name: [] for name in SETS}
        for number in range(scenes):
            things, shown = self.picture("train", number)
            for name, kinds in SETS.items():
                texts = {turn["user"]: turn for kind in kinds for turn in turns_of(MAKERS[kind](things, self.rng))}
                found[name].append({"id": f"train-{number}-{name}", **shown, "texts": list(texts.values())})
        return found | {"videos": [self.video_row("train", number) for number in range(videos)]}

    def text_rows(self, scenes: int, videos: int) -> list[Row]:
        """Questions of each kind about scenes and videos that are not shown."""
        made = []
        for _ in range(scenes):
            things = self.new(make_scene)
            made += [make(things, self.rng) for make in MAKERS.values()]
        made += [direction_row(self.new(make_video)) for _ in range(videos)]
        return [
            {"id": f"text-{number}", "source": "text", "texts": [turn | {"source": "text"} for turn in turns_of(row)]}
            for number, row in enumerate(made)
        ]

    def asked_rows(self, split: str, scenes: int, videos: int) -> dict[str, list[Row]]:
        """A row for each question, by the kind that was to be asked."""
        found: dict[str, list[Row]] = {kind: [] for kind in MAKERS}
        for number in range(scenes):
            things, shown = self.picture(split, number)
            for kind, make in MAKERS.items():
                found[kind].append({"id": f"{split}-{number}-{kind}", **shown} | make(things, self.rng))
        return found | {"video": [self.video_row(split, number) for number in range(videos)]}


def turns_of(row: Row) -> list[Row]:
    """Questions and answers as text, points too."""
    return [{key: turn[key] for key in ("user", "assistant", "source")} for turn in read_record(row, None)["texts"]]


def write_rows(path: Path, rows: list[Row]) -> str:
    """A line that says how many there are of each kind."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = Counter(one["source"] for row in rows for one in row.get("texts", [row]))
    counted = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    return f"{path.name:<17} {len(rows):>5} rows, answers: {counted}"


def make_tokenizer() -> Any:
    """One token for each word, digit and sign, with the blank before it, so that text comes back letter by letter:
    points are read strictly."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    words = [*BLANKS, *(f"{blank}{word}" for word in dict.fromkeys((*WORDS, *SIGNS)) for blank in ("", " "))]
    room = VOCAB_SIZE - 1 - len(easy_vqa.SPECIAL_TOKENS)
    made = easy_vqa.tokenizer([*words, *(f"<unused{i}>" for i in range(room - len(words)))])
    backend = made.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])  # upper and lower case differ
    pattern = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = decoders.Fuse()
    return made


def make(output: Path, seed: int, scale: float) -> list[str]:
    """Write everything; returns what was made, in lines. Raises ValueError for a bad scale, OSError."""
    if not 0 < scale <= 10:
        raise ValueError(f"--scale {scale:g}: must be above 0 and at most 10")
    sizes = {split: [max(4, round(size * scale)) for size in given] for split, given in SIZES.items()}
    maker = Maker(output, seed)
    files = maker.training_rows(*sizes["train"]) | {"text": maker.text_rows(*sizes["text"])}
    asked = maker.asked_rows("val", *sizes["val"])
    files |= {f"stage{n}_val": [row for kind in kinds for row in asked[kind]] for n, kinds in VAL_KINDS.items()}
    files["test"] = [row for rows in maker.asked_rows("test", *sizes["test"]).values() for row in rows]
    lines = [write_rows(output / f"{name}.jsonl", rows) for name, rows in files.items()]
    make_tokenizer().save_pretrained(output / "tokenizer")
    return [*lines, f"{output}: {len(maker.seen)} scenes and videos, none of them twice"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for rows, pictures, videos and tokenizer")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn [0]")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of pictures and videos [1]")
    given = parser.parse_args(argv)
    try:
        print("\n".join(make(given.output.expanduser(), given.seed, given.scale)))
    except (ValueError, OSError) as error:
        print(f"make_shapes.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
