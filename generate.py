"""Ask a trained model about images and videos: once, in a chat, or the questions of a file.

    python generate.py --checkpoint grades_output/<run name> --image shape.png --prompt "what color is the shape?"
    python generate.py --checkpoint grades_output/<run name> --video clip.mp4 --prompt "what happens?"
    python generate.py --checkpoint grades_output/<run name> --chat
    python generate.py --checkpoint grades_output/<run name> --prompts rows.jsonl --output answers.jsonl

--checkpoint is a run folder, a checkpoint folder or a hub id. Without --image the model answers from the text alone.
Images stand before the prompt, or where it says <image>, as often as there are images; videos the same with <video>.
In a chat /help names the commands. --prompts takes rows in every format of docs/data.md, or {"image": ..., "prompt":
...}.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import VLMConfig
from models.hub import BackboneUnavailable, checkpoint_folder
from training.checkpoint_folder import find_checkpoint

if TYPE_CHECKING:
    from eval.asking import Asker

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # that --draw_points writes
TOP_K = 50  # or the whole vocabulary, where that is smaller


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with `folder` the local one that --checkpoint means. Whatever is wrong with them ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint folder or hub id")
    parser.add_argument("--image", type=Path, nargs="*", default=[], help="image files, which stand before the prompt")
    parser.add_argument(
        "--video", type=Path, nargs="*", default=[], help="video files or folders of frames, behind the images"
    )
    parser.add_argument("--max_video_frames", type=int, help="frames of a video at most; by default as in training")
    parser.add_argument("--prompt", help="the question; with --chat the first one")
    parser.add_argument("--chat", action="store_true", help="talk with the model; /help names the commands")
    parser.add_argument("--prompts", type=Path, help="file or folder of questions, each with its images")
    parser.add_argument(
        "--output", type=Path, help="file for the answers to --prompts, a .jsonl; run again to continue"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="questions of --prompts at once")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode their images; 0: none")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="logits are divided by this; 0: greedy")
    parser.add_argument("--top_k", type=int, help=f"sample from so many most likely tokens; 0: all; else {TOP_K}")
    parser.add_argument("--top_p", type=float, default=0.9, help="sample from the most likely tokens of this total")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="an answer ends before any of these")
    parser.add_argument("--generations", type=int, default=1, help="answers to each question")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--speed", action="store_true", help="time to first token and tokens/s on stderr; always so in a chat"
    )
    parser.add_argument(
        "--draw_points",
        type=Path,
        metavar="OUT.png",
        help="draw the points of the answer onto --image; _1, _2 if several",
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as in train.py")
    parser.add_argument("--lm_tokenizer", help="as in train.py, for a checkpoint without a tokenizer of its own")
    given = parser.parse_args(argv)
    problems = _value_problems(given) + _mode_problems(given)
    cfg, missing = find_model(given)
    problems += missing if cfg is None else _model_problems(given, cfg)
    if problems:
        parser.error("\n  ".join(problems))
    return given


def find_model(given: argparse.Namespace) -> tuple[VLMConfig | None, list[str]]:
    """(the config in the folder that --checkpoint means, what is wrong with it); `given` gets that folder."""
    try:
        given.folder = checkpoint_folder(find_checkpoint(given.checkpoint), flag="checkpoint")
        return VLMConfig.load(given.folder), []
    except FileNotFoundError as error:
        return None, [f"--checkpoint {error}"]
    except BackboneUnavailable as error:
        return None, [str(error)]
    except ValueError as error:
        return None, [f"--checkpoint {given.checkpoint}: {error}"]


def _value_problems(given: argparse.Namespace) -> list[str]:
    """What is wrong with single values."""
    checks = [
        (given.max_new_tokens >= 1, "max_new_tokens", ">= 1"),
        (given.temperature >= 0 and math.isfinite(given.temperature), "temperature", ">= 0"),
        (given.top_k is None or given.top_k >= 0, "top_k", ">= 0"),
        (0 < given.top_p <= 1, "top_p", "in (0, 1]"),
        (given.generations >= 1, "generations", ">= 1"),
        (given.batch_size >= 1, "batch_size", ">= 1"),
        (given.max_video_frames is None or given.max_video_frames >= 1, "max_video_frames", ">= 1"),
        (given.num_workers >= 0, "num_workers", ">= 0"),
        (0 <= given.seed < 2**63, "seed", "in [0, 2^63)"),
    ]
    problems = [f"--{name} {getattr(given, name)}: must be {allowed}" for ok, name, allowed in checks if not ok]
    problems += [f"--image {shlex.quote(str(image))}: no such file" for image in given.image if not image.is_file()]
    problems += [f"--video {shlex.quote(str(video))}: no such file" for video in given.video if not video.exists()]
    if not all(given.stop):
        problems.append("--stop '': must be a text")
    for flag, texts in (("prompt", [given.prompt or ""]), ("stop", given.stop)):
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):  # what was no UTF-8 becomes these
            problems.append(f"--{flag}: is not UTF-8")
    return problems


def _mode_problems(given: argparse.Namespace) -> list[str]:
    """Which flags cannot be meant together."""
    problems = []
    if given.prompts and (given.chat or given.prompt is not None or given.image or given.video):
        problems.append(
            "--prompts: must be without --chat, --prompt, --image and --video; its rows name what they show"
        )
    elif not (given.prompts or given.chat or given.prompt is not None):
        problems.append("--prompt, --chat or --prompts: one of them is needed")
    if bool(given.prompts) != bool(given.output):
        problems.append("--prompts and --output: must be given together")
    if given.prompts and not given.prompts.expanduser().exists():
        problems.append(f"--prompts {given.prompts}: no such file or folder")
    if given.output and (given.output.is_dir() or given.output.suffix != ".jsonl"):
        problems.append(f"--output {given.output}: must be a file that ends in .jsonl")
    if given.draw_points:
        problems += _drawing_problems(given)
    if given.chat and given.generations > 1:
        problems.append(f"--generations {given.generations}: must be 1 in a chat")
    return problems


def _drawing_problems(given: argparse.Namespace) -> list[str]:
    """Why --draw_points cannot be done."""
    problems, flag = [], f"--draw_points {given.draw_points}"
    if given.prompts or given.chat or not given.image or given.generations > 1:
        problems.append(f"{flag}: needs --image and --prompt, without --chat, and one answer (--generations 1)")
    if given.draw_points.suffix.lower() not in PICTURES or given.draw_points.is_dir():
        problems.append(f"{flag}: must be a file that ends in {', '.join(PICTURES)}")
    if not given.draw_points.absolute().parent.is_dir():
        problems.append(f"{flag}: no such folder {given.draw_points.parent}")
    if problems:
        return problems
    shown = [*given.image, *(frame for video in given.video if video.is_dir() for frame in video.iterdir())]
    for target in drawing_paths(given):
        if target.exists() and any(one.exists() and target.samefile(one) for one in shown):
            problems.append(f"{flag}: would overwrite {shlex.quote(str(target))}, which is shown; take another name")
    return problems


def drawing_paths(given: argparse.Namespace) -> list[Path]:
    """Where --draw_points writes: for several images NAME_1, NAME_2, ... beside it."""
    path, images = given.draw_points, len(given.image)
    return [path] if images == 1 else [path.with_name(f"{path.stem}_{n}{path.suffix}") for n in range(1, images + 1)]


def _model_problems(given: argparse.Namespace, cfg: VLMConfig) -> list[str]:
    """What does not fit the model."""
    problems = []
    positions, vocabulary = cfg.lm_max_position_embeddings, cfg.lm_base_vocab_size + cfg.extra_token_amount
    if given.max_new_tokens > positions:
        problems.append(f"--max_new_tokens {given.max_new_tokens}: must be <= {positions}, the model's positions")
    if given.top_k is None:
        given.top_k = min(TOP_K, vocabulary)
    elif given.top_k > vocabulary:
        problems.append(f"--top_k {given.top_k}: must be <= {vocabulary}, the model's vocabulary; 0 takes all of it")
    return problems


def sampling_of(given: argparse.Namespace) -> dict[str, Any]:
    """As Asker.answer takes it; empty: greedy."""
    names = ("temperature", "top_k", "top_p")
    return {name: getattr(given, name) for name in names} if given.temperature else {}


def ask_once(given: argparse.Namespace, asker: Asker) -> None:
    """Print the answers to --prompt."""
    from dataclasses import replace

    from data.images import ImageDecodeError

    shown = []
    for kind in ("image", "video"):
        for path in getattr(given, kind):
            try:
                shown.append(getattr(asker.reader, kind)(path))
            except ImageDecodeError as error:
                raise ValueError(f"--{kind} {shlex.quote(str(path))}: {error}") from error
    try:
        spoken, shown = asker.reader.spoken(given.prompt, shown)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from None
    question = asker.reader.conversation([spoken], shown)
    if problem := asker.reader.too_long(question, given.max_new_tokens):
        raise ValueError(f"--prompt: {problem}")
    question = replace(question, prompts=question.prompts * given.generations)
    for answer in asker.answer([question], given.max_new_tokens, given.stop, **sampling_of(given)):
        print(answer)
    if given.draw_points:
        from data.points import find_points
        from eval.drawing import save_drawings

        for line in save_drawings(find_points(answer), given.image, drawing_paths(given)):
            print(line, file=sys.stderr)


def chat(given: argparse.Namespace, asker: Asker) -> None:
    """Talk until the user ends it; notes go to stderr, answers to stdout."""
    from eval.chat import Chat, TypedLines

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    talk = Chat(asker, given.max_new_tokens, given.stop, sampling_of(given), show, note)
    note(f"{given.checkpoint}: ask away; /help names the commands")
    for kind in ("image", "video"):
        for path in getattr(given, kind):
            talk.add(kind, path)
    if given.prompt is not None:
        talk.run(iter([f" {given.prompt}"]))  # with a space it is no command
    talk.run(TypedLines())


def answer_file(given: argparse.Namespace, asker: Asker, rows: Any) -> None:
    """Answer --prompts into --output."""
    from eval.answering import describe_model
    from eval.prompts_file import PromptsFile

    asking = PromptsFile(
        asker, rows, given.output, given.batch_size, given.num_workers, given.generations, given.max_new_tokens,
        given.stop, given.seed, sampling_of(given),
    )  # fmt: skip
    try:
        failed = asking.answer(describe_model(asker, given.checkpoint))
    except KeyboardInterrupt:
        print(f"stopped; the same command continues {given.output}", file=sys.stderr)
        raise
    for reason, what in rows.not_usable.items():
        print(f"not asked: {reason}: {what}", file=sys.stderr)
    if failed:
        print(f'{failed} of {len(rows.questions)} questions could not be asked: see "error"', file=sys.stderr)
    print(given.output)


def main(given: argparse.Namespace) -> None:
    """Do what the flags ask for. Raises ValueError, OSError."""
    import torch  # takes seconds: after the flags have been checked

    from eval.asking import Asker
    from eval.own_rows import show_frames
    from eval.prompts_file import open_prompts
    from training.setup import autocast, pick_device, prepare_backend

    rows = open_prompts(given.prompts.expanduser()) if given.prompts else None
    device = pick_device()
    prepare_backend(device)
    torch.manual_seed(given.seed)
    asker = Asker(given.folder, device, autocast(device, given.dtype), given.lm_tokenizer, given.max_video_frames)
    show_frames([rows] if rows is not None else [], given.max_video_frames or asker.model.cfg.max_video_frames)
    if given.chat:
        chat(given, asker)
        return
    if rows is not None:
        answer_file(given, asker, rows)
    else:
        ask_once(given, asker)
    if given.speed:
        print(asker.speed, file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where the console lacks a letter
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        main(parse_arguments())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:  # a damaged checkpoint, a file that is not an image
        print(f"generate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
