"""Time the training step or generation beside Hugging Face's own nanoVLM classes, in turns, on the same batch.

    git clone https://github.com/huggingface/nanoVLM
    python scripts/bench_nanovlm.py --nanovlm nanoVLM --config configs/nanovlm_222m.yaml --dtype float32 \\
        --batch_size 2 --gradient_accumulation_steps 1 --sequence_length 128
    python scripts/bench_nanovlm.py --nanovlm nanoVLM --config configs/nanovlm_222m.yaml --batch_size 1 \\
        --gradient_accumulation_steps 1 --sequence_length 128 --new_tokens 64

Both have the recipe's sizes, random weights and the step of their train.py: forward and backward pass, clipping, AdamW
as each makes it. With --new_tokens they answer instead: the first token, of prompt and images, and the greedy tokens
after it, through the cache of each. Prints the medians over the rounds after warm-up and the ratio of the two, with the
range of its middle half: a machine that becomes slower slows both. --cpu_time is for a machine that others use. Takes
every flag of train.py too.
"""

import contextlib
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.config import VLMConfig
from scripts.bench_common import Bench, make_parser, parse

PACKAGES = ("models", "data")  # have the same names there
Seconds = dict[str, list[float]]  # of this and of nanoVLM, in each round


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Imports of PACKAGES come from this folder, and leave ours as they were."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in PACKAGES}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        sys.modules.update(ours)


def check_clone(folder: Path) -> None:
    """Raises FileNotFoundError where the folder is no clone of nanoVLM."""
    if not (folder / "models" / "vision_language_model.py").exists():
        raise FileNotFoundError(f"--nanovlm {folder}: must be a clone of https://github.com/huggingface/nanoVLM")


def their_model(folder: Path, cfg: VLMConfig) -> Any:
    """nanoVLM's model of these sizes, with random weights. Its tokenizer, of which the step needs one id, is not read.

    Raises FileNotFoundError where the folder is no clone of nanoVLM.
    """
    check_clone(folder)
    tokenizer = types.SimpleNamespace(image_token_id=cfg.image_token_id, eos_token_id=None)
    with importing_from(folder):
        processors: Any = types.ModuleType("data.processors")
        processors.get_tokenizer = lambda *_, **__: tokenizer
        sys.modules |= {"data": types.ModuleType("data"), "data.processors": processors}
        their_config = importlib.import_module("models.config").VLMConfig()
        for name in vars(their_config):
            if hasattr(cfg, name):
                setattr(their_config, name, getattr(cfg, name))
        return importlib.import_module("models.vision_language_model").VisionLanguageModel(their_config, False)


class TheirBench:
    """nanoVLM's step, as its train.py makes it, and its greedy answers."""

    def __init__(self, folder: Path, bench: Bench):
        """bench: ours, whose sizes and batch it has."""
        self.bench, vlm, cfg = bench, bench.settings.vlm, bench.cfg
        self.model = their_model(folder, vlm).to(bench.device)
        parts = {"MP": cfg.lr_mp, "decoder": cfg.lr_language_backbone, "vision_encoder": cfg.lr_vision_backbone}
        self.optimizer = torch.optim.AdamW(
            [{"params": list(getattr(self.model, name).parameters()), "lr": rate} for name, rate in parts.items()]
        )
        batch = bench.micro_batches[0]
        mean, std = (
            torch.tensor(value, device=bench.device).view(-1, 1, 1) for value in (vlm.image_mean, vlm.image_std)
        )
        self.inputs = {
            "input_ids": batch["input_ids"],
            "images": (batch["images"].float() / 255 - mean) / std,
            "attention_mask": None,  # no row is padded; torch from 2.13 on refuses theirs beside a causal mask
            "targets": batch["targets"],
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.bench.autocast:
            loss = self.model(**self.inputs)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=self.bench.cfg.max_grad_norm or 1.0)
        self.optimizer.step()

    def generate(self, new_tokens: int) -> None:
        """Of the prompts of the batch, in its dtype as well."""
        inputs = {"input_ids": self.inputs["input_ids"], "images": self.inputs["images"]}
        with self.bench.autocast:
            self.model.generate(**inputs, max_new_tokens=new_tokens, greedy=True)


def our_answers(bench: Bench, new_tokens: int) -> None:
    """As `TheirBench.generate`."""
    batch = bench.micro_batches[0]
    inputs = {name: batch[name] for name in ("input_ids", "images", "image_slots", "image_sources")}
    with bench.autocast:
        bench.model.generate(**inputs, max_new_tokens=new_tokens, greedy=True)


def in_turns(
    steps: dict[str, Callable[[], None]],
    bench: Bench,
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of each step of every round, all of a round after each other."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: Seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(bench.seconds(step, clock))
    return seconds


def main(argv: list[str] | None = None) -> None:
    made = make_parser(__doc__.splitlines()[0])
    made.add_argument("--nanovlm", type=Path, required=True, help="a clone of nanoVLM")
    made.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    made.add_argument("--warmup_steps", type=int, default=3, help="steps of each before them")
    made.add_argument(
        "--cpu_time", action="store_true", help="count this process's CPU time, where other programs use the CPU too"
    )
    made.add_argument("--new_tokens", type=int, default=0, help="answer with this many tokens instead of training")
    arguments, settings = parse(made, argv)
    if arguments.rounds < 2:
        made.error(f"--rounds {arguments.rounds}: must be >= 2, for a range")
    if arguments.new_tokens == 1 or arguments.new_tokens < 0:
        made.error(
            f"--new_tokens {arguments.new_tokens}: must be 0, to train, or >= 2, as tokens after the first count"
        )
    try:
        check_clone(arguments.nanovlm)
    except FileNotFoundError as error:
        made.error(str(error))
    bench = Bench(arguments, settings)
    if len(bench.micro_batches) > 1 or (settings.train.turns_per_image or 1) > 1:
        made.error("nanoVLM's step is one micro-batch of one row per image: --gradient_accumulation_steps 1 and "
                   "--turns_per_image 1")  # fmt: skip
    theirs = TheirBench(arguments.nanovlm, bench)
    print("\n".join([*bench.describe(), f"dtype                {settings.train.dtype}"]))
    if arguments.cpu_time:
        print("seconds              of CPU time, all threads together")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if not arguments.new_tokens:
        rivals = {"this": bench.step, "nanoVLM": theirs.step}
        show("a step", "s", in_turns(rivals, bench, arguments.rounds, arguments.warmup_steps, clock))
        return
    bench.model.cfg.lm_eos_token_id = None  # no row ends early
    for model in (bench.model, theirs.model):
        model.eval()
    seconds = {}
    for count in (1, arguments.new_tokens):
        rivals = {"this": lambda: our_answers(bench, count), "nanoVLM": lambda: theirs.generate(count)}  # noqa: B023
        seconds[count] = in_turns(rivals, bench, arguments.rounds, arguments.warmup_steps, clock)
    show("first token", "s", seconds[1])
    show_later(
        seconds[1], seconds[arguments.new_tokens], len(bench.micro_batches[0]["input_ids"]), arguments.new_tokens
    )


def show_later(first: Seconds, all_of_them: Seconds, rows: int, new_tokens: int) -> None:
    """Print the rates of the tokens after the first, whose time is a difference, or that this cannot be told."""
    medians = {name: statistics.median(found) for name, found in first.items()}
    later = {name: [total - medians[name] for total in found] for name, found in all_of_them.items()}
    lost = sum(min(both) <= 0 for both in zip(*later.values(), strict=True))
    if lost:  # no rate, and no ratio of two of them, could be made from that
        print(f"{'later tokens':<20} cannot be told: in {lost} of {len(later['this'])} rounds all {new_tokens} tokens "
              "took no longer than the first does; more --new_tokens, or a machine with less to do")  # fmt: skip
        return
    count = rows * (new_tokens - 1)
    show("later tokens", "tokens/s", {name: [count / value for value in found] for name, found in later.items()})


def show(what: str, unit: str, found: dict[str, list[float]]) -> None:
    """Print the medians of both, and the ratio of each round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*found.values(), strict=True)], n=4)
    medians = ", ".join(f"{name} {statistics.median(values):.4g} {unit}" for name, values in found.items())
    print(f"{what:<20} {medians}; ratio {middle:.3f} (middle half {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
