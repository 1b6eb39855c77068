"""The model's arithmetic, on tiny random weights: every shortcut against the plain way."""

import pytest
import torch

from models.config import VLMConfig
from models.language_model import KVCache, LanguageModel, RotaryEmbedding
from models.modality_projector import ModalityProjector
from models.vision_language_model import VisionLanguageModel, _sample
from models.vision_transformer import ViT

IMAGE = 29  # the image token: the first after the base vocabulary


def tiny(**changes) -> VLMConfig:
    values = {
        "vit_hidden_dim": 16,
        "vit_inter_dim": 24,
        "vit_patch_size": 4,
        "vit_img_size": 16,
        "vit_n_heads": 2,
        "vit_n_blocks": 2,
        "lm_hidden_dim": 24,
        "lm_inter_dim": 32,
        "lm_re_base": 1000,
        "lm_max_position_embeddings": 64,
        "lm_base_vocab_size": IMAGE,
        "extra_token_amount": 1,
        "vlm_extra_tokens": {"image_token": "<|image|>"},
        "lm_n_heads": 6,
        "lm_n_kv_heads": 2,
        "lm_n_blocks": 2,
        "lm_max_length": 64,
        "mp_pixel_shuffle_factor": 2,
        "mp_image_token_length": 4,
        "max_img_size": 16,
    }
    return VLMConfig(**(values | changes))


@pytest.fixture
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(tiny()).eval()


def text(*shape: int) -> torch.Tensor:
    return torch.randint(IMAGE, shape)


def with_image(ids: torch.Tensor, start: int = 1) -> torch.Tensor:
    ids = ids.clone()
    ids[..., start : start + 4] = IMAGE
    return ids


def test_tiny_config_is_valid():
    assert tiny().problems() == []


@pytest.mark.parametrize(("side", "factor", "channels"), [(4, 2, 3), (6, 3, 2), (4, 1, 5), (4, 4, 1)])
def test_pixel_shuffle_against_a_loop(side, factor, channels):
    cfg = tiny(mp_pixel_shuffle_factor=factor, vit_hidden_dim=channels)
    x = torch.randn(2, side * side, channels)
    rows = []
    for row in range(0, side, factor):
        for column in range(0, side, factor):
            patches = [x[:, (row + i) * side + column + j] for i in range(factor) for j in range(factor)]
            rows.append(torch.cat(patches, dim=-1))
    assert torch.equal(ModalityProjector(cfg).pixel_shuffle(x), torch.stack(rows, dim=1))


def test_pixel_shuffle_refuses_other_grids():
    with pytest.raises(ValueError, match="9 patches"):
        ModalityProjector(tiny()).pixel_shuffle(torch.zeros(1, 9, 16))


def test_positions_beyond_the_maximum_scale_the_frequencies():
    rotary = RotaryEmbedding(tiny(lm_max_position_embeddings=8))
    position_ids = torch.arange(32)[None]
    cos, sin = rotary(position_ids, 32)
    scaled_cos, scaled_sin = rotary(position_ids / 4, 8)  # 32 / 8
    torch.testing.assert_close(cos, scaled_cos)
    torch.testing.assert_close(sin, scaled_sin)


def test_attn_scaling_multiplies_cos_and_sin():
    plain, scaled = RotaryEmbedding(tiny()), RotaryEmbedding(tiny(lm_attn_scaling=0.5))
    for once, half in zip(plain(torch.arange(5)[None], 5), scaled(torch.arange(5)[None], 5), strict=True):
        torch.testing.assert_close(half, once * 0.5)


def test_grouped_query_attention_is_attention_with_repeated_kv_weights():
    grouped, full = LanguageModel(tiny(lm_n_kv_heads=2)), LanguageModel(tiny(lm_n_kv_heads=6))
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].view(2, 4, 24)
            weights[name] = heads.repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(grouped(x), full(x))


def test_lm_use_tokens_takes_ids_and_returns_logits():
    lm = LanguageModel(tiny(lm_use_tokens=True))
    assert lm(text(2, 7)).shape == (2, 7, 30)


def test_cls_flag_returns_one_vector_an_image():
    assert ViT(tiny(vit_cls_flag=True))(torch.randn(3, 3, 16, 16)).shape == (3, 16)


def test_loss_is_the_mean_cross_entropy_of_labels(model):
    ids = with_image(text(2, 12))
    targets = torch.full_like(ids, -100)
    targets[0, 6:] = text(6)
    logits, loss = model(ids, torch.randn(2, 3, 16, 16), targets=targets)
    log_probabilities = logits.log_softmax(dim=-1)
    expected = -torch.stack([log_probabilities[0, t, targets[0, t]] for t in range(6, 12)]).mean()
    torch.testing.assert_close(loss, expected)
    assert model(ids, torch.randn(2, 3, 16, 16))[1] is None


def test_training_path_returns_the_sum_over_labels(model):
    ids, images = with_image(text(2, 12)), torch.randn(2, 3, 16, 16)
    targets = text(2, 12).masked_fill(torch.rand(2, 12) < 0.5, -100)
    targets[0, -1] = 3
    label_positions = (targets.flatten() != -100).nonzero().squeeze(1)
    image_slots = (ids.flatten() == IMAGE).nonzero().squeeze(1)
    total = model(ids, images, targets=targets, image_slots=image_slots, label_positions=label_positions)
    mean = model(ids, images, targets=targets)[1]
    torch.testing.assert_close(total, mean * len(label_positions))
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_the_loss_in_chunks_is_the_same_loss(model, size, monkeypatch):
    ids, targets = text(2, 12), text(2, 12)
    label_positions = torch.arange(3, 24, 2)  # 11: the last chunk is smaller
    indices = {"targets": targets, "label_positions": label_positions, "image_slots": torch.empty(0, dtype=torch.long)}
    shapes = []
    model.decoder.head.register_forward_hook(lambda head, inputs, logits: shapes.append(len(logits)))

    def loss_and_gradients():
        shapes.clear()
        model.zero_grad()
        loss = model(ids, **indices)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    whole, gradients = loss_and_gradients()
    assert shapes == [11]
    model.loss_chunk_size = size
    loss, in_chunks = loss_and_gradients()
    assert max(shapes) == min(size, 11)
    assert sum(shapes) == (22 if size < 11 else 11)  # once more in the backward pass
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(in_chunks, gradients)
    shapes.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **indices), whole)
    assert sum(shapes) == 11


def test_image_sources_share_an_image(model):
    ids, images = with_image(text(3, 10)), torch.randn(2, 3, 16, 16)
    repeated = model(ids, images[[0, 1, 0]])[0]
    sources = torch.cat([torch.arange(4) + 4 * image for image in (0, 1, 0)])
    torch.testing.assert_close(model(ids, images, image_sources=sources)[0], repeated)
    slots = (ids.flatten() == IMAGE).nonzero().squeeze(1)
    torch.testing.assert_close(model(ids, images, image_sources=sources, image_slots=slots)[0], repeated)


def test_images_as_nested_lists(model):
    ids, images = with_image(text(2, 12)), torch.randn(2, 3, 16, 16)
    expected = model(ids, images)[0]
    assert torch.equal(model(ids, [[images[0]], [images[1:]]])[0], expected)
    assert torch.equal(model(ids, list(images))[0], expected)


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_text_alone(model, images):
    ids = text(2, 8)
    assert torch.equal(model(ids, images)[0], model(ids)[0])


def test_image_tokens_must_match_images(model):
    with pytest.raises(ValueError, match="hold 4 image tokens, 2 images of 4 tokens make 8"):
        model(with_image(text(1, 12)), torch.randn(2, 3, 16, 16))


def test_image_embeddings_replace_the_slots_in_order(model):
    ids, images = with_image(text(1, 12), start=2), torch.randn(1, 3, 16, 16)
    x = model.embed(ids, images)
    torch.testing.assert_close(x[0, 2:6], model.MP(model.vision_encoder(images))[0])
    assert torch.equal(x[0, 6:], model.decoder.token_embedding(ids[0, 6:]))


def test_documents_do_not_see_each_other(model):
    ids = text(1, 12)
    document_ids = torch.tensor([[0] * 5 + [1] * 7])
    position_ids = torch.cat((torch.arange(5), torch.arange(7)))[None]
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % IMAGE
    before, after = (model(x, position_ids=position_ids, document_ids=document_ids)[0] for x in (ids, changed))
    assert torch.equal(before[0, 5:], after[0, 5:])
    assert not torch.equal(before[0, :5], after[0, :5])
    torch.testing.assert_close(before[:, 5:], model(ids[:, 5:])[0])
    leaking = [model(x, position_ids=position_ids)[0][0, 5:] for x in (ids, changed)]
    assert not torch.equal(*leaking)


def test_right_padding_leaves_real_positions_alone(model):
    ids = text(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    logits = model(ids, attention_mask=mask)[0]
    torch.testing.assert_close(logits[:1, :6], model(ids[:1, :6])[0])
    torch.testing.assert_close(logits[1:], model(ids[1:])[0])
    assert logits.isfinite().all()


def test_cached_decoding_equals_full_forward(model):
    ids, images = with_image(text(2, 8)), torch.randn(2, 3, 16, 16)
    expected = ids
    for _ in range(6):
        expected = torch.cat((expected, model(expected, images)[0][:, -1:].argmax(dim=-1)), dim=1)
        assert (expected[:, 8:] != IMAGE).all(), "choose another seed: a generated image token needs an image"
    assert torch.equal(model.generate(ids, images, max_new_tokens=6, greedy=True), expected[:, 8:])


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_left_padded_batch_generates_what_single_rows_do(model, mask_dtype):
    images = torch.randn(2, 3, 16, 16)
    short, long = with_image(text(1, 7)), with_image(text(1, 11))
    singles = [
        model.generate(ids, images[i : i + 1], max_new_tokens=5, greedy=True) for i, ids in enumerate((short, long))
    ]
    batch = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1), long))
    mask = torch.ones(2, 11, dtype=mask_dtype)
    mask[0, :4] = 0
    together = model.generate(batch, images, mask, max_new_tokens=5, greedy=True)
    assert torch.equal(together, torch.cat(singles))


@torch.no_grad()
def test_several_positions_after_cached_ones_need_a_mask(model):
    cache = KVCache(model.cfg, 1, 8, "cpu", torch.float32)
    x = torch.randn(1, 6, 24)
    first = model.decoder(x[:, :3], cache=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model.decoder(x[:, 3:], cache=cache)
    second = model.decoder(x[:, 3:], torch.ones(1, 6), cache=cache)
    torch.testing.assert_close(torch.cat((first, second), dim=1), model.decoder(x))


def test_generation_stops_at_the_end_token_and_fills(model, monkeypatch):
    end = 7
    script = torch.tensor([[3, end, 4, 5, 6], [4, 5, 6, end, 8]])

    def generate(**settings):
        columns = iter(script.unbind(dim=1))
        monkeypatch.setattr("models.vision_language_model._sample", lambda *_: next(columns))
        return model.generate(text(2, 6), max_new_tokens=5, **settings).tolist()

    assert generate() == script.tolist()
    expected = [[3, end, end, end], [4, 5, 6, end]]
    assert generate(eos_token_id=end) == expected
    model.cfg.lm_eos_token_id = end
    assert generate() == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1, "top_p": None, "temperature": 5.0},
        {"top_k": None, "top_p": 1e-6, "temperature": 5.0},
        {"top_k": None, "top_p": 0.0, "temperature": 5.0},
        {"top_k": 50, "top_p": 0.9, "temperature": 0},
    ],
)
def test_narrow_sampling_is_greedy(settings):
    logits = torch.randn(64, 30)
    assert torch.equal(_sample(logits, **settings, greedy=False), logits.argmax(dim=-1))


def test_sampling_keeps_to_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)
    assert _sample(logits, 2, None, 1.0, False).unique().tolist() == [0, 1]
    assert _sample(logits, None, 0.9, 1.0, False).unique().tolist() == [0, 1, 2]
    assert _sample(logits, None, 1.0, 1.0, False).unique().tolist() == [0, 1, 2, 3]
