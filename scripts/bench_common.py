"""What the benchmarks share: a recipe with random weights and rows, its step, and clocks."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from grades import GradESConfig, GradESMonitor
from grades.config import ROLLBACK
from models.lora import inject_lora
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.arguments import Settings, parse_arguments
from training.build import compile_model
from training.flops import model_cost
from training.memory import peak_memory_bytes
from training.step import clip_gradients, forward_backward

# A micro-batch as packing makes it: (rows, tokens a row, images or tiles a row, documents a row).
SHAPES = {"222m": (16, 1024, 6, 6), "450m": (2, 4096, 50, 4)}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of random_batch; `parse` takes train.py's flags besides."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False, epilog="Takes train.py's flags too.")
    made.add_argument("--sequence_length", type=int, help="tokens per row (default: the images and 20 of text)")
    made.add_argument("--images_per_row", type=int, default=1, help="images (or tiles) per row")
    made.add_argument("--label_share", type=float, default=0.25, help="share of the tokens that have a label")
    made.add_argument("--documents", type=int, default=1, help="samples packed into each row; 1: no packing")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The script's own flags, and the recipe with train.py's; impossible ones end the program."""
    arguments, rest = made.parse_known_args(argv)
    settings = parse_arguments(rest)
    image_tokens = arguments.images_per_row * settings.vlm.mp_image_token_length
    if arguments.sequence_length is not None and arguments.sequence_length <= image_tokens:
        made.error(
            f"--sequence_length {arguments.sequence_length}: must be more than the {image_tokens} image tokens of a row"
        )
    return arguments, settings


class Bench:
    """A recipe's model and optimizer on a device, and its step. Random weights and rows: nothing is downloaded.

    Each micro-batch of a step is the same one.
    """

    def __init__(self, arguments: argparse.Namespace, settings: Settings):
        self.settings, self.cfg = settings, settings.train
        self.device = setup.pick_device() if arguments.device == "auto" else torch.device(arguments.device)
        setup.prepare_backend(self.device)
        setup.set_seed(self.cfg.seed)
        with self.device:
            self.model = VisionLanguageModel(settings.vlm)
        if self.cfg.lora_rank:
            inject_lora(self.model, self.cfg)
            self.model.to(self.device)
        self.optimizer = setup.make_optimizer(self.model, self.cfg)
        self.autocast = setup.autocast(self.device, self.cfg.dtype)
        setup.apply_to_model(self.model, self.cfg)
        self.is_compiled = compile_model(self.model, settings, self.device)
        batch = random_batch(arguments, settings, self.device)
        self.micro_batches = [batch] * self.cfg.gradient_accumulation_steps

    def backward(self) -> None:
        """The forward and backward passes of a step."""
        forward_backward(self.model, self.micro_batches, self.device, self.autocast)

    def update(self) -> None:
        """The rest of the step: clipping, optimizer, no gradients left."""
        clip_gradients(self.model, self.cfg.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.backward()
        self.update()

    def flops(self) -> int:
        """Of the matrix products of a step, with what is trainable now; what is computed twice counts once."""
        cost = model_cost(self.model)
        return sum(map(cost.of, self.micro_batches))

    def tokens(self) -> int:
        """Positions of a step, images and padding included."""
        return sum(batch["input_ids"].numel() for batch in self.micro_batches)

    def peak_gib(self) -> float | None:
        """The most memory so far: of the device with CUDA, of this process on a CPU; None where unknown."""
        peak = peak_memory_bytes(self.device)
        return None if peak is None else peak / 2**30

    def seconds(self, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
        """Of work, from an idle device to an idle device."""
        self._synchronize()
        started = clock()
        work()
        self._synchronize()
        return clock() - started

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def describe(self) -> list[str]:
        """Where and what is measured."""
        count, (rows, length) = len(self.micro_batches), self.micro_batches[0]["input_ids"].shape
        images = len(self.micro_batches[0]["images"])
        where = f"on {self.device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        where += ", compiled" if self.is_compiled else ""
        return [
            f"{self.settings.recipe.stem} {where}",
            f"parameters           {sum(p.numel() for p in self.model.parameters()):,}",
            f"micro-batch          {rows} rows x {length} tokens, {images} images; {count} in a step",
        ]


def random_batch(arguments: argparse.Namespace, settings: Settings, device: torch.device) -> dict:
    """A micro-batch as the collator makes it: rows of random ids that begin with their images and end with labels.

    turns_per_image rows share their images, as in training. Several documents in a row do not see each other.
    """
    vlm, turns = settings.vlm, settings.train.turns_per_image or 1
    image_tokens = arguments.images_per_row * vlm.mp_image_token_length
    rows, length = settings.train.batch_size * turns, arguments.sequence_length or image_tokens + 20
    ids = torch.randint(0, vlm.lm_base_vocab_size, (rows, length))
    ids[:, :image_tokens] = vlm.image_token_id
    targets = torch.full((rows, length), -100)
    labels = max(1, round(arguments.label_share * length))
    targets[:, -labels:] = torch.randint(0, vlm.lm_base_vocab_size, (rows, labels))
    images = settings.train.batch_size * arguments.images_per_row
    sources = torch.arange(images * vlm.mp_image_token_length).view(-1, 1, image_tokens).expand(-1, turns, -1)
    batch = {
        "input_ids": ids,
        "targets": targets,
        "images": torch.randint(0, 256, (images, 3, vlm.vit_img_size, vlm.vit_img_size), dtype=torch.uint8),
        "image_slots": (ids.flatten() == vlm.image_token_id).nonzero().squeeze(1),
        "image_sources": sources.flatten(),
        "label_positions": (targets.flatten() != -100).nonzero().squeeze(1),
    }
    if arguments.documents > 1:
        positions = torch.arange(length).expand(rows, -1)
        size = -(-length // arguments.documents)
        batch |= {"position_ids": positions % size, "document_ids": (positions // size).int()}
    return {name: value.to(device) for name, value in batch.items()} | {"num_labels": rows * labels}


class Watcher(Protocol):
    """What is called in a step as GradESMonitor is, and checks at even steps."""

    def after_backward(self, step: int) -> None: ...

    def after_step(self, step: int) -> object: ...


def make_monitor(bench: Bench, metric: str, sample: int, compute_interval: int = 2) -> GradESMonitor:
    """A monitor that measures and never freezes. In place of rollback, which measures no matrices: weight_change."""
    metric = "weight_change" if metric == ROLLBACK else metric
    config = GradESConfig(
        metric=metric, monitor_sample=sample, compute_interval=compute_interval, alpha=0.0, freeze_vision=False,
        freeze_language=False, target_components=bench.settings.grades.target_components,
    )  # fmt: skip
    return GradESMonitor(config, bench.model, bench.optimizer, log=lambda line: None)


def time_checks(bench: Bench, watchers: Mapping[Any, Watcher], rounds: int) -> tuple[float, dict[Any, float]]:
    """Median seconds of a step, and of all that each watcher does in two steps, which is one check.

    The watchers take turns, two real steps each: caches and gradients are as in training, and a machine that becomes
    slower slows all of them.
    """
    bench.step()
    for watcher in watchers.values():  # until each holds all that it will ever hold
        for step in range(1, 5):
            watcher.after_backward(step)
            watcher.after_step(step)
    step_s: list[float] = []
    check_s: dict[Any, list[float]] = {name: [] for name in watchers}
    for number in range(rounds):
        for name, watcher in watchers.items():
            spent = 0.0
            for step in (2 * number + 1, 2 * number + 2):
                backward_s = bench.seconds(bench.backward)
                spent += bench.seconds(lambda: watcher.after_backward(step))  # noqa: B023 (called at once)
                step_s.append(backward_s + bench.seconds(bench.update))
                spent += bench.seconds(lambda: watcher.after_step(step))  # noqa: B023
            check_s[name].append(spent)
    return statistics.median(step_s), {name: statistics.median(found) for name, found in check_s.items()}
