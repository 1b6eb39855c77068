"""Features of a frozen vision tower: kept by what it sees, within a budget, as computed; gone when it trains again."""

import json

import pytest
import torch
from tiny.data import byte_level_tokenizer, dataset, encoded, picture, tiny_train, tiny_vlm
from tiny.grades import FAMILIES, make_model, make_optimizer
from tiny.runs import arguments

import train
from data.collators import TrainCollator, image_keys
from data.datasets import Sample
from data.packing import PackedCollator
from grades import GradESConfig, GradESMonitor
from models.config import VLMConfig
from training.arguments import parse_arguments
from training.feature_cache import FeatureCache

KEYS = [b"a", b"a mirrored", b"b", b"the second of b"]


def inputs(seed: int = 0) -> dict:
    return {"images": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), "input_ids": None}


@pytest.fixture(params=FAMILIES)
def model(request):
    model = make_model(**FAMILIES[request.param])
    model.vision_encoder.requires_grad_(False)
    return model


def test_what_is_held_is_what_would_be_computed(model):
    cache, given = FeatureCache(model, 1.0), inputs()
    first, hits = cache.complete(given, KEYS)
    assert hits == 0
    assert "images" not in first
    torch.testing.assert_close(first["image_features"], model.vision_encoder(given["images"]))
    turned = {"images": given["images"][[2, 0, 1]]}
    again, hits = cache.complete(turned, [KEYS[2], KEYS[0], b"c"])
    assert hits == 2
    torch.testing.assert_close(again["image_features"], model.vision_encoder(turned["images"]))
    assert (cache.hits, cache.lookups) == (2, 7)
    assert again["image_features"].stride() == model.vision_encoder(turned["images"]).stride()


def test_with_the_projector_frozen_too_its_output_is_held(model):
    """Which takes less; when it trains again, the tower's own."""
    cache, given = FeatureCache(model, 1.0), inputs()
    cache.complete(given, KEYS)
    of_features = cache.held_bytes
    model.MP.requires_grad_(False)
    expected = model.MP(model.vision_encoder(given["images"]))
    assert [cache.complete(given, KEYS)[1] for _ in range(2)] == [0, 4]
    held = cache.complete(given, KEYS)[0]
    torch.testing.assert_close(held["image_embeddings"], expected)
    assert held.keys() == {"input_ids", "image_embeddings"}
    assert cache.held_bytes == expected.nbytes != of_features
    ids = torch.full((1, expected.shape[:-1].numel()), model.cfg.image_token_id)
    torch.testing.assert_close(model(ids, image_embeddings=expected)[0], model(ids, given["images"])[0])
    pooled, spared = cache.complete(given | {"pool_index": torch.zeros(1, 1, dtype=torch.long)}, KEYS)
    assert (spared, "image_features" in pooled) == (0, True)
    cache.complete({"input_ids": None}, [])  # text alone, which tells nothing of windows
    assert cache.complete(given | {"pool_index": torch.zeros(1, 1, dtype=torch.long)}, KEYS)[1] == 4
    model.MP.requires_grad_(True)
    assert "image_features" in cache.complete(given, KEYS)[0]
    assert (cache.served, cache.batches) == (7, 7)


@pytest.mark.parametrize("gib", [1.0, 1e-9])
def test_an_image_that_comes_twice_in_a_batch_is_computed_once(model, gib):
    cache, given, seen = FeatureCache(model, gib), inputs(), []
    model.vision_encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    places = [0, 1, 0, 2, 1]
    found, spared = cache.complete({"images": given["images"][places]}, [KEYS[place] for place in places])
    assert (spared, seen) == (2, [3])
    torch.testing.assert_close(found["image_features"], model.vision_encoder(given["images"])[places])


def test_products_of_another_dtype_are_not_mixed(model):
    cache, given = FeatureCache(model, 1.0), inputs()
    cache.complete(given, KEYS)
    with torch.autocast("cpu", torch.bfloat16):
        found, spared = cache.complete(given, KEYS)
        assert (spared, found["image_features"].dtype) == (0, model.vision_encoder(given["images"]).dtype)
        assert torch.equal(found["image_features"], model.vision_encoder(given["images"]))
        assert cache.complete(given, KEYS)[1] == 4
    assert cache.complete(given, KEYS)[1] == 0


def test_a_resumed_run_begins_without_features(model):
    cache = FeatureCache(model, 1.0)
    cache.complete(inputs(), KEYS)
    with torch.no_grad():
        model.vision_encoder.blocks[0].mlp.fc1.weight.mul_(2)  # as a checkpoint's weights are loaded
    cache.load_state_dict({"hits": 3, "lookups": 9})
    found, spared = cache.complete(inputs(), KEYS)
    assert (spared, cache.hits, cache.lookups) == (0, 3, 13)
    torch.testing.assert_close(found["image_features"], model.vision_encoder(inputs()["images"]))


def test_it_keeps_within_its_budget(model):
    size = model.vision_encoder(inputs()["images"])[0].nbytes
    cache = FeatureCache(model, 2.5 * size / 2**30)
    cache.complete(inputs(), KEYS)
    assert (len(cache.features), cache.held_bytes) == (2, 2 * size)
    assert cache.complete(inputs(), KEYS)[1] == 2


def test_it_is_empty_while_anything_in_the_tower_trains(model):
    cache = FeatureCache(model, 1.0)
    cache.complete(inputs(), KEYS)
    model.vision_encoder.blocks[1].ln1.weight.requires_grad_(True)
    same, hits = cache.complete(inputs(), KEYS)
    assert (hits, cache.features, cache.served, cache.batches) == (0, {}, 1, 2)
    assert "images" in same


def test_a_probe_of_what_is_frozen_leaves_it_as_it_is():
    """--unfreeze_factor gives what is frozen a gradient in one step, and no update."""
    model = make_model()
    optimizer = make_optimizer(model)
    monitor = GradESMonitor(GradESConfig(metric="gradient_norm", unfreeze_factor=1e9), model, optimizer, 10)
    cache, given = FeatureCache(model, 1.0), inputs()
    monitor.freezer.freeze([name for name, part in monitor.by_name.items() if part.tower == "vision"])
    model.vision_encoder.requires_grad_(False)
    assert [cache.complete(given, KEYS)[1] for _ in range(2)] == [0, 4]
    monitor.freezer.begin_probe()
    assert "images" in cache.complete(given, KEYS)[0]  # the tower has to be computed
    monitor.freezer.end_probe()
    assert cache.complete(given, KEYS)[1] == 4
    monitor.freezer.unfreeze(monitor.by_name)
    cache.complete(given, KEYS)
    assert not cache.features


def keys_of(samples: list[Sample], vlm: VLMConfig) -> list[bytes]:
    batch = TrainCollator(0, vlm, with_keys=True)(samples)
    assert len(batch["image_keys"]) == len(batch["images"])
    assert PackedCollator(0, vlm, with_keys=True)([samples])["image_keys"] == batch["image_keys"]
    return batch["image_keys"]


def samples(rows: list[dict], vlm: VLMConfig | None = None) -> list[Sample]:
    turn = {"user": "what color is the shape?", "assistant": "red"}
    made = [{"texts": [turn], "id": str(number)} | row for number, row in enumerate(rows)]
    data = dataset(made, vlm or tiny_vlm(image_layout="resize"), tiny_train())
    return [data[0, number] for number in range(len(rows))]


def test_the_key_is_of_the_picture_in_whatever_row_or_clip(tmp_path):
    one, other = picture(16, 16, seed=1), picture(16, 16, seed=2)
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate((other, one)):
        (tmp_path / f"clip/{number}.png").write_bytes(encoded(frame))
    clip = {"images": [], "videos": [str(tmp_path / "clip")], "video_numbers": [0]}
    (tmp_path / "tokenizer").mkdir()
    size = byte_level_tokenizer(tmp_path / "tokenizer")
    vlm = tiny_vlm(lm_tokenizer=str(tmp_path / "tokenizer"), lm_base_vocab_size=size, image_layout="resize")
    found = keys_of(samples([{"images": [one]}, {"images": [encoded(one)]}, clip, {"images": [one, other]}], vlm), vlm)
    assert found == [found[0], found[0], found[2], found[0], found[0], found[2]]
    assert found[0] != found[2]


def test_other_pixels_have_another_key():
    one = picture(16, 16, seed=1)
    (sample,) = samples([{"images": [one]}])
    mirrored = Sample(sample.images.flip(-1), sample.conversations, sample.id, mirrored=True)
    assert len(set(image_keys([sample, mirrored]))) == 2
    changed = sample.images.clone()
    changed[0, 2, 15, 15] ^= 1
    assert len(set(image_keys([sample, Sample(changed, sample.conversations, sample.id)]))) == 2
    tall = {"images": [picture(16, 32, seed=3)]}
    layouts = (tiny_vlm(image_layout=layout, max_img_size=32) for layout in ("resize", "tiles"))
    whole, tiles = (image_keys(samples([tall], vlm)) for vlm in layouts)
    assert (len(whole), len(set(tiles))) == (1, 3)
    assert not set(whole) & set(tiles[1:])


def test_without_a_cache_no_image_is_hashed():
    (sample,) = samples([{"images": [picture(16, 16)]}])
    assert "image_keys" not in TrainCollator(0, tiny_vlm())([sample])


def test_a_run_with_it_is_the_run_without(data, tmp_path, monkeypatch):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    flags = {"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e-9, "alpha": 0.2, "flip_images": True}
    summaries = []
    for name, gib in (("with", 0.1), ("without", 0)):
        words = arguments(data, tmp_path, name, feature_cache_gib=gib, max_training_steps=12, **flags)
        assert train.main(parse_arguments(words)) == 0
        summaries.append(json.loads((tmp_path / "out" / name / "summary.json").read_text()))
    ours, theirs = summaries
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    assert 0 < ours["feature_cache_hits"] < ours["feature_cache_lookups"]
    assert theirs["feature_cache_hits"] is None
    assert ours["train_flops"] < theirs["train_flops"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"vit_dropout": 0.1}, "--vit_dropout"),
        ({"lora_rank": 2, "lora_dropout": 0.1}, "--lora_dropout"),
        ({"lora_rank": 2, "lora_dropout": 0.1, "lora_vision": False}, None),  # the tower has none
        ({"lm_dropout": 0.1}, None),
    ],
)
def test_no_draw_of_dropout_is_kept(data, tmp_path, monkeypatch, flags, names):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    given = {"lr_vision_backbone": 0, "feature_cache_gib": 0.1} | flags
    if names == "--lora_dropout":  # a tower at a learning rate of 0 has no adapters
        given |= {"lr_vision_backbone": 1e-3, "enable_grades": True, "vision_tau": 1e9, "language_tau": 1e-9}
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **given))) == 0
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    log = (tmp_path / "out" / "run" / "log.txt").read_text()
    assert (names is None) == ("--feature_cache_gib has no effect" not in log)
    assert names is None or f"--feature_cache_gib has no effect with {names}: " in log
    assert bool(summary["feature_cache_hits"]) == (names is None)
