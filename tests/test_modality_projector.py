"""The connectors beside nanoVLM's: against transformers' Molmo2, against loops, and in the whole model."""

import pytest
import torch
from tiny.grades import FAMILIES, MOLMO, TINY, batch, make_model

from models.config import VLMConfig
from models.modality_projector import ModalityProjector, grid_windows
from models.vision_language_model import VisionLanguageModel

# A window in order, partly empty, of two images, with a patch twice, and an empty one (which Molmo2 leaves out).
WINDOWS = [[0, 1, 4, 5], [2, 3, -1, -1], [-1, 15, 16, -1], [7, 7, 8, -1], [-1, -1, -1, -1], [31, 30, 27, 26]]


def projector(**fields) -> ModalityProjector:
    torch.manual_seed(0)
    made = ModalityProjector(VLMConfig(**TINY | {"mp_image_token_length": 16} | fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def molmo2(cfg: VLMConfig):
    """transformers' adapter of the same sizes."""
    from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
    from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter

    heads = {"num_attention_heads": cfg.vit_n_heads, "num_key_value_heads": cfg.vit_n_heads}
    return Molmo2Adapter(
        Molmo2AdapterConfig(
            vision_feature_layer=[1, 0], hidden_size=cfg.vit_hidden_dim, intermediate_size=cfg.connector_dim,
            head_dim=cfg.vit_hidden_dim // cfg.vit_n_heads, text_hidden_size=cfg.lm_hidden_dim, **heads,
        )
    ).eval()  # fmt: skip


NAMES = {
    "image_pooling_2d.q_proj": "pooling.q_proj", "image_pooling_2d.k_proj": "pooling.k_proj",
    "image_pooling_2d.v_proj": "pooling.v_proj", "image_pooling_2d.o_proj": "pooling.out_proj",
    "image_projector.gate_proj": "gate_proj", "image_projector.up_proj": "up_proj",
    "image_projector.down_proj": "down_proj",
}  # fmt: skip


def test_molmos_connector_equals_transformers():
    cfg = VLMConfig(**TINY | MOLMO)
    ours, theirs = projector(**MOLMO, mp_hidden_dim=None), molmo2(cfg)
    tensors = {f"{name}.{kind}": f"{own}.{kind}" for name, own in NAMES.items() for kind in ("weight", "bias")}
    state = ours.state_dict()
    tensors = {name: own for name, own in tensors.items() if own in state}
    assert set(tensors.values()) == state.keys()
    theirs.load_state_dict({name: state[own] for name, own in tensors.items()})
    features, windows = torch.randn(2, 16, 32), torch.tensor(WINDOWS)
    found, expected = ours(features, windows), theirs(features, windows).last_hidden_state
    assert found.isfinite().all()
    present = [0, 1, 2, 3, 5]
    torch.testing.assert_close(found[present], expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(expected)
    (found[present] * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        hf = next(key for key, own in tensors.items() if own == name)
        torch.testing.assert_close(parameter.grad, gradients[hf].grad, atol=1e-4, rtol=1e-5, msg=name)


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_windows_of_the_plain_grid_are_molmos(grid, side):
    molmo = pytest.importorskip("transformers.models.molmo2.image_processing_molmo2")
    theirs, rows, columns = molmo.arange_for_pooling(torch.arange(grid**2).view(grid, grid), side, side)
    theirs = theirs.view(-1, side**2)
    again = torch.where(theirs >= 0, theirs + grid**2, -1)
    assert torch.equal(grid_windows(2, grid, side), torch.cat((theirs, again)))
    cfg = VLMConfig(**TINY | {"vit_img_size": 4 * grid, "mp_type": "molmo", "mp_pool_size": side})
    assert cfg.image_tokens == rows * columns


@pytest.mark.parametrize("size", [2, 3])
def test_without_pool_index_molmo_takes_the_plain_grid(size):
    made = projector(**MOLMO, mp_pool_size=size)
    features = torch.randn(3, 16, 32)
    expected = made(features, grid_windows(3, 4, size)).view(3, 4, 24)
    torch.testing.assert_close(made(features), expected)


@pytest.mark.parametrize(("kind", "parameters"), [("linear", 16 * 24 + 24), ("mlp", 17 * 2048 + 24 * 2049)])
def test_linear_and_mlp_make_a_token_of_each_patch_or_of_the_mean_of_a_window(kind, parameters):
    made = projector(mp_type=kind)
    assert sum(parameter.numel() for parameter in made.parameters()) == parameters
    features = torch.randn(2, 16, 16)
    single = torch.arange(32)[:, None]
    torch.testing.assert_close(made(features, single).view(2, 16, 24), made(features))
    flat = features.flatten(0, 1)
    means = [flat[[i for i in window if i >= 0]].mean(dim=0) for window in WINDOWS if max(window) >= 0]
    found = made(features, torch.tensor(WINDOWS))[[0, 1, 2, 3, 5]]
    torch.testing.assert_close(found, made.project(torch.stack(means)))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_reach_the_slots_of_the_whole_model(family):
    """The plain grid as pool_index changes nothing; in another order the same embeddings stand in other slots."""
    model, data = make_model(**FAMILIES[family]).eval(), batch(0)
    windows = grid_windows(2, 4, 2)
    plain = model(**data)[0]
    torch.testing.assert_close(model(**data, pool_index=windows)[0], plain)
    turned = windows.flip(0)
    assert not torch.allclose(model(**data, pool_index=turned)[0], plain, atol=1e-3)
    sources = torch.arange(7, -1, -1)
    torch.testing.assert_close(model(**data, pool_index=turned, image_sources=sources)[0], plain)
    features = model.vision_encoder(data.pop("images"))
    torch.testing.assert_close(model(**data, image_features=features, pool_index=windows)[0], plain)
    with pytest.raises(ValueError, match="hold 8 image tokens, 2 images by pool_index make 7"):
        model(**data, image_features=features, pool_index=windows[:7])


def test_generation_takes_windows():
    model, data = make_model(**MOLMO).eval(), batch(0)
    ids, images, windows = data["input_ids"], data["images"], grid_windows(2, 4, 2).flip(0)
    first = model(ids, images, pool_index=windows)[0][:, -1].argmax(dim=-1)
    assert torch.equal(model.generate(ids, images, max_new_tokens=1, greedy=True, pool_index=windows)[:, 0], first)


def test_molmos_merge_adds_to_the_embeddings_of_the_image_tokens():
    replaced, added = (make_model(**MOLMO, mp_merge=merge) for merge in ("replace", "add"))
    data = batch(0)
    ids, images = data["input_ids"], data["images"]
    slots = ids == TINY["lm_base_vocab_size"]
    expected = replaced.embed(ids, images) + replaced.decoder.token_embedding(ids) * slots[..., None]
    torch.testing.assert_close(added.embed(ids, images), expected)


def test_a_checkpoint_keeps_the_whole_shape(tmp_path):
    model = make_model(**MOLMO | {"image_mean": [0.1, 0.2, 0.3], "mp_merge": "add"}).eval()
    model.save_pretrained(tmp_path)
    again, data = VisionLanguageModel.from_pretrained(tmp_path).eval(), batch(0)
    data["images"] = torch.randint(256, data["images"].shape, dtype=torch.uint8)
    assert vars(again.cfg) == vars(model.cfg)
    assert torch.equal(again(**data)[0], model(**data)[0])
