"""Time evaluate.py on made-up data in MMStar's shape, kill it halfway and resume it, and time nanoVLM's loop beside it.

    git clone https://github.com/huggingface/nanoVLM
    python scripts/bench_evaluation.py --config configs/nanovlm_222m.yaml --limit 64 --nanovlm nanoVLM --output bench
    python scripts/bench_evaluation.py --dtype float32 --kill --output bench_small

The pictures are drawn and the questions made up, as are the answers that count as right: the scores say nothing about
any model. What is measured is time, with random weights.

evaluate.py answers the first --limit of the 1,500 rows, in batches of --eval_batch_size. With --kill a second
evaluation gets SIGKILL once half of the answers are there, is started again, and its results are compared with the
first one's. With --nanovlm the model of that clone, with random weights of the same sizes, answers the same rows in
turns with this project's, both decoding the pictures in the same process. Their batches are questions of the same
length, since that model cannot take padded ones with torch 2.13 and later. All is written into the folder
bench_evaluation of --output, which each call empties. Takes train.py's flags, of which the sizes of the model, --dtype
and --eval_batch_size matter.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw

from data import easy_vqa
from data.datasets import Questions
from data.text import get_tokenizer
from eval.answering import Prompts
from eval.asking import Asker
from eval.benchmarks import Benchmark, open_benchmark
from eval.tasks import TASKS
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from scripts.bench_nanovlm import check_clone, their_model
from training import setup
from training.arguments import Settings, parse_arguments

TASK = "mmstar"
ROWS = 1500
CATEGORIES = {  # six, of three parts each, as MMStar has them; the names are made up
    f"made-up category {one}": [f"made-up part {one}.{part}" for part in range(3)] for one in range(6)
}
SHAPES, COLORS = ("circle", "square", "triangle"), ("red", "green", "blue", "yellow", "black", "white")
DETAILS = ("", " in the picture", " that is drawn in the upper half of the picture", " nearest to the left edge of it")
NEW_TOKENS = 5
NOT_COMPARED = ("created", "command")  # of results.json: when and how it was made
POLL_S = 0.05


def record(number: int) -> dict[str, Any]:
    """A row in MMStar's columns, always the same for a number."""
    rng = random.Random(number)
    category = list(CATEGORIES)[number % len(CATEGORIES)]
    chosen = rng.sample(COLORS, 4)
    options = ", ".join(f"{letter}: {color}" for letter, color in zip("ABCD", chosen, strict=True))
    return {
        "index": number,
        "question": f"Which color is the {rng.choice(SHAPES)}{rng.choice(DETAILS)}?\nOptions: {options}",
        "image": {"bytes": drawn(rng), "path": None},
        "answer": rng.choice("ABCD"),
        "category": category,
        "l2_category": rng.choice(CATEGORIES[category]),
    }


def drawn(rng: random.Random) -> bytes:
    """A JPEG of three shapes, of the size of a small photo."""
    size = rng.choice(((512, 384), (640, 480), (400, 600)))
    picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for shape in SHAPES:
        x, y, side = rng.randrange(size[0] - 150), rng.randrange(size[1] - 150), rng.randrange(40, 150)
        box, color = (x, y, x + side, y + side), rng.choice(COLORS)
        if shape == "circle":
            draw.ellipse(box, fill=color)
        elif shape == "square":
            draw.rectangle(box, fill=color)
        else:
            draw.polygon([(x, y + side), (x + side // 2, y), (x + side, y + side)], fill=color)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, rows: int) -> None:
    """The made-up rows as save_to_disk writes them, and a page that says what they are."""
    import datasets

    table = datasets.Dataset.from_list([record(number) for number in range(rows)])
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({TASKS[TASK].split: table}).save_to_disk(folder / TASK)
    (folder / "MADE_UP.md").write_text(
        "Drawn pictures and made-up questions in MMStar's columns, to measure time. They are not MMStar, and a score "
        "on them says nothing about a model.\n",
        encoding="utf-8",
    )


def write_checkpoint(folder: Path, cfg: VLMConfig) -> None:
    """Random weights of these sizes, with a tokenizer of the questions' words that has as many tokens as they need."""
    room = cfg.lm_base_vocab_size - 1 - len(easy_vqa.SPECIAL_TOKENS)
    texts = [record(number)["question"] for number in range(50)]
    texts += ["system user assistant Answer with the option's letter from the given choices directly", *"ABCD", "\n"]
    words = list(dict.fromkeys(word for text in texts for word in re.findall(r"\n|\w+|[^\w\s]", text.lower())))[:room]
    words += [f"<unused{number}>" for number in range(room - len(words))]
    folder.mkdir(parents=True, exist_ok=True)
    easy_vqa.tokenizer(words).save_pretrained(folder / "words")
    cfg.lm_tokenizer = str(folder / "words")
    torch.manual_seed(0)
    VisionLanguageModel(cfg).save_pretrained(folder)
    get_tokenizer(cfg).save_pretrained(folder)


class Evaluation:
    """evaluate.py as a process of its own."""

    def __init__(self, folder: Path, settings: Settings, limit: int):
        self.folder, self.limit = folder, limit
        dtype = settings.train.dtype if settings.train.dtype in ("auto", "bfloat16", "float32") else "auto"
        self.command = [
            sys.executable, str(ROOT / "evaluate.py"), "--checkpoint", str(folder / "checkpoint"), "--tasks", TASK,
            "--data_root", str(folder / "data"), "--limit", str(limit), "--max_new_tokens", str(NEW_TOKENS),
            "--batch_size", str(settings.train.eval_batch_size), "--num_workers", "1", "--dtype", dtype,
        ]  # fmt: skip

    def run(self, name: str, kill_after: int | None = None) -> tuple[float, int]:
        """(seconds, exit status); kill_after: SIGKILL once so many answers are in its --output."""
        output = self.folder / name
        with (self.folder / f"{name}.txt").open("a", encoding="utf-8") as log:
            started = time.perf_counter()
            process = subprocess.Popen(
                [*self.command, "--output", str(output)], stdout=log, stderr=log, start_new_session=True
            )
            while kill_after is not None and process.poll() is None and answered(output) < kill_after:
                time.sleep(POLL_S)
            if kill_after is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
            status = process.wait()
            return time.perf_counter() - started, status


def answered(output: Path) -> int:
    """How many answers an evaluation that is under way has written."""
    lines = sum(path.read_bytes().count(b"\n") - 1 for path in (output / "progress").glob("*.jsonl"))
    return max(0, lines)


def differences(first: Path, second: Path) -> list[str]:
    """What differs in results.json and answers.jsonl of two --output folders but when and how they were made."""
    one, other = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (first, second))
    found = sorted(key for key in {*one, *other} - {*NOT_COMPARED} if one.get(key) != other.get(key))
    same = (first / "answers.jsonl").read_bytes() == (second / "answers.jsonl").read_bytes()
    return [*found, *([] if same else ["answers.jsonl"])]


class Rivals:
    """This project's model and nanoVLM's over the same rows, in the same dtype."""

    def __init__(self, folder: Path, nanovlm: Path, settings: Settings, limit: int):
        device = torch.device("cpu")
        self.autocast = setup.autocast(device, settings.train.dtype)
        self.asker = Asker(folder / "checkpoint", device, self.autocast)
        self.theirs = their_model(nanovlm, self.asker.model.cfg).eval()
        self.benchmark: Benchmark = open_benchmark(TASKS[TASK], folder / "data", limit, "lmms-eval", True)
        self.prompts = Prompts(self.asker.reader, self.benchmark, self.benchmark.questions, False, NEW_TOKENS)
        self.size = settings.train.eval_batch_size

    def batches(self, numbers: Iterable[int]) -> Iterator[list[Questions]]:
        """Questions with their decoded images, of the same length in a batch."""
        found = []
        for number in numbers:
            one = self.prompts[number]
            assert isinstance(one, Questions), one
            found.append(one)
        found.sort(key=lambda one: len(one.prompts[0]), reverse=True)
        for _, group in groupby(found, key=lambda one: len(one.prompts[0])):
            same = list(group)
            yield from (same[i : i + self.size] for i in range(0, len(same), self.size))

    def this(self, numbers: Sequence[int]) -> None:
        for batch in self.batches(numbers):
            self.asker.answer(batch, NEW_TOKENS)

    @torch.inference_mode()
    def nanovlm(self, numbers: Sequence[int]) -> None:
        """As its evaluation asks: generate with its KV cache, greedy, then decode."""
        cfg = self.asker.model.cfg
        for batch in self.batches(numbers):
            ids = torch.tensor([one.prompts[0] for one in batch])
            tiles = torch.cat([one.images for one in batch if one.images is not None])
            mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (cfg.image_mean, cfg.image_std))
            images = (tiles.float() / 255 - mean) / std
            with self.autocast:
                new = self.theirs.generate(ids, images, max_new_tokens=NEW_TOKENS, greedy=True)
            self.asker.tokenizer.batch_decode(new, skip_special_tokens=True)

    def measure(self, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
        """Rows per second of each in every round, one after the other on the same rows."""
        count = len(self.benchmark.questions) // rounds
        rivals: dict[str, Callable[[Sequence[int]], None]] = {"this": self.this, "nanoVLM": self.nanovlm}
        found: dict[str, list[float]] = {name: [] for name in rivals}
        for step in rivals.values():
            step(range(min(2, count)))
        self.asker.model.cfg.lm_eos_token_id = None
        for turn in range(rounds):
            for name, step in rivals.items():
                started = clock()
                step(range(turn * count, (turn + 1) * count))
                found[name].append(count / (clock() - started))
        return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The script's own flags, and the model with train.py's; impossible ones end the program."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--output", type=Path, required=True, help="folder of the folder for data and results")
    made.add_argument("--rows", type=int, default=ROWS, help="rows of the made-up data")
    made.add_argument("--limit", type=int, help="rows to answer (default: all)")
    made.add_argument("--kill", action="store_true", help="evaluate again with a SIGKILL halfway, and compare")
    made.add_argument("--nanovlm", type=Path, help="a clone of nanoVLM, to time in turns")
    made.add_argument("--rounds", type=int, default=4, help="turns of each beside nanoVLM")
    made.add_argument("--cpu_time", action="store_true", help="beside nanoVLM: seconds of CPU time, as others use it")
    given, rest = made.parse_known_args(argv)
    settings = parse_arguments(rest)
    given.limit = given.rows if given.limit is None else min(given.limit, given.rows)
    for name in ("rows", "limit"):
        if getattr(given, name) < 1:
            made.error(f"--{name} {getattr(given, name)}: must be >= 1")
    if given.nanovlm and not 1 <= given.rounds <= given.limit:
        made.error(f"--rounds {given.rounds}: must be between 1 and the {given.limit} rows to answer")
    try:
        if given.nanovlm:
            check_clone(given.nanovlm)
    except FileNotFoundError as error:
        made.error(str(error))
    return given, settings


def main(argv: list[str] | None = None) -> int:
    given, settings = parse(argv)
    folder, limit = given.output / "bench_evaluation", given.limit
    if folder.exists():  # evaluate.py would continue what an earlier call left, of other data or another model
        shutil.rmtree(folder)
    write_data(folder / "data", given.rows)
    write_checkpoint(folder / "checkpoint", settings.vlm)
    evaluation = Evaluation(folder, settings, limit)
    seconds, status = evaluation.run("whole")
    if status:
        print(f"evaluate.py failed: see {folder / 'whole.txt'}", file=sys.stderr)
        return 1
    results = json.loads((folder / "whole" / "results.json").read_text(encoding="utf-8"))
    model = results["model"]
    print(f"{model['parameters']:,} parameters, {model['dtype']}, {torch.get_num_threads()} threads, made-up data")
    print(f"whole                {limit} rows in {seconds:.1f} s, start included: {limit / seconds:.2f} rows/s")
    if given.kill:
        killed_s, status = evaluation.run("killed", kill_after=limit // 2)
        there = answered(folder / "killed")
        resumed_s, again = evaluation.run("killed")
        print(f"killed               after {killed_s:.1f} s with {there} answers (exit status {status}); resumed in "
              f"{resumed_s:.1f} s (exit status {again})")  # fmt: skip
        found = differences(folder / "whole", folder / "killed")
        print(f"results              {'differ in ' + ', '.join(found) if found else 'the same'}")
    if given.nanovlm:
        clock = time.process_time if given.cpu_time else time.perf_counter
        found_rates = Rivals(folder, given.nanovlm, settings, limit).measure(given.rounds, clock)
        medians = ", ".join(f"{name} {statistics.median(rates):.3g} rows/s" for name, rates in found_rates.items())
        ratios = [ours / theirs for ours, theirs in zip(*found_rates.values(), strict=True)]
        print(f"in turns{' (CPU time)' if given.cpu_time else ''} {medians}; ratio {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
