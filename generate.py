"""Ask a trained model about an image.

    python generate.py --checkpoint grades_output/<run name> --image shape.png --prompt "what color is the shape?"

--checkpoint is a run folder, a checkpoint folder or a hub id. Without --image the model answers from the text alone.
"""

import argparse
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint folder or hub id")
    parser.add_argument("--image", type=Path, nargs="*", default=[], help="image files, in the order of the prompt")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--generations", type=int, default=1, help="answers to sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm_tokenizer", help="as train.py takes it, for a checkpoint that brings no tokenizer")
    arguments = parser.parse_args()
    for image in arguments.image:
        if not image.is_file():
            parser.error(f"--image {image}: no such file")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {arguments.max_new_tokens}: must be >= 1")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    import torch

    from data.images import ImageProcessor
    from data.text import encode_prompt, get_tokenizer, image_string
    from models.backbones import checkpoint_folder
    from models.vision_language_model import VisionLanguageModel
    from training.checkpoint_folder import find_checkpoint
    from training.setup import pick_device, prepare_backend

    device = pick_device()
    prepare_backend(device)
    torch.manual_seed(arguments.seed)
    folder = checkpoint_folder(find_checkpoint(arguments.checkpoint), flag="checkpoint")
    model = VisionLanguageModel.from_pretrained(folder).to(device).eval()
    model.cfg.lm_tokenizer = arguments.lm_tokenizer or model.cfg.lm_tokenizer
    tokenizer = get_tokenizer(model.cfg, None if arguments.lm_tokenizer else folder)
    processor = ImageProcessor(model.cfg)
    processed = [processor(image) for image in arguments.image]
    text = image_string([grid for _, grid in processed], model.cfg)
    input_ids = torch.tensor([encode_prompt(tokenizer, arguments.prompt, text)], device=device)
    for _ in range(arguments.generations):
        new_ids = model.generate(
            input_ids,
            [tiles.to(device) for tiles, _ in processed],
            max_new_tokens=arguments.max_new_tokens,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            temperature=arguments.temperature,
            eos_token_id=tokenizer.eos_token_id,
        )
        print(tokenizer.decode(new_ids[0], skip_special_tokens=True).strip())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where the console lacks a letter
    try:
        main(parse_arguments())
    except (ValueError, OSError) as error:  # a checkpoint or an image that cannot be read, an unreachable hub
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
