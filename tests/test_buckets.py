"""Few sizes for compiled blocks: padding changes no loss and no gradient, and nothing compiles again."""

import contextlib
import random

import pytest
import torch
from tiny.grades import FAMILIES, make_model

from models import buckets
from models.buckets import bucket
from models.modality_projector import grid_windows
from training import setup
from training.arguments import parse_arguments
from training.step import forward_backward

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MOST = 36  # images in a micro-batch


def micro_batch(number: int, cfg) -> dict:
    """Two to twelve rows of five to sixty tokens after one to three images, as the collator makes them."""
    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    rows, per_row, text = rng.randint(2, 12), rng.randint(1, 3), rng.randint(5, 60)
    image_tokens = per_row * cfg.mp_image_token_length
    ids = torch.randint(0, cfg.lm_base_vocab_size, (rows, image_tokens + text), generator=generator)
    ids[:, :image_tokens] = cfg.image_token_id
    targets = torch.randint(0, cfg.lm_base_vocab_size, ids.shape, generator=generator)
    targets[:, : image_tokens + rng.randint(0, 3)] = -100
    labels = (targets.flatten() != -100).nonzero().squeeze(1)
    images = torch.randint(0, 256, (rows * per_row, 3, cfg.vit_img_size, cfg.vit_img_size), generator=generator)
    return {
        "input_ids": ids, "targets": targets, "images": images.to(torch.uint8), "image_sources": None,
        "image_slots": (ids.flatten() == cfg.image_token_id).nonzero().squeeze(1), "label_positions": labels,
        "num_labels": len(labels),
    }  # fmt: skip


def in_buckets(model):
    model.vision_encoder.most_images, model.decoder.in_buckets = MOST, True
    return model


def test_buckets_are_few_and_add_at_most_an_eighth():
    sizes = {bucket(count) for count in range(1, 1025)}
    assert len(sizes) == 16 + 6 * 8
    assert all(0 <= bucket(count) - count <= count / 8 for count in range(1, 1025))
    assert [bucket(count, 70) for count in (65, 70, 71, 90)] == [70, 70, 71, 90]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_loss_nor_gradients(family):
    plain, padded = make_model(**FAMILIES[family]), in_buckets(make_model(**FAMILIES[family]))
    seen = []
    padded.vision_encoder.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[0]))
    padded.decoder.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    between = [n for n in range(60) if bucket(count := len(micro_batch(n, plain.cfg)["images"])) != count]
    for number in [0, 1, *between[:3]]:
        batch = micro_batch(number, plain.cfg)
        if family != "nanovlm":
            batch["pool_index"] = grid_windows(len(batch["images"]), 4, 2).flip(0)
        losses = [forward_backward(model, [batch], CPU, contextlib.nullcontext()) for model in (plain, padded)]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
        for (name, ours), theirs in zip(plain.named_parameters(), padded.parameters(), strict=True):
            assert (ours.grad - theirs.grad).abs().max() <= 1e-6 * max(1.0, ours.grad.abs().max().item()), name
        sizes = len(batch["images"]), batch["input_ids"].shape[1]
        assert tuple(seen[-2:]) == (bucket(sizes[0], MOST), bucket(sizes[1]))
    assert len(between) >= 3


def test_evaluation_is_not_padded():
    model, seen = in_buckets(make_model()).eval(), []
    model.vision_encoder.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[0]))
    model.vision_encoder(torch.zeros(17, 3, 16, 16, dtype=torch.uint8))
    assert seen == [17] != [bucket(17)]


@pytest.mark.slow
def test_two_hundred_micro_batches_have_few_shapes_and_compile_twice(monkeypatch):
    """One compilation for every number of images; one for the first length of rows, one for all others."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = make_model(vit_n_blocks=2, lm_n_blocks=2)
    for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
        block.compile(backend="eager")
    in_buckets(model)
    shapes, graphs = {"vision": set(), "language": set()}, []
    sized_alike = buckets.sized_alike
    monkeypatch.setattr(
        "models.vision_transformer.sized_alike", lambda x: shapes["vision"].add(x.shape[0]) or sized_alike(x)
    )
    with config.patch(fail_on_recompile_limit_hit=True):
        for number in range(200):
            batch = micro_batch(number, model.cfg)
            shapes["language"].add(bucket(batch["input_ids"].shape[1]))
            forward_backward(model, [batch], CPU, contextlib.nullcontext())
            graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert 5 < len(shapes["vision"]) <= len({bucket(count, MOST) for count in range(1, MOST + 1)})
    assert 5 < len(shapes["language"]) <= len({bucket(count) for count in range(1, 90)})
    assert graphs[-1] == graphs[9] <= 4


@pytest.mark.parametrize(
    ("words", "device", "has_compiler", "expected"),
    [
        ("", CPU, True, False), ("", CUDA, True, True), ("", CUDA, False, False), ("--no_compile", CUDA, True, False),
        ("--compile", CPU, False, True), ("--compile", CUDA, True, True), ("--compile auto", CUDA, True, True),
        ("--enable_grades --metric gradient_norm --unfreeze_factor 2", CUDA, True, False),
    ],
)  # fmt: skip
def test_auto_compiles_on_cuda_where_that_is_possible(words, device, has_compiler, expected, monkeypatch):
    monkeypatch.setattr(setup, "has_compiler", lambda: has_compiler)
    assert setup.compiles(parse_arguments(words.split()), device) is expected


def test_compile_without_a_compiler_is_an_error_that_names_the_flag(monkeypatch):
    monkeypatch.setattr(setup, "has_compiler", lambda: False)
    with pytest.raises(ValueError, match="--compile on: must be off or auto"):
        setup.compiles(parse_arguments(["--compile"]), CUDA)
