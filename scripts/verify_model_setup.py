"""Whether nanoMolmo2 can be trained here: parameters, memory, FLOPs and time of a step, counted without any download.

    python scripts/verify_model_setup.py
    python scripts/verify_model_setup.py --gpu_gib 24 --batch_size 4
    python scripts/verify_model_setup.py --load          # also loads the weights and runs one picture

Takes every flag of train.py, --config with another recipe too. Memory is held against the card found, else against
--gpu_gib. Exit code 0: it fits (and loads); 1: it does not; 2: a setting is wrong.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from data.layouts import image_tokens_in_words
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.arguments import Settings, parse_arguments
from training.flops import CARD_TFLOPS, card_tflops
from training.plan import COUNTED_SHARE, Plan, plan_of
from training.sizes import take_over_sizes

RECIPE = ROOT / "configs" / "nanomolmo2_model.yaml"
GPU_GIB = 40.0
GPU = "A100"  # whose speed the time of a step is estimated with where no card is found
USED_SHARE = 0.4  # of a card's data sheet, that a step may be expected to reach
# What a part holds from step to step, per parameter: the weight; of what trains its gradient and AdamW's two moments.
WEIGHT_BYTES, TRAINING_BYTES = 4, 12


def main(argv: list[str] | None = None) -> int:
    """Print the model's parts and what a step takes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, epilog="Other flags: "
                                     "those of train.py, see python train.py --help_all")  # fmt: skip
    parser.add_argument("--gpu_gib", type=float, help="memory of the card; by default that found here, else 40")
    parser.add_argument("--load", action="store_true", help="load the weights (from the hub) and run one picture")
    given, rest = parser.parse_known_args(argv)
    if given.gpu_gib is not None and not given.gpu_gib > 0:
        parser.error(f"--gpu_gib {given.gpu_gib:g}: must be > 0")
    settings = parse_arguments([f"--config={RECIPE}", *rest])
    device = setup.pick_device()
    try:
        take_over_sizes(settings, local_only=True)
        if settings.train.dtype == "auto":
            settings.train.dtype = "bfloat16"
        plan = plan_of(settings, torch.device("cuda"))  # whether there is one here or not
    except (ValueError, OSError) as error:
        print(f"verify_model_setup.py: error: {error}", file=sys.stderr)
        return 2
    fits, lines = fit_lines(plan, device, given.gpu_gib)
    print("\n".join([*part_lines(plan, settings.vlm), *lines]))
    if given.load:
        try:
            print(load_line(settings, device))
        except (ValueError, OSError) as error:
            print(f"verify_model_setup.py: error: {error}", file=sys.stderr)
            return 1
    print("ready" if fits else "not ready: see memory above")
    return 0 if fits else 1


def part_lines(plan: Plan, cfg: VLMConfig) -> list[str]:
    """A table of the parts with their parameters and the memory they hold, then what a micro-batch adds."""
    names = {"vision": f"vision ({cfg.vit_architecture})", "projector": f"connector ({cfg.mp_type})"}
    rows = [(names.get(part.name, part.name), part.parameters, part.trainable) for part in plan.parts]
    whole, training = sum(part.parameters for part in plan.parts), sum(part.trainable for part in plan.parts)
    lines = [f"{'part':<24}{'parameters':>14}{'trainable':>14}{'share':>8}{'GiB held':>10}"]
    for name, count, trains in [*rows, ("all", whole, training)]:
        held = (count * WEIGHT_BYTES + trains * TRAINING_BYTES) / 2**30
        lines.append(f"{name:<24}{count:>14,}{trains:>14,}{trains / count:>8.1%}{held:>10.2f}")
    built = max(cfg.vit_feature_blocks, default=cfg.vit_n_blocks - 1) + 1
    lines += [f"vision: {built} of {cfg.vit_n_blocks} blocks are needed and built"] if built < cfg.vit_n_blocks else []
    watched = sum(part.components for part in plan.parts)
    lines += [f"watched by GradES: {watched:,} matrices"] if watched else []
    return [
        *lines,
        f"micro-batch: {plan.rows:,} rows of at most {plan.row_tokens:,} tokens with {plan.images:,} images, tiles or "
        f"crops; {image_tokens_in_words(cfg)}; {plan.micro_batches:,} micro-batches in a step",
    ]


def fit_lines(plan: Plan, device: torch.device, gpu_gib: float | None) -> tuple[bool, list[str]]:
    """(whether the plan fits, lines on memory, FLOPs and time)."""
    name, found, rate = "", None, f"{GPU} by its data sheet"
    if device.type == "cuda":
        name, found = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory / 2**30
        rate = name if card_tflops(device) else f"{rate}, as that of {name} is not known"
    gib, tflops = gpu_gib or found or GPU_GIB, card_tflops(device) or CARD_TFLOPS[GPU]
    card = name if found and not gpu_gib else "--gpu_gib" if gpu_gib else "no card found, as if of"
    needed = sum(plan.memory.values()) / 2**30
    fits = needed <= COUNTED_SHARE * gib
    sizes = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in plan.memory.items())
    seconds = plan.step_flops / (USED_SHARE * tflops * 1e12)
    return fits, [
        f"memory: {needed:.2f} GiB in training ({sizes})",
        f"card: {card} {gib:.1f} GiB, of which {COUNTED_SHARE:.0%} may be counted on: "
        + (
            "fits" if fits else "does not fit; try a smaller --batch_size, --activation_checkpointing or --lora_rank 16"
        ),
        f"step: {plan.step_flops:.3e} FLOPs; about {seconds:.1f} s where {USED_SHARE:.0%} of {tflops:,} TFLOP/s are "
        f"reached (an estimate; {rate})",
    ]


def load_line(settings: Settings, device: torch.device) -> str:
    """Load the weights and run one picture of random pixels through the whole model. Raises ValueError or OSError."""
    start = time.perf_counter()
    model = VisionLanguageModel(settings.vlm, load_backbone=settings.vlm.vlm_load_backbone_weights)
    if problems := model.cfg.problems():
        raise ValueError("\n".join(problems))
    model = model.eval().to(device)
    cfg, loaded = model.cfg, time.perf_counter() - start
    side, slots = cfg.vit_img_size, cfg.mp_image_token_length
    pixels = torch.randint(256, (1, 3, side, side), dtype=torch.uint8, device=device)
    ids = torch.tensor([[*[cfg.image_token_id] * slots, *range(8)]], device=device)
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(ids, pixels)[0]
    if not bool(logits.isfinite().all()):
        raise ValueError(f"--lm_model_type {cfg.lm_model_type}: the logits of a picture are not finite")
    took = time.perf_counter() - start
    return f"load: {loaded:.1f} s; one picture: {took:.1f} s on {device}, logits {list(logits.shape)}, all finite"


if __name__ == "__main__":
    sys.exit(main())
