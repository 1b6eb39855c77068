"""The videos of a row as frames among its images, which then go the way of images: tokens, packing, batches.

In front of a frame stands its time, behind the last one stand the subtitles, as in Molmo2's
olmo/preprocessing/video_preprocessor.py: "0.0 " and then " 0.5 ", "subtitle" and a line for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from data.formats import Row
from data.images import ImageProcessor, decode_image
from data.layouts import FRAME
from data.text import image_string
from data.video import decoded, sampled
from data.video_frames import BROKEN, Frame, Pictures, VideoError
from models.config import VLMConfig


def with_frames(row: Row, max_frames: int, use_truncated: bool = False) -> Row:
    """The row with the frames of its videos among its images, where the videos stand, and without videos.

    max_frames: of each video. Raises VideoError.
    """
    if not row.get("videos"):
        return row
    videos, images = dict(zip(row["video_numbers"], row["videos"], strict=True)), iter(row["images"])
    shown: list[Any] = []
    starts = [0]  # of all that the row shows, where it begins among the pictures; and their number
    for number in range(len(row["images"]) + len(videos)):
        if number in videos:
            clip = row.get("clip_start"), row.get("clip_end")
            frames = sampled(videos[number], max_frames, *clip, use_truncated=use_truncated)
            shown += with_times(frames, subtitle_text(row.get("subtitles"), *clip))
        else:
            shown.append(next(images))
        starts.append(len(shown))
    return row | {"images": shown, "texts": [_moved(turn, starts) for turn in row["texts"]], "videos": []}


def _moved(turn: dict, starts: list[int]) -> dict:
    """The turn with a place for each picture where it had one for each image and video."""
    if "image_places" not in turn:
        return turn
    first, places = turn["images_before"], []
    for number, place in enumerate(turn["image_places"], start=first):
        places += [place] * (starts[number + 1] - starts[number])
    return turn | {"images_before": starts[first], "image_places": places}


def with_times(frames: Sequence[Frame], after: str = "") -> list[Frame]:
    """The frames with the texts around them. after: stands behind the last."""
    texts = [f"{frame.time_s:.1f} " for frame in frames]
    made = [
        replace(frame, before=" " * (n > 0) + text) for n, (frame, text) in enumerate(zip(frames, texts, strict=True))
    ]
    made[-1] = replace(made[-1], after=after)
    return made


def subtitle_text(subtitles: Iterable[dict] | None, start: float | None = None, end: float | None = None) -> str:
    """What is said from start to end (seconds of the file; None: its own), by the clock of the clip; "" for nothing."""
    first, last, lines = start or 0.0, float("inf") if end is None else end, []
    for one in subtitles or ():
        if one["text"].strip() and one["start"] < last and one["end"] >= first:
            begin, stop = max(one["start"], first) - first, min(one["end"], last) - first
            lines.append(f"{begin:.1f} - {stop:.1f} {one['text'].strip()}\n")
    return "subtitle\n" + "".join(lines) if lines else ""


def grid_of(picture: Any, processor: ImageProcessor) -> tuple[int, int]:
    """The grid of an image, from its header; a frame has its own. Raises ImageDecodeError."""
    return FRAME if isinstance(picture, Frame) else processor.grid(picture)


def picture_text(picture: Any, grid: tuple[int, int], cfg: VLMConfig) -> str:
    """The text that stands for an image or a frame."""
    text = image_string([grid], cfg)
    return f"{picture.before}{text}{picture.after}" if isinstance(picture, Frame) else text


def decode_pictures(pictures: Sequence[Any], processor: ImageProcessor) -> tuple[list[torch.Tensor], int]:
    """(uint8 [n, 3, S, S] of each image, and of the frames of each video together, in order; how many videos break
    off and are used). Images that do are counted by the processor. Raises ImageDecodeError.
    """
    tiles, broken = [], 0
    for group in _by_file(pictures):
        first = group[0]
        if not isinstance(first, Frame):
            tiles.append(processor(first)[0])
        elif first.stamp is None:  # of a folder
            tiles.append(processor.square(first.source)[None])
        else:
            found, is_broken = decoded(group, processor.side)
            if is_broken and not processor.use_truncated:
                raise VideoError("some frames do not decode; --truncated_images use takes what is there", BROKEN)
            tiles.append(found)
            broken += is_broken
    return tiles, broken


def small_frames(frames: Sequence[Frame], side: int) -> torch.Tensor:
    """uint8 [n, 3, H, W]: frames of one video for a page, in its own shape, at most `side` pixels wide or high; of one
    that breaks off what is there. Raises ImageDecodeError."""
    if frames[0].stamp is not None:
        return decoded(frames, side, keep_aspect=True)[0]
    pictures = Pictures(len(frames), side, keep_aspect=True)  # of a folder
    for number, frame in enumerate(frames):
        pictures.put(number, decode_image(frame.source, use_truncated=True))
    return pictures.tensor()


def videos_in(pictures: Sequence[Any]) -> list[list[Frame]]:
    """The frames among the pictures of a row, those of each video together."""
    videos: list[list[Frame]] = []
    for one in pictures:
        if isinstance(one, Frame):
            if not videos or one.time_s <= videos[-1][-1].time_s:  # another one begins
                videos.append([])
            videos[-1].append(one)
    return videos


def _by_file(pictures: Sequence[Any]) -> list[list[Any]]:
    """The frames of a file together, all else alone."""
    groups: list[list[Any]] = []
    for one in pictures:
        last: Any = groups[-1][-1] if groups else None
        are_frames = isinstance(one, Frame) and isinstance(last, Frame) and last.source is one.source
        if are_frames and None not in (last.stamp, one.stamp) and last.stamp < one.stamp:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups
