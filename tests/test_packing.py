"""Packed rows: what is in them, that their samples do not see each other, and that none is lost on the way."""

import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import families
from tiny.data import dataset, encoded, picture, row, same, some_rows, tiny_train, tiny_vlm, turn

import models.language_model
from data.collators import TrainCollator, to_device
from data.loader import train_batches
from data.packing import PADDING, PackedCollator, PackedReaders, pack
from data.rows import load_rows
from grades import GradESConfig
from models.attention import attend_flex, block_mask, takes_flex_attention
from models.config import TrainConfig, VLMConfig, check_settings
from models.language_model import LanguageModel
from models.modality_projector import grid_windows
from models.vision_language_model import VisionLanguageModel

PAD = 1
CPU = torch.device("cpu")


def small(length: int = 128, **changes) -> VLMConfig:
    """A model of a few thousand weights with rows of `length` tokens."""
    sizes = {
        "resize_to_max_side_len": False, "lm_max_length": length,
        "vit_hidden_dim": 8, "vit_inter_dim": 8, "vit_n_heads": 1, "vit_n_blocks": 1,
        "lm_hidden_dim": 32, "lm_inter_dim": 16, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 2,
    }  # fmt: skip
    return tiny_vlm(**sizes | changes)


def packing(length: int = 128, **changes) -> TrainConfig:
    return tiny_train(packing=True, max_sample_length=length, **{"batch_size": 2} | changes)


def batches(rows, vlm: VLMConfig, cfg: TrainConfig, start=0):
    return train_batches(dataset(rows, vlm, cfg), TrainCollator(PAD, vlm), cfg, start)


# Knapsacks


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_keep_to_the_limits(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(200)]
    images = [rng.choice([0, 1, 1, 2, 5]) for _ in range(200)]
    rows = pack(lengths, images, 100, max_images=4)
    assert sorted(i for one in rows for i in one) == list(range(200))
    for one in rows:
        assert sum(lengths[i] for i in one) <= 100
        assert len(one) == 1 or sum(images[i] for i in one) <= 4


@pytest.mark.parametrize(
    ("lengths", "images", "capacity", "max_images", "rows"),
    [
        ([10] * 6, [1] * 6, 60, 6, 1),
        ([10] * 6, [1] * 6, 60, 2, 3),  # the limit on images is all that keeps samples apart
        ([10] * 6, [0] * 6, 60, 1, 1),
        ([10] * 40 + [30] * 20, [1] * 40 + [0] * 20, 100, 4, 10),  # text fills the room that the limit closes
        ([60, 50, 40, 30, 20], [1] * 5, 100, 3, 2),
        ([44, 24, 24, 22, 21, 17, 8, 8, 6, 6, 20], [0] * 11, 100, 3, 2),  # the best fits, one by one, need a third row
    ],
)
def test_samples_need_few_rows(lengths, images, capacity, max_images, rows):
    assert len(pack(lengths, images, capacity, max_images)) == rows


def photos_and_texts(rng: random.Random) -> tuple[int, int]:
    """(tokens, images) at the 450M recipe's sizes: photos of 5, 9, 13 or 17 tiles, a tenth text alone."""
    tiles = 1 + 4 * rng.randint(1, 4) if rng.random() > 0.1 else 0
    return 65 * tiles + 20 + min(2000, int(rng.lognormvariate(4.5, 1))), int(tiles > 0)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_photos_and_texts_are_nearly_full(seed):
    rng = random.Random(seed)
    lengths, images = zip(*(photos_and_texts(rng) for _ in range(600)), strict=True)
    rows = pack(lengths, images, 4096, 18)
    assert sum(lengths) / (4096 * len(rows)) > 0.97
    assert all(sum(images[i] for i in one) <= 18 for one in rows)


def short_with_images_and_texts() -> list[dict]:
    short = [row(None, [turn("is " + "the " * (i % 7))], f"image{i}") for i in range(900)]
    return short + [row([], [turn("is " + "the " * (60 + i % 150))], f"text{i}") for i in range(375)]


def of_mixed_lengths() -> list[dict]:
    words = np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, 1200).astype(int), 1, 900)
    return [row([], [turn("is " + "the " * n)], str(i)) for i, n in enumerate(words)]


@pytest.mark.parametrize(
    ("make_rows", "count"),
    [(lambda: load_rows("easy-vqa")[:400], 50), (short_with_images_and_texts, 60), (of_mixed_lengths, 80)],
)
def test_batches_are_nearly_full(make_rows, count):
    vlm = small(1024, vlm_extra_tokens={"image_token": "<|image|>"}, max_img_size=16)
    found = islice(batches(make_rows(), vlm, packing(1024, batch_size=1, max_images_per_knapsack=16)), count)
    assert sum(batch["num_tokens"] for batch in found) / (1024 * count) > 0.97


def test_a_limit_on_tiles_holds_in_every_batch_and_drops_what_exceeds_a_share():
    vlm = small(256, resize_to_max_side_len=False)
    tall, small_one = picture(16, 64), picture(16, 16, seed=1)  # four tiles and the global image; one
    rows = [row([[tall], [small_one], [small_one, small_one], [tall, tall]][i % 4], name=str(i)) for i in range(40)]
    cfg = packing(256, batch_size=2, max_tiles_per_batch=12, max_images_per_knapsack=4)
    found = list(islice(batches(rows, vlm, cfg), 12))
    counts = [0 if batch["images"] is None else len(batch["images"]) for batch in found]
    assert max(counts) <= 12
    assert max(counts) > 6
    dropped = sum((Counter(batch["dropped"]) for batch in found), Counter())
    assert set(dropped) == {"too many tiles"}
    assert {int(name) % 4 for batch in found for name in batch["ids"]} == {0, 1, 2}


# Batches


def test_a_packed_batch_against_brute_force():
    vlm, cfg = small(256), packing(turns_per_image=2)
    data = dataset([*some_rows(5), row([b"junk"])], vlm, cfg)
    samples = [data[0, i] for i in range(6)]
    rows = [samples[:3], samples[3:]]
    batch = PackedCollator(PAD, vlm)(rows)
    slots, sources, images = [], [], 0
    for number, one in enumerate(rows):
        ids, labels, positions, documents = [], [], [], []
        for sample in one:
            for document_ids, document_labels in sample.conversations:
                ids += document_ids.tolist()
                labels += document_labels.tolist()
                positions += range(len(document_ids))
                documents += [1 + max(documents, default=-1)] * len(document_ids)
                mine = 0 if sample.images is None else len(sample.images) * 4
                sources += range(images * 4, images * 4 + mine)
            images += 0 if sample.images is None else len(sample.images)
        padding = 256 - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [PAD] * padding
        assert batch["targets"][number].tolist() == labels + [-100] * padding
        assert batch["position_ids"][number].tolist() == positions + [0] * padding
        assert batch["document_ids"][number].tolist() == documents + [PADDING] * padding
        slots += [number * 256 + i for i, token in enumerate(ids) if token == vlm.image_token_id]
    assert batch["image_slots"].tolist() == slots
    assert batch["image_sources"].tolist() == sources
    assert torch.equal(batch["images"], torch.cat([s.images for s in samples if s.images is not None]))
    assert batch["label_positions"].tolist() == (batch["targets"].flatten() != -100).nonzero().flatten().tolist()
    assert batch["num_labels"] == len(batch["label_positions"])
    assert batch["num_tokens"] == (batch["document_ids"] != PADDING).sum()
    assert batch["ids"] == [f"row{i}" for i in range(5)]
    assert batch["dropped"] == {"image does not decode": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_comes_once_in_an_epoch_whoever_reads(workers):
    rows = some_rows(40)
    cfg = packing(num_workers=workers)
    names = [batch["ids"] for batch in islice(batches(rows, small(), cfg), 60)]
    readers = max(1, workers)
    seen = [[name for batch in names[reader::readers] for name in batch] for reader in range(readers)]
    size = 40 // readers
    epochs = [[name for one in seen for name in one[i : i + size]] for i in (0, size, 2 * size)]
    assert all(sorted(epoch) == sorted(one["id"] for one in rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_batches_follow_from_the_seed_and_go_on_after_any_of_them(workers):
    def first(count: int, start=0, seed: int = 0) -> list[dict]:
        rows = [*some_rows(30), row([b"junk"], name="bad")]
        cfg = packing(num_workers=workers, turns_per_image=2, flip_images=True, seed=seed)
        return list(islice(batches(rows, small(), cfg, start), count))

    def are_same(some: list[dict], others: list[dict]) -> bool:
        return all(map(same, some, others)) and len(some) == len(others)

    whole = first(12)
    assert are_same(first(12), whole)
    assert not are_same(first(12, seed=1), whole)
    for number in (1, 4, 9):
        assert are_same(first(12 - number, whole[number - 1]["position"]), whole[number:])


def test_what_cannot_be_used_is_counted_once_a_visit():
    late = row([encoded(picture(64, 64))[:200]], name="decodes only in part")
    rows = [*some_rows(12), row([b"junk"]), row(texts=[]), late]
    dropped = Counter()
    for batch in islice(batches(rows, small(), packing(batch_size=1)), 200):
        dropped.update(batch["dropped"])
        [(epochs, *_)] = batch["position"]["places"]
        if epochs == 8:
            break
    visited = {name: round(n / epochs) for name, n in dropped.items()}
    assert visited == {"image does not decode": 1, "image file breaks off": 1, "no text": 1}
    with pytest.raises(ValueError, match=r"dropped 4 rows \(4 image file breaks off\)"):
        next(batches([late] * 4, small(), packing()))


def test_a_sample_longer_than_a_row_is_divided_between_its_conversations():
    texts = [turn("is " + "the " * 8 + "shape red?", source=str(i)) for i in range(8)]
    batch = next(batches([row(texts=texts)], small(64), packing(64, turns_per_image=8, batch_size=4)))
    assert (batch["document_ids"].amax(1) + 1).tolist() == [2, 2, 2, 2]
    assert len(batch["images"]) == 4  # each row has the image that its conversations share


def test_a_row_less_where_conversations_fit_into_the_others():
    """A sample leaves room for one of its three conversations, so that three rows take all of a fourth sample."""
    texts = [turn("is " + "the " * 12 + f"{color}?") for color in ("red", "blue", "green")]
    half = encoded(picture())[:200]  # decodes only in part
    rows = [row(texts=texts, name=f"row{i}") for i in range(23)] + [row([half], texts, "bad")]
    vlm, cfg = small(128), packing(batch_size=1, turns_per_image=3)
    data = dataset(rows, vlm, cfg)
    (window,) = PackedReaders(data, PackedCollator(PAD, vlm)).windows(0, 0)
    _, samples, packed = window
    (tokens,) = {sum(len(ids) for ids, _ in one.conversations) for one in samples if one.conversations}
    assert 64 < tokens < 128 - tokens / 3
    assert len(packed) == 18
    for one in packed:
        assert sum(piece.tokens for piece in one) <= 128
    given = Counter((piece.sample.id, i) for one in packed for piece in one for i in range(piece.start, piece.stop))
    assert given == {(one["id"], i): 1 for one in rows for i in range(3)}
    dropped: Counter = Counter()
    found = batches(rows, vlm, cfg)
    while (batch := next(found))["position"]["places"][0][0] < 3:
        dropped.update(batch["dropped"])
    assert abs(dropped["image file breaks off"] - 3) <= 1  # once an epoch, though several rows have a part of it


def test_of_fewer_rows_than_readers_each_gets_one_in_time():
    cfg = packing(batch_size=1)
    for reader in range(5):
        found = train_batches(dataset(some_rows(2), small(), cfg), TrainCollator(PAD, small()), cfg, 0, reader, 5)
        places = [batch["position"]["places"][0] for batch in islice(found, 4)]
        assert [epoch for epoch, *_ in places] == [e for e in range(20) if (reader + e) % 5 < 2][:4]


# What the model makes of them


def documents(seed: int, vlm: VLMConfig) -> list[list[dict]]:
    """Two packed rows of samples with and without images."""
    data = dataset(some_rows(8), vlm, packing(), train=False)
    samples = [data[0, i] for i in range(8)]
    random.Random(seed).shuffle(samples)
    return [samples[:4], samples[4:]]


def logits_of(model: VisionLanguageModel, batch: dict) -> torch.Tensor:
    return model(**to_device({k: v for k, v in batch.items() if k not in ("targets", "label_positions")}, CPU))[0]


def images_of(batch: dict, inside: torch.Tensor, vlm: VLMConfig) -> torch.Tensor:
    """The images whose tokens stand where `inside`, bool [B, T], says."""
    windows = batch.get("pool_index", grid_windows(len(batch["images"]), vlm.vit_grid, vlm.mp_window))
    found = windows[inside.flatten()[batch["image_slots"]]]
    return found[found >= 0] // vlm.vit_grid**2


of_families = pytest.mark.parametrize("family", ["nanovlm", "molmo2"])


@of_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_a_sample_leaves_its_row_mates_as_they_are(dtype, family):
    torch.manual_seed(0)
    vlm = small(256, **families.FAMILIES[family])
    model = VisionLanguageModel(vlm).eval()
    batch = PackedCollator(PAD, vlm)(documents(0, vlm))
    assert batch["document_ids"].max() == 3
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        before = logits_of(model, batch)
        for document in range(4):
            changed = dict(batch, input_ids=batch["input_ids"].clone(), images=batch["images"].clone())
            inside = batch["document_ids"] == document
            words = inside & (batch["input_ids"] != vlm.image_token_id)
            changed["input_ids"][words] = (batch["input_ids"][words] + 7) % vlm.image_token_id
            changed["images"][images_of(batch, inside, vlm).unique()] += 100
            after = logits_of(model, changed)
            assert torch.equal(before[~inside], after[~inside])
            assert not torch.isclose(before[inside], after[inside]).all(-1).any()


@of_families
def test_the_packed_loss_and_its_gradient_are_those_of_padded_rows(family):
    torch.manual_seed(0)
    vlm = small(256, **families.FAMILIES[family])
    model = VisionLanguageModel(vlm)
    rows = documents(1, vlm)
    found = []
    for batch in (PackedCollator(PAD, vlm)(rows), TrainCollator(PAD, vlm)([sample for one in rows for sample in one])):
        model.zero_grad()
        loss = model(**to_device(batch, CPU)) / batch["num_labels"]
        loss.backward()
        found.append((loss, [parameter.grad.clone() for parameter in model.parameters()]))
    (packed, packed_gradients), (padded, padded_gradients) = found
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(packed_gradients, padded_gradients, rtol=1e-4, atol=1e-6)


def test_rows_without_images_go_through_collator_and_model():
    vlm = small()
    model = VisionLanguageModel(vlm)
    text_only = [row([], [turn("is the shape red?")], str(i)) for i in range(6)]
    batch = next(batches(text_only, vlm, packing()))
    assert batch["images"] is None
    model(**to_device(batch, CPU)).backward()
    assert model.decoder.norm.weight.grad is not None
    late = next(batches([*text_only, row(name="late")], vlm, packing(batch_size=1, seed=3)))
    assert len(late["images"]) == 1
    assert torch.isfinite(model(**to_device(late, CPU)))


# FlexAttention, which CUDA takes


def random_documents(rows: int, length: int) -> torch.Tensor:
    starts = (torch.rand(rows, length) < 0.04).int()
    return starts.cumsum(1).masked_fill(torch.arange(length) > length - 30, PADDING)


def test_block_masks_attend_as_the_plain_mask_does(monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(small(256)).eval()
    x, ids = torch.randn(2, 256, 32), random_documents(2, 256)
    made = []

    def counted(*given):
        made.append(block_mask(*given))
        return made[-1]

    with torch.no_grad():
        plain = model(x, document_ids=ids)
        monkeypatch.setattr(models.language_model, "takes_flex_attention", lambda *_: True)
        monkeypatch.setattr(models.language_model, "block_mask", counted)
        monkeypatch.setattr(models.attention, "compiled_attend_flex", lambda: attend_flex)
        torch.testing.assert_close(model(x, document_ids=ids), plain)
    assert len(made) == 1


def test_flex_attention_is_for_cuda_with_a_compiler_and_for_shapes_that_it_knows(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(models.attention, "has_compiler", lambda: False)
    assert not takes_flex_attention(cuda, 1024, 64, 0.0)
    monkeypatch.setattr(models.attention, "has_compiler", lambda: True)
    assert not takes_flex_attention(CPU, 256, 64, 0.0)
    assert takes_flex_attention(cuda, 1024, 64, 0.0)
    assert not any(takes_flex_attention(cuda, *other) for other in ((1000, 64, 0.0), (1024, 48, 0.0), (1024, 64, 0.1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_trains_as_the_plain_mask_does(dtype, compiled, monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(small(256)).cuda()
    x, ids = torch.randn(2, 256, 32).cuda(), random_documents(2, 256).cuda()
    found = []
    for flex in (False, True):
        monkeypatch.setattr(models.language_model, "takes_flex_attention", lambda *_, flex=flex: flex)
        if flex and compiled:
            for block in model.blocks:
                block.compile()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(x, document_ids=ids)
        hidden[ids != PADDING].square().mean().backward()
        found.append((hidden[ids != PADDING].float(), [parameter.grad for parameter in model.blocks.parameters()]))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(*found, **tolerance)


# Flags


def test_impossible_settings_name_their_flags():
    fine = GradESConfig()
    with pytest.raises(ValueError, match="--packing True: must be off where lm_max_length 256 is more than"):
        check_settings(small(256, lm_max_position_embeddings=128), packing(), fine)
    with pytest.raises(ValueError, match="--max_images_per_knapsack 0: must be > 0"):
        check_settings(small(), packing(max_images_per_knapsack=0), fine)
