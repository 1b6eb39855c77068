"""--dry_run: what a run will take, counted before anything is downloaded: parameters, tokens, FLOPs, memory."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn

from data.layouts import (
    count_image_tokens,
    count_images,
    frame_length,
    frame_tokens,
    frame_window,
    has_crops,
    largest_grid,
)
from grades import find_components
from grades.components import Component
from grades.config import ROLLBACK
from grades.sampling import make_sampler
from models.attention import FLEX_BLOCK, suits_flex_attention
from models.lora import inject_lora
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.activations import activation_bytes
from training.arguments import Settings
from training.flops import model_cost

META = torch.device("meta")
LABEL_SHARE = 0.25  # of a row's tokens carry a label: questions, image tokens and templates do not
# Copies that a metric keeps of the matrices, or of a sample of them.
SNAPSHOTS = {"weight_change": 1, "gradient_change": 1, "gradient_norm": 0, "gradient_rms": 0, "rollback": 0}
NOTES = """\
            Activations: kept for the backward pass of one micro-batch, {dtype} products, fused attention.
            Not counted: what an operation needs only while it runs, the allocator's
            reserve, Python and its libraries, evaluation."""


# Of the device's memory, for what is counted: the rest is for what is not.
COUNTED_SHARE = 0.85
TOKENS = FLEX_BLOCK  # the length of rows that fit is told in steps of this many, so that FlexAttention takes them


def fitting_tiles(settings: Settings, device: torch.device, memory: float, processes: int = 1) -> int:
    """The most tiles with which a micro-batch's plan takes COUNTED_SHARE of `memory` bytes; 0 for no limit."""
    rows = settings.train.batch_size

    def planned(tiles: int) -> tuple[int, int]:
        limited = dataclasses.replace(settings, train=dataclasses.replace(settings.train, max_tiles_per_batch=tiles))
        plan = plan_of(limited, device, processes)
        return plan.images, plan.held_bytes

    (most, largest), budget = planned(0), COUNTED_SHARE * memory
    if largest <= budget:
        return 0
    least, smallest = planned(rows)
    if smallest > budget:
        raise ValueError(
            f"--batch_size {rows}: takes {smallest / 2**30:.1f} GiB with a single tile in each row, which is more than "
            f"{COUNTED_SHARE:.0%} of the device's {memory / 2**30:.1f} GiB; give a smaller one, or "
            "--activation_checkpointing"
        )
    tiles = least + int((budget - smallest) * (most - least) / (largest - smallest))
    return tiles // rows * rows


def fitting_tokens(settings: Settings, device: torch.device, memory: float, processes: int = 1) -> int:
    """Tokens of the longest rows, full of frames where there are videos, with which a micro-batch's plan takes
    COUNTED_SHARE of `memory` bytes, down to a multiple of TOKENS; 0 where not even so many fit."""
    budget, known = COUNTED_SHARE * memory, dict[int, int]()

    def look(tokens: int) -> None:
        known[tokens] = plan_of(of_length(settings, tokens), device, processes).held_bytes

    look(TOKENS)
    if known[TOKENS] > budget:
        return 0
    look(max(2 * TOKENS, _row_tokens(settings) // TOKENS * TOKENS))
    for _ in range(6):  # nearly a line, or a parabola
        (one, lower), (other, upper) = list(known.items())[-2:]
        if lower == upper:
            break
        tokens = max(TOKENS, int(other + (budget - upper) * (other - one) / (upper - lower)) // TOKENS * TOKENS)
        if tokens in known:
            break
        look(tokens)
    return max(tokens for tokens, taken in known.items() if taken <= budget)


def of_length(settings: Settings, tokens: int) -> Settings:
    """The settings with rows of so many tokens, and where there are videos with as many frames as these hold."""
    frames = max(1, (tokens - 1) // frame_length(settings.vlm)) if settings.shows_videos else 1
    vlm = dataclasses.replace(settings.vlm, lm_max_length=tokens, max_video_frames=frames)
    return dataclasses.replace(settings, vlm=vlm, train=dataclasses.replace(settings.train, max_sample_length=tokens))


@dataclass
class Part:
    """A tower, or the projector (GradES's connector) between them."""

    name: str
    parameters: int
    trainable: int
    components: int  # matrices that GradES watches


@dataclass
class Plan:
    """A run in which nothing freezes, and whose rows have as many tokens, tiles and frames as the settings allow."""

    processes: int
    parts: list[Part]
    micro_batches: int  # in a step of one process
    rows: int  # in a micro-batch
    row_tokens: int
    images: int  # in a micro-batch, tiles and frames counted
    steps: int
    step_flops: int  # of all processes
    dtype: str  # of matrix products
    compiles: bool
    memory: dict[str, int]  # bytes of one process by what they hold

    @property
    def held_bytes(self) -> int:
        """That one process holds."""
        return sum(self.memory.values())

    @property
    def step_tokens(self) -> int:
        """Tokens of all processes, padding included."""
        return self.processes * self.micro_batches * self.rows * self.row_tokens


def plan_of(settings: Settings, device: torch.device, processes: int = 1) -> Plan:
    """The plan of a run on the device, which need not be here, or on one such device for each of its processes."""
    with META:
        model = VisionLanguageModel(settings.vlm)
        if settings.train.lora_rank:
            inject_lora(model, settings.train)
    with warnings.catch_warnings():  # autocast says that there is no CUDA
        warnings.simplefilter("ignore")
        return make_plan(model, settings, device, processes)


def make_plan(model: VisionLanguageModel, settings: Settings, device: torch.device, processes: int = 1) -> Plan:
    """The plan of a run on the device, or on one such device for each of its processes.

    model: on the meta device, with its adapters; it cannot be used afterwards.
    """
    cfg = settings.train
    setup.freeze_untrained(model, cfg)
    setup.apply_to_model(model, cfg)
    grades = settings.grades
    components = []
    if cfg.enable_grades:
        components = find_components(model, grades.target_components, grades.watch_connector)
    batch = full_batch(settings, META)
    vlm = model.cfg
    if device.type == "cuda" and suits_flex_attention(batch["input_ids"].shape[1], vlm.head_dim, vlm.lm_dropout):
        batch.pop("document_ids", None)  # FlexAttention keeps documents apart without a mask
    dtype = setup.dtype_in_effect(setup.autocast(device, cfg.dtype))
    return Plan(
        processes=processes,
        parts=[
            _part("vision", model.vision_encoder, components),
            _part("projector", model.MP, components, "connector"),
            _part("language", model.decoder, components),
        ],
        micro_batches=cfg.gradient_accumulation_steps,
        rows=batch["input_ids"].shape[0],
        row_tokens=batch["input_ids"].shape[1],
        images=batch["images"].shape[0],
        steps=cfg.max_training_steps,
        step_flops=processes * cfg.gradient_accumulation_steps * model_cost(model).of(batch),
        dtype=dtype,
        compiles=setup.compiles(settings, device),
        memory=_held(model, settings, components, processes if cfg.parallel == "fsdp" else 1)
        | {
            "batch": _bytes(filter(torch.is_tensor, batch.values())),
            "activations": activation_bytes(
                model, batch, dtype == "bfloat16", cfg.parallel == "fsdp" and processes > 1
            ),
        },
    )


def _held(model: nn.Module, settings: Settings, components: list[Component], shards: int) -> dict[str, int]:
    """Bytes that one process holds from step to step, with FSDP its share."""
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    sampler = make_sampler(settings.grades.monitor_sample)
    copied = sum(_bytes(sampler.copy(component.weights)) for component in components)
    whole = {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "optimizer": 2 * gradients,  # AdamW's two moments
        "GradES": SNAPSHOTS[settings.grades.metric] * copied,
    }
    if settings.train.feature_cache_gib:
        whole["feature cache"] = round(settings.train.feature_cache_gib * 2**30)
    if copies := _averages(settings):
        whole["averages"] = copies * gradients
    shares = {name: -(-size // shards) for name, size in whole.items()}
    if settings.train.gradient_accumulation_steps > 1:  # FSDP divides gradients in the last micro-batch
        shares["gradients"] = gradients
    return shares


def _averages(settings: Settings) -> int:
    """Copies of what trains: the average, of a window its block, and for rollback the older average."""
    rate, grades = settings.train.average_weights, settings.train.enable_grades
    return (rate > 0) + (rate >= 2) + (grades and settings.grades.metric == ROLLBACK)


def full_batch(settings: Settings, device: torch.device) -> dict:
    """The collator's largest micro-batch, of zeros: each image of the largest size, in turns_per_image rows.

    A row has max_sample_length tokens and one image, or one video where there are some. A packed one has lm_max_length
    tokens, and as many images as max_images_per_knapsack and its tokens allow.
    """
    vlm, cfg = settings.vlm, settings.train
    turns, length = 1 if cfg.packing else cfg.turns_per_image or 1, _row_tokens(settings)
    tiles, per_tile, window = _row_images(settings)
    rows, images, side = cfg.batch_size * turns, cfg.batch_size * tiles, vlm.vit_img_size
    embeddings = round(tiles * per_tile)  # of a row
    slots, labels = rows * embeddings, rows * max(1, round(LABEL_SHARE * length))
    indices = functools.partial(torch.zeros, dtype=torch.long, device=device)
    documents = {"position_ids": indices(rows, length), "document_ids": indices(rows, length).int()}
    windows = {"pool_index": indices(cfg.batch_size * embeddings, window**2)} if window else {}
    return (
        (documents if cfg.packing else {})
        | windows
        | {
            "input_ids": indices(rows, length),
            "targets": indices(rows, length),
            "images": torch.zeros(images, 3, side, side, dtype=torch.uint8, device=device),
            "image_slots": indices(slots),
            "image_sources": indices(slots) if cfg.turns_per_image else None,
            "label_positions": indices(labels),
            "num_labels": labels,
        }
    )


def _row_tokens(settings: Settings) -> int:
    return settings.vlm.lm_max_length if settings.train.packing else settings.train.max_sample_length


def _row_images(settings: Settings) -> tuple[int, float, int]:
    """(images of the row with most of them, tiles and frames counted; image tokens of each; the side of the windows of
    its pool_index, 0 where it needs none)."""
    vlm, cfg, tokens = settings.vlm, settings.train, _row_tokens(settings)
    packed = max(cfg.max_images_per_knapsack, cfg.max_images_per_example) if cfg.packing else 1

    def fitting(images: int, each: float) -> int:
        return max(1, min(images, int((tokens - 1) / each), cfg.tiles_per_row or images))

    grid = largest_grid(vlm)
    count, crops = count_images(grid, vlm), has_crops(vlm)
    each = count_image_tokens(grid, vlm) / count if crops else vlm.mp_image_token_length
    tiles = fitting(count * packed, each)  # a picture with more than its share has a row of its own
    if settings.shows_videos:
        frames = fitting(max(vlm.max_video_frames, packed), frame_length(vlm))
        if frames >= tiles:
            side = frame_window(vlm)
            return frames, frame_tokens(vlm), side if side != vlm.mp_window else 0
    return tiles, each, vlm.mp_window if crops else 0


def fit_line(settings: Settings, device: torch.device, memory: float, processes: int = 1) -> str:
    """How long rows may be in `memory` bytes, in words."""
    tokens = fitting_tokens(settings, device, memory, processes)
    name = "lm_max_length" if settings.train.packing else "max_sample_length"
    frames = ""
    if settings.shows_videos and tokens:
        frames = f", of a video {of_length(settings, tokens).vlm.max_video_frames:,} frames"
    found = f"rows of up to {tokens:,} tokens (--{name}){frames}" if tokens else f"no row of {TOKENS} tokens"
    return f"fits        in {COUNTED_SHARE:.0%} of {memory / 2**30:.1f} GiB: {found}"


def plan_lines(plan: Plan) -> list[str]:
    """The plan in words."""
    sums = (sum(getattr(p, name) for p in plan.parts) for name in ("parameters", "trainable", "components"))
    parts = [*plan.parts, Part("all", *sums)]
    rows = f"{plan.rows:,} rows of at most {plan.row_tokens:,} tokens"
    rows += f" with {plan.images:,} images (or tiles, crops, frames)"
    each = f" of each of {plan.processes:,} processes" if plan.processes > 1 else ""
    sizes = ", ".join(f"{name} {size / 2**30:.3f}" for name, size in plan.memory.items())
    tokens, flops, run = plan.step_tokens, plan.step_flops, f"in {plan.steps:,} steps"
    return [
        f"{'':<12}{'parameters':>15}{'trainable':>15}{'watched by GradES':>20}",
        *(f"{p.name:<12}{p.parameters:>15,}{p.trainable:>15,}{p.components:>11,} matrices" for p in parts),
        f"micro-batch {rows}; {plan.micro_batches:,} in a step{each}",
        f"tokens      at most {tokens:,} a step, {tokens * plan.steps:,} {run}",
        f"FLOPs       {flops:.3e} a step, {flops * plan.steps:.3e} {run} (matrix products, nothing frozen)",
        f"compile     {'on' if plan.compiles else 'off'}",
        f"memory      {plan.held_bytes / 2**30:.2f} GiB per process: {sizes}",
        *NOTES.format(dtype=plan.dtype).splitlines(),
    ]


def _part(name: str, module: nn.Module, components: list[Component], tower: str | None = None) -> Part:
    sizes = {parameter: parameter.numel() for parameter in module.parameters()}
    trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
    return Part(name, sum(sizes.values()), trainable, sum(one.tower == (tower or name) for one in components))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
