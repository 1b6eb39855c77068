"""Small clips that tests write through `av`: grey frames whose brightness tells which one it is."""

from fractions import Fraction
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 64, 48
STEP = 8  # of brightness from one frame to the next
FPS = 10


def brightness(number: int) -> int:
    return 16 + STEP * number % 224


def frame_pixels(number: int) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]: grey, white in its upper left quarter, which says what is up, and noise below it, which
    gives each frame some bytes."""
    pixels = np.full((HEIGHT, WIDTH, 3), brightness(number), np.uint8)
    pixels[HEIGHT // 2 :, : WIDTH // 2] = np.random.default_rng(number).integers(0, 256, (HEIGHT // 2, WIDTH // 2, 3))
    pixels[: HEIGHT // 2, : WIDTH // 2] = 255
    return pixels


def write_clip(
    path: Path,
    frames: int = 20,
    times: list[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 5,
    sound: bool = False,
    pictures: bool = True,
    options: dict | None = None,
) -> Path:
    """times: of each frame in seconds; by default FPS of them a second."""
    import av

    times = [number / FPS for number in range(frames)] if times is None else times
    with av.open(str(path), "w", options=options or {}) as container:
        if pictures:
            stream = container.add_stream(codec, rate=FPS)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, pix_fmt, gop
            stream.bit_rate = 1_000_000
            stream.codec_context.time_base = Fraction(1, FPS if path.suffix == ".avi" else 1000)
        heard = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, time_s in enumerate(times if pictures else []):
            frame = av.VideoFrame.from_ndarray(frame_pixels(number), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time_s), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if pictures:
            container.mux(stream.encode())
        if heard is not None:
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            quiet.sample_rate, quiet.pts = 16000, 0
            container.mux(heard.encode(quiet))
            container.mux(heard.encode())
    return path


def rotated(path: Path) -> Path:
    """The mp4 with the display matrix of a phone held upright: players turn it 90 degrees clockwise."""
    data = path.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    plain = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    at = data.index(plain, data.index(b"tkhd"))
    turned = bytes(4) + one + bytes(4) + (-1 << 16).to_bytes(4, "big", signed=True) + bytes(8)
    turned += (HEIGHT << 16).to_bytes(4, "big") + bytes(4) + (1 << 30).to_bytes(4, "big")
    path.write_bytes(data[:at] + turned + data[at + 36 :])
    return path
