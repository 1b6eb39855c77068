"""Text to token ids and labels, images to tiles.

Shapes: S vit_img_size, H and W the size of the resized image (multiples of S), n images that the vision tower sees.
"""

from __future__ import annotations

import contextlib
import io
from bisect import bisect_left
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.sources import require_hub
from models.config import VLMConfig
from models.gguf import GGUFFile, gguf_path

END_OF_TURN = "<|im_end|>"
EASY_VQA_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
# fmt: off
EASY_VQA_WORDS = (
    "\n", "system", "user", "assistant", "?", "a", "black", "blue", "brown", "circle", "color", "contain", "does",
    "gray", "green", "image", "in", "is", "no", "not", "of", "present", "rectangle", "red", "shape", "teal", "the",
    "there", "triangle", "what", "yellow", "yes",
)
# fmt: on
EASY_VQA_VOCAB_SIZE = 1 + len(EASY_VQA_SPECIAL_TOKENS) + len(EASY_VQA_WORDS)
GGUF_CONTROL_TOKEN = 3  # among tokenizer.ggml.token_type

# How an image is turned upright, by the value of its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # in an image's info
SIDEWAYS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # width becomes height
# What is decoded is at most so large. PIL's own limit is lower and knows nothing of draft mode.
MAX_DECODED_PIXELS = 20_000 * 20_000
Image.MAX_IMAGE_PIXELS = None
# Larger images are not converted to RGB as a whole, but in strips of so many pixels that are reduced at once.
STRIP_PIXELS = 2**24
# An image may be reduced to so many times the size that is wanted: once it is resized, no one sees a difference.
REDUCING_GAP = 2


class ImageDecodeError(ValueError):
    """The file or the bytes of an image cannot be read as an image."""


def get_tokenizer(cfg: VLMConfig, folder: str | Path | None = None):
    """The tokenizer of a checkpoint folder if it holds one, else cfg.lm_tokenizer, with the extra tokens added.

    Raises ValueError if the extra tokens do not get the ids that the config says.
    """
    if folder is not None and (Path(folder) / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        # Not AutoTokenizer: it would take the checkpoint's config.json for a transformers model's.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    elif cfg.lm_tokenizer == "easy-vqa":
        tokenizer = _easy_vqa_tokenizer()
    elif path := gguf_path(cfg.lm_tokenizer, "lm_tokenizer"):
        tokenizer = _gguf_tokenizer(path)
    else:
        tokenizer = _pretrained_tokenizer(cfg.lm_tokenizer)
    _add_extra_tokens(tokenizer, cfg)
    tokenizer.chat_template = cfg.lm_chat_template
    if END_OF_TURN in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TURN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:  # the cache first: a known tokenizer needs no network
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:  # ImportError: an absent package for another kind of tokenizer
        if Path(name).exists():
            raise ValueError(f"--lm_tokenizer {name}: {error}") from error
    require_hub(f"--lm_tokenizer {name}", "a local folder or easy-vqa")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--lm_tokenizer {name}: {error}") from error


def _gguf_tokenizer(path: Path):
    """SmolLM's tokenizer from a GGUF file: byte-level BPE as GPT-2's, every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {k.removeprefix("tokenizer.ggml."): value for k, value in GGUFFile(path).metadata.items()}
    kind = found.get("pre")
    if kind != "smollm":
        raise ValueError(
            f"--lm_tokenizer {path}: tokenizer.ggml.pre {kind!r}, must be 'smollm'; --lm_tokenizer also takes a local "
            "folder or a hub id"
        )
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(found["tokens"])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    typed = zip(found["tokens"], found["token_type"], strict=True)
    control = [token for token, token_type in typed if token_type == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _add_extra_tokens(tokenizer, cfg: VLMConfig) -> None:
    """Add cfg.vlm_extra_tokens after the base vocabulary, in order."""
    from tokenizers import AddedToken

    extra = list(cfg.vlm_extra_tokens.values())
    base = len(tokenizer) - sum(token in tokenizer.get_vocab() for token in extra)
    if base != cfg.lm_base_vocab_size:
        raise ValueError(
            f"--lm_base_vocab_size {cfg.lm_base_vocab_size}: must be {base}, the number of tokens of --lm_tokenizer "
            f"{cfg.lm_tokenizer}"
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in extra], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(extra)
    wanted = list(range(cfg.image_token_id, cfg.image_token_id + len(extra)))
    if ids != wanted:
        token, found, needed = next(triple for triple in zip(extra, ids, wanted, strict=True) if triple[1] != triple[2])
        raise ValueError(
            f"--vlm_extra_tokens: {token} has id {found} in --lm_tokenizer {cfg.lm_tokenizer} and must have {needed}: "
            "the extra tokens follow its own in order, and none of them may be among its own"
        )


def _easy_vqa_tokenizer():
    """One token a word of easy-VQA's questions and answers; other words are <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *EASY_VQA_SPECIAL_TOKENS, *EASY_VQA_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(EASY_VQA_SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.Lowercase()
    # Matches are the tokens, what lies between them (spaces) is removed; a line break is a token of ChatML.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    joined = [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse()]  # spaces between words, none before "?"
    chatml = [("<|im_start|> ", "<|im_start|>"), (" <|im_end|>", "<|im_end|>"), (" \n", "\n"), ("\n ", "\n")]
    tokenizer.decoder = decoders.Sequence(joined + [decoders.Replace(old, new) for old, new in chatml])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>", eos_token=END_OF_TURN
    )


def image_string(grids: list[tuple[int, int]], cfg: VLMConfig) -> str:
    """The text that stands for images of the given grids (rows, columns): one image token for each image embedding."""
    tokens = cfg.vlm_extra_tokens
    slots = tokens["image_token"] * cfg.mp_image_token_length
    text = ""
    for rows, cols in grids:
        if (rows, cols) == (1, 1) or "global_image_token" in tokens:
            text += tokens.get("global_image_token", "") + slots
        if (rows, cols) != (1, 1):
            text += "".join(tokens[f"r{r + 1}c{c + 1}"] + slots for r in range(rows) for c in range(cols))
    return text


def encode_conversation(tokenizer, turns: list[dict], image_text: str) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation; the images stand before the first question.

    labels are ids shifted left by one where the assistant speaks, its end-of-turn token included, and -100 elsewhere.
    """
    messages: list[dict] = []
    spans = []  # characters that the assistant says
    for turn in turns:
        messages.append({"role": "user", "content": turn["user"] if messages else image_text + turn["user"]})
        start = len(_render(tokenizer, messages, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": turn["assistant"]})
        text = _render(tokenizer, messages)
        spans.append((start, len(text.rstrip())))  # the template's line break after the end of turn is nobody's
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    starts = [start for start, _ in encoding.offsets]
    labels = [-100] * len(ids)
    for start, end in spans:
        first, last = max(bisect_left(starts, start), 1), bisect_left(starts, end)
        labels[first - 1 : last - 1] = ids[first:last]
    return ids, labels


def encode_prompt(tokenizer, question: str, image_text: str) -> list[int]:
    """The ids of a question up to where the assistant begins to speak."""
    text = _render(tokenizer, [{"role": "user", "content": image_text + question}], add_generation_prompt=True)
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def image_size(source) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone. Raises ImageDecodeError."""
    with _decoding():
        image = _open(source)
        if _turn(image) not in SIDEWAYS:
            return image.size
        # Of a TIFF that it will turn itself Pillow says the upright size already; the tags have that of the pixels.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
        return height, width


def decode_image(source, wanted: tuple[int, int] | None = None) -> Image.Image:
    """The upright PIL image of a path, of bytes, of {"bytes", "path"} or of a PIL image.

    wanted: the (width, height) that the image will be resized to. It then need not come in full size: never smaller
    than wanted, as 8-bit RGB where it was reduced. Raises ImageDecodeError, also for more than MAX_DECODED_PIXELS.

    Memory: only a JPEG is decoded at a reduced size. Of other formats Pillow holds all pixels for a moment, 4 bytes for
    each of an RGB or RGBA image, 1 of grey or a palette: MAX_DECODED_PIXELS of RGBA are 1.6 GB in each worker, and of a
    TIFF that lies on its side twice as much. All that is made of them is made in strips.
    """
    with _decoding():
        image = _open(source)
        turn = _turn(image)
        if wanted is not None and image is not source:  # which stays as it is
            image.draft(None, _enough(wanted, turn))  # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
        width, height = image.size
        if width * height > MAX_DECODED_PIXELS:
            raise ImageDecodeError(f"{width} x {height} pixels are more than {MAX_DECODED_PIXELS:,}")
        image.load()
        if _turn(image) is None:
            turn = None  # a TIFF, which Pillow has turned
        width, height = image.size
        if wanted is not None and width * height > STRIP_PIXELS:
            wide, high = _enough(wanted, turn)
            image = _reduced(image, (max(1, width // wide), max(1, height // high)))
        if turn is not None:
            image = image.transpose(turn)
            for name in ORIENTED_BY:
                image.info.pop(name, None)  # it is upright now
        return image


def _enough(wanted: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """The (width, height) before it is turned to which an image may be reduced."""
    width, height = wanted[::-1] if turn in SIDEWAYS else wanted
    return REDUCING_GAP * width, REDUCING_GAP * height


@contextlib.contextmanager
def _decoding():
    try:
        yield
    except ImageDecodeError:
        raise
    except Exception as error:  # decoders raise nearly anything at damaged files
        raise ImageDecodeError(f"{error}") from error


def _open(source) -> Image.Image:
    """With its header read and its pixels not."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the image upright. Of a PNG only an orientation that stands before the pixels is known."""
    if image.format == "PNG" and image.info.keys().isdisjoint(ORIENTED_BY):
        return None  # getexif would decode the image to look behind it
    return TURNS.get(image.getexif().get(0x0112))


def _reduced(image: Image.Image, factors: tuple[int, int]) -> Image.Image:
    """8-bit RGB of 1/factors of the size, each pixel the mean of those it stands for."""
    if image.mode in ("I", "F"):  # their range is that of the whole image
        return to_rgb(image.reduce(factors))
    across, down = factors
    reduced = Image.new("RGB", (-(-image.width // across), -(-image.height // down)))
    rows = max(1, STRIP_PIXELS // (image.width * down))  # of the reduced image, in a strip
    for row in range(0, reduced.height, rows):
        strip = image.crop((0, row * down, image.width, min((row + rows) * down, image.height)))
        reduced.paste(to_rgb(strip).reduce(factors), (0, row))
    return reduced


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: transparent parts white, more than 8 bits scaled down."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        return Image.fromarray(_to_8_bit(np.asarray(image, dtype=np.float32), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values to [0, 255]: 16 bits by their full range; other integers and floats by the range they keep to."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    largest = values.max(initial=0.0)
    ranges = [65535.0] if mode.startswith("I;16") else [255.0, 65535.0] if mode == "I" else [1.0, 255.0, 65535.0]
    white = next((value for value in ranges if largest <= value), largest)
    return np.clip(values * (255.0 / white), 0, 255).round().astype(np.uint8)


class ImageProcessor:
    """An image, of any size and mode, as the square images that the vision tower sees."""

    def __init__(self, cfg: VLMConfig):
        self.cfg = cfg
        self.side = cfg.vit_img_size
        self.with_global = "global_image_token" in cfg.vlm_extra_tokens

    def __call__(self, source) -> tuple[torch.Tensor, tuple[int, int]]:
        """(float32 [n, 3, S, S], normalised, and the grid (rows, columns) of tiles) of what decode_image takes.

        A 1x1 grid is the image alone; a larger one is, where the config has a global_image_token, the whole image
        made S x S, and then the tiles row by row. Raises ImageDecodeError.
        """
        target = self.target_size(*image_size(source))
        resized = _resize(to_rgb(decode_image(source, target)), target)
        side = self.side
        rows, cols = resized.height // side, resized.width // side
        corners = [(col * side, row * side) for row in range(rows) for col in range(cols)]
        seen = [resized.crop((left, top, left + side, top + side)) for left, top in corners]
        if (rows, cols) != (1, 1) and self.with_global:
            seen.insert(0, _resize(resized, (side, side)))
        tiles = np.empty((len(seen), 3, side, side), dtype=np.float32)
        for tile, image in zip(tiles, seen, strict=True):
            self._normalise(image, tile)
        return torch.from_numpy(tiles), (rows, cols)

    def grid(self, source) -> tuple[int, int]:
        """The grid (rows, columns) of tiles, from the image's header alone. Raises ImageDecodeError."""
        width, height = self.target_size(*image_size(source))
        return height // self.side, width // self.side

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in multiples of S: the longer side at most max_img_size, the shorter in proportion, up."""
        long, short = max(width, height), min(width, height)
        new_long = self.cfg.max_img_size
        if not self.cfg.resize_to_max_side_len:
            new_long = min(new_long, _round_up(long, self.side))
        # In integers: a rounding error must not add a row of tiles.
        new_short = -(-short * new_long // (long * self.side)) * self.side
        return (new_long, new_short) if width >= height else (new_short, new_long)

    def count(self, grid: tuple[int, int]) -> int:
        """How many images [3, S, S] a grid of tiles makes."""
        return 1 if grid == (1, 1) else grid[0] * grid[1] + self.with_global

    def mirror(self, tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The result of __call__ for the image mirrored left to right."""
        first = len(tiles) - grid[0] * grid[1]  # 1 with a global image
        order = np.arange(first, len(tiles)).reshape(grid)[:, ::-1]
        # NumPy: on a busy CPU torch's threads take a hundred times as long for so small a copy.
        return torch.from_numpy(tiles.numpy()[..., ::-1][[*range(first), *order.flatten()]])

    def _normalise(self, image: Image.Image, tile: np.ndarray) -> None:
        """Write the S x S image into the tile, float32 [3, S, S]."""
        scale = np.float32(1.0 / (255.0 * self.cfg.image_std))
        shift = np.float32(self.cfg.image_mean / self.cfg.image_std)
        for channel, band in zip(tile, image.split(), strict=True):  # one after the other: they fit the cache
            np.multiply(np.asarray(band), scale, out=channel, dtype=np.float32)
            channel -= shift


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
