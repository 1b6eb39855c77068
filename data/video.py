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
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.image_files import IMAGE_ENDINGS
from data.images import NO_SUCH_FILE, ImageDecodeError, opaque, resized

FRAMES_PER_S = 2.0  # at most
FOLDER_FRAMES_PER_S = 2.0  # of a folder of frames, whose files do not say
USUAL_RATE = 25  # frames a second of a stream that does not say
GIF_FRAME_S = 0.1  # of one that names no time, as browsers show it
LACKING_S = 1.0  # a file that ends this much before its header says so, breaks off

NOT_DECODED = "video does not decode"
NO_PICTURES = "video without pictures"
OUTSIDE = "clip outside of its video"
BROKEN = "video breaks off or is damaged"
NEEDS_AV = "video, which needs av"
# How GIF, PNG and WebP begin: what Pillow reads.
ANIMATIONS = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP", re.DOTALL)

Packet = tuple[Any, Any, bool]  # stamp and duration in units of the file, None where it has none; is it a key frame
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
    Nothing is decoded, except of animations and where packets have no time. Raises VideoError.
    """
    source = (source.get("bytes") or source["path"]) if isinstance(source, dict) else source
    if not isinstance(source, bytes) and Path(source).is_dir():
        files = _pictures(Path(source))
        times = np.arange(len(files)) / FOLDER_FRAMES_PER_S
        none = np.arange(len(files))
        frames = Frames(none, none * 0, times, len(files) / FOLDER_FRAMES_PER_S)
    else:
        files = []
        frames = _animation(source) if _is_animation(source) else _file(source)
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
            found.append(Frame(source, time_s, stamp, file_s, key, bool(frames.broken)))
    return found


def decoded(frames: Sequence[Frame], side: int) -> tuple[torch.Tensor, bool]:
    """(uint8 [n, 3, side, side], whether the file turned out to be broken) of frames of one file, in order.

    Each is turned upright and resized as it is decoded. Where a frame does not decode the one before it is still shown,
    as a player does. Where there are key frames between two that are asked for, those before the last of them are
    skipped by a seek. Raises VideoError where none decodes.
    """
    source, is_broken = frames[0].source, frames[0].is_broken
    if _is_animation(source):
        return _squares(frames, side), is_broken
    if torchcodec_decoder() is not None:
        with contextlib.suppress(Exception):  # at a damaged file: av takes what is there, and says what is wrong
            return _by_torchcodec(frames, side), is_broken
    for may_seek in (True, False):
        with contextlib.suppress(CannotSeek), _opened(source) as (container, stream):
            pictures, is_damaged = _Decoding(container, stream, may_seek).take(frames, side)
            return pictures, is_broken or is_damaged
    raise AssertionError("without a seek there is nothing to be refused")


# Files that FFmpeg reads


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[tuple[Any, Any]]:
    """(container, video stream). Whatever FFmpeg raises becomes a VideoError."""
    try:
        import av
    except ImportError:
        raise VideoError("pip install 'av>=15', or uv sync --extra video", NEEDS_AV) from None
    av.logging.set_level(av.logging.PANIC)  # a damaged file has hundreds of lines
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        # A playlist must not lead elsewhere.
        with av.open(file, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
            streams = [one for one in container.streams.video if not one.disposition & one.disposition.attached_pic]
            if not streams:
                raise VideoError("sound alone" if container.streams.audio else "no stream of pictures", NO_PICTURES)
            streams[0].codec_context.thread_count = 1  # one of many workers
            yield container, streams[0]
    except (FileNotFoundError, NotADirectoryError):
        raise VideoError(f"{source}", NO_SUCH_FILE) from None
    except (av.error.FFmpegError, OSError, ValueError, RuntimeError, MemoryError) as error:
        if isinstance(error, ImageDecodeError):
            raise
        raise VideoError(f"{getattr(error, 'strerror', None) or error}") from None


def _file(source: Any) -> Frames:
    """The frames of a file, from its packets. Raises VideoError."""
    with _opened(source) as (container, stream):
        packets, end_s, broken = _packets(container, stream)
        header_s = (container.duration or 0) / 1e6 + max(0, container.start_time or 0) / 1e6
        unit = float(stream.time_base or 0)
    if not packets or any(stamp is None for stamp, _, _ in packets):
        packets = _shown_packets(source)
    if not packets:
        raise VideoError("no frame in it")
    stamps = np.array([stamp for stamp, _, _ in packets], np.int64)
    order = np.argsort(stamps, kind="stable")
    first_s = float(stamps.min()) * unit
    times = stamps[order] * unit - first_s
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    end = float(times[-1]) + ((packets[order[-1]][1] or 0) * unit or usual)
    longest = float(np.diff(times).max()) if len(times) > 1 else 0.0
    if not broken and header_s - max(end_s, end + first_s) > max(LACKING_S, 1.5 * longest):
        broken = f"it ends at {end:.1f} s of {header_s - first_s:.1f} s"
    keys = np.sort(stamps[[is_key for _, _, is_key in packets]])
    before = keys[np.maximum(np.searchsorted(keys, stamps[order], side="right") - 1, 0)]
    return Frames(stamps[order], before, times, end, first_s, broken)


def _packets(container: Any, stream: Any) -> tuple[list[Packet], float, str]:
    """(the packets of the stream that will be shown, when the last packet of any stream ends in seconds, why the file
    is broken)."""
    import av

    found: list[Packet] = []
    end_s, broken = 0.0, ""
    try:
        for packet in container.demux():
            if packet.size == 0:  # the end of a stream
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None and packet.time_base:
                end_s = max(end_s, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.is_corrupt:
                broken = f"its data ends at {end_s:.1f} s"
            elif packet.stream is stream and not packet.is_discard and (found or packet.is_keyframe):
                found.append((packet.pts, packet.duration, packet.is_keyframe))
    except av.error.FFmpegError as error:
        broken = f"{error.strerror} at {end_s:.1f} s"
    return found, end_s, broken


def _shown_packets(source: Any) -> list[Packet]:
    """The same of a file whose packets have no time: of its frames, which takes decoding all of them."""
    with _opened(source) as (container, stream):
        decoding = _Decoding(container, stream)
        return [(frame.pts, None, number == 0) for number, frame in enumerate(decoding.frames())]


class _Decoding:
    """An open file of which frames are taken."""

    def __init__(self, container: Any, stream: Any, may_seek: bool = True):
        self.container, self.stream, self.may_seek, self.broken = container, stream, may_seek, False

    def frames(self, first: int | None = None) -> Iterator[Any]:
        """The frames from here on, those before the stamp `first` apart. What the decoder refuses is damage, unless
        nothing has been decoded yet: a recording may begin between key frames."""
        import av

        packets, some, count = self.container.demux(self.stream), False, 0
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                made = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                self.broken |= some
                if packet is None or not isinstance(error, av.error.InvalidDataError):
                    return
                continue
            for frame in made:
                if frame.pts is None:  # a stream without a container
                    frame.pts = round(count / (self.stream.average_rate or USUAL_RATE) / self.stream.time_base)
                count += 1
                if frame.is_corrupt:
                    self.broken |= some
                elif first is None or frame.pts >= first:
                    some = True
                    yield frame

    def take(self, wanted: Sequence[Frame], side: int) -> tuple[torch.Tensor, bool]:
        """As `decoded`. Raises CannotSeek."""
        pictures = np.empty((len(wanted), 3, side, side), np.uint8)
        frames, at, ended = self.frames(), self.stream.start_time or 0, False
        shown: Any = None  # the frame at the stamp, or before it
        ahead: Any = None  # the one that was decoded after it
        for number, want in enumerate(wanted):
            stamp, sought = want.stamp or 0, False
            if self.may_seek and not ended and want.key > at:
                frames, shown, ahead, sought = self._from(want.key), None, None, True
            while not ended and (ahead is None or ahead.pts <= stamp):
                shown, ahead = ahead if ahead is not None else shown, next(frames, None)
                ended = ahead is None
            if shown is None and sought:
                raise CannotSeek
            if shown is None and ahead is None:
                raise VideoError("none of its frames decodes")
            pictures[number] = _square(ahead if shown is None else shown, side)
            at = ahead.pts if ahead is not None else at
        return torch.from_numpy(pictures), self.broken

    def _from(self, key: int) -> Iterator[Any]:
        """The frames from the key frame on."""
        import av

        try:
            self.container.seek(key, stream=self.stream)
        except av.error.FFmpegError:
            raise CannotSeek from None
        return self.frames(key)


class CannotSeek(Exception):
    """A seek leads elsewhere than to the key frame."""


def _square(frame: Any, side: int) -> np.ndarray:
    """uint8 [3, side, side] of a decoded frame, upright."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return resized(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), (side, side)).numpy()


@cache
def torchcodec_decoder() -> Any:
    """The class VideoDecoder of torchcodec, None where it is absent or finds no FFmpeg."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return VideoDecoder


def _by_torchcodec(frames: Sequence[Frame], side: int) -> torch.Tensor:
    """As `decoded`. Raises RuntimeError and other errors of torchcodec."""
    source = frames[0].source
    decoder = torchcodec_decoder()(source if isinstance(source, bytes) else str(source), num_ffmpeg_threads=1)
    pictures = np.empty((len(frames), 3, side, side), np.uint8)
    for number, frame in enumerate(frames):  # one at a time: never all of them at their full size
        pictures[number] = resized(decoder.get_frame_played_at(frame.file_s + 1e-6).data, (side, side)).numpy()
    return torch.from_numpy(pictures)


# Files that Pillow reads, and folders


def _is_animation(source: Any) -> bool:
    if isinstance(source, bytes):
        return ANIMATIONS.match(source[:12]) is not None
    try:
        with Path(source).open("rb") as file:
            return ANIMATIONS.match(file.read(12)) is not None
    except OSError:
        return False  # FFmpeg says why


def _animation(source: Any) -> Frames:
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


def _squares(frames: Sequence[Frame], side: int) -> torch.Tensor:
    """uint8 [n, 3, side, side] of pictures of one such file."""
    pictures = np.empty((len(frames), 3, side, side), np.uint8)
    with _animated(frames[0].source) as image:
        for picture, frame in zip(pictures, frames, strict=True):
            image.seek(frame.stamp)
            pixels = torch.from_numpy(np.array(opaque(image.copy()).convert("RGB"))).permute(2, 0, 1)
            picture[:] = resized(pixels, (side, side)).numpy()
    return torch.from_numpy(pictures)


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder: frame_2 before frame_10. Raises VideoError."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.name[0] != "."]
    if not files:
        raise VideoError(f"{folder}: a folder without pictures", NO_PICTURES)
    return sorted(files, key=lambda file: [int(one) if one.isdigit() else one for one in re.split(r"(\d+)", file.name)])
