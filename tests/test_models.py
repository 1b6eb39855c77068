"""The model's arithmetic, on tiny random weights: every shortcut against the plain way."""

import pytest
import torch
from tiny.grades import FAMILIES, TINY, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import VLMConfig
from models.language_model import KVCache, RotaryEmbedding
from models.modality_projector import ModalityProjector, grid_windows
from models.vision_language_model import VisionLanguageModel, _sample

IMAGE = TINY["lm_base_vocab_size"]  # the image token: the first after the base vocabulary
HEADS = {"lm_n_heads": 6, "lm_n_kv_heads": 2}


def tiny(**changes) -> VLMConfig:
    return VLMConfig(**(TINY | HEADS | changes))


@pytest.fixture(params=FAMILIES)
def model(request) -> VisionLanguageModel:
    return make_model(**HEADS | FAMILIES[request.param]).eval()


def text(*shape: int) -> torch.Tensor:
    return torch.randint(IMAGE, shape)


def with_image(ids: torch.Tensor, start: int = 1) -> torch.Tensor:
    ids = ids.clone()
    ids[..., start : start + 4] = IMAGE
    return ids


def positions(found: torch.Tensor) -> torch.Tensor:
    """Flat indices of what is true."""
    return found.flatten().nonzero().squeeze(1)


@pytest.mark.parametrize(("side", "factor", "channels"), [(4, 2, 3), (6, 3, 2), (4, 1, 5), (4, 4, 1)])
def test_pixel_shuffle_against_a_loop(side, factor, channels):
    cfg = tiny(mp_pixel_shuffle_factor=factor, vit_hidden_dim=channels, vit_img_size=4 * side)
    projector = ModalityProjector(cfg)
    x = torch.randn(2, side * side, channels)
    rows = []
    for row in range(0, side, factor):
        for column in range(0, side, factor):
            patches = [x[:, (row + i) * side + column + j] for i in range(factor) for j in range(factor)]
            rows.append(torch.cat(patches, dim=-1))
    assert torch.equal(projector.pixel_shuffle(x), torch.stack(rows, dim=1))
    torch.testing.assert_close(projector(x, grid_windows(2, side, factor)).view(2, -1, 24), projector(x))
    with pytest.raises(ValueError, match="7 patches"):
        projector.pixel_shuffle(torch.zeros(1, 7, channels))


def test_rotary_scales_positions_beyond_the_maximum_and_its_output():
    position_ids = torch.arange(32)[None]
    expected = RotaryEmbedding(tiny())(position_ids / 4, 8)  # 32 / 8
    found = RotaryEmbedding(tiny(lm_max_position_embeddings=8, lm_attn_scaling=0.5))(position_ids, 32)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain * 0.5)


def test_loss_is_the_mean_cross_entropy_of_labels_and_in_training_their_sum(model):
    ids, images = with_image(text(2, 12)), torch.randn(2, 3, 16, 16)
    targets = text(2, 12).masked_fill(torch.rand(2, 12) < 0.5, -100)
    targets[0, -1] = 3
    found = positions(targets != -100)
    logits, mean = model(ids, images, targets=targets)
    log_probabilities = logits.log_softmax(dim=-1).flatten(0, 1)
    expected = -torch.stack([log_probabilities[i, targets.flatten()[i]] for i in found]).mean()
    torch.testing.assert_close(mean, expected)
    assert model(ids, images)[1] is None
    total = model(ids, images, targets=targets, image_slots=positions(ids == IMAGE), label_positions=found)
    torch.testing.assert_close(total, mean * len(found))
    total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_the_loss_in_chunks_is_the_same_loss(model, size):
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
    assert sum(shapes) == (22 if size < 11 else 11)  # computed again in the backward pass
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
    for slots in (None, positions(ids == IMAGE)):
        torch.testing.assert_close(model(ids, images, image_sources=sources, image_slots=slots)[0], repeated)


def test_images_may_be_nested_lists_or_absent(model):
    ids, images = with_image(text(2, 12)), torch.randn(2, 3, 16, 16)
    for nested in ([[images[0]], [images[1:]]], list(images)):
        assert torch.equal(model(ids, nested)[0], model(ids, images)[0])
    plain = text(2, 8)
    for none in ([], [[], []], torch.empty(0, 3, 16, 16)):
        assert torch.equal(model(plain, none)[0], model(plain)[0])
    with pytest.raises(ValueError, match="hold 8 image tokens, 3 images of 4 tokens make 12"):
        model(ids, torch.randn(3, 3, 16, 16))


def test_image_embeddings_replace_the_slots_in_order(model):
    ids, images = with_image(text(1, 12), start=2), torch.randn(1, 3, 16, 16)
    x = model.embed(ids, images)
    torch.testing.assert_close(x[0, 2:6], model.MP(model.vision_encoder(images))[0])
    assert torch.equal(x[0, 6:], model.decoder.token_embedding(ids[0, 6:]))


def test_right_padding_leaves_real_positions_alone(model):
    ids = text(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    logits = model(ids, attention_mask=mask)[0]
    torch.testing.assert_close(logits[:1, :6], model(ids[:1, :6])[0])
    torch.testing.assert_close(logits[1:], model(ids[1:])[0])
    assert logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_cast_to_half_precision_takes_uint8_pictures(model, dtype):
    """They are scaled in float32 and then rounded to the weights' dtype."""
    vit, pictures = model.to(dtype).vision_encoder, torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    scales, shifts = torch.tensor(model.cfg.pixel_scaling())[:, :, None, None].transpose(0, 1)
    scaled = pictures.float() * scales - shifts
    features = vit(pictures)
    assert features.dtype == dtype
    assert torch.equal(features, vit(scaled.to(dtype)))
    model.generate(with_image(text(2, 7)), pictures, max_new_tokens=2, greedy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_padded_and_cached_decoding_equals_full_forward(model, dtype, mask_dtype):
    images = torch.randn(2, 3, 16, 16)
    short, long = with_image(text(1, 7)), with_image(text(1, 11))
    batch = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1), long))
    mask = torch.ones(2, 11, dtype=mask_dtype)
    mask[0, :4] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        together = model.generate(batch, images, mask, max_new_tokens=5, greedy=True)
        for ids, image, new_ids in zip((short, long), images, together, strict=True):
            alone = model.generate(ids, image, max_new_tokens=5, greedy=True)
            grown = ids
            for _ in range(5):
                logits = model(grown, image, image_slots=torch.arange(1, 5))[0]  # a new image token has no image
                grown = torch.cat((grown, logits[:, -1:].argmax(dim=-1)), dim=1)
            assert new_ids.tolist() == alone[0].tolist() == grown[0, ids.shape[1] :].tolist()


@torch.no_grad()
def test_several_positions_after_cached_ones_are_causal(model):
    x = torch.randn(1, 6, 24)
    for mask in (None, torch.ones(1, 6)):
        cache = KVCache(model.cfg, 1, 4, "cpu", torch.float32)
        first = model.decoder(x[:, :3], cache=cache)
        cache.make_room(3, 6)
        second = model.decoder(x[:, 3:], mask, cache=cache)
        torch.testing.assert_close(torch.cat((first, second), dim=1), model.decoder(x))
        cache.make_room(2, 6)
        torch.testing.assert_close(model.decoder(x[:, 2:], mask, cache=cache), model.decoder(x)[:, 2:])


class Casts(TorchDispatchMode):
    """Counts casts of a tensor of this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_tokens(model):
    weight = model.decoder.blocks[0].mlp.gate_proj.weight
    with torch.autocast("cpu", dtype=torch.bfloat16), Casts(weight.shape) as casts:
        model.generate(text(1, 6), max_new_tokens=5, greedy=True)
    assert casts.count == 2 * len(model.decoder.blocks)  # gate_proj and up_proj of each


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
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        model.generate(text(1, 3), max_new_tokens=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(1, None, 5.0), (None, 1e-6, 5.0), (None, 0.0, 5.0), (50, 0.9, 0)]
)
def test_narrow_sampling_is_greedy(top_k, top_p, temperature):
    logits = torch.randn(64, 30)
    assert torch.equal(_sample(logits, top_k, top_p, temperature, greedy=False), logits.argmax(dim=-1))


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(2, None, 2), (None, 0.9, 3), (None, 1.0, 4), (0, None, 4)])
def test_sampling_keeps_to_top_k_and_top_p(top_k, top_p, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)
    assert _sample(logits, top_k, top_p, 1.0, False).unique().tolist() == list(range(kept))
