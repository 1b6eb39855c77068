"""nanoVLM's checkpoint format: names, shapes, old config.json files, and what goes to the hub."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import EXTRA_TOKENS, VLMConfig
from models.vision_language_model import VisionLanguageModel

EMBEDDING, HEAD = "decoder.token_embedding.weight", "decoder.head.weight"
TINY = {
    "vit_hidden_dim": 16, "vit_inter_dim": 24, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "vit_n_blocks": 1, "lm_hidden_dim": 24, "lm_inter_dim": 32, "lm_n_heads": 6, "lm_n_kv_heads": 2, "lm_n_blocks": 2,
    "lm_base_vocab_size": 29, "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "max_img_size": 32,
}  # fmt: skip


def tiny_model(**changes) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(VLMConfig(**(TINY | changes)))


def on_meta(cfg: VLMConfig) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(cfg)


def parameter_count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_and_shapes_of_the_450m_checkpoint():
    expected = json.loads((Path(__file__).parent / "assets" / "nanovlm_450m_keys.json").read_text())
    model = on_meta(VLMConfig())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert model.decoder.head.weight is model.decoder.token_embedding.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_for_bit_without_network(tmp_path, no_network, tied):
    model = tiny_model(lm_tie_weights=tied, lm_eos_token_id=5)
    model.save_pretrained(tmp_path / "run" / "step_10")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "run" / "step_10")
    assert no_network == []
    assert_same_weights(loaded, model)
    assert asdict(loaded.cfg) == asdict(model.cfg)
    assert (loaded.decoder.head.weight is loaded.decoder.token_embedding.weight) == tied
    stored = load_file(tmp_path / "run" / "step_10" / "model.safetensors")
    assert len({EMBEDDING, HEAD} & stored.keys()) == (1 if tied else 2)


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_the_tied_head_loads_under_either_name_and_without_rotary_frequencies(tmp_path, names):
    def rename(tensors):
        del tensors["decoder.rotary_embd.inv_freq"]
        matrix = tensors.pop(HEAD) if HEAD in tensors else tensors.pop(EMBEDDING)
        tensors.update({name: matrix.clone() for name in names})

    model = tiny_model()
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, rename)
    assert_same_weights(VisionLanguageModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_all_bad_tensors_are_listed(tmp_path, tied):
    def damage(tensors):
        tensors.pop("MP.proj.weight")
        tensors.pop(HEAD if HEAD in tensors else EMBEDDING)  # an untied model's embedding stands in for no head
        tensors["decoder.norm.weight"] = torch.zeros(7)
        tensors["decoder.blocks.2.norm1.weight"] = torch.zeros(24)

    tiny_model(lm_tie_weights=tied).save_pretrained(tmp_path)
    edit_weights(tmp_path, damage)
    with pytest.raises(ValueError, match="4 tensors do not fit") as error:
        VisionLanguageModel.from_pretrained(tmp_path)
    for problem in (
        "MP.proj.weight: missing",
        f"{HEAD}: missing",
        "decoder.norm.weight: shape [7], must be [24]",
        "decoder.blocks.2.norm1.weight: left over",
    ):
        assert problem in str(error.value)


def test_a_folder_without_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        VisionLanguageModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        VisionLanguageModel.from_pretrained(tmp_path)


def test_unknown_fields_are_ignored_with_a_warning():
    stored = asdict(VLMConfig()) | {"lm_model_dtype": "bf16", "a_field_of_the_future": 3}
    with pytest.warns(UserWarning, match="ignoring unknown fields a_field_of_the_future, lm_model_dtype"):
        assert VLMConfig.from_dict(stored) == VLMConfig()


def test_missing_fields_get_the_default_of_their_time():
    """A published 450M config: no pixel normalisation and no end token among its fields."""
    newer = (
        "image_mean", "image_std", "lm_eos_token_id", "resize_to_max_side_len", "max_img_size", "vit_architecture",
        "vit_feature_layers", "mp_type", "mp_merge", "mp_pool_size", "mp_hidden_dim", "lm_head_dim", "lm_qk_norm",
        "lm_qkv_bias",
    )  # fmt: skip
    cfg = VLMConfig.from_dict({name: value for name, value in asdict(VLMConfig()).items() if name not in newer})
    assert (cfg.image_mean, cfg.image_std, cfg.lm_eos_token_id) == (0.0, 1.0, None)
    assert (cfg.vit_architecture, cfg.vit_feature_layers, cfg.mp_type, cfg.mp_merge) == (
        "siglip", [], "pixel_shuffle", "replace",
    )  # fmt: skip
    assert (cfg.head_dim, cfg.lm_qk_norm, cfg.lm_qkv_bias) == (64, False, False)
    assert (cfg.max_img_size, cfg.resize_to_max_side_len) == (cfg.vit_img_size, False)
    assert cfg.vlm_extra_tokens == EXTRA_TOKENS
    assert cfg.problems() == []


def oldest_config() -> dict:
    """A config.json as written before the image token, at tiny sizes."""
    newer = ("lm_base_vocab_size", "mp_image_token_length", "max_img_size")
    return {name: value for name, value in TINY.items() if name not in newer} | {"lm_vocab_size": 29}


def test_the_oldest_config_gets_one_image_token():
    cfg = VLMConfig.from_dict(oldest_config())
    assert (cfg.lm_base_vocab_size, cfg.extra_token_amount, cfg.lm_vocab_size) == (29, 1, 30)
    assert cfg.image_token_id == 29
    assert cfg.vlm_extra_tokens == {"image_token": "<|image|>"}
    assert (cfg.mp_image_token_length, cfg.max_img_size) == (4, 16)
    assert cfg.problems() == []


def test_the_oldest_weights_grow_by_the_mean_row(tmp_path):
    old = tiny_model(extra_token_amount=0)
    old.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(oldest_config()))
    with pytest.warns(UserWarning, match="no rows for 1 extra tokens"):
        loaded = VisionLanguageModel.from_pretrained(tmp_path)
    assert parameter_count(loaded) == parameter_count(old) + 24
    matrix, old_matrix = loaded.decoder.token_embedding.weight, old.decoder.token_embedding.weight
    assert torch.equal(matrix[:29], old_matrix)
    torch.testing.assert_close(matrix[29], old_matrix.mean(dim=0))
    assert loaded.decoder.head.weight is matrix
    assert torch.equal(loaded.MP.proj.weight, old.MP.proj.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(VisionLanguageModel.from_pretrained(tmp_path / "again"), loaded)


@pytest.mark.parametrize("name", ["someone/tiny-vlm", "tiny-vlm", None])
def test_push_to_hub_uploads_a_loadable_folder(monkeypatch, tmp_path, name):
    """To the user's own namespace where the name has none."""
    from huggingface_hub import HfApi, RepoUrl

    calls = []

    def create_repo(self, repo_id, *, private, exist_ok):
        calls.append(("create", repo_id, private, exist_ok))
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'someone/{repo_id}'}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id))
        for file in Path(folder_path).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = tiny_model()
    model.push_to_hub(name, private=True)
    full_name = "someone/tiny-vlm" if name else "someone/nanoVLM"
    assert calls == [("create", name or "nanoVLM", True, True), ("upload", full_name)]
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert_same_weights(VisionLanguageModel.from_pretrained(tmp_path), model)
    card = (tmp_path / "README.md").read_text()
    # A licence for the weights is the choice of their owner.
    assert card.startswith("---\nlibrary_name: nanovlm\npipeline_tag: image-text-to-text\n---\n")
    assert f'VisionLanguageModel.from_pretrained("{full_name}")' in card
