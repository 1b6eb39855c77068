"""What a question shows, on a page: its pictures, and its videos as strips of frames with their times, all small and
with the points of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.frames import small_frames, videos_in
from data.html_page import data_url, text
from data.images import image_size, small
from data.points import find_points
from data.video_frames import Frame
from eval.drawing import COLOURS, EXPECTED, Labelled, Placed, draw_points, place_points

PAGE_BYTES = 8 * 2**20  # of all pictures on a page
SHORT = 200  # letters of an error
STYLE = f"""
.strip {{ display: flex; flex-wrap: wrap; gap: .3em; margin-bottom: .4em }} .strip figure {{ margin: 0 }}
.strip img {{ display: block; border: 1px solid #bbb }}
.strip figcaption {{ color: #777; font-size: .75em; text-align: center; line-height: 1.3 }}
.points {{ display: block; margin-bottom: .4em }} .points span {{ white-space: nowrap }}
.points b {{ color: {EXPECTED} }} .points i {{ color: {COLOURS[0]}; font-style: normal }}
"""


class PagePictures:
    """Makes them, up to PAGE_BYTES in all."""

    def __init__(self, side: int, frame_side: int, pictures: int, frames: int):
        """side, frame_side: pixels of the longer side of a picture and of a frame; pictures, frames: how many of a
        question, and of a video, at most."""
        self.side, self.frame_side, self.pictures, self.frames = side, frame_side, pictures, frames
        self.bytes = self.picture_count = self.frame_count = self.left_out = 0

    def of(self, shown: Sequence[Any], expected: str = "", said: str = "") -> tuple[str, str]:
        """HTML of what a question shows: (its videos, its pictures). "" for none.

        shown: images in any form that rows may have, and frames. expected, said: the right answer, the model's.
        """
        images, videos = [one for one in shown if not isinstance(one, Frame)], videos_in(shown)
        times_s = [frame.time_s for frame in videos[0]] if videos else []
        right, given = (place_points(find_points(one), len(images), times_s) for one in (expected, said))
        strips = [
            self._strip(video, *((right.frames, given.frames) if number == 0 else ([], [])))
            for number, video in enumerate(videos)
        ]
        parts = [
            self._picture(image, right.images[n], given.images[n]) for n, image in enumerate(images[: self.pictures])
        ]
        if len(images) > self.pictures:
            parts.append(_note(f"and {len(images) - self.pictures} more"))
        key = _key(right, given)
        if parts:
            parts.append(key)
        elif strips:
            strips.append(key)
        return "".join(strips), "".join(parts)

    def _strip(self, frames: Sequence[Frame], expected: Sequence[Labelled], said: Sequence[Labelled]) -> str:
        """Some frames of a video, those with points first."""
        pointed = [number for number in range(len(frames)) for of in (expected, said) if of and of[number]]
        chosen = chosen_frames(len(frames), pointed, self.frames)
        if self._is_full(len(chosen)):
            return ""
        try:
            pictures = _small_strip(tuple(frames[number] for number in chosen), self.frame_side)
        except (ValueError, OSError) as error:
            return _note(f"no video: {str(error)[:SHORT]}")
        figures = []
        for number, pixels in zip(chosen, pictures, strict=True):
            time = f"{frames[number].time_s:.1f} s"
            image = self._image(pixels, f"frame at {time}", *(of[number] if of else [] for of in (expected, said)))
            figures.append(f"<figure>{image}<figcaption>{time}</figcaption></figure>")
        self.frame_count += len(chosen)
        more = _note(f"{len(chosen)} of {len(frames)} frames") if len(chosen) < len(frames) else ""
        return f'<div class="strip">{"".join(figures)}{more}</div>'

    def _picture(self, image: Any, expected: Labelled, said: Labelled) -> str:
        if self._is_full(1):
            return ""
        try:
            width, height = image_size(image)
            pixels = enlarged(small(image, self.side), self.side)
        except (ValueError, OSError) as error:
            return _note(f"no picture: {str(error)[:SHORT]}")
        self.picture_count += 1
        return self._image(pixels, f"{width} x {height} pixels", expected, said)

    def _is_full(self, count: int) -> bool:
        self.left_out += count * (full := self.bytes >= PAGE_BYTES)
        return full

    def _image(self, pixels: torch.Tensor, what: str, expected: Labelled, said: Labelled) -> str:
        if expected or said:
            plain = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            drawn = draw_points(plain, [("", [one for _, points in said for one in points])], expected, with_text=False)
            pixels = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)
        html = f'<img alt="{what}" title="{what}" src="{data_url(pixels, jpeg=True)}">'
        self.bytes += len(html)
        return html

    def note(self) -> str:
        """How many there are, and how large."""
        counts = [
            f"{count:,} {word}{'s' * (count != 1)}, at most {side} pixels wide or high"
            for count, word, side in (
                (self.picture_count, "picture", self.side), (self.frame_count, "frame", self.frame_side),
            )
            if count
        ]  # fmt: skip
        if not counts:
            return "The data holds no pictures."
        left_out = f"; {self.left_out} left out, as the page would become too large" if self.left_out else ""
        size = f"{self.bytes / 2**20:.1f} MB" if self.bytes >= 2**19 else f"{self.bytes / 2**10:.0f} kB"
        return f"{'; '.join(counts)}; {size} in all{left_out}."


@lru_cache(maxsize=32)  # the same strips stand on the page of samples after each evaluation
def _small_strip(frames: tuple[Frame, ...], side: int) -> torch.Tensor:
    return small_frames(frames, side)


def chosen_frames(count: int, wanted: Sequence[int], most: int) -> list[int]:
    """Which of so many frames are shown: the wanted ones, and others spread evenly, the first and the last of all
    among them where there is room."""
    chosen = sorted(set(wanted))
    if len(chosen) > most:
        return [chosen[place] for place in _spread(len(chosen), most)]
    for others in range(min(most, count), 0, -1):
        both = sorted({*chosen, *_spread(count, others)})
        if len(both) <= most:
            return both
    return chosen


def _spread(count: int, most: int) -> list[int]:
    return sorted(set(np.linspace(0, count - 1, most).round().astype(int).tolist()))


def enlarged(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [3, H, W]: a very small picture made larger by a whole number, so that one sees what is in it."""
    times = side // max(pixels.shape[1:])
    return pixels.repeat_interleave(times, 1).repeat_interleave(times, 2) if times > 1 else pixels


def _key(expected: Placed, said: Placed) -> str:
    """What the marks mean, and what is not drawn."""
    parts = [
        f"<span><{tag}>{sign}</{tag}> {word}: {placed.count}</span>"
        + (f", {placed.elsewhere} elsewhere" if placed.elsewhere else "")
        + (f", {len(placed.broken)} that cannot be read" if placed.broken else "")
        for placed, tag, sign, word in ((expected, "b", "\u25ef", "expected"), (said, "i", "\u25cf", "answer"))
        if placed.count or placed.elsewhere or placed.broken
    ]
    return f'<span class="note points">Points: {"; ".join(parts)}</span>' if parts else ""


def _note(said: str) -> str:
    return f'<span class="note">{text(said)}</span>'
