"""Images of every kind and size: what is decoded, how much memory it takes, and what is refused."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny.data import TILE_TOKENS, dataset, encoded, picture, row, tiny_vlm

from data import images
from data.images import ImageDecodeError, ImageProcessor, decode_image, image_size
from data.layouts import tiled_size
from data.text import image_string

ROOT = Path(__file__).parent.parent
BICUBIC = Image.Resampling.BICUBIC


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def one_bit_png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG of white pixels, one bit each; only `rows` of its rows are there."""
    line = b"\0" + b"\xff" * -(-width // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def shown(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [3, H, W] as Pillow's images are: [H, W, 3]."""
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy()


# Tiles


def slow_size(width: int, height: int, side: int, largest: int, enlarge: bool) -> tuple[int, int]:
    """(width, height), found by trying multiples of the side."""
    long, short = max(width, height), min(width, height)
    new_long = side
    while new_long < largest and (enlarge or new_long < long):
        new_long += side
    new_short = side
    while new_short * long < short * new_long:
        new_short += side
    return (new_long, new_short) if width >= height else (new_short, new_long)


@pytest.mark.parametrize("enlarge", [True, False])
def test_target_size_against_trying(enlarge):
    cfg = tiny_vlm(resize_to_max_side_len=enlarge)
    for width in (1, 15, 16, 17, 33, 48, 63, 64, 65, 1000):
        for height in (1, 16, 31, 32, 33, 64, 70, 999, 5000):
            assert tiled_size(width, height, cfg) == slow_size(width, height, 16, 64, enlarge), (width, height)


@pytest.mark.parametrize("with_global", [True, False])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (64, 64), (16, 16), (1, 1), (5000, 10), (1, 20_000)])
def test_tiles_against_cropping(size, with_global):
    tokens = {name: token for name, token in TILE_TOKENS.items() if with_global or name != "global_image_token"}
    cfg = tiny_vlm(vlm_extra_tokens=tokens, resize_to_max_side_len=False)
    processor = ImageProcessor(cfg)
    image = picture(*size)
    tiles, (rows, cols) = processor(image)
    width, height = slow_size(*size, 16, 64, False)
    assert (rows, cols) == (height // 16, width // 16)
    resized = image.resize((width, height), BICUBIC)
    boxes = [(c * 16, r * 16, c * 16 + 16, r * 16 + 16) for r in range(rows) for c in range(cols)]
    wanted = [resized.crop(box) for box in boxes]
    if with_global and len(boxes) > 1:
        wanted.insert(0, resized.resize((16, 16), Image.Resampling.BILINEAR))  # as torchvision by default
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (len(wanted), 3, 16, 16)
    assert processor.count((rows, cols)) == len(wanted)
    for tile, image in zip(tiles, wanted, strict=True):
        assert np.abs(shown(tile).astype(int) - np.asarray(image)).max() <= 2
    assert image_string([(rows, cols)], cfg).count("<|image|>") == len(wanted) * cfg.mp_image_token_length


@pytest.mark.parametrize("size", [(16, 16), (64, 32), (48, 64)])
def test_mirror_is_the_mirrored_image(size):
    processor = ImageProcessor(tiny_vlm(resize_to_max_side_len=False))
    image = picture(*size)
    tiles, grid = processor(image)
    torch.testing.assert_close(processor.mirror(tiles, grid), processor(ImageOps.mirror(image))[0], atol=2, rtol=0)


# Modes


def deep(dtype: type, *values: float) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")


def palette(**info: int) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    image.putpalette([0, 0, 0, 90, 90, 90])
    image.info |= info
    return image


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (deep(np.uint16, 0, 32896, 65535), [0, 128, 255]),
        (deep(np.uint16, 0, 200), [0, 200]),
        (deep(np.int32, 0, 128, 255), [0, 128, 255]),
        (deep(np.uint16, 0, 2048, 4095), [0, 128, 255]),  # 12 bits
        (deep(np.uint16, 0, 2048, 4096), [0, 8, 16]),
        (deep(np.int32, -5, 32896, 65535), [0, 128, 255]),
        (deep(np.int32, 0, 502_000, 1_000_000), [0, 128, 255]),
        (deep(np.float32, 0.0, 0.5, 1.0, np.nan, np.inf), [0, 128, 255, 0, 0]),
        (deep(np.float32, 0.0, 64.0), [0, 64]),
        (deep(np.float32, 0.0, 0.0), [0, 0]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [255]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 128)), [127]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 255)), [0]),
        (Image.new("LA", (1, 1), (100, 0)), [255]),
        (palette(), [0, 90]),
        (palette(transparency=0), [255, 90]),
    ],
)
def test_deep_images_are_scaled_to_8_bits_and_transparent_ones_put_on_white(image, wanted):
    rgb = shown(decode_image(image))
    assert rgb.tolist() == [[[value] * 3 for value in wanted]]


MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_shows_the_same_picture(mode):
    image = Image.new("RGB", (400, 40), "white")
    image.paste("black", (0, 0, 200, 40))
    if mode[0] in "IF":
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        converted = Image.fromarray(np.asarray(image.convert("L")).astype(dtype) * dtype(257 if mode == "I;16" else 1))
    else:
        converted = image.convert("RGBA").convert("PA") if mode == "PA" else image.convert(mode)
    assert converted.mode == mode
    for size in (None, (40, 4), (16, 16), (800, 80)):
        found, wanted = shown(decode_image(converted, size)), shown(decode_image(image, size))
        assert found.shape == (*(size or image.size)[::-1], 3)
        assert np.abs(found.astype(int) - wanted).max() <= 3


def test_decode_takes_every_kind_of_source(tmp_path):
    image, path = picture(), tmp_path / "a.png"
    image.save(path)
    data = encoded(image)
    for source in (image, data, path, str(path), {"bytes": data, "path": None}, {"path": str(path)}):
        assert np.array_equal(shown(decode_image(source)), image)


# Orientation


def oriented(kind: str, orientation: int) -> bytes:
    """A picture of 400 x 200 pixels that this EXIF orientation turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    exact = {"lossless": True} if kind == "WEBP" else {}
    picture(20, 10).resize((400, 200), BICUBIC).save(buffer, kind, exif=exif, **exact)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_upright_and_their_grid_is_known_from_the_header(kind, orientation):
    data = oriented(kind, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(oriented("PNG", orientation))))
    assert upright.size == ((400, 200) if orientation < 5 else (200, 400))
    atol = 90 if kind == "JPEG" else 0
    for source in (data, Image.open(io.BytesIO(data))):
        assert image_size(source) == upright.size
        assert np.abs(shown(decode_image(source)).astype(int) - np.asarray(upright)).max() <= atol
    processor = ImageProcessor(tiny_vlm())
    tiles, grid = processor(data)
    assert grid == processor.grid(data) == ((2, 4) if orientation < 5 else (4, 2))
    difference = (tiles.int() - processor(upright)[0].int()).abs()
    assert difference.max() <= (26 if kind == "JPEG" else 0)


def test_the_orientation_of_a_png_counts_only_before_its_pixels():
    """Behind them the header would say another size than the image has once it is decoded."""
    early = oriented("PNG", 6)
    start = early.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(early[start : start + 4])
    late = early[:start] + early[stop:-12] + early[start:stop] + early[-12:]
    assert image_size(early) == decode_image(early).shape[:0:-1] == (200, 400)
    assert image_size(late) == decode_image(late).shape[:0:-1] == (400, 200)


# Limits


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from tiny.data import tiny_vlm
from data.images import ImageProcessor

def peak_mib():  # not getrusage: that remembers the process before the fork
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) / 1024

process, data, before = ImageProcessor(tiny_vlm()), sys.stdin.buffer.read(), peak_mib()
tiles, grid = process(data)
print(peak_mib() - before, *grid, float(tiles.min()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_the_largest_image_takes_what_its_pixels_take_and_little_more():
    """20,000 x 20,000 pixels of one bit: 381 MiB in PIL, which holds a byte for each, and as much for them as grey."""
    png = one_bit_png(20_000, 20_000)
    found = subprocess.run([sys.executable, "-c", MEASURE], input=png, capture_output=True, cwd=ROOT, check=True)
    mib, *rest = map(float, found.stdout.split())
    assert rest[:2] == [4, 4]
    assert rest[2] >= 253
    assert 380 < mib < 900


def test_more_pixels_than_the_limit_are_a_dropped_row_before_they_are_decoded():
    bomb = one_bit_png(60_000, 60_000, rows=1)
    with pytest.raises(ImageDecodeError, match="60000 x 60000 pixels are more than 400,000,000"):
        ImageProcessor(tiny_vlm())(bomb)
    assert dataset([row([bomb])])[0, 0].dropped == {"image has too many pixels": 1}


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch):
    decoded = []
    real = images.opaque
    monkeypatch.setattr(images, "opaque", lambda image: decoded.append(image.size) or real(image))
    image = picture(60, 40).resize((1200, 800), BICUBIC)
    data = encoded(image, "JPEG")
    for size, at in (((64, 48), (150, 100)), ((240, 160), (600, 400)), ((512, 512), (1200, 800)), (None, (1200, 800))):
        assert decode_image(data, size).shape[:0:-1] == (size or image.size)
        assert decoded.pop() == at
    opened = Image.open(io.BytesIO(data))
    decode_image(opened, (64, 48))
    assert decoded.pop() == opened.size == (1200, 800)  # a caller's own image stays as it is
    processor = ImageProcessor(tiny_vlm())
    quick, whole = processor(data)[0], processor(Image.open(io.BytesIO(data)))[0]
    assert (quick.int() - whole.int()).abs().float().mean() < 1.5  # of 256 levels


PNG, JPEG = encoded(picture(64, 64)), encoded(picture(64, 64), "JPEG")
BROKEN = PNG[:40] + b"\xff\xff\xff\xff" + PNG[44:]


@pytest.mark.parametrize(
    "source", [PNG[:200], JPEG[:300], BROKEN, b"junk", b"", None, {"bytes": None, "path": None}, {}, "/nowhere.png"]
)
def test_what_does_not_decode_is_one_kind_of_error(source):
    with pytest.raises(ImageDecodeError):
        decode_image(source)


def test_pils_own_limit_is_off_for_the_call_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(PNG).shape[1:] == image_size(PNG) == (64, 64)
    with pytest.raises(ImageDecodeError):
        decode_image(BROKEN)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(PNG))
