"""Time the data of any recipe, without a model: batches/s, how full they are, and how long a step would wait for them.

    python scripts/bench_data.py --packing --lm_max_length 512 --max_sample_length 512
    python scripts/bench_data.py --config configs/nanovlm_450m.yaml --random_rows 400 --num_workers 8 --step_s 0.5 \\
        --lm_tokenizer easy-vqa --lm_base_vocab_size 36

Takes every flag of train.py too. With --random_rows no data set is read: the rows have made-up photos of up to
--image_size in many shapes, or, one row in ten, none. A step is a sleep, which is what a GPU's step is for the CPU.
"""

import argparse
import io
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from data.collators import TrainCollator
from data.datasets import VQADataset
from data.images import ImageProcessor
from data.loader import train_batches
from data.mixture_rows import load_training_rows
from data.packing import PackedCollator, PackedReaders
from data.text import get_tokenizer
from training.arguments import Settings, parse_arguments


def main(argv: list[str] | None = None) -> None:
    epilog = "Takes train.py's flags too."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, epilog=epilog)
    parser.add_argument("--random_rows", type=int, default=0, help="rows to make up; 0: the recipe's data set")
    parser.add_argument("--image_size", type=int, nargs=2, default=(640, 480), help="their largest width and height")
    parser.add_argument("--micro_batches", type=int, default=32, help="timed without a pause")
    parser.add_argument("--steps", type=int, default=10, help="steps, which sleep")
    parser.add_argument("--step_s", type=float, default=0.5, help="seconds per step without waiting for data")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be >= 1")
    settings = parse_arguments(rest)
    torch.set_num_threads(1)  # as in a worker
    rows = random_rows(arguments) if arguments.random_rows else None
    started = time.perf_counter()
    dataset = make_dataset(settings, rows)
    collator = TrainCollator(dataset.tokenizer.pad_token_id, settings.vlm)
    batches = train_batches(dataset, collator, settings.train)
    next(batches)
    startup_s = time.perf_counter() - started
    print("\n".join([describe(settings), f"first micro-batch    after {startup_s:.2f} s"]))
    print("\n".join(time_throughput(batches, arguments.micro_batches)), flush=True)
    if settings.train.packing:
        dataset.prepared = None  # so that no image is decoded
        print(time_packer(PackedReaders(dataset, PackedCollator(collator.pad_id, settings.vlm))), flush=True)
    accumulated = settings.train.gradient_accumulation_steps
    print("\n".join(time_waits(batches, arguments.steps, arguments.step_s, accumulated)))


def random_rows(arguments: argparse.Namespace) -> list[dict]:
    """Rows of one photo or none, with one to four questions and answers of up to 400 words; 16 photos take turns."""
    rng = random.Random(0)
    sizes = [tuple(round(side * rng.uniform(0.3, 1)) for side in arguments.image_size) for _ in range(16)]
    photos = [jpeg(seed, size) for seed, size in enumerate(sizes[: arguments.random_rows])]
    words = ["the", "red", "circle", "is", "a", "blue", "shape", "in", "image"]
    rows = []
    for number in range(arguments.random_rows):
        lengths = [min(400, 1 + int(rng.lognormvariate(2.5, 1))) for _ in range(rng.randint(1, 4))]
        answers = [" ".join(rng.choices(words, k=length)) for length in lengths]
        turns = [{"user": "what is in the image?", "assistant": answer, "source": None} for answer in answers]
        images = [] if number % 10 == 9 else [photos[number % len(photos)]]
        rows.append({"images": images, "texts": turns, "id": str(number)})
    return rows


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """Noise as blurred as a photo, so that its file is about as large."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_dataset(settings: Settings, rows: list[dict] | None) -> VQADataset:
    """Of the given rows, or of the recipe's."""
    vlm, cfg = settings.vlm, settings.train
    found = rows or load_training_rows(cfg)
    return VQADataset(found, get_tokenizer(vlm), ImageProcessor(vlm), vlm, cfg, train=True, cache=cfg.cache_rows)


def describe(settings: Settings) -> str:
    cfg = settings.train
    layout = f"packed to {settings.vlm.lm_max_length} tokens" if cfg.packing else "padded to the longest row"
    return (
        f"{settings.recipe.stem}, {cfg.num_workers} workers: micro-batches of {cfg.batch_size} rows, {layout}; "
        f"images up to {settings.vlm.max_img_size} pixels"
    )


def time_throughput(batches: Iterator[dict], count: int) -> list[str]:
    """Rates without pauses between the micro-batches."""
    started = time.perf_counter()
    seen = list(map(measures, itertools.islice(batches, count)))
    seconds = time.perf_counter() - started
    rows, samples, images, tokens, positions = map(sum, zip(*seen, strict=True))
    return [
        f"rows/s               {rows / seconds:,.1f}",
        f"samples/s            {samples / seconds:,.1f}, {samples / rows:.2f} per row",
        f"tiles/s              {images / seconds:,.1f}",
        f"tokens/s             {tokens / seconds:,.0f}",
        f"fill rate            {tokens / positions:.2%} of the positions are tokens",
    ]


def time_packer(readers: PackedReaders) -> str:
    """Samples per second that one reader plans and packs, images not decoded, over two windows."""
    started = time.perf_counter()
    samples = sum(len(window) for _, window, _ in itertools.islice(readers.windows(0, 0), 2))
    return f"packer samples/s     {samples / (time.perf_counter() - started):,.0f}, nothing decoded"


def packed_images(settings: Settings, rows: list[dict], micro_batches: int) -> list[int]:
    """Images, tiles counted, in each of one reader's first micro-batches of packed rows; none is decoded."""
    dataset = make_dataset(settings, rows)
    readers = PackedReaders(dataset, PackedCollator(dataset.tokenizer.pad_token_id, settings.vlm))
    packed = (row for epoch in itertools.count() for *_, window in readers.windows(0, epoch) for row in window)
    count, size = dataset.image_processor.count, settings.train.batch_size
    images = (sum(count(grid) for piece in row for grid in piece.sample.grids) for row in packed)
    return [sum(itertools.islice(images, size)) for _ in range(micro_batches)]


def measures(batch: dict) -> tuple[int, int, int, int, int]:
    """Rows, samples, tiles, tokens, positions."""
    images = 0 if batch["images"] is None else len(batch["images"])
    ids = batch["input_ids"]
    return len(ids), len(batch["ids"]), images, batch["num_tokens"], ids.numel()


def time_waits(batches: Iterator[dict], steps: int, step_s: float, accumulated: int) -> list[str]:
    """How long steps of step_s seconds wait for their micro-batches, which workers prepare in the meantime."""
    waits = []
    for _ in range(steps):
        started = time.perf_counter()
        for _ in range(accumulated):
            next(batches)
        waits.append(time.perf_counter() - started)
        time.sleep(step_s)
    wait_s, share = statistics.mean(waits), sum(waits) / (sum(waits) + steps * step_s)
    verdict = "not the bottleneck" if share < 0.05 else "THE BOTTLENECK: use more workers or longer steps"
    return [
        f"wait per step        mean {wait_s * 1000:.1f} ms, longest {max(waits) * 1000:.1f} ms, with steps of "
        f"{step_s:g} s of {accumulated} micro-batches",
        f"data is              {verdict} ({share:.1%} of the time is waiting)",
    ]


if __name__ == "__main__":
    main()
