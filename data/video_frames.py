"""A frame of a video that is not decoded yet, what its pixels become, and why a video cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.images import ImageDecodeError, resized, within

NOT_DECODED = "video does not decode"
NO_PICTURES = "video without pictures"
OUTSIDE = "clip outside of its video"
BROKEN = "video breaks off or is damaged"
NEEDS_AV = "video, which needs av"

Source = str | Path | bytes | dict[str, Any]  # a dict has "bytes" or "path"


class VideoError(ImageDecodeError):
    """A video cannot be used."""

    def __init__(self, found: str, kind: str = NOT_DECODED):
        super().__init__(found, kind)


@dataclass(frozen=True)
class Frame:
    """A picture of a video that is not decoded yet."""

    source: Source  # the video's; of a folder the file of this picture
    time_s: float  # when it is shown, from the start of the clip
    stamp: int | None = None  # in units of the file, of a GIF its number; None: the source is this picture alone
    file_s: float = 0.0  # the same in seconds
    number: int = 0  # among the file's frames
    key: int = 0  # the stamp of the frame at which decoding can begin
    is_broken: bool = False  # whether the file breaks off
    before: str = ""  # the texts around it
    after: str = ""


@dataclass(frozen=True)
class Frames:
    """All frames of a video. n of them, int64 [n] each, sorted."""

    stamps: np.ndarray
    keys: np.ndarray
    times_s: np.ndarray  # float64 [n], from 0
    end_s: float  # when the last one ends
    first_s: float = 0.0  # when the first one is shown by the file's clock
    broken: str = ""  # why they are not all that the file should have


class Pictures:
    """Frames of one video, each resized as it comes, so that only one is in memory at its full size."""

    def __init__(self, count: int, side: int, keep_aspect: bool = False):
        """keep_aspect: the first one decides the shape of all, `side` being its longer side; otherwise squares."""
        self.count, self.side, self.keep_aspect = count, side, keep_aspect
        self.size = (side, side)
        self.pixels: np.ndarray | None = None

    def put(self, number: int, pixels: torch.Tensor) -> None:
        """pixels: uint8 [3, H, W], upright."""
        if self.pixels is None:
            if self.keep_aspect:
                self.size = within((pixels.shape[2], pixels.shape[1]), self.side)
            self.pixels = np.empty((self.count, 3, self.size[1], self.size[0]), np.uint8)
        self.pixels[number] = resized(pixels, self.size).numpy()

    def tensor(self) -> torch.Tensor:
        """uint8 [count, 3, H, W] of all of them."""
        assert self.pixels is not None
        return torch.from_numpy(self.pixels)
