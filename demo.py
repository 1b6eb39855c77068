"""Ask a trained model about a picture or a video in the browser.

    python demo.py --checkpoint grades_output/<run name>

--checkpoint is a run folder, a checkpoint folder or a hub id. The page shows the answer as it comes, what the model
sees, the points that the answer holds, how fast it is, and when what of it froze in training. It needs the package
gradio (uv sync --extra demo), for videos av too (--extra video), and no network: neither it nor the page asks for
anything outside this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generate import find_model

if TYPE_CHECKING:
    from PIL import Image

    from eval.asking import Asker

MOST_TOKENS = 512  # that the page's slider offers for an answer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with `folder` the local one that --checkpoint means. Whatever is wrong with them ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint folder or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: of all this machine has")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any that is free")
    parser.add_argument("--max_video_frames", type=int, help="frames of a video at most; by default as in training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where the model runs")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as in train.py")
    parser.add_argument("--lm_tokenizer", help="as in train.py, for a checkpoint without a tokenizer of its own")
    given = parser.parse_args(argv)
    _, problems = find_model(given)
    if given.max_video_frames is not None and given.max_video_frames < 1:
        problems.append(f"--max_video_frames {given.max_video_frames}: must be >= 1")
    if not 0 <= given.port < 2**16:
        problems.append(f"--port {given.port}: must be in [0, 65535]")
    elif problem := _address_problem(given.host, given.port):
        problems.append(problem)
    if find_spec("gradio") is None:
        problems.append("demo.py needs the package gradio (uv sync --extra demo, or pip install gradio)")
    if problems:
        parser.error("\n  ".join(problems))
    return given


def _address_problem(host: str, port: int) -> str | None:
    """Why nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        return f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); take another, or port 0"
    return None


def find_freezes(folder: Path) -> dict[str, Any] | None:
    """The history of the run that the checkpoint in `folder` is of; None where there is none."""
    from grades.report import find_history

    above = folder.resolve().parent
    for place in (folder, above.parent) if above.name == "checkpoints" else (folder,):
        try:
            return json.loads(find_history(place).read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue
    return None


def draw_freezes(history: dict[str, Any]) -> Image.Image:
    """The freeze map."""
    import io

    from PIL import Image

    from grades.plots import freezing

    file = io.BytesIO()
    freezing(history).savefig(file, dpi=110)
    return Image.open(file)


def build_page(asker: Asker, name: str, history: dict[str, Any] | None) -> Any:
    """The page, of gradio's class Blocks. history: see find_freezes."""
    import gradio

    from eval.demonstration import show_answer
    from grades.report import summary

    def answer(picture: str | None, video: str | None, question: str, longest: int, temperature: float) -> Generator:
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 0.9} if temperature else {}
        shown = [picture] if picture else []
        try:
            for now in show_answer(asker, shown, question or "", int(longest), video, **sampling):
                pointed = gradio.Gallery(now.pointed, visible=bool(now.pointed))
                yield now.answer, now.numbers, now.seen, pointed
        except ValueError as error:
            yield "", str(error), None, gradio.Gallery(visible=False)

    cfg = asker.model.cfg
    parameters = sum(parameter.numel() for parameter in asker.model.parameters())
    with gradio.Blocks(analytics_enabled=False, delete_cache=(600, 3600), title=f"{name}: nanoVLM with GradES") as page:
        gradio.Markdown(f"## {name}\n{parameters:,} parameters, on {asker.device.type}, {asker.compute_dtype()}")
        with gradio.Row():
            with gradio.Column():
                # As it was uploaded: what the model sees of it is the business of data.images.
                picture = gradio.Image(
                    label="Picture", type="filepath", image_mode=None, height=300, sources=["upload", "clipboard"],
                    buttons=["fullscreen"], elem_id="picture",
                )  # fmt: skip
                # Not gradio's Video, which takes no GIF.
                video = gradio.File(
                    label="Video", file_count="single", type="filepath", file_types=["video", ".gif", ".webp"],
                    height=120, elem_id="video",
                )  # fmt: skip
                question = gradio.Textbox(label="Question", autofocus=True, elem_id="question")
                ask = gradio.Button("Ask", variant="primary", elem_id="ask")
                most = min(MOST_TOKENS, cfg.lm_max_position_embeddings)
                longest = gradio.Slider(1, most, min(50, most), step=1, label="Longest answer, in tokens")
                temperature = gradio.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest token)")
            with gradio.Column():
                said = gradio.Textbox(label="Answer", lines=4, elem_id="answer")
                numbers = gradio.Textbox(label="Tokens and speed", elem_id="numbers")
                pointed = gradio.Gallery(
                    show_label=False, format="png", visible=False, interactive=False, columns=2, object_fit="contain",
                    elem_id="pointed", buttons=["download", "fullscreen"],
                )  # fmt: skip
                gradio.Markdown("What the model sees")
                seen = gradio.Image(
                    show_label=False, type="pil", interactive=False, elem_id="seen", buttons=["download", "fullscreen"]
                )
        if history is not None:
            with gradio.Accordion("When what froze in training", open=False, elem_id="freezes"):
                gradio.Markdown("\n\n".join(summary(history)))
                gradio.Image(
                    draw_freezes(history), show_label=False, interactive=False, buttons=["download", "fullscreen"]
                )
        inputs, outputs = [picture, video, question, longest, temperature], [said, numbers, seen, pointed]
        for event in (ask.click, question.submit):
            # One at a time: there is one model.
            event(answer, inputs, outputs, concurrency_limit=1, concurrency_id="model", show_progress="hidden")
    return page


def main(given: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Raises ValueError, OSError."""
    # Before gradio is imported: it sends counts of use to its makers otherwise.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio

    from eval.asking import Asker
    from training.setup import autocast, pick_device, prepare_backend

    device = pick_device(given.device)
    prepare_backend(device)
    asker = Asker(given.folder, device, autocast(device, given.dtype), given.lm_tokenizer, given.max_video_frames)
    page = build_page(asker, Path(given.checkpoint).name or given.checkpoint, find_freezes(given.folder))
    # Fonts that every machine has: gradio's own come from a server.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, url, _ = page.queue().launch(
        server_name=given.host, server_port=given.port or None, share=False, quiet=True, prevent_thread_lock=True,
        footer_links=[], ssr_mode=False, theme=theme,
    )  # fmt: skip
    print(url, flush=True)
    page.block_thread()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:  # a damaged checkpoint, a device that is not there
        print(f"demo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
