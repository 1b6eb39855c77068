import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny.data import TILE_TOKENS, byte_level_tokenizer, encoded, picture, tiny_vlm, turn

from data.processors import (
    EASY_VQA_VOCAB_SIZE,
    ImageDecodeError,
    ImageProcessor,
    decode_image,
    encode_conversation,
    encode_prompt,
    get_tokenizer,
    image_string,
    to_rgb,
)
from data.sources import load_rows

ONE_TOKEN = {"image_token": "<|image|>"}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level tokenizer with the tile tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    size = byte_level_tokenizer(folder)
    return get_tokenizer(tiny_vlm(lm_tokenizer=str(folder), lm_base_vocab_size=size))


# Tokenizers


def test_embedded_tokenizer_knows_all_of_easy_vqa():
    tokenizer = get_tokenizer(tiny_vlm())
    assert len(tokenizer) == EASY_VQA_VOCAB_SIZE + len(TILE_TOKENS)
    seen = set()
    for split in ("train", "test"):
        for row in load_rows("easy-vqa", split=split):
            seen |= {text for turn in row["texts"] for text in (turn["user"], turn["assistant"])}
    assert len(seen) > 100
    for text in seen:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_embedded_tokenizer_round_trips_chatml():
    tokenizer = get_tokenizer(tiny_vlm())
    text = "<|im_start|>user\nwhat is the blue shape?<|im_end|>\n<|im_start|>assistant\ncircle<|im_end|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("What is the BLUE shape ?") == tokenizer.encode("what is the blue shape?")
    assert tokenizer.decode(ids, skip_special_tokens=True).split("\n")[-2] == "circle"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a purple shape")) == ["a", "<unk>", "shape"]


def test_extra_tokens_follow_the_base_vocabulary(byte_level):
    for tokenizer in (get_tokenizer(tiny_vlm()), byte_level):
        base = len(tokenizer) - len(TILE_TOKENS)
        assert tokenizer.convert_tokens_to_ids(list(TILE_TOKENS.values())) == list(range(base, len(tokenizer)))
        assert tokenizer.eos_token == "<|im_end|>"
        assert tokenizer.pad_token_id is not None


def test_wrong_base_vocabulary_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match=f"--lm_base_vocab_size 99: must be {EASY_VQA_VOCAB_SIZE}"):
        get_tokenizer(tiny_vlm(lm_base_vocab_size=99))
    tokens = {"image_token": "<|image|>", "global_image_token": "<|im_end|>"}
    with pytest.raises(ValueError, match=r"--vlm_extra_tokens: <\|image\|> has id 36 .* must have 35"):
        get_tokenizer(tiny_vlm(vlm_extra_tokens=tokens, lm_base_vocab_size=EASY_VQA_VOCAB_SIZE - 1))
    with pytest.raises(ValueError, match="--lm_tokenizer "):
        get_tokenizer(tiny_vlm(lm_tokenizer=str(tmp_path)))


def test_checkpoint_tokenizer_wins_and_is_the_same(tmp_path):
    cfg = tiny_vlm()
    tokenizer = get_tokenizer(cfg)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vit_hidden_dim": 16}')  # a checkpoint's, not a transformers model's
    cfg.lm_tokenizer = "not/there"
    loaded = get_tokenizer(cfg, tmp_path)
    text = "<|im_start|>user\n<|image|><row_1_col_2>is there a red shape?<|im_end|>\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.chat_template == tokenizer.chat_template


# Conversations


def walked_labels(tokenizer, ids: list[int]) -> list[int]:
    """Labels by walking over the ids of a ChatML conversation, without a look at characters."""
    vocabulary = tokenizer.get_vocab()
    start, end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
    role = tokenizer.encode("assistant\n", add_special_tokens=False)
    labels = [-100] * len(ids)
    speaking = False
    i = 0
    while i < len(ids):
        if ids[i] == start:
            speaking = ids[i + 1 : i + 1 + len(role)] == role
            i += len(role) + 1 if speaking else 1
            continue
        if speaking:
            labels[i - 1] = ids[i]
        speaking = speaking and ids[i] != end
        i += 1
    return labels


CONVERSATIONS = [
    [("what is the shape?", "circle")],
    [("what?", "the shape is red.\n\nthe user is the assistant"), ("assistant\nis it?", "."), ("no", "yes  no ")],
    [("Grüße, 世界 😀", "é́ 😀😀 مرحبا"), ("\U0001f468‍\U0001f469‍\U0001f467", "ﬁ ½ \t x")],
    [(f"is {i} the shape?", "red " * i) for i in range(1, 24)],
]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_labels_against_a_walk_over_the_ids(kind, number, byte_level):
    tokenizer = byte_level if kind == "bytes" else get_tokenizer(tiny_vlm())
    turns = [turn(user, assistant) for user, assistant in CONVERSATIONS[number]]
    images = image_string([(1, 1), (2, 1)], tiny_vlm())
    ids, labels = encode_conversation(tokenizer, turns, images)
    text = "".join(
        f"<|im_start|>user\n{images if i == 0 else ''}{t['user']}<|im_end|>\n"
        f"<|im_start|>assistant\n{t['assistant']}<|im_end|>\n"
        for i, t in enumerate(turns)
    )
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert labels == walked_labels(tokenizer, ids)
    assert sum(label == tokenizer.eos_token_id for label in labels) == len(turns)
    if kind == "bytes":
        spoken = tokenizer.decode([label for label in labels if label != -100])
        assert spoken == "".join(t["assistant"] + "<|im_end|>" for t in turns)


def test_first_label_stands_where_the_prompt_ends(byte_level):
    image = image_string([(1, 1)], tiny_vlm())
    ids, labels = encode_conversation(byte_level, [turn("what?", "the shape")], image)
    prompt = encode_prompt(byte_level, "what?", image)
    assert ids[: len(prompt)] == prompt
    assert next(i for i, label in enumerate(labels) if label != -100) == len(prompt) - 1


def test_image_string_of_grids():
    slots = "<|image|>" * 4
    whole = "<|global_image|>" + slots
    assert image_string([(1, 1), (1, 1)], tiny_vlm()) == whole * 2
    tiles = f"<row_1_col_1>{slots}<row_1_col_2>{slots}<row_2_col_1>{slots}<row_2_col_2>{slots}"
    assert image_string([(2, 2)], tiny_vlm()) == whole + tiles
    assert image_string([(1, 1)], tiny_vlm(vlm_extra_tokens=ONE_TOKEN)) == slots
    without_global = {name: token for name, token in TILE_TOKENS.items() if name != "global_image_token"}
    assert image_string([(2, 2)], tiny_vlm(vlm_extra_tokens=without_global)) == tiles
    assert image_string([], tiny_vlm()) == ""


# Images


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
    processor = ImageProcessor(tiny_vlm(resize_to_max_side_len=enlarge))
    for width in (1, 15, 16, 17, 33, 48, 63, 64, 65, 1000):
        for height in (1, 16, 31, 32, 33, 64, 70, 999, 5000):
            assert processor.target_size(width, height) == slow_size(width, height, 16, 64, enlarge), (width, height)


@pytest.mark.parametrize("with_global", [True, False])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (64, 64), (16, 16), (1, 1), (5000, 10)])
def test_tiles_against_cropping(size, with_global):
    tokens = {name: token for name, token in TILE_TOKENS.items() if with_global or name != "global_image_token"}
    cfg = tiny_vlm(vlm_extra_tokens=tokens, resize_to_max_side_len=False, image_mean=0.25, image_std=0.5)
    processor = ImageProcessor(cfg)
    image = picture(*size)
    tiles, (rows, cols) = processor(image)
    width, height = slow_size(*size, 16, 64, False)
    assert (rows, cols) == (height // 16, width // 16)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    boxes = [(c * 16, r * 16, c * 16 + 16, r * 16 + 16) for r in range(rows) for c in range(cols)]
    wanted = [resized.crop(box) for box in boxes]
    if with_global and len(boxes) > 1:
        wanted.insert(0, resized.resize((16, 16), Image.Resampling.BICUBIC))
    assert tiles.dtype == torch.float32
    assert tiles.shape == (len(wanted), 3, 16, 16)
    assert processor.count((rows, cols)) == len(wanted)
    for tile, image in zip(tiles, wanted, strict=True):
        torch.testing.assert_close(tile, (torch.tensor(np.array(image)).permute(2, 0, 1) / 255 - 0.25) / 0.5)
    assert image_string([(rows, cols)], cfg).count("<|image|>") == len(wanted) * cfg.mp_image_token_length


@pytest.mark.parametrize("size", [(16, 16), (64, 32), (48, 64)])
def test_mirror_is_the_mirrored_image(size):
    processor = ImageProcessor(tiny_vlm(resize_to_max_side_len=False))
    image = picture(*size)
    tiles, grid = processor(image)
    torch.testing.assert_close(processor.mirror(tiles, grid), processor(ImageOps.mirror(image))[0], atol=0.02, rtol=0)


def grey(image: Image.Image) -> list[int]:
    """The grey values of the first row."""
    rgb = np.asarray(to_rgb(image))
    assert rgb.shape[2] == 3
    assert (rgb == rgb[..., :1]).all()
    return rgb[0, :, 0].tolist()


def test_to_rgb_scales_deep_images_to_8_bits():
    def deep(values, dtype):
        return Image.fromarray(np.array([values], dtype=dtype))

    assert grey(deep([0, 32896, 65535], np.uint16)) == [0, 128, 255]
    assert grey(deep([0, 200], np.uint16)) == [0, 1]
    assert grey(deep([0, 128, 255], np.int32)) == [0, 128, 255]
    assert grey(deep([-5, 32896, 65535], np.int32)) == [0, 128, 255]
    assert grey(deep([0, 502_000, 1_000_000], np.int32)) == [0, 128, 255]
    assert grey(deep([0.0, 0.5, 1.0, np.nan, np.inf], np.float32)) == [0, 128, 255, 0, 0]
    assert grey(deep([0.0, 64.0], np.float32)) == [0, 64]
    assert grey(deep([0.0, 0.0], np.float32)) == [0, 0]
    sixteen = decode_image(encoded(deep([0, 32896, 65535], np.uint16)))
    assert grey(sixteen) == [0, 128, 255]


def test_to_rgb_puts_transparent_images_on_white():
    assert grey(Image.new("RGBA", (1, 1), (0, 0, 0, 0))) == [255]
    assert grey(Image.new("RGBA", (1, 1), (0, 0, 0, 255))) == [0]
    assert grey(Image.new("LA", (1, 1), (100, 0))) == [255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 90, 90, 90])
    palette.putpixel((1, 0), 1)
    assert grey(palette) == [0, 90]
    palette.info["transparency"] = 0
    assert grey(palette) == [255, 90]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_to_rgb_of_every_mode_shows_the_same_picture(mode):
    image = Image.new("RGB", (4, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    converted = image.convert("RGBA").convert("PA") if mode == "PA" else image.convert(mode)
    assert np.abs(np.asarray(to_rgb(converted), dtype=int) - np.asarray(image)).max() <= 3


def test_decode_takes_every_kind_of_source(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    data = encoded(image)
    for source in (
        image,
        data,
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"path": str(tmp_path / "a.png")},
    ):
        assert np.array_equal(np.asarray(decode_image(source)), np.asarray(image))


def test_decode_turns_as_exif_says():
    image = picture(4, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (4, 2))
    turned.paste(image)
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (2, 4)


def test_decode_of_damaged_images_is_one_kind_of_error(monkeypatch):
    png, jpeg = encoded(picture(64, 64)), encoded(picture(64, 64), "JPEG")
    broken = png[:40] + b"\xff\xff\xff\xff" + png[44:]
    for source in (png[:200], jpeg[:300], broken, b"junk", b"", None, {"bytes": None, "path": None}, "/nowhere.png"):
        with pytest.raises(ImageDecodeError):
            decode_image(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageDecodeError, match="exceeds limit"):
        decode_image(png)
