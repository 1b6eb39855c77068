"""Pretrained backbones: our towers against transformers', and what an error says of a bad folder or an absent hub."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.backbones import configure_from_backbones
from models.config import SCRATCH, VLMConfig
from models.hub import BackboneUnavailable, checkpoint_folder
from models.language_model import LanguageModel
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
VISION = SIZES | {"num_attention_heads": 3, "image_size": 16, "patch_size": 4}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LANGUAGE = SIZES | NO_TOKENS | {
    "vocab_size": 31, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "rope_theta": 500.0, "rms_norm_eps": 1e-5,
}  # fmt: skip


def save(model, folder, shard="5GB"):
    """Random weights into the folder, norms and biases too, which transformers starts at one and zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


def save_vision(folder, shard="5GB", **changes):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return save(SiglipVisionModel(SiglipVisionConfig(**(VISION | changes))), folder, shard)


def save_language(folder, shard="5GB", **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return save(LlamaForCausalLM(LlamaConfig(**(LANGUAGE | changes))), folder, shard)


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in stored.items() if name not in remove}))


def edit_weights(folder, edit):
    """edit(tensors) in place; early releases of transformers 5 put `vision_model.` before the tower's names."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def config(vision=SCRATCH, language=SCRATCH, **fields) -> VLMConfig:
    return VLMConfig(vit_model_type=str(vision), lm_model_type=str(language), **fields)


@pytest.fixture
def backbones(tmp_path):
    """A config whose two backbones are tiny local folders, and those folders."""
    vision, language = tmp_path / "vision", tmp_path / "language"
    save_vision(vision)
    save_language(language)
    return config(vision, language), vision, language


@torch.no_grad()
def assert_same_features(folder, hf):
    vit = ViT.from_pretrained(config(vision=folder)).eval()
    images = torch.randn(2, 3, vit.cfg.vit_img_size, vit.cfg.vit_img_size)
    torch.testing.assert_close(vit(images), hf(pixel_values=images).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def assert_same_logits(folder, hf):
    lm = LanguageModel.from_pretrained(config(language=folder)).eval()
    ids = torch.randint(lm.cfg.lm_base_vocab_size, (2, 11))
    logits = lm.head(lm(lm.token_embedding(ids)))[..., : lm.cfg.lm_base_vocab_size]
    torch.testing.assert_close(logits, hf(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
        {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3, "shard": "5KB"},
        {"hidden_size": 40, "num_attention_heads": 5, "image_size": 24, "patch_size": 8, "vision_use_head": False},
    ],
)
def test_vit_equals_siglip(tmp_path, changes):
    assert_same_features(tmp_path, save_vision(tmp_path, **changes))
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)


def test_vit_is_the_vision_tower_of_a_full_model(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    text = SIZES | NO_TOKENS | {"num_attention_heads": 3, "vocab_size": 9, "projection_size": 24}
    hf = save(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)), tmp_path, "10KB")
    assert_same_features(tmp_path, hf.vision_model)


def test_vit_loads_older_names_and_a_config_without_what_equals_defaults(tmp_path):
    def old_names(tensors):
        for name in list(tensors):
            tensors[f"vision_model.{name}"] = tensors.pop(name)
        tensors["vision_model.embeddings.position_ids"] = torch.arange(16)[None]

    hf = save_vision(tmp_path, num_attention_heads=12)
    edit_weights(tmp_path, old_names)
    edit_config(tmp_path, remove=("num_attention_heads", "layer_norm_eps", "num_channels", "hidden_act"))
    assert_same_features(tmp_path, hf)


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": "5KB"},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6, "rope_theta": 1e5},
        {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-2},
    ],
)
def test_decoder_equals_llama(tmp_path, changes):
    assert_same_logits(tmp_path, save_language(tmp_path, **changes))
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)


def test_decoder_loads_an_old_config_without_what_equals_defaults(tmp_path):
    hf = save_language(tmp_path, num_key_value_heads=6)
    missing = ("num_key_value_heads", "head_dim", "attention_bias", "hidden_act", "rope_parameters")
    edit_config(tmp_path, remove=missing, rope_theta=500.0, rope_scaling=None)
    assert_same_logits(tmp_path, hf)


def test_configure_sets_sizes_and_leaves_the_rest(backbones):
    cfg, vision, language = backbones
    cfg.max_img_size, cfg.mp_pixel_shuffle_factor, cfg.lm_max_length = 1024, 3, 77
    before = vars(cfg).copy()
    configure_from_backbones(cfg)
    assert {name: value for name, value in vars(cfg).items() if value != before[name]} == {
        "vit_hidden_dim": 24, "vit_inter_dim": 40, "vit_n_blocks": 2, "vit_n_heads": 3, "vit_img_size": 16,
        "vit_patch_size": 4, "lm_hidden_dim": 24, "lm_inter_dim": 40, "lm_n_blocks": 2, "lm_n_heads": 6,
        "lm_n_kv_heads": 2, "lm_re_base": 500, "lm_max_position_embeddings": 64, "lm_base_vocab_size": 31,
        "lm_vocab_size": 31 + 66,
    }  # fmt: skip
    assert isinstance(cfg.lm_re_base, int)

    # siglip2-base-patch16-512 writes only the model type and the image size
    (vision / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"image_size": 512}}))
    (language / "config.json").write_text(json.dumps({"model_type": "llama"}))
    configure_from_backbones(cfg)
    assert (cfg.vit_hidden_dim, cfg.vit_n_blocks, cfg.vit_n_heads, cfg.vit_inter_dim) == (768, 12, 12, 3072)
    assert (cfg.vit_img_size, cfg.vit_patch_size, cfg.vit_ln_eps) == (512, 16, 1e-6)
    assert (cfg.lm_hidden_dim, cfg.lm_n_kv_heads, cfg.lm_re_base, cfg.lm_tie_weights) == (4096, 32, 10_000, False)


def test_scratch_and_what_is_not_on_this_machine_keep_their_sizes(backbones):
    _, vision, _ = backbones
    for cfg in (config(SCRATCH, SCRATCH), config("some/hub-id", "another/hub-id")):
        before = vars(cfg).copy()
        configure_from_backbones(cfg, local_only=True)
        assert vars(cfg) == before
    cfg = config(vision, SCRATCH, lm_hidden_dim=120, lm_n_blocks=1)
    configure_from_backbones(cfg)
    assert (cfg.vit_hidden_dim, cfg.lm_hidden_dim) == (24, 120)
    assert LanguageModel.from_pretrained(cfg).head.in_features == 120


@pytest.mark.parametrize(("tied", "wanted"), [(True, True), (True, False), (False, True)])
def test_heads_and_the_embeddings_of_extra_tokens(tmp_path, tied, wanted):
    """An untied model or an untied config unties the head; extra tokens start at the mean; bfloat16 becomes float32."""
    save_language(tmp_path, tie_word_embeddings=tied)
    edit_weights(tmp_path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    lm = LanguageModel.from_pretrained(config(language=tmp_path, lm_tie_weights=wanted))
    assert lm.cfg.lm_tie_weights == (lm.head.weight is lm.token_embedding.weight) == (tied and wanted)
    tensors = load_file(tmp_path / "model.safetensors")
    for matrix, name in ((lm.head.weight, "lm_head.weight"), (lm.token_embedding.weight, "model.embed_tokens.weight")):
        expected = tensors["model.embed_tokens.weight" if tied else name].float()
        assert torch.equal(matrix[:31], expected)
        torch.testing.assert_close(matrix[31:], expected.mean(dim=0).expand(66, -1))


def test_a_whole_model_has_the_sizes_of_its_backbones(backbones):
    cfg, _, _ = backbones
    cfg.mp_pixel_shuffle_factor, cfg.mp_image_token_length = 2, 4
    cfg.vit_n_heads, cfg.lm_re_base = 2, 400
    model = VisionLanguageModel(cfg, load_backbone=True)
    assert (cfg.vit_n_heads, cfg.lm_re_base) == (3, 500)
    ids = torch.tensor([[1, *[cfg.image_token_id] * 4, 2]])
    assert model(ids, torch.randn(1, 3, 16, 16))[0].shape == (1, 6, 97)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("vit", {"model_type": "clip"}, "'clip', must be siglip or siglip_vision_model"),
        ("vit", {"hidden_act": "gelu"}, "hidden_act 'gelu', must be 'gelu_pytorch_tanh'"),
        ("lm", {"model_type": "qwen3"}, "'qwen3', must be llama"),
        ("lm", {"head_dim": 8}, "head_dim 8, must be 4"),
        (
            "lm",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "hidden_act": "gelu"},
            "hidden_act 'gelu', must be 'silu'; rope_type 'linear', must be 'default'",
        ),
    ],
)
def test_other_architectures_are_refused(backbones, tower, changes, message):
    cfg, vision, language = backbones
    edit_config(vision if tower == "vit" else language, **changes)
    with pytest.raises(ValueError, match=f"--{tower}_model_type .*{message}"):
        configure_from_backbones(cfg)


def vision_damage(tensors):
    del tensors["post_layernorm.bias"], tensors["encoder.layers.0.self_attn.k_proj.weight"]
    tensors["encoder.layers.1.mlp.fc1.bias"] = torch.zeros(7)
    tensors["encoder.layers.2.mlp.fc1.bias"] = torch.zeros(40)


def language_damage(tensors):
    del tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 40)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)


VISION_PROBLEMS = {
    "post_layernorm.bias: missing", "encoder.layers.0.self_attn.k_proj.weight: missing",
    "encoder.layers.1.mlp.fc1.bias: shape [7], must be [40]", "encoder.layers.2.mlp.fc1.bias: left over",
}  # fmt: skip
LANGUAGE_PROBLEMS = {
    "norm.weight: missing", "embed_tokens.weight: missing", "lm_head.weight: missing",
    "layers.0.mlp.up_proj.weight: shape [24, 40], must be [40, 24]", "layers.0.self_attn.q_norm.weight: left over",
}  # fmt: skip


@pytest.mark.parametrize(
    ("tower", "damage", "problems"),
    [(ViT, vision_damage, VISION_PROBLEMS), (LanguageModel, language_damage, LANGUAGE_PROBLEMS)],
)
def test_everything_that_does_not_fit_is_listed(backbones, tower, damage, problems):
    cfg, vision, language = backbones
    cfg.lm_tie_weights = False
    edit_weights(vision if tower is ViT else language, damage)
    with pytest.raises(ValueError, match=f"_model_type .*{len(problems)} tensors do not fit") as error:
        tower.from_pretrained(cfg)
    assert set(str(error.value).split("\n  ")[1:]) == problems


def test_missing_files_are_named(backbones):
    cfg, vision, language = backbones
    (vision / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vision: no model\.safetensors"):
        ViT.from_pretrained(cfg)
    (language / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"language.config\.json"):
        LanguageModel.from_pretrained(cfg)


def test_local_folders_need_no_network(backbones, no_network):
    VisionLanguageModel(backbones[0], load_backbone=True)
    assert no_network == []


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("flag", "load"),
    [
        ("vit_model_type", configure_from_backbones),
        ("vit_model_type", ViT.from_pretrained),
        ("lm_model_type", LanguageModel.from_pretrained),
        ("vlm_checkpoint_path", lambda cfg: checkpoint_folder(cfg.lm_model_type)),
    ],
)
def test_a_hub_out_of_reach_is_an_error_at_once(no_network, monkeypatch, flag, load, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    name = "nobody/no-such-model"
    start = time.monotonic()
    with pytest.raises(BackboneUnavailable, match=rf"^--{flag} {name}: no such local folder, and the hub [^\n]*$"):
        load(config(name, name))
    assert time.monotonic() - start < 5
    assert bool(no_network) != offline


def test_a_silent_hub_is_given_up(monkeypatch):
    from huggingface_hub import HfApi

    asked = {}

    def silent(self, repo_id, *, revision, timeout):
        asked.update(repo_id=repo_id, revision=revision, timeout=timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(HfApi, "model_info", silent)
    with pytest.raises(BackboneUnavailable, match="TimeoutError: timed out"):
        checkpoint_folder("nobody/no-such-model", "v1")
    assert asked == {"repo_id": "nobody/no-such-model", "revision": "v1", "timeout": 5}


@pytest.mark.parametrize(
    ("name", "problem"), [("./not/a/folder", "no such local folder"), ("a.gguf", "scripts/convert_gguf.py a.gguf")]
)
def test_what_cannot_be_a_hub_id_is_not_looked_up(no_network, name, problem):
    with pytest.raises(BackboneUnavailable, match=f"--lm_model_type {name}: .*{problem}"):
        LanguageModel.from_pretrained(config(language=name))
    assert no_network == []


def test_the_cache_serves_where_the_hub_does_not_answer(tmp_path, monkeypatch, no_network):
    """What was downloaded before loads without a network."""
    repository = tmp_path / "models--somebody--backbone"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_folder("somebody/backbone") == repository / "snapshots" / "abc"
