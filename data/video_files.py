"""Videos that FFmpeg reads, through av: the times of all frames from their packets, and some of the frames decoded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from data.images import NO_SUCH_FILE
from data.video_frames import NEEDS_AV, NO_PICTURES, Frame, Frames, Pictures, VideoError

USUAL_RATE = 25  # frames a second of a stream that does not say
LACKING_S = 1.0  # a file that ends this much before its header says so, breaks off

Packet = tuple[Any, Any, bool]  # stamp and duration in units of the file, None where it has none; is it a key frame


class CannotSeek(Exception):
    """A seek leads elsewhere than to the key frame."""


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
            if streams[0].codec_context is None:
                raise VideoError("nothing here knows its codec")
            streams[0].codec_context.thread_count = 1  # one of many workers
            yield container, streams[0]
    except (VideoError, CannotSeek):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise VideoError(f"{source}", NO_SUCH_FILE) from None
    except Exception as error:  # at damaged files nearly anything
        raise VideoError(f"{getattr(error, 'strerror', None) or error}") from None


def frames_of(source: Any, until_s: float | None = None) -> Frames:
    """The frames of a file, from its packets; with until_s those that begin up to then, after which it is not read.

    Raises VideoError.
    """
    with _opened(source) as (container, stream):
        packets, end_s, broken, is_whole = _packets(container, stream, until_s)
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
    if not is_whole:
        end = max(end, end_s - first_s)
    elif not broken and header_s - max(end_s, end + first_s) > max(LACKING_S, 1.5 * longest):
        broken = f"it ends at {end:.1f} s of {header_s - first_s:.1f} s"
    keys = np.sort(stamps[[is_key for _, _, is_key in packets]])
    before = keys[np.maximum(np.searchsorted(keys, stamps[order], side="right") - 1, 0)]
    return Frames(stamps[order], before, times, end, first_s, broken)


def _packets(container: Any, stream: Any, until_s: float | None) -> tuple[list[Packet], float, str, bool]:
    """(the packets of the stream that will be shown, when the last packet of any stream ends in seconds, why the file
    is broken, whether it was read to its end)."""
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
                if until_s is not None and _begins_after(until_s, packet, found[0][0]):
                    return found, end_s, broken, False
    except av.error.FFmpegError as error:
        broken = f"{error.strerror} at {end_s:.1f} s"
    return found, end_s, broken, True


def _begins_after(until_s: float, packet: Any, first: int | None) -> bool:
    """Whether nothing from this packet on is shown up to then: a frame is never shown before its decoding time."""
    if packet.dts is None or first is None:
        return False
    return float((packet.dts - first) * packet.time_base) > until_s


def _shown_packets(source: Any) -> list[Packet]:
    """The same of a file whose packets have no time: of its frames, which takes decoding all of them."""
    with _opened(source) as (container, stream):
        decoding = _Decoding(container, stream)
        return [(frame.pts, None, number == 0) for number, frame in enumerate(decoding.frames())]


def decode_file(frames: Sequence[Frame], pictures: Pictures) -> bool:
    """Put some frames of a file, in order, there; returns whether something in it is damaged. By torchcodec where that
    is there, which is faster and gives the same pictures. Raises VideoError."""
    if torchcodec_decoder() is not None:
        with contextlib.suppress(Exception):  # at a damaged file: av takes what is there, and says what is wrong
            _by_torchcodec(frames, pictures)
            return False
    for may_seek in (True, False):
        with contextlib.suppress(CannotSeek), _opened(frames[0].source) as (container, stream):
            return _Decoding(container, stream, may_seek).take(frames, pictures)
    raise AssertionError("without a seek there is nothing to be refused")


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

    def take(self, wanted: Sequence[Frame], pictures: Pictures) -> bool:
        """As decode_file. Raises CannotSeek."""
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
            pictures.put(number, upright(ahead if shown is None else shown))
            at = ahead.pts if ahead is not None else at
        return self.broken

    def _from(self, key: int) -> Iterator[Any]:
        """The frames from the key frame on."""
        import av

        try:
            self.container.seek(key, stream=self.stream)
        except av.error.FFmpegError:
            raise CannotSeek from None
        return self.frames(key)


def upright(frame: Any) -> torch.Tensor:
    """uint8 [3, H, W] of a decoded frame."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


@cache
def torchcodec_decoder() -> Any:
    """The class VideoDecoder of torchcodec, None where it is absent or finds no FFmpeg."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return VideoDecoder


def _by_torchcodec(frames: Sequence[Frame], pictures: Pictures) -> None:
    """As decode_file. Raises torchcodec's errors (not every MPEG-TS is read), ValueError where it counts otherwise."""
    source = frames[0].source
    decoder = torchcodec_decoder()(source if isinstance(source, bytes) else str(source), num_ffmpeg_threads=1)
    for number, frame in enumerate(frames):
        found = decoder.get_frame_at(frame.number)
        if abs(found.pts_seconds - frame.file_s) > 1e-3:
            raise ValueError(f"frame {frame.number} is at {found.pts_seconds} s, not {frame.file_s}")
        pictures.put(number, found.data)
