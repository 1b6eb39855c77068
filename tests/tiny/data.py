"""Tiny configs, tokenizers, images and rows for the tests of `data`."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data import easy_vqa
from data.datasets import VQADataset
from data.formats import Part
from data.images import ImageProcessor
from data.streams import RowStream
from data.text import get_tokenizer
from models.config import TrainConfig, VLMConfig

TILE_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | {
    f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)
}


def tiny_vlm(**changes) -> VLMConfig:
    """16-pixel tiles, 4 image tokens each, at most 4 x 4 tiles, the embedded tokenizer."""
    values = {
        "vit_img_size": 16,
        "vit_patch_size": 4,
        "mp_pixel_shuffle_factor": 2,
        "mp_image_token_length": 4,
        "max_img_size": 64,
        "lm_base_vocab_size": easy_vqa.VOCAB_SIZE,
        "lm_tokenizer": easy_vqa.NAME,
        "lm_max_length": 512,
        "vlm_extra_tokens": TILE_TOKENS,
    } | changes
    return VLMConfig(**values | {"extra_token_amount": len(values["vlm_extra_tokens"])})


def tiny_train(**changes) -> TrainConfig:
    return TrainConfig(**{"max_sample_length": 512, "batch_size": 4, "eval_batch_size": 4} | changes)


def picture(width: int = 16, height: int = 16, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def turn(user: str = "is there a red shape?", assistant: str = "yes", source: str | None = None) -> dict:
    return {"user": user, "assistant": assistant, "source": source}


def row(images=None, texts=None, name: str = "row", **more) -> dict:
    images = [encoded(picture())] if images is None else images
    return {"images": images, "texts": [turn()] if texts is None else texts, "id": name} | more


def dataset(rows, vlm=None, train_cfg=None, train: bool = True, cache: bool = False) -> VQADataset:
    vlm = vlm or tiny_vlm()
    return VQADataset(rows, get_tokenizer(vlm), ImageProcessor(vlm), vlm, train_cfg or tiny_train(), train, cache)


def byte_level_tokenizer(folder, bos: str | None = None) -> int:
    """Write a small byte-level BPE tokenizer with ChatML's tokens into the folder; returns its size.

    bos: which of its special tokens it puts before a text.
    """
    from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = ["user\nassistant\nwhat is the colour of the shape\n\n\nthe shape is red"] * 3
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=320, special_tokens=special, show_progress=False)
    backend = Tokenizer.from_str(made.to_str())
    if bos:
        before = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B:1", [(bos, backend.token_to_id(bos))])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), before])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos).save_pretrained(folder)
    return made.get_vocab_size()


def write_rows(folder: Path, count: int, text=lambda i: False, sizes=((16, 16),)) -> Path:
    """Rows in the_cauldron's shape in a new folder. text: whether row i is text alone; the image of one is none.

    sizes: of the images, in turn.
    """
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        if not text(i):
            (folder / f"{i}.png").write_bytes(
                encoded(picture(*sizes[i % len(sizes)], seed=i)) if i != 3 else b"not an image"
            )
        turns = [turn(assistant="yes" if i % 2 else "no"), turn("what?", "red")]
        lines.append(json.dumps({"images": [] if text(i) else [f"{i}.png"], "texts": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


COLORS = ["red", "blue", "green", "gray", "teal", "black", "brown", "yellow"]


def some_rows(count: int) -> list[dict]:
    """Rows of 0, 1 or 2 images and 1 to 4 turns."""
    return [
        row(
            [encoded(picture(16 + 16 * (i % 2), 16, seed=i))] * (i % 3),
            [turn("is " + "the " * t + f"{COLORS[(i + t) % 8]}?", COLORS[t], "color") for t in range(1 + i % 4)],
            name=f"row{i}",
        )
        for i in range(count)
    ]


def stream(count: int, junk: bool = False) -> RowStream:
    """Of two shards."""
    import datasets

    rows = [
        {"images": [{"bytes": b"junk" if junk else encoded(picture(seed=i)), "path": None}], "texts": [turn()]}
        for i in range(count)
    ]
    table = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    return RowStream([Part("stream", table.with_format("arrow"))])


STREAM_OF_10 = [f"stream[{shard}]#{i}" for shard in (0, 1) for i in range(5)]


def drawn(data, count: int) -> list[dict]:
    """The next training batches of a Data, which are used."""
    batches = [next(data) for _ in range(count)]
    data.mark_used(batches)
    return batches


def same(one: dict, other: dict) -> bool:
    """Whether two batches are equal to the last bit; how long a run waited for them does not count."""
    import torch

    one, other = ({name: value for name, value in batch.items() if name != "wait_s"} for batch in (one, other))

    def equal(a, b) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
