"""Checkpoints as transformers reads them: the same ids, pixels, logits and answers; and back again."""

import contextlib
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny.data import TILE_TOKENS, byte_level_tokenizer, picture, tiny_vlm
from tiny.families import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor

from data.images import ImageProcessor
from data.text import encode_chat, get_tokenizer
from eval.asking import Asker
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from scripts.export_transformers import OURS, back, export, inexpressible, keeps_positions, main
from scripts.processing_nanovlm import NanoVLMImageProcessor

ONE = {"max_img_size": 16, "vlm_extra_tokens": {"image_token": "<|image|>"}}
GLOBAL = {"max_img_size": 16, "vlm_extra_tokens": {"image_token": "<img>", "global_image_token": "<|global_image|>"}}
NAMED = {"max_img_size": 16, "vlm_extra_tokens": {"image_token": "<|image|>", "r1c1": "<row_1_col_1>"}}
WITHOUT_GLOBAL = {name: token for name, token in TILE_TOKENS.items() if name != "global_image_token"}
SHAPE = {
    "vit_model_type": "scratch", "lm_model_type": "scratch", "lm_tokenizer": "easy-vqa", "vit_hidden_dim": 16,
    "vit_inter_dim": 32, "vit_n_heads": 2, "vit_n_blocks": 2, "lm_hidden_dim": 16, "lm_inter_dim": 32, "lm_n_heads": 4,
    "lm_n_kv_heads": 2, "lm_n_blocks": 2,
}  # fmt: skip
QUESTION = "what color is the shape?"
CASES = {
    "one tile": ONE,
    "one tile, its own head": ONE | {"lm_tie_weights": False, "lm_re_base": 500},
    "one tile, global token, mean 0": GLOBAL | {"image_mean": 0.0, "image_std": 1.0},
    "quickstart": ONE | {
        "image_mean": 0.94, "vit_n_heads": 1, "vit_img_size": 48, "max_img_size": 48, "mp_pixel_shuffle_factor": 4,
        "mp_image_token_length": 9,
    },
    "one tile with its name": NAMED,
    "tiles": {},
    "tiles without a global token, of small pictures": {
        "vlm_extra_tokens": WITHOUT_GLOBAL, "resize_to_max_side_len": False,
    },
    "tiles of small pictures": {"resize_to_max_side_len": False},
}  # fmt: skip


def save(folder, **changes) -> Asker:
    """A random checkpoint."""
    torch.manual_seed(0)
    model = VisionLanguageModel(tiny_vlm(**SHAPE | changes))
    with torch.no_grad():
        model.decoder.token_embedding.weight.mul_(2)
    model.save_pretrained(folder)
    return Asker(folder, torch.device("cpu"), contextlib.nullcontext())


def load(folder, tiles: bool):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=tiles)


def asked(images, text=QUESTION) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_exported_model_is_the_same_model(tmp_path, name):
    asker, tiles = save(tmp_path / "ours", **CASES[name]), name.startswith("tiles")
    assert main([str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    theirs, processor = load(tmp_path / "theirs", tiles)
    size = asker.model.cfg.vit_img_size
    small, other, large = picture(size, size), picture(size, size, seed=1), picture(3 * size, 2 * size - 5, seed=2)
    black = Image.new("RGB", (size, size))  # with mean 0 all pixels are 0, as of pictures that are not there
    for images in ([], [small], [large], [small, other], [black, small]):
        batch = processor.apply_chat_template(
            asked(images), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        question = asker.reader.read({"user": QUESTION}, images)
        ids, pixels = torch.tensor(question.prompts), batch.get("pixel_values")
        assert torch.equal(batch["input_ids"], ids)
        if images:
            # Where the picture has another size, Pillow's bicubic against torch's: see data.images. Without tiles
            # transformers resizes by Pillow where it has no torchvision.
            levels = 2.5 if images == [large] and not tiles else 0.01
            scale, mean = 255 * asker.model.cfg.image_std, 255 * asker.model.cfg.image_mean
            assert pixels.shape[:2] == (1, len(question.images))
            assert (pixels[0] * scale + mean - question.images.float()).abs().max() < levels
        logits = asker.model(ids, pixels if pixels is None else pixels[0])[0]
        torch.testing.assert_close(theirs(**batch).logits, logits, atol=2e-5, rtol=2e-5)
        answer = theirs.generate(**batch, max_new_tokens=6)[0, ids.shape[1] :]
        stop = asker.tokenizer.eos_token_id
        ours = asker.model.generate(
            ids, pixels if pixels is None else pixels[0], max_new_tokens=6, greedy=True, eos_token_id=stop
        )
        assert answer.tolist() == ours[0].tolist()


@pytest.mark.parametrize("changes", [ONE, {}], ids=["one tile", "tiles"])
@torch.no_grad()
def test_a_padded_batch_answers_as_each_alone(tmp_path, changes):
    asker = save(tmp_path / "ours", **changes)
    (tmp_path / "theirs.tmp" / "of an export that was killed").mkdir(parents=True)
    export(tmp_path / "ours", tmp_path / "theirs")
    theirs, processor = load(tmp_path / "theirs", not changes)
    images = [[picture()], [picture(seed=1), picture(40, 16, seed=2)]]
    conversations = [asked(images[0]), asked(images[1], "is it red?")]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    made = theirs.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    questions = [
        asker.reader.read({"user": text}, own) for text, own in zip((QUESTION, "is it red?"), images, strict=True)
    ]
    answers = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
    assert answers == [asker.answer([question], 5)[0] for question in questions]
    if not changes:  # a plain list of pictures is dealt out to the texts
        flat = processor(text=texts, images=[*images[0], *images[1]], padding=True, return_tensors="pt")
        assert torch.equal(flat["pixel_values"], batch["pixel_values"])
        with pytest.raises(ValueError, match=r"there are \[2\] images|there are \[1, 1\] images"):
            processor(text=texts[:1], images=images[1])


def test_the_template_writes_conversations_as_they_are_trained(tmp_path):
    """Also with a byte-level tokenizer, whose line breaks and spaces would show a difference."""
    base = byte_level_tokenizer(tmp_path / "tokenizer")
    asker = save(tmp_path / "ours", **ONE, lm_base_vocab_size=base, lm_tokenizer=str(tmp_path / "tokenizer"))
    asker.tokenizer.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs")
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    said = ["  two\n\n\nlines 12 é 日", "red", "and\tthis?"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=True)]
    for form in (messages, [one | {"content": [{"type": "text", "text": one["content"]}]} for one in messages]):
        text = processor.apply_chat_template(form, add_generation_prompt=True)
        assert processor.tokenizer(text)["input_ids"] == encode_chat(asker.tokenizer, said)
    assert processor.tokenizer.eos_token_id == asker.tokenizer.eos_token_id


@pytest.mark.parametrize("changes", [ONE, {}], ids=["one tile", "tiles"])
def test_a_tokenizer_with_a_bos_adds_none(tmp_path, changes):
    """As in training. What its post-processor does to offsets stays, for a run that goes on from it."""
    base = byte_level_tokenizer(tmp_path / "tokenizer", bos="<|endoftext|>")
    asker = save(tmp_path / "ours", **changes, lm_base_vocab_size=base, lm_tokenizer=str(tmp_path / "tokenizer"))
    bos = asker.tokenizer.bos_token_id
    assert asker.tokenizer("red")["input_ids"][0] == bos
    asker.tokenizer.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs")
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs", trust_remote_code=not changes)
    batch = processor.apply_chat_template(
        asked([picture()]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == asker.reader.read({"user": QUESTION}, [picture()]).prompts
    theirs = processor.tokenizer
    assert bos not in theirs("red")["input_ids"] + theirs("red", "blue")["input_ids"]
    assert theirs.bos_token_id == bos
    same = [one.backend_tokenizer.encode("the red", add_special_tokens=False) for one in (theirs, asker.tokenizer)]
    assert same[0].offsets == same[1].offsets


def test_the_file_for_tiles_cuts_pictures_as_training_does():
    for enlarge, with_global in ((True, True), (False, True), (False, False)):
        tokens = dict(tiny_vlm().vlm_extra_tokens)
        if not with_global:
            del tokens["global_image_token"]
        ours = ImageProcessor(tiny_vlm(resize_to_max_side_len=enlarge, vlm_extra_tokens=tokens))
        theirs = NanoVLMImageProcessor(16, 64, enlarge, with_global, 0.0, 1 / 255)
        for width, height in ((1, 1), (16, 16), (17, 16), (200, 3), (31, 64), (65, 33), (128, 127)):
            image = picture(width, height, seed=width)
            (tiles, grid), (pixels, same) = ours(image), theirs.tiles(image)
            assert grid == same
            torch.testing.assert_close(pixels, tiles.float(), atol=1e-3, rtol=0)


def test_the_file_for_tiles_reads_every_kind_of_picture_as_training_does(tmp_path):
    ours, theirs = ImageProcessor(tiny_vlm()), NanoVLMImageProcessor(16, 64, image_mean=0.0, image_std=1 / 255)
    clear = picture(40, 20, "RGBA")
    clear.putalpha(picture(40, 20, "L", seed=1))
    palette = picture(40, 20, "P")
    palette.info["transparency"] = palette.getpixel((3, 3))
    noise = np.random.default_rng(0).integers(0, 4096, (20, 40))
    deep = {
        f"{number}_bits": Image.fromarray((noise * scale).astype(np.uint16)) for number, scale in ((12, 1), (16, 16))
    }
    float_grey = {"float": Image.fromarray((noise / 4095).astype(np.float32))}
    plain = {mode: picture(40, 20, mode) for mode in ("RGB", "L", "1", "CMYK", "LA")}
    pictures = {"clear": clear, "palette": palette} | deep | float_grey | plain
    for name, image in pictures.items():
        kind = "tiff" if name in ("float", "CMYK") else "png"
        image.save(tmp_path / f"{name}.{kind}")
    for kind in ("jpg", "png", "tiff", "webp"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        picture(40, 20).save(tmp_path / f"turned.{kind}", exif=exif)
    paths = sorted(tmp_path.iterdir())
    for source in (*pictures.values(), *paths, *map(str, paths), *map(Image.open, paths)):
        tiles, grid = ours(source)
        pixels, same = theirs.tiles(source)
        assert grid == same
        torch.testing.assert_close(pixels, tiles.float(), atol=1e-3, rtol=0)


def test_back_again_nothing_has_changed(tmp_path):
    for name, changes in CASES.items():
        asker = save(tmp_path / name, **changes)
        export(tmp_path / name, tmp_path / f"{name} hf")
        assert main(["--back", str(tmp_path / f"{name} hf"), str(tmp_path / f"{name} again")]) == 0
        again = VisionLanguageModel.from_pretrained(tmp_path / f"{name} again")
        assert again.cfg == asker.model.cfg
        ours = asker.model.state_dict()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in again.state_dict().items())
        tokenizer = get_tokenizer(again.cfg, tmp_path / f"{name} again")
        assert tokenizer.get_vocab() == asker.tokenizer.get_vocab()
        assert tokenizer.chat_template == asker.tokenizer.chat_template


@torch.no_grad()
def test_an_adapter_comes_back_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    asker = save(tmp_path / "ours", **ONE)
    export(tmp_path / "ours", tmp_path / "theirs")
    theirs, processor = load(tmp_path / "theirs", False)
    adapted = get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    back(tmp_path / "adapter", tmp_path / "again")
    again = VisionLanguageModel.from_pretrained(tmp_path / "again")
    batch = processor(text="<|image|>is it red?", images=picture(), return_tensors="pt")
    logits, _ = again(batch["input_ids"], batch["pixel_values"][0])
    torch.testing.assert_close(logits, adapted(**batch).logits, atol=2e-5, rtol=2e-5)
    assert (logits - asker.model(batch["input_ids"], batch["pixel_values"][0])[0]).abs().max() > 0.01


def test_trl_trains_it_and_the_result_comes_back(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    asker = save(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs")
    model, processor = load(tmp_path / "theirs", True)
    prompt, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "red"}
    rows = [{"images": [picture(20 + i, 16, seed=i)], "prompt": [prompt], "completion": [answer]} for i in range(4)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, max_length=None, save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert processor.tokenizer.decode([label for label in labels[0] if label >= 0]).startswith("red<|im_end|>")
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    back(tmp_path / "trained", tmp_path / "again")
    again = VisionLanguageModel.from_pretrained(tmp_path / "again")
    assert again.cfg == asker.model.cfg
    trained = trainer.model.state_dict()["model.connector.modality_projection.proj.weight"]
    assert torch.equal(again.MP.proj.weight, trained)
    assert not torch.equal(trained, asker.model.MP.proj.weight)


def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys):
    assert not keeps_positions(19)
    assert all(keeps_positions(side) for side in (12, 14, 16, 24, 27, 32))
    wrong = tiny_vlm(**SHAPE, lm_attn_scaling=1.5, vit_img_size=76, max_img_size=76, mp_pixel_shuffle_factor=1,
                     mp_image_token_length=361)  # fmt: skip
    assert [problem.split(":")[0] for problem in inexpressible(wrong)] == [
        "lm_attn_scaling 1.5", "vit_img_size 76 / vit_patch_size 4 = 19",
    ]  # fmt: skip
    other = tiny_vlm(vit_architecture="clip", vit_feature_layers=[-1], lm_qk_norm=True, lm_qkv_bias=True,
                     mp_type="linear", mp_merge="add", image_mean=[0.1, 0.2, 0.3])  # fmt: skip
    assert [problem.split(":")[0] for problem in inexpressible(other)] == [
        "vit_architecture clip", "vit_feature_layers [-1]", "lm_qk_norm True", "lm_qkv_bias True", "mp_type linear",
        "mp_merge add", "image_mean [0.1, 0.2, 0.3], image_std 0.5",
    ]  # fmt: skip
    crops = inexpressible(tiny_vlm(**FAMILIES["molmo2"]))
    assert "image_layout molmo_crops" in [problem.split(":")[0] for problem in crops]
    VisionLanguageModel(wrong).save_pretrained(tmp_path / "wrong")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "smolvlm"}')
    for arguments, problem in (
        ([tmp_path / "wrong", tmp_path / "new"], "lm_attn_scaling 1.5: must be 1.0"),
        ([tmp_path / "wrong", tmp_path / "other"], "exists already; must be a new folder"),
        ([tmp_path / "absent", tmp_path / "new"], "absent"),
        (["--back", tmp_path / "other", tmp_path / "new"], f"no {OURS}"),
        (["--back", tmp_path / "absent", tmp_path / "new"], "absent"),
    ):
        assert main([str(one) for one in arguments]) == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_foreign_tensor_is_named_on_the_way_back(tmp_path):
    save(tmp_path / "ours", **ONE)
    export(tmp_path / "ours", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config[OURS]["lm_n_blocks"] = 1
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.text_model\.layers\.1\.\S+: left over"):
        back(tmp_path / "theirs", tmp_path / "again")
    assert VLMConfig.load(tmp_path / "ours").lm_n_blocks == 2
