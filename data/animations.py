"""GIF, animated WebP and PNG as videos, which Pillow reads."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.images import NO_SUCH_FILE, opaque
from data.video_frames import Frame, Frames, Pictures, VideoError

GIF_FRAME_S = 0.1  # of one that names no time, as browsers show it
# How GIF, PNG and WebP begin: what Pillow reads.
ANIMATIONS = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP", re.DOTALL)


def is_animation(source: Any) -> bool:
    if isinstance(source, bytes):
        return ANIMATIONS.match(source[:12]) is not None
    try:
        with Path(source).open("rb") as file:
            return ANIMATIONS.match(file.read(12)) is not None
    except OSError:
        return False  # FFmpeg says why


def animation(source: Any) -> Frames:
    """The frames of a GIF, WebP or PNG, of one or many pictures."""
    with _animated(source) as image:
        lengths: list[float] = []
        broken = ""
        for number in range(image.n_frames):
            try:
                image.seek(number)
                image.load()
            except (EOFError, OSError) as error:
                if not lengths:
                    raise
                broken = f"picture {number + 1} of {image.n_frames}: {error}"
                break
            lengths.append((image.info.get("duration") or 0) / 1000 or GIF_FRAME_S)
    ends = np.cumsum(lengths)
    numbers = np.arange(len(lengths))
    return Frames(numbers, numbers * 0, ends - lengths, float(ends[-1]), broken=broken)


@contextlib.contextmanager
def _animated(source: Any) -> Iterator[Any]:
    """The open file. Whatever Pillow raises becomes a VideoError."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except FileNotFoundError:
        raise VideoError(f"{source}", NO_SUCH_FILE) from None
    except Exception as error:  # decoders raise nearly anything at damaged files
        raise VideoError(f"{error}") from None


def decode_animation(frames: Sequence[Frame], pictures: Pictures) -> None:
    """Put pictures of one such file, in order, there."""
    with _animated(frames[0].source) as image:
        for number, frame in enumerate(frames):
            image.seek(frame.stamp)
            pixels = np.array(opaque(image.copy()).convert("RGB"))
            pictures.put(number, torch.from_numpy(pixels).permute(2, 0, 1))
