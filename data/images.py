"""Images to tiles: open, turn upright, resize, cut. They stay 8-bit; the model normalises them on its device.

Shapes: S vit_img_size, H and W the size of the resized image (multiples of S), n images that the vision tower sees.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from data import layouts
from data.layouts import Grid
from data.web_images import FetchError, WebImage, fetched
from models.config import VLMConfig

Source = str | Path | bytes | dict[str, Any] | Image.Image | WebImage  # a dict has "bytes" or "path"

NOT_DECODED = "image does not decode"
NO_SUCH_FILE = "no such file"
TOO_MANY_PIXELS = "image has too many pixels"
CUT_OFF = "image file breaks off"
# What HEIC and AVIF files are called in their first bytes, and what opens them.
HEIC, AVIF = ("HEIC", "pillow-heif"), ("AVIF", "pillow>=11.3")
BRANDS = dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), HEIC)
BRANDS |= dict.fromkeys((b"avif", b"avis"), AVIF)
MAX_PIXELS = 20_000 * 20_000  # of a decoded image; PIL's own limit is lower
# A JPEG may be decoded, and an image of more than this many pixels is reduced by a whole number, which takes less
# memory, to a size that is at least REDUCING_GAP times the new one.
MANY_PIXELS = 8_000 * 8_000
REDUCING_GAP = 1.5
SIDEWAYS = range(5, 9)  # the EXIF orientations that swap width and height


class ImageDecodeError(ValueError):
    """The file or the bytes of an image cannot be read as an image."""

    def __init__(self, found: str, kind: str = NOT_DECODED):
        """found: in words; kind: the reason that rows are counted by."""
        super().__init__(found)
        self.kind = kind


def image_size(source: Source) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises ImageDecodeError, also for more than
    MAX_PIXELS."""
    with _opened(source) as (image, orientation):
        return image.size[::-1] if orientation in SIDEWAYS else image.size


def decode_image(source: Source, size: tuple[int, int] | None = None, use_truncated: bool = False) -> torch.Tensor:
    """uint8 [3, height, width]: the upright image in RGB, resized to `size` (width, height) if given.

    Of several pictures (GIF, TIFF, animated WebP) the first. Transparent parts become white, more than 8 bits are
    scaled down. use_truncated: where the data of an image ends too early, what is missing is grey or black; otherwise
    such an image is an ImageDecodeError of kind CUT_OFF. Raises ImageDecodeError.

    Memory: a large JPEG is decoded at a reduced size if `size` allows it. Of any other format PIL holds all pixels:
    1 byte each if grey, 2 if one-bit, 4 if RGB, 8 if RGBA, at most 13 in any other mode; 4 more where EXIF says that
    the image is to be turned.
    """
    pixels = decode_pixels(source, size, use_truncated)
    return (pixels if size is None else resized(pixels, size)).expand(3, -1, -1)


def decode_pixels(source: Source, size: tuple[int, int] | None = None, use_truncated: bool = False) -> torch.Tensor:
    """uint8 [C, height, width], C 1 or 3: the same before it is resized; a large one at least REDUCING_GAP times `size`
    (width, height), the smallest that it will be resized to."""
    with _opened(source, use_truncated) as (image, orientation):
        if size is not None and image is not source:  # a caller's own image keeps its size
            width, height = size[::-1] if orientation in SIDEWAYS else size
            image.draft(None, (int(REDUCING_GAP * width), int(REDUCING_GAP * height)))
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        image = opaque(image)
        if size is not None and image.width * image.height > MANY_PIXELS:
            across, down = (max(1, int(old / new / REDUCING_GAP)) for old, new in zip(image.size, size, strict=True))
            image = image.reduce((across, down))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def small(source: Source, side: int) -> torch.Tensor:
    """An image for a page, at most `side` pixels wide or high: uint8 [3, H, W]. One that breaks off is used too.

    Raises ImageDecodeError.
    """
    return decode_image(source, within(image_size(source), side), use_truncated=True)


def within(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) in the same proportion, neither more than `side`; a smaller one as it is."""
    scale = min(1.0, side / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def check_whole(source: Source) -> None:
    """Raise ImageDecodeError unless all of the image decodes."""
    with _opened(source) as (image, _):
        image.load()


@contextlib.contextmanager
def pil_limits(use_truncated: bool = False) -> Iterator[None]:
    """PIL's limit on pixels is off in here, MAX_PIXELS takes its place, and use_truncated is what it does at an image
    that breaks off. Both are the process's: of several threads that decode, all have to be within one of these."""
    limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, use_truncated
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limits


@contextlib.contextmanager
def _opened(source: Source, use_truncated: bool = False) -> Iterator[tuple[Image.Image, int]]:
    """The image, of which only the header is read, and the EXIF orientation that is left to apply once it is loaded.

    Within `pil_limits`. Whatever a decoder raises becomes an ImageDecodeError.
    """
    found: Any = None
    try:
        with pil_limits(use_truncated):
            found = (source.get("bytes") or source["path"]) if isinstance(source, dict) else source
            found = fetched(found.url) if isinstance(found, WebImage) else found
            is_open = isinstance(found, Image.Image)
            image = found if is_open else _read_header(io.BytesIO(found) if isinstance(found, bytes) else found)
            if image.width * image.height > MAX_PIXELS:
                raise ImageDecodeError(
                    f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}", TOO_MANY_PIXELS
                )
            # PIL itself turns a TIFF. Not image.getexif(): for a PNG that decodes the pixels to look behind them.
            exif = {} if image.format == "TIFF" else Image.Image.getexif(image)
            yield image, exif.get(ExifTags.Base.Orientation, 1)
    except ImageDecodeError:
        raise
    except FetchError as error:
        raise ImageDecodeError(f"{error}", error.kind) from None
    except (FileNotFoundError, NotADirectoryError):
        raise ImageDecodeError(f"{found}", NO_SUCH_FILE) from None
    except Exception as error:  # decoders raise nearly anything at damaged files
        cut_off = isinstance(error, OSError) and "truncated" in str(error)
        if cut_off:
            raise ImageDecodeError(f"{error}; --truncated_images use takes what is there", CUT_OFF) from error
        raise ImageDecodeError(f"{error}") from error


def _read_header(file: Any) -> Image.Image:
    """Image.open, with HEIC too where pillow-heif is there. Raises ImageDecodeError where a package is absent."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        begin = file.getvalue()[:12] if isinstance(file, io.BytesIO) else _first_bytes(file)
        name, package = BRANDS.get(begin[8:12] if begin[4:8] == b"ftyp" else b"", ("", ""))
        if not name:
            raise
    try:
        if name == "AVIF":
            raise ImportError
        import pillow_heif
    except ImportError:
        raise ImageDecodeError(f"pip install '{package}'", f"{name} image, which needs {package}") from None
    pillow_heif.register_heif_opener()
    return Image.open(file)


def _first_bytes(path: str | Path) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(12)


def opaque(image: Image.Image) -> Image.Image:
    """8-bit grey or RGB of an image of any mode, with transparent parts white."""
    if image.mode[0] in "IF":
        return _to_8_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        white.paste(image, mask=image)
        return white
    mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey scaled to 8 bits: integers by the smallest of 8, 12 and 16 bits that holds the largest of them, floats by 1
    or by these; what exceeds them by its largest value.

    Cameras, scanners and microscopes store 12 bits in files of 16, which do not say so: scaled by 16 bits such a
    picture would be almost black.
    """
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0)
    largest = values.max(initial=0.0)
    ranges = [1.0] * (image.mode == "F") + [255.0, 4095.0, 65535.0]
    values *= 255.0 / next((white for white in ranges if largest <= white), largest)
    return Image.fromarray(np.rint(np.clip(values, 0, 255, out=values), out=values).astype(np.uint8))


def resized(pixels: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """uint8 [C, H, W] resized to (width, height), antialiased: at most 2 of 256 levels from Pillow's, and faster."""
    if pixels.shape[1:] == size[::-1]:
        return pixels
    return F.interpolate(pixels[None], size[::-1], mode=mode, antialias=True)[0]


def fitted(pixels: torch.Tensor, size: tuple[int, int], mode: str, antialias: bool, keep_aspect: bool) -> torch.Tensor:
    """uint8 [C, H, W] resized to (width, height); with keep_aspect as large as fits, in the middle of black."""
    old, new = (pixels.shape[2], pixels.shape[1]), size
    if keep_aspect:
        scale = min(new_length / length for new_length, length in zip(size, old, strict=True))
        new = max(1, min(size[0], round(scale * old[0]))), max(1, min(size[1], round(scale * old[1])))
    if old != new:
        pixels = F.interpolate(pixels[None], new[::-1], mode=mode, antialias=antialias)[0]
    left, top = (size[0] - new[0]) // 2, (size[1] - new[1]) // 2
    return F.pad(pixels, (left, size[0] - new[0] - left, top, size[1] - new[1] - top)) if new != size else pixels


class ImageProcessor:
    """An image, of any size and mode, as the square images that the vision tower sees: see data.layouts."""

    def __init__(self, cfg: VLMConfig, use_truncated: bool = False):
        """use_truncated: of an image whose data ends too early take what is there, and count it."""
        self.cfg = cfg
        self.use_truncated, self.truncated = use_truncated, 0  # how many were, so far
        self.side = cfg.vit_img_size

    def __call__(self, source: Source) -> tuple[torch.Tensor, Grid]:
        """(uint8 [n, 3, S, S], the grid (rows, columns) of tiles or crops) of an image. Raises ImageDecodeError.

        Resized as nanoVLM does it, with antialiasing: bicubic, and of the result the whole image beside its tiles
        bilinear. For molmo_crops as Molmo does it, bilinear, and antialiased only where the aspect is kept.
        """
        grid = layouts.grid_of(*image_size(source), self.cfg)
        if layouts.has_crops(self.cfg):
            return self._crops(source, grid), grid
        if self.cfg.image_layout == "resize":
            return self.square(source)[None], grid
        return self._tiles(source, grid), grid

    def square(self, source: Source) -> torch.Tensor:
        """uint8 [3, S, S]: the whole image. Raises ImageDecodeError."""
        size = (self.side, self.side)
        if not self.cfg.keep_aspect:
            return self.decoded(source, size)
        return fitted(self.decoded(source, size, resize=False), size, "bicubic", True, True).expand(3, -1, -1)

    def _tiles(self, source: Source, grid: Grid) -> torch.Tensor:
        """uint8 [n, 3, S, S]: a 1x1 grid is the image alone; a larger one is, where the config has a
        global_image_token, the whole image made S x S, and then the tiles row by row."""
        (rows, cols), side = grid, self.side
        whole = self.decoded(source, (cols * side, rows * side))
        tiles = np.empty((self.count(grid), 3, side, side), dtype=np.uint8)
        first = len(tiles) - rows * cols
        if first:
            tiles[0] = resized(whole, (side, side), "bilinear").numpy()
        # NumPy: on a busy CPU torch's threads take a hundred times as long for a copy.
        cut = whole.numpy().reshape(3, rows, side, cols, side).transpose(1, 3, 0, 2, 4)
        tiles[first:].reshape(rows, cols, 3, side, side)[:] = cut
        return torch.from_numpy(tiles)

    def _crops(self, source: Source, grid: Grid) -> torch.Tensor:
        """uint8 [n, 3, S, S]: the whole image made S x S, then the crops of the canvas row by row."""
        cfg, side, size = self.cfg, self.side, layouts.canvas_size(grid, self.cfg)
        pixels = self.decoded(source, size, resize=False)
        whole, canvas = (
            fitted(pixels, to, "bilinear", cfg.keep_aspect, cfg.keep_aspect).numpy() for to in ((side, side), size)
        )
        crops, step = np.empty((self.count(grid), 3, side, side), dtype=np.uint8), layouts.crop_step(cfg)
        crops[0] = whole
        for number, (row, column) in enumerate(np.ndindex(grid), start=1):
            top, left = row * step, column * step
            crops[number] = canvas[:, top : top + side, left : left + side]
        return torch.from_numpy(crops)

    def decoded(self, source: Source, size: tuple[int, int], resize: bool = True) -> torch.Tensor:
        """As decode_image (or decode_pixels), with what is there of an image that breaks off where that is to be used,
        and counted."""
        decode = decode_image if resize else decode_pixels
        try:
            return decode(source, size)
        except ImageDecodeError as error:
            if error.kind != CUT_OFF or not self.use_truncated:
                raise
        self.truncated += 1
        return decode(source, size, use_truncated=True)

    def grid(self, source: Source) -> Grid:
        """The grid (rows, columns) of tiles or crops, from the image's header alone. Raises ImageDecodeError."""
        return layouts.grid_of(*image_size(source), self.cfg)

    def count(self, grid: Grid) -> int:
        """How many images [3, S, S] a grid of tiles or crops makes."""
        return layouts.count_images(grid, self.cfg)

    def mirror(self, images: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The result of __call__ for the image mirrored left to right.

        With keep_aspect, where an odd number of black columns is added, they are one pixel beside.
        """
        return torch.from_numpy(images.numpy()[..., ::-1][layouts.mirror_order(grid, len(images))])
