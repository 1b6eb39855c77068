"""data.processors: what VLMEvalKit's wrapper for nanoVLM (vlmeval/vlm/nanovlm.py, 2026-08) uses is here."""

import contextlib

import pytest
import torch
from tiny.data import TILE_TOKENS, picture
from tiny.families import CROP_EXTRA, FAMILIES
from tiny.grades import make_model

from data import easy_vqa
from eval.asking import Asker

QUESTION = "what color is the shape?"
WITHOUT_GLOBAL = {name: token for name, token in TILE_TOKENS.items() if name != "global_image_token"}


def save_model(folder, tokens, **changes):
    """A checkpoint whose answers depend on picture and question."""
    known = {"lm_base_vocab_size": easy_vqa.VOCAB_SIZE, "lm_tokenizer": easy_vqa.NAME}
    model = make_model(vlm_extra_tokens=tokens, extra_token_amount=len(tokens), **known, **changes)
    model.cfg.lm_eos_token_id = easy_vqa.tokenizer().eos_token_id  # as train.py sets it
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


class TheirWrapper:
    """What VLMEvalKit does with nanoVLM's modules, step by step."""

    def __init__(self, path, device="cpu"):
        from data.processors import get_image_processor, get_tokenizer
        from models.vision_language_model import VisionLanguageModel

        self.model, self.device = VisionLanguageModel.from_pretrained(path).to(device).eval(), device
        cfg = self.cfg = self.model.cfg
        extra, template = getattr(cfg, "vlm_extra_tokens", None), getattr(cfg, "lm_chat_template", None)
        self.tokenizer = get_tokenizer(cfg.lm_tokenizer, extra, template)
        stored = getattr(self.model, "_saved_config_keys", None)
        largest, enlarge = cfg.vit_img_size, False
        if stored is not None and "vlm_extra_tokens" in stored:
            largest = getattr(cfg, "max_img_size", cfg.vit_img_size)
            enlarge = getattr(cfg, "resize_to_max_side_len", False)
        self.processor = get_image_processor(largest, cfg.vit_img_size, enlarge)

    def generate(self, prompt, images, max_new_tokens):
        from data.processors import get_image_string

        processed, grids = [], []
        for image in images:
            tiles, grid = self.processor(image)
            if not hasattr(self.tokenizer, "global_image_token") and grid[0] * grid[1] == len(tiles) - 1:
                tiles = tiles[1:]
            processed.append(tiles)
            grids.append(grid)
        shown = "".join(get_image_string(self.tokenizer, [grid], self.cfg.mp_image_token_length) for grid in grids)
        messages = [{"role": "user", "content": shown + prompt}]
        text = self.tokenizer.apply_chat_template([messages], tokenize=False, add_generation_prompt=True)
        text = text[0] if isinstance(text, list) else text
        length = self.cfg.lm_max_position_embeddings
        inputs = self.tokenizer([text], return_tensors="pt", padding=False, truncation=True, max_length=length)
        self.ids = inputs["input_ids"].to(self.device)
        mask = inputs["attention_mask"].to(self.device)
        options = {"max_new_tokens": max_new_tokens, "greedy": True}
        generated = self.model.generate(self.ids, processed or None, mask, **options)
        return self.tokenizer.batch_decode(generated, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize(
    ("tokens", "side", "sizes", "layout"),
    [
        (TILE_TOKENS, 64, [(40, 25)], "tiles"),  # tiles and the whole image
        (TILE_TOKENS, 64, [(40, 25), (16, 16), (64, 20)], "tiles"),
        (WITHOUT_GLOBAL, 64, [(40, 25)], "tiles"),
        (WITHOUT_GLOBAL, 64, [(16, 16)], "tiles"),
        ({"image_token": "<|image|>"}, 16, [(40, 25)], "tiles"),  # no tiles, as in nanoVLM-222M
        (TILE_TOKENS, 64, [], "tiles"),
        ({"image_token": "<|image|>"}, 64, [(40, 25)], "resize"),  # one square
        (TILE_TOKENS, 64, [(40, 25)], "resize"),
    ],
)
@pytest.mark.parametrize("enlarge", [False, True])
def test_vlmevalkit_asks_as_we_do(tmp_path, tokens, side, sizes, enlarge, layout):
    sized = {"max_img_size": side, "resize_to_max_side_len": enlarge, "lm_max_length": 512}
    folder = save_model(tmp_path / "model", tokens, image_layout=layout, **sized)
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    ours = Asker(folder, torch.device("cpu"), contextlib.nullcontext())
    question = ours.reader.read({"user": QUESTION}, images)
    theirs = TheirWrapper(folder)
    answer = theirs.generate(QUESTION, images, 8)
    assert theirs.ids[0].tolist() == question.prompts[0]
    assert [answer] == ours.answer([question], 8)
    assert answer


def test_a_model_of_crops_is_refused(tmp_path):
    """Which VLMEvalKit would show tiles, or of a small picture the whole alone."""
    rest = {name: value for name, value in FAMILIES["molmo2"].items() if "extra_token" not in name}
    wrapper = TheirWrapper(save_model(tmp_path, CROP_EXTRA, **rest))
    with pytest.raises(ValueError, match="--image_layout molmo_crops: must be tiles here"):
        wrapper.generate(QUESTION, [picture()], 4)


def test_a_model_of_padded_squares_is_refused(tmp_path):
    """Which VLMEvalKit would show stretched."""
    folder = save_model(tmp_path, TILE_TOKENS, image_layout="resize", keep_aspect=True, lm_max_length=512)
    with pytest.raises(ValueError, match="--keep_aspect True: must be False here"):
        TheirWrapper(folder)


def test_the_tokens_are_attributes_as_in_nanovlm(tmp_path):
    tokenizer = TheirWrapper(save_model(tmp_path / "model", TILE_TOKENS, max_img_size=64)).tokenizer
    assert (tokenizer.image_token, tokenizer.r1c1) == ("<|image|>", "<row_1_col_1>")
    assert tokenizer.image_token_id == easy_vqa.VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(tokenizer.image_token_id) == tokenizer.image_token


def test_a_single_tile_without_a_global_token_has_its_name(tmp_path):
    from data.processors import get_image_string

    tokenizer = TheirWrapper(save_model(tmp_path / "model", WITHOUT_GLOBAL, max_img_size=64)).tokenizer
    assert get_image_string(tokenizer, [(1, 1)], 2) == "<row_1_col_1><|image|><|image|>"


def test_a_template_that_is_not_given_is_the_tokenizers_own_or_chatml():
    from data.processors import get_tokenizer

    assert "<|im_start|>" in get_tokenizer(easy_vqa.NAME).chat_template
    assert get_tokenizer(easy_vqa.NAME, None, "{{ 'x' }}").chat_template == "{{ 'x' }}"
