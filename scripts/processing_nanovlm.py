"""Text and pictures of an exported nanoVLM model as its inputs, for models that cut a picture into tiles.

scripts/export_transformers.py copies this file into the folder that it makes, where AutoProcessor finds it with
trust_remote_code=True. It therefore imports nothing of the project. What it computes is what data/images.py and
data/text.py compute in training.
"""

import os.path
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin


class NanoVLMImageProcessor(BaseImageProcessor):
    """Pictures -> pixel_values [B, n, 3, S, S]: of each the whole made S x S, then its tiles row by row."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as transformers has it

    def __init__(
        self,
        tile_size: int = 512,
        max_size: int = 2048,
        enlarge: bool = True,
        with_global: bool = True,
        image_mean: float = 0.5,
        image_std: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """tile_size: S, in pixels. max_size: the longer side of a picture becomes at most this, or with `enlarge`
        exactly this. with_global: whether the whole picture stands before its tiles."""
        super().__init__(**kwargs)
        self.tile_size, self.max_size, self.enlarge, self.with_global = tile_size, max_size, enlarge, with_global
        self.image_mean, self.image_std = image_mean, image_std

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """images: a picture, a list of them, or a list for each text. Besides pixel_values, in which a missing picture
        is zeros: `grids`, for each text the (rows, columns) of its pictures."""
        if not isinstance(images, list | tuple):
            images = [images]
        nested = images if images and isinstance(images[0], list | tuple) else [images]
        made = [[self.tiles(image) for image in row] for row in nested]
        rows = [torch.cat([tiles for tiles, _ in row]) if row else torch.zeros(0, 3, 1, 1) for row in made]
        most = max(len(row) for row in rows)
        pixels = torch.zeros(len(rows), most, 3, self.tile_size, self.tile_size)
        for place, row in zip(pixels, rows, strict=True):
            if len(row):
                place[: len(row)] = row
        return BatchFeature({"pixel_values": pixels, "grids": [[grid for _, grid in row] for row in made]})

    def tiles(self, image: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        """(normalised float32 [n, 3, S, S], (rows, columns)) of a picture: PIL, array, path or address. Of an address
        transformers reads transparent parts and grey of 16 bits in its own way."""
        side = self.tile_size
        if isinstance(image, np.ndarray | torch.Tensor):
            pixels = torch.as_tensor(image)
            pixels = pixels if pixels.shape[0] == 3 else pixels.permute(2, 0, 1)
        else:
            pixels = torch.from_numpy(np.array(opaque(upright(image)))).permute(2, 0, 1)
        width, height = self.target_size(pixels.shape[2], pixels.shape[1])
        pixels = resized(pixels, (height, width))
        grid = (height // side, width // side)
        cut = pixels.reshape(3, grid[0], side, grid[1], side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        if self.with_global and grid != (1, 1):
            cut = torch.cat((resized(pixels, (side, side), "bilinear")[None], cut))
        return (cut.float() / 255.0 - self.image_mean) / self.image_std, grid

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in multiples of S: the longer side at most max_size, the shorter in proportion, up."""
        side, long, short = self.tile_size, max(width, height), min(width, height)
        new_long = self.max_size if self.enlarge else min(self.max_size, -(-long // side) * side)
        new_short = -(-short * new_long // (long * side)) * side
        return (new_long, new_short) if width >= height else (new_short, new_long)


def upright(image: Any) -> Image.Image:
    """A picture (PIL, path or address) turned as its EXIF says: of a PNG only what stands before its pixels counts."""
    if isinstance(image, str | Path) and os.path.isfile(image):  # noqa: PTH113  # no error at base64
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        return load_image(image)
    exif = {} if image.format == "TIFF" else Image.Image.getexif(image)  # PIL itself turns a TIFF
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    image.load()
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def opaque(image: Image.Image) -> Image.Image:
    """RGB of a picture of any mode: transparent parts white, grey of more than 8 bits scaled down."""
    if image.mode[0] in "IF":
        # By the smallest of 8, 12 and 16 bits that holds the largest value: 12 bits are stored in files of 16.
        values = np.nan_to_num(np.array(image, dtype=np.float32), posinf=0.0, neginf=0.0)
        largest = values.max(initial=0.0)
        ranges = [1.0] * (image.mode == "F") + [255.0, 4095.0, 65535.0]
        values *= 255.0 / next((white for white in ranges if largest <= white), largest)
        image = Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGB", image.size, "white")
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def resized(pixels: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size]."""
    if pixels.shape[1:] == size:
        return pixels
    return F.interpolate(pixels[None], size, mode=mode, antialias=True)[0]


class NanoVLMProcessor(ProcessorMixin):
    """The tokens of a picture stand where its image token stands in the text."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 64,
        extra_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        """image_seq_len: image tokens of a tile. extra_tokens: "image_token", "r1c1" and so on -> how it is written."""
        self.image_seq_len, self.extra_tokens = image_seq_len, extra_tokens or {"image_token": "<|image|>"}
        self.image_token = self.extra_tokens["image_token"]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """images: as the image processor takes them; a plain list is dealt out to the texts by their image tokens."""
        texts = [text] if isinstance(text, str) else list(text if text is not None else [])
        return_tensors = kwargs.pop("return_tensors", None)
        found: dict[str, Any] = {}
        if images is not None:
            nested = self.dealt_out(images, texts)
            found = dict(self.image_processor(nested))
            grids = found.pop("grids")
            texts = [self.expanded(one, own) for one, own in zip(texts, grids, strict=True)] if texts else texts
        if texts:
            known = (
                "padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "add_special_tokens",
                "return_attention_mask",
            )  # fmt: skip
            options = dict(kwargs.get("text_kwargs") or {}) | kwargs
            found |= self.tokenizer(texts, **{name: options[name] for name in known if name in options})
        return BatchFeature(found, tensor_type=return_tensors)

    def dealt_out(self, images: Any, texts: list[str]) -> list[list[Any]]:
        """For each text the pictures in it. Raises ValueError where it has not as many image tokens."""
        images = list(images) if isinstance(images, list | tuple) else [images]
        if images and isinstance(images[0], list | tuple):
            nested = [list(row) for row in images]
        elif not texts:
            return [images]
        else:
            left = iter(images)
            nested = [[one for _, one in zip(range(text.count(self.image_token)), left)] for text in texts]  # noqa: B905
            nested[-1] += list(left)
        counts = [text.count(self.image_token) for text in texts]
        if texts and counts != [len(row) for row in nested]:
            raise ValueError(
                f"the texts hold {counts} {self.image_token}, but there are {list(map(len, nested))} images"
            )
        return nested

    def expanded(self, text: str, grids: list[tuple[int, int]]) -> str:
        """The text with all tokens of each picture."""
        before, *parts = text.split(self.image_token)
        return before + "".join(self.image_text(grid) + part for grid, part in zip(grids, parts, strict=True))

    def image_text(self, grid: tuple[int, int]) -> str:
        """The tokens of one picture."""
        tokens, (rows, cols) = self.extra_tokens, grid
        slots = self.image_token * self.image_seq_len
        whole = tokens["global_image_token"] + slots if "global_image_token" in tokens else ""
        if grid == (1, 1):
            return whole or tokens.get("r1c1", "") + slots
        return whole + "".join(tokens[f"r{row + 1}c{col + 1}"] + slots for row in range(rows) for col in range(cols))
