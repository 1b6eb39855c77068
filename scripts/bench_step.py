"""Time the training step of any recipe with random weights and random data; nothing is downloaded.

    python scripts/bench_step.py --config configs/quickstart.yaml
    python scripts/bench_step.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128

Prints seconds a step, tokens/s, achieved TFLOP/s, peak memory and what one check of GradES costs. Every flag of
train.py works besides. Medians over the steps after warm-up; compare runs by their ratios.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.arguments import Settings, parse_arguments


def parse() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="and train.py's flags"
    )
    parser.add_argument("--sequence_length", type=int, help="tokens a row (default: the images and 20 of text)")
    parser.add_argument("--images_per_row", type=int, default=1, help="images (or tiles) a row")
    parser.add_argument("--label_share", type=float, default=0.25, help="share of the tokens that carry a label")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup_steps", type=int, default=3, help="steps before them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    arguments, rest = parser.parse_known_args()
    return arguments, parse_arguments(rest)


def random_batch(arguments: argparse.Namespace, settings: Settings, device) -> dict:
    """Rows of random ids that begin with their images; the last positions carry the labels.

    With turns_per_image so many rows share their images, as in training.
    """
    import torch

    vlm, turns = settings.vlm, settings.train.turns_per_image or 1
    image_tokens = arguments.images_per_row * vlm.mp_image_token_length
    rows, length = settings.train.batch_size * turns, arguments.sequence_length or image_tokens + 20
    if length <= image_tokens:
        sys.exit(f"--sequence_length {length}: must be more than the {image_tokens} image tokens of a row")
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
        "images": torch.randn(images, 3, vlm.vit_img_size, vlm.vit_img_size),
        "image_slots": (ids.flatten() == vlm.image_token_id).nonzero().squeeze(1),
        "image_sources": sources.flatten(),
        "label_positions": (targets.flatten() != -100).nonzero().squeeze(1),
    }
    return {name: value.to(device) for name, value in batch.items()} | {"num_labels": rows * labels}


def main() -> None:
    arguments, settings = parse()
    import torch

    from grades import GradESMonitor
    from models.vision_language_model import VisionLanguageModel
    from training import setup

    device = setup.pick_device() if arguments.device == "auto" else torch.device(arguments.device)
    setup.prepare_backend(device)
    setup.set_seed(settings.train.seed)
    with device:
        model = VisionLanguageModel(settings.vlm)
    optimizer = setup.make_optimizer(model, settings.train)
    monitor = GradESMonitor(settings.grades, model, optimizer, total_steps=10**9, log=lambda line: None)
    if settings.train.compile:
        setup.compile_blocks(model)
    batch = random_batch(arguments, settings, device)
    step_s, flop = time_step(arguments, settings, model, optimizer, batch, device)
    monitor.metric.measure(monitor.components)  # takes the first snapshot
    check_s = statistics.median(seconds(lambda: monitor.metric.measure(monitor.components), device) for _ in range(5))

    peak_gib = peak_memory_gib(device)  # with the monitor's snapshot
    rows, length = batch["input_ids"].shape
    micro_batches = settings.train.gradient_accumulation_steps
    interval = settings.grades.compute_interval
    print(f"{settings.recipe.stem} on {device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"parameters           {sum(p.numel() for p in model.parameters()):,}, {len(monitor.components)} components")
    print(
        f"micro-batch          {rows} rows x {length} tokens, {len(batch['images'])} images; {micro_batches} in a step"
    )
    print(f"step                 {step_s:.4f} s")
    print(f"tokens/s             {rows * length * micro_batches / step_s:,.0f}")
    print(f"matrix products      {flop / 1e12:.4f} TFLOP a step, {flop / step_s / 1e12:.3f} TFLOP/s")
    print(f"peak memory          {peak_gib:.2f} GiB{' (process)' if device.type == 'cpu' else ''}")
    print(f"one GradES check     {check_s:.4f} s = {check_s / step_s:.1%} of a step")
    print(f"at interval {interval:<8} {check_s / step_s / interval:.2%} of the run")


def time_step(arguments, settings: Settings, model, optimizer, batch: dict, device) -> tuple[float, int]:
    """(median seconds of a step, its FLOPs in matrix products)."""
    from torch.utils.flop_counter import FlopCounterMode

    from training import setup
    from training.step import clip_gradients, forward_backward

    autocast = setup.autocast(device, settings.train.dtype)
    micro_batches = [batch] * settings.train.gradient_accumulation_steps

    def step() -> None:
        forward_backward(model, micro_batches, device, autocast)
        clip_gradients(model, settings.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with FlopCounterMode(display=False) as flops:
        step()
    for _ in range(arguments.warmup_steps):
        step()
    return statistics.median(seconds(step, device) for _ in range(arguments.steps)), flops.get_total_flops()


def seconds(work, device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gib(device) -> float:
    """Peak of what the device held; on the CPU of the whole process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
