"""Draw data for the three stages of nanoMolmo2 at a tiny size, without a network: pictures, points and short videos.

    python scripts/make_shapes.py --output shapes_rows
    python scripts/train_stages.py configs/nanomolmo2_tiny
    python evaluate.py --checkpoint grades_output/nanomolmo2_tiny_stage3/checkpoints/last \
        --tasks shapes_rows/test.jsonl --output results/shapes

A picture has one to three coloured shapes, each near the middle of one of 4 x 4 cells. A video is a folder of four
pictures in which one shape moves a cell at a time and another one stays. Rows of docs/data.md: captions, pointing and
counting (stage 1), questions (stage 2), videos (stage 3); a later stage also has rows of the earlier kinds, so that
they are not forgotten. The source of a row is its kind.

Writes stage1_train.jsonl, stage1_val.jsonl and so on, test.jsonl with all kinds, pictures/, videos/ and tokenizer/.
No scene is drawn twice, so that no test picture was trained on. The same --seed and --scale make the same files.
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

SIDE, CELLS = 48, 4  # pixels of a picture; cells a side
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUND = (245, 245, 245)
SIZES = {"train": (3000, 1200), "val": (100, 50), "test": (200, 100)}  # scenes, videos, at --scale 1
VOCAB_SIZE = 192  # of the tokenizer: lm_base_vocab_size of configs/nanomolmo2_tiny_*.yaml
POINT_TO, HOW_MANY = "Point to the {}.", "How many {} are there?"
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
    """One to three things in different cells, from the top left to the bottom right."""
    cells = rng.sample(range(CELLS * CELLS), rng.randint(1, 3))
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
    return {"caption": f"{listed([one.name for one in things])}.", "source": "caption"}


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
# Of every scene in this stage; a stage has so many of the scenes.
STAGE_KINDS = {1: ("caption", "pointing", "counting"), 2: ("color", "yes_no", "pointing", "counting"), 3: ("color",)}
STAGE_SHARE = {1: 1.0, 2: 1.0, 3: 1 / 5}
EARLIER = {1: (), 2: ("caption",), 3: ("caption", "pointing", "counting", "yes_no")}  # of a fifth of the scenes


class Maker:
    """Writes pictures and videos of scenes that were not drawn before."""

    def __init__(self, output: Path, seed: int):
        self.output, self.rng, self.seen = output, random.Random(seed), set[Any]()
        for name in ("pictures", "videos"):
            (output / name).mkdir(parents=True, exist_ok=True)

    def _new(self, make: Any) -> Any:
        while (found := make(self.rng)) in self.seen:
            pass
        self.seen.add(found)
        return found

    def scene_rows(self, split: str, number: int) -> dict[str, Row]:
        """A row of each kind, by kind, of a new picture."""
        things = self._new(make_scene)
        path = f"pictures/{split}_{number}.png"
        draw(things, self.rng).save(self.output / path)
        return {
            kind: {"id": f"{split}-{number}-{kind}", "image": path, "cluster": f"{split}-{number}"}
            | make(things, self.rng)
            for kind, make in MAKERS.items()
        }

    def video_row(self, split: str, number: int) -> Row:
        """The row of a new video."""
        video, path = self._new(make_video), f"videos/{split}_{number}"
        (self.output / path).mkdir(exist_ok=True)
        for n, things in enumerate(video.frames()):
            draw(things, self.rng).save(self.output / path / f"{n}.png")
        return {"id": f"{split}-video-{number}", "video": path} | direction_row(video)


def stage_rows(stage: int, scenes: list[dict[str, Row]], videos: list[Row]) -> list[Row]:
    """The rows of a stage, of scenes with a row of each kind."""
    own = scenes[: round(len(scenes) * STAGE_SHARE[stage]) or 1]
    rows = [scene[kind] for scene in own for kind in STAGE_KINDS[stage]]
    rows += [scene[kind] for scene in scenes[: len(scenes) // 5 or 1] for kind in EARLIER[stage]]
    return rows + (videos if stage == 3 else [])


def write_rows(path: Path, rows: list[Row]) -> str:
    """A line that says how many there are of each kind."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds = Counter(row["source"] for row in rows)
    return f"{path.name:<20} {len(rows):>6} rows: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items())


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
    maker, lines = Maker(output, seed), []
    for split, sizes in SIZES.items():
        n_scenes, n_videos = (max(4, round(size * scale)) for size in sizes)
        scenes = [maker.scene_rows(split, number) for number in range(n_scenes)]
        videos = [maker.video_row(split, number) for number in range(n_videos)]
        if split == "test":
            rows = [scene[kind] for scene in scenes for kind in MAKERS]
            lines.append(write_rows(output / "test.jsonl", rows + videos))
            continue
        for stage in STAGE_KINDS:
            rows = stage_rows(stage, scenes, videos)
            maker.rng.shuffle(rows)
            lines.append(write_rows(output / f"stage{stage}_{split}.jsonl", rows))
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
