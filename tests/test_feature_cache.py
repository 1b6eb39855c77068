"""Features of a frozen vision tower: kept within a budget, the same as computed, gone when the tower trains again."""

import json

import pytest
import torch
from tiny.grades import FAMILIES, make_model
from tiny.runs import arguments

import train
from training.arguments import parse_arguments
from training.feature_cache import FeatureCache

KEYS = [("a", False, 0), ("a", True, 0), ("b", False, 0), ("b", False, 1)]


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
    again, hits = cache.complete(turned, [KEYS[2], KEYS[0], ("c", False, 0)])
    assert hits == 2
    torch.testing.assert_close(again["image_features"], model.vision_encoder(turned["images"]))
    assert (cache.hits, cache.lookups) == (2, 7)


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
    assert (hits, cache.features) == (0, {})
    assert "images" in same


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
