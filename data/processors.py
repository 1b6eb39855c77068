"""nanoVLM's names for the tokenizer and the image processor, for programs that were written for its layout.

VLMEvalKit's wrapper (vlmeval/vlm/nanovlm.py) is one. The work is that of data.text and data.images: texts and tiles are
those that this repository trains on. New code takes data.text.get_tokenizer, which knows a checkpoint's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data import text
from data.images import ImageProcessor
from models.config import CHATML, VLMConfig


def get_tokenizer(
    name: str, extra_special_tokens: Mapping[str, str] | None = None, chat_template: str | None = None
) -> text.Tokenizer:
    """The tokenizer of a hub id, a local folder or easy-vqa, with the extra tokens, each also an attribute by its name.

    chat_template: by default the tokenizer's own, or else ChatML. Raises ValueError.
    """
    extra = dict(extra_special_tokens or {})
    plain = text.named_tokenizer(name)
    cfg = VLMConfig(
        lm_tokenizer=name,
        lm_base_vocab_size=text.base_vocab_size(plain, extra.values()),
        vlm_extra_tokens=extra,
        extra_token_amount=len(extra),
        lm_chat_template=chat_template or plain.chat_template or CHATML,
    )
    tokenizer = text.get_tokenizer(cfg)
    for attribute, token in extra.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def get_image_processor(
    max_img_size: int, splitted_image_size: int, resize_to_max_side_len: bool = False
) -> ImageProcessor:
    """Called with an image it gives (uint8 [n, 3, S, S], (rows, columns)), S splitted_image_size: the whole image
    first, then its tiles, or the image alone where there is one tile. The model normalises the pixels itself."""
    side, enlarge = splitted_image_size, resize_to_max_side_len
    return ImageProcessor(VLMConfig(vit_img_size=side, max_img_size=max_img_size, resize_to_max_side_len=enlarge))


def get_image_string(
    tokenizer: text.Tokenizer, splitted_image_counts: Sequence[tuple[int, int]], mp_image_token_length: int
) -> str:
    """The text that stands for images of these grids (rows, columns). tokenizer: of get_tokenizer.

    Raises ValueError for a model of crops: the programs that ask here cut tiles, which it was never shown.
    """
    if hasattr(tokenizer, "low_res_im_start"):
        raise ValueError("--image_layout molmo_crops: must be tiles here; generate.py and evaluate.py cut its crops")
    names = ["image_token", "global_image_token"]
    names += [
        f"r{row}c{column}"
        for rows, columns in splitted_image_counts
        for row in range(1, rows + 1)
        for column in range(1, columns + 1)
    ]
    tokens = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
    cfg = VLMConfig(vlm_extra_tokens=tokens, mp_image_token_length=mp_image_token_length)
    return text.image_string(list(splitted_image_counts), cfg)
