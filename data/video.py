"""Frames and times of a video: which are shown is known from its packets, and only those are kept when it is decoded.

Sampling is Molmo2's `uniform_last_frame` (olmo/data/video_loader.py, TimeSampler): at most two instants a second, at
most max_frames of them, the last one included. Of an instant the frame is taken that is shown then. Unlike there a
frame comes once, however long it is shown, and its time is its own, which is at most the instant's.

Memory of decoding: FFmpeg's own reference frames, one frame in RGB at its full size (3 bytes a pixel), and the frames
that are asked for, resized: 3 * S * S bytes each, S the side of the square. A file that is given as bytes is in memory
as well. Of a GIF, an animated WebP or PNG Pillow holds one whole picture at a time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.animations import animation, decode_animation, is_animation
from data.image_files import IMAGE_ENDINGS
from data.video_files import decode_file, frames_of
from data.video_frames import BROKEN, NO_PICTURES, OUTSIDE, Frame, Frames, Pictures, Source, VideoError

FRAMES_PER_S = 2.0  # at most
FOLDER_FRAMES_PER_S = 2.0  # of a folder of frames, whose files do not say


def instants(length_s: float, max_frames: int, per_s: float = FRAMES_PER_S) -> np.ndarray:
    """float64 [n], n <= max_frames: when to look at a clip of that length, from its start; with its end if n > 1."""
    if length_s <= 0:
        return np.zeros(1)
    if length_s > (max_frames - 1) / per_s:
        return np.linspace(0.0, length_s, max_frames)
    return np.append(np.arange(0.0, length_s, 1 / per_s), length_s)


def sampled(
    source: Source,
    max_frames: int,
    start_s: float | None = None,
    end_s: float | None = None,
    use_truncated: bool = False,
) -> list[Frame]:
    """The frames that show a video, each once and in order.

    source: a file or its bytes in any format of FFmpeg, a GIF, an animated WebP or PNG, or a folder of pictures, sorted
    by name, of which there are FOLDER_FRAMES_PER_S. start_s, end_s: seconds from its first frame; all of it without
    them. use_truncated: of a file that breaks off take what is there; otherwise it is a VideoError of kind BROKEN.
    Nothing is decoded, except of animations and where packets have no time; packets are read up to end_s. Raises
    VideoError.
    """
    source = (source.get("bytes") or source["path"]) if isinstance(source, dict) else source
    if _is_folder(source):
        files = pictures_in(Path(str(source)))
        times = np.arange(len(files)) / FOLDER_FRAMES_PER_S
        frames = Frames(np.arange(len(files)), np.zeros(len(files), np.int64), times, len(files) / FOLDER_FRAMES_PER_S)
    else:
        files = []
        frames = animation(source) if is_animation(source) else frames_of(source, end_s)
    if frames.broken and not use_truncated:
        raise VideoError(f"{frames.broken}; --truncated_images use takes what is there", BROKEN)
    start, end = start_s or 0.0, min(frames.end_s, frames.end_s if end_s is None else end_s)
    if start >= frames.end_s > 0:
        raise VideoError(f"it begins at {start:g} s of {frames.end_s:g} s", OUTSIDE)
    shown = np.searchsorted(frames.times_s, start + instants(end - start, max_frames) + 1e-6, side="right") - 1
    if end_s is not None and end_s < frames.end_s:  # the frame that begins where the clip ends is not in it
        shown = np.minimum(shown, np.searchsorted(frames.times_s, end - 1e-6, side="left") - 1)
    found: list[Frame] = []
    for number in np.unique(shown.clip(0)).tolist():
        time_s = max(0.0, float(frames.times_s[number]) - start)
        if files:
            found.append(Frame(str(files[number]), time_s))
        else:
            stamp, key = int(frames.stamps[number]), int(frames.keys[number])
            file_s = float(frames.times_s[number]) + frames.first_s
            found.append(Frame(source, time_s, stamp, file_s, number, key, bool(frames.broken)))
    return found


def decoded(frames: Sequence[Frame], side: int, keep_aspect: bool = False) -> tuple[torch.Tensor, bool]:
    """(uint8 [n, 3, side, side], whether the file turned out to be broken) of frames of one file, in order.

    keep_aspect: in the video's own shape, as large as fits there; a smaller one as it is. Each is turned upright and
    resized as it is decoded. Where a frame does not decode the one before it is still shown, as a player does. Where
    there are key frames between two that are asked for, those before the last of them are skipped by a seek. Raises
    VideoError where none decodes.
    """
    source, is_broken = frames[0].source, frames[0].is_broken
    pictures = Pictures(len(frames), side, keep_aspect)
    if is_animation(source):
        decode_animation(frames, pictures)
    else:
        is_broken |= decode_file(frames, pictures)
    return pictures.tensor(), is_broken


def _is_folder(source: Source) -> bool:
    if isinstance(source, str | Path):
        with contextlib.suppress(OSError):  # a name that is too long
            return Path(source).is_dir()
    return False


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder: frame_2 before frame_10. Raises VideoError."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.name[0] != "."]
    if not files:
        raise VideoError(f"{folder}: a folder without pictures", NO_PICTURES)
    return sorted(files, key=lambda file: [int(one) if one.isdigit() else one for one in re.split(r"(\d+)", file.name)])
