"""Images of every size: what is decoded, how much memory it takes, and what is refused."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from tiny.data import dataset, encoded, picture, row, tiny_vlm

from data import processors
from data.processors import ImageDecodeError, ImageProcessor, decode_image, image_size, to_rgb

ROOT = Path(__file__).resolve().parent.parent


def one_bit_png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG of white pixels, one bit each; only `rows` of its rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = b"\0" + b"\xff" * -(-width // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


MEASURE = """
import re, sys
from pathlib import Path
sys.path.insert(0, "tests")
from tiny.data import tiny_vlm
from data.processors import ImageProcessor

def peak_mib():  # not getrusage: that remembers the process before the fork
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

process = ImageProcessor(tiny_vlm())
data = sys.stdin.buffer.read()
before = peak_mib()
tiles, grid = process(data)
print(peak_mib() - before, *grid, float(tiles.min()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_the_largest_image_takes_what_its_pixels_take_and_little_more():
    """20,000 x 20,000 pixels of one bit: 381 MiB in PIL, which holds a byte for each; RGB would be 1,526 MiB."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE], input=one_bit_png(20_000, 20_000), capture_output=True, cwd=ROOT, check=True
    )
    mib, rows, cols, darkest = map(float, found.stdout.split())
    assert (rows, cols, darkest) == (4, 4, 1.0)
    assert 380 < mib < 600


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (20_000, 3)])
def test_thin_and_tiny_images_make_tiles(size):
    long_way, short_way = (1, 4), (4, 1)
    tiles, grid = ImageProcessor(tiny_vlm())(encoded(Image.new("RGB", size, "white")))
    assert grid == ((4, 4) if size == (1, 1) else long_way if size[0] > size[1] else short_way)
    assert (tiles == 1.0).all()


def test_more_pixels_than_the_limit_are_a_dropped_row_before_they_are_decoded():
    bomb = one_bit_png(60_000, 60_000, rows=1)
    with pytest.raises(ImageDecodeError, match="60000 x 60000 pixels are more than 400,000,000"):
        ImageProcessor(tiny_vlm())(bomb)
    assert dataset([row([bomb])])[0, 0].dropped == {"image does not decode": 1}


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size():
    image = picture(60, 40).resize((1200, 800), Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG")
    assert decode_image(data).size == image_size(data) == (1200, 800)
    assert decode_image(data, (64, 48)).size == (150, 100)
    assert decode_image(data, (240, 160)).size == (600, 400)
    assert decode_image(data, (512, 512)).size == (1200, 800)
    processor = ImageProcessor(tiny_vlm())
    quick, grid = processor(data)
    whole, same_grid = processor(decode_image(data))
    assert grid == same_grid == (3, 4)
    assert (quick - whole).abs().mean() < 0.01  # of a range of 2
    opened = Image.open(io.BytesIO(data))
    assert decode_image(opened, (64, 48)).size == opened.size == (1200, 800)  # someone else's image stays as it is


def of_mode(mode: str) -> Image.Image:
    image = picture(90, 70)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "P with transparency":
        image = image.convert("P")
        image.info["transparency"] = 3
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "P with transparency", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F"])
def test_large_images_are_reduced_in_strips_to_what_the_whole_would_give(mode, monkeypatch):
    image = of_mode(mode)
    whole = np.asarray(to_rgb(image).reduce((4, 3)), dtype=int)
    monkeypatch.setattr(processors, "STRIP_PIXELS", 90 * 10)
    reduced = decode_image(image, (10, 10))
    assert reduced.mode == "RGB"
    assert reduced.size == (23, 24)
    assert np.abs(np.asarray(reduced, dtype=int) - whole).max() <= (1 if mode in ("I", "F") else 0)


def turning_itself(monkeypatch, turns: bool) -> None:
    """Let Pillow turn TIFFs upright while it loads them, as it does of late, or leave them as they lie."""
    if turns:
        if Image.open(io.BytesIO(oriented("TIFF", 6))).size == (400, 200):
            pytest.skip("this Pillow does not turn TIFFs")
        return
    setup = TiffImageFile._setup

    def lying(image):
        setup(image)
        image._size = image.tag_v2[256], image.tag_v2[257]

    monkeypatch.setattr(TiffImageFile, "_setup", lying)
    monkeypatch.setattr(TiffImageFile, "load_end", lambda image: None)


def oriented(kind: str, orientation: int) -> bytes:
    """A picture of 400 x 200 pixels that this EXIF orientation turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(20, 10).resize((400, 200), Image.Resampling.BICUBIC).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once_whether_pillow_turns_it_or_not(orientation, turns, monkeypatch):
    turning_itself(monkeypatch, turns)
    tiff, png = oriented("TIFF", orientation), oriented("PNG", orientation)
    upright = decode_image(png)
    assert image_size(tiff) == image_size(png) == upright.size
    assert np.array_equal(decode_image(tiff), upright)
    opened = Image.open(io.BytesIO(tiff))
    assert np.array_equal(decode_image(opened), upright)
    assert image_size(opened) == image_size(decode_image(tiff)) == upright.size
    monkeypatch.setattr(processors, "STRIP_PIXELS", 400 * 10)
    wanted = (80, 20) if upright.width == 400 else (20, 80)
    assert np.array_equal(decode_image(tiff, wanted), decode_image(png, wanted))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_size_and_grid_are_known_before_the_image_is_decoded(orientation, kind):
    buffer = io.BytesIO(oriented(kind, orientation))
    upright = (400, 200) if orientation in (1, 3) else (200, 400)
    assert image_size(buffer.getvalue()) == decode_image(buffer.getvalue()).size == upright
    processor = ImageProcessor(tiny_vlm())
    tiles, grid = processor(buffer.getvalue())
    assert grid == processor.grid(buffer.getvalue()) == ((2, 4) if upright[0] == 400 else (4, 2))
    whole, _ = processor(decode_image(buffer.getvalue()))
    torch.testing.assert_close(tiles, whole, atol=0.2 if kind == "JPEG" else 0.0, rtol=0)


def test_an_image_that_ends_too_soon_is_found_when_it_is_decoded():
    cut = encoded(picture(64, 64))[:200]
    data = dataset([row([cut])])
    plan = data.plan((0, 0))
    assert plan.grids == [(4, 4)]
    assert len(plan.conversations) == 1
    sample = data.decode(plan)
    assert (sample.conversations, sample.images, sample.dropped) == ([], None, {"image does not decode": 1})
