"""What a step takes on one GPU, counted without one: memory, FLOPs, kernels, bytes, and what padding to few sizes adds.

    python scripts/count_cuda.py                 # all tables, in about a minute
    python scripts/count_cuda.py --only memory flops

Counts, not measurements: of shapes on the meta device, without weights. --list names the tables.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.buckets import bucket
from models.vision_language_model import VisionLanguageModel
from scripts import bench_data
from scripts.bench_common import SHAPES, random_batch
from scripts.cuda_kernels import count_kernels, kernel_choices
from scripts.runs import ROOT, markdown_table
from training.arguments import Settings, parse_arguments
from training.flops import model_cost
from training.plan import META, full_batch, make_plan

CUDA = torch.device("cuda")
MEMORY_RECIPES = ("nanovlm_222m_24gb", "nanovlm_222m", "nanovlm_450m", "table10_nanovlm")
PUBLISHED_GB = {1: 4.4, 16: 7.6, 32: 12.1, 64: 21.0, 128: 38.8, 256: 74.6}  # nanoVLM's README: 222M, H100, 128 tokens
MICRO_BATCHES = 40
LOSS_CHUNK = 1024
Table = tuple[list[str], list[list[str]]]


def settings_of(recipe: str, *flags: str) -> Settings:
    return parse_arguments([f"--config={ROOT / 'configs' / recipe}.yaml", "--dtype=bfloat16", *flags])


def planned(*given: str) -> tuple[float, float, int]:
    """(GiB of a step, GiB of its activations, images or tiles in a micro-batch) on CUDA, as --dry_run has them."""
    settings = settings_of(*given)
    with META:
        model = VisionLanguageModel(settings.vlm)
    with warnings.catch_warnings():  # autocast says that there is no CUDA
        warnings.simplefilter("ignore")
        plan = make_plan(model, settings, CUDA)
    return sum(plan.memory.values()) / 2**30, plan.memory["activations"] / 2**30, plan.images


def memory() -> Table:
    """Memory by recipe, its largest micro-batch, with GradES."""
    rows = []
    for recipe in MEMORY_RECIPES:
        for flags in (["--no_activation_checkpointing"], ["--activation_checkpointing"]):
            whole, activations, images = planned(recipe, "--enable_grades", *flags)
            given = settings_of(recipe).train.activation_checkpointing == (flags[0] == "--activation_checkpointing")
            how = "checkpointed" if "--activation" in flags[0] else "kept"
            cells = [str(images), how + (" (the recipe)" if given else "")]
            rows.append([recipe, *cells, f"{activations:.1f}", f"{whole:.1f}"])
    return ["recipe", "images or tiles", "activations", "of them (GiB)", "in all (GiB)"], rows


def memory_by_batch() -> Table:
    """Memory by batch size: 222M, 128 tokens and one image a row."""
    flags = ["--no_packing", "--max_sample_length=128", "--gradient_accumulation_steps=1"]
    rows = []
    for size, published in PUBLISHED_GB.items():
        whole, *_ = planned("nanovlm_222m", f"--batch_size={size}", *flags)
        rows.append([str(size), f"{whole * 2**30 / 1e9:.1f}", f"{published:.1f}"])
    return ["batch size", "counted (GB)", "nanoVLM's, measured (GB)"], rows


def micro_batch(size: str) -> tuple[VisionLanguageModel, dict]:
    """(model, the micro-batch that check_cuda.py measures), on the meta device."""
    rows, length, images, _ = SHAPES[size]
    settings = settings_of(f"nanovlm_{size}", f"--batch_size={rows}")
    arguments = argparse.Namespace(images_per_row=images, sequence_length=length, label_share=0.25, documents=1)
    with META:
        model = VisionLanguageModel(settings.vlm)
    return model, random_batch(arguments, settings, META)


def flops() -> Table:
    """FLOPs of a micro-batch in TFLOP: forward and backward pass, nothing frozen."""
    rows = []
    for size in SHAPES:
        model, batch = micro_batch(size)
        cost, (count, length) = model_cost(model), batch["input_ids"].shape
        parts = [len(batch["images"]) * cost.image, count * length * cost.token, count * length**2 * cost.pair]
        parts.append(batch["num_labels"] * cost.label)
        assert sum(parts) == cost.of(batch)
        rows.append([named(size), *(f"{part / 1e12:.1f}" for part in [*parts, sum(parts)])])
    return ["micro-batch", "vision", "language", "pairs of positions", "head", "in all"], rows


def named(size: str) -> str:
    rows, length, images, _ = SHAPES[size]
    return f"{size.upper()}, {rows} x {length:,} tokens, {rows * images} images"


def kernels() -> Table:
    """Kernels of a micro-batch, eager; bytes read and written; and with q, k, v and gate, up as one product each."""
    rows = []
    for size in SHAPES:
        for fused in (False, True):
            model, batch = micro_batch(size)
            flop = model_cost(model).of(batch)
            found = count_kernels(model, batch, fused)
            cells = [f"{found.kernels:,}", f"{found.product_bytes / 1e9:.0f}", f"{found.other_bytes / 1e9:.0f}"]
            cells += [f"{flop / (found.product_bytes + found.other_bytes):.0f}"]
            rows.append([named(size), "one each" if fused else "separate", *cells])
    header = ["micro-batch", "q, k, v; gate, up", "kernels", "GB of products", "GB of all else", "FLOPs per byte"]
    return header, rows


def loss() -> Table:
    """The loss: products of the head, and the most that it holds at a time beside hidden states and weights.

    Worked out from the operators' sources, not counted.
    """
    rows = []
    for size in SHAPES:
        model, batch = micro_batch(size)
        labels, (words, width) = batch["num_labels"], model.decoder.head.weight.shape
        logit, chunk = labels * words, LOSS_CHUNK * words
        gradients = 2 * (words + labels) * width  # of F.linear_cross_entropy, made in the forward pass
        kinds = {
            # float32: log-softmax, its gradient, that of the logits
            "eager": (3, (4 + 4 + 4) * logit),
            # bfloat16: logits and their gradient
            "compiled": (3, (2 + 2) * logit),
            f"--loss_chunk_size {LOSS_CHUNK}": (4, (4 + 4 + 4) * chunk),
            "the same, compiled": (4, (2 + 2) * chunk),
            # float32 logits, which become their gradient, and that in bfloat16
            f"F.linear_cross_entropy in chunks of {LOSS_CHUNK}": (3, (4 + 2) * chunk + gradients),
        }
        rows += [[named(size), name, str(n), f"{held / 2**30:.2f}"] for name, (n, held) in kinds.items()]
    return ["micro-batch", "loss", "products of the head", "held (GiB)"], rows


def handed_over() -> Table:
    """Bytes of a full micro-batch that worker, trainer and device hand over (MB)."""
    rows = []
    for recipe in ("nanovlm_222m", "nanovlm_450m"):
        batch = full_batch(settings_of(recipe), META)
        images = batch.pop("images")
        rest = sum(tensor.nbytes for tensor in batch.values() if torch.is_tensor(tensor))
        cells = [images.nbytes, images.float().nbytes, rest]
        rows.append([recipe, str(len(images)), *(f"{size / 1e6:.1f}" for size in cells)])
    return ["recipe", "images or tiles", "as 8-bit", "as float32", "indices"], rows


def choices() -> Table:
    """What SDPA is asked for on CUDA, and the kernel that takes it."""
    return ["case", "heads (queries, keys)", "mask", "dtype", "kernel"], [list(row) for row in kernel_choices()]


def padding() -> Table:
    """What padding to few sizes adds to a run's micro-batches, by the number of sizes in a doubling."""
    rows = []
    for name, counts in seen_counts():
        for each in (1, 4, 8):
            padded = [bucket(count, per_doubling=each) for count in counts]
            share = sum(padded) / sum(counts) - 1
            rows.append([name, str(each), str(len(set(counts))), str(len(set(padded))), f"{share:.1%}"])
    return ["micro-batches", "sizes in a doubling", "sizes seen", "after padding", "added"], rows


def seen_counts() -> Iterator[tuple[str, list[int]]]:
    """(what is counted, its number in each of MICRO_BATCHES micro-batches)."""
    words = ["--lm_tokenizer=easy-vqa", "--lm_base_vocab_size=36"]
    for size, largest in (("450m", (2000, 1500)), ("222m", (640, 480))):
        settings = settings_of(f"nanovlm_{size}", *words, "--num_workers=0")
        rows = bench_data.random_rows(argparse.Namespace(random_rows=4000, image_size=largest))
        counts = bench_data.packed_images(settings, rows, MICRO_BATCHES)
        yield f"{size.upper()}, photos up to {largest[0]} x {largest[1]}: images", counts
    settings = settings_of("quickstart")
    dataset = bench_data.make_dataset(settings, None)
    collator = bench_data.TrainCollator(dataset.tokenizer.pad_token_id, settings.vlm)
    batches = bench_data.train_batches(dataset, collator, settings.train)
    seen = [next(batches) for _ in range(MICRO_BATCHES)]
    yield "quickstart, easy-VQA: images", [len(batch["images"]) for batch in seen]
    yield "quickstart, easy-VQA: tokens a row", [batch["input_ids"].shape[1] for batch in seen]


TABLES: dict[str, Callable[[], Table]] = {
    table.__name__: table for table in (memory, memory_by_batch, flops, kernels, loss, handed_over, choices, padding)
}


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    made.add_argument("--list", action="store_true", help="name the tables and end")
    arguments = made.parse_args(argv)
    with contextlib.suppress(BrokenPipeError):
        for name in arguments.only:
            title = " ".join((TABLES[name].__doc__ or "").split())
            shown = f"{name}: {title}" if arguments.list else f"**{name}** {title}\n\n{markdown_table(*TABLES[name]())}"
            print(shown, flush=True)


if __name__ == "__main__":
    main()
