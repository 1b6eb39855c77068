"""Ask a trained model about an image.

    python generate.py --checkpoint grades_output/<run name> --image shape.png --prompt "what color is the shape?"

--checkpoint is a run folder, a checkpoint folder or a hub id. Without --image the model answers from the text alone.
Images stand before the prompt, or where it says <image>, as often as there are images.
"""

import argparse
import shlex
import sys
from pathlib import Path

from models.hub import BackboneUnavailable, checkpoint_folder
from training.checkpoint_folder import find_checkpoint


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with `checkpoint` the local folder that it means. Whatever is wrong with them ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint folder or hub id")
    parser.add_argument("--image", type=Path, nargs="*", default=[], help="image files, which stand before the prompt")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="logits are divided by this; 0: greedy")
    parser.add_argument("--top_k", type=int, default=50, help="sample from this many most likely tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=0.9, help="sample from the most likely tokens of this total")
    parser.add_argument("--generations", type=int, default=1, help="answers to generate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as in train.py")
    parser.add_argument("--lm_tokenizer", help="as in train.py, for a checkpoint without a tokenizer of its own")
    given = parser.parse_args(argv)
    checks = [
        (given.max_new_tokens >= 1, "max_new_tokens", ">= 1"),
        (given.temperature >= 0, "temperature", ">= 0"),
        (given.top_k >= 0, "top_k", ">= 0"),
        (0 < given.top_p <= 1, "top_p", "in (0, 1]"),
        (given.generations >= 1, "generations", ">= 1"),
    ]
    problems = [f"--{name} {getattr(given, name)}: must be {allowed}" for ok, name, allowed in checks if not ok]
    problems += [f"--image {shlex.quote(str(image))}: no such file" for image in given.image if not image.is_file()]
    try:
        given.checkpoint = checkpoint_folder(find_checkpoint(given.checkpoint), flag="checkpoint")
    except FileNotFoundError as error:
        problems.append(f"--checkpoint {error}")
    except BackboneUnavailable as error:
        problems.append(str(error))
    if problems:
        parser.error("\n  ".join(problems))
    return given


def main(given: argparse.Namespace) -> None:
    """Print the answers of the model in the folder given.checkpoint."""
    import torch  # takes seconds: after the flags have been checked

    from data.images import ImageDecodeError, ImageProcessor
    from data.places import place_images, with_images
    from data.text import encode_prompt, get_tokenizer, image_string
    from data.values import BadRow
    from models.vision_language_model import VisionLanguageModel
    from training.setup import autocast, pick_device, prepare_backend

    device = pick_device()
    prepare_backend(device)
    torch.manual_seed(given.seed)
    model = VisionLanguageModel.from_pretrained(given.checkpoint).to(device).eval()
    model.cfg.lm_tokenizer = given.lm_tokenizer or model.cfg.lm_tokenizer
    tokenizer = get_tokenizer(model.cfg, None if given.lm_tokenizer else given.checkpoint)
    processor = ImageProcessor(model.cfg)
    processed = []
    for image in given.image:
        try:
            processed.append(processor(image))
        except ImageDecodeError as error:
            raise ValueError(f"--image {shlex.quote(str(image))}: {error}") from error
    try:
        [turn] = place_images([{"user": given.prompt, "assistant": None}], None, len(processed))
    except BadRow as bad:
        raise ValueError(f"--prompt: {bad.kind}: {bad.found}") from None
    prompt, _ = with_images(turn, [image_string([grid], model.cfg) for _, grid in processed])
    input_ids = torch.tensor([encode_prompt(tokenizer, prompt, "")], device=device)
    for _ in range(given.generations):
        with autocast(device, given.dtype):
            new_ids = model.generate(
                input_ids,
                [tiles.to(device) for tiles, _ in processed],
                max_new_tokens=given.max_new_tokens,
                top_k=given.top_k,
                top_p=given.top_p,
                temperature=given.temperature,
                eos_token_id=tokenizer.eos_token_id,
            )
        print(str(tokenizer.decode(new_ids[0], skip_special_tokens=True)).strip())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where the console lacks a letter
    try:
        main(parse_arguments())
    except (ValueError, OSError) as error:  # a damaged checkpoint, a file that is not an image
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
