"""Pretrained backbones: our towers against transformers', what a bad folder and an absent hub say. Offline."""

import json
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from models.backbones import BackboneUnavailable, checkpoint_folder, configure_from_backbones
from models.config import VLMConfig
from models.language_model import LanguageModel
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 16, "patch_size": 4}
LANGUAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 31}
LANGUAGE |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
LANGUAGE |= {"tie_word_embeddings": True, "rope_theta": 500.0, "rms_norm_eps": 1e-5}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def randomized(model):
    """Norms and biases too, which transformers starts at one and zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_vision(folder, shard="5GB", **changes):
    hf = randomized(SiglipVisionModel(SiglipVisionConfig(**(VISION | changes))))
    hf.save_pretrained(folder, max_shard_size=shard)
    return hf


def save_language(folder, shard="5GB", **changes):
    hf = randomized(LlamaForCausalLM(LlamaConfig(**(LANGUAGE | NO_TOKENS | changes))))
    hf.save_pretrained(folder, max_shard_size=shard)
    return hf


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    stored = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in stored.items() if name not in remove}))


def edit_weights(folder, edit):
    """edit(tensors) in place; early releases of transformers 5 put `vision_model.` before the tower's names."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in stored.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def backbones(tmp_path):
    """A config whose two backbones are tiny local folders, and those folders."""
    vision, language = tmp_path / "vision", tmp_path / "language"
    save_vision(vision)
    save_language(language)
    return VLMConfig(vit_model_type=str(vision), lm_model_type=str(language), lm_use_tokens=True), vision, language


def vision_config(folder) -> VLMConfig:
    cfg = VLMConfig(vit_model_type=str(folder / "vision"), lm_model_type=str(folder / "language"))
    if not (folder / "language").exists():
        save_language(folder / "language")
    configure_from_backbones(cfg)
    return cfg


def language_config(folder, **changes) -> VLMConfig:
    save_vision(folder / "vision")
    cfg = VLMConfig(vit_model_type=str(folder / "vision"), lm_model_type=str(folder / "language"), lm_use_tokens=True)
    for name, value in changes.items():
        setattr(cfg, name, value)
    configure_from_backbones(cfg)
    return cfg


@torch.no_grad()
def assert_same_features(cfg, hf):
    images = torch.randn(2, 3, cfg.vit_img_size, cfg.vit_img_size)
    expected = hf(pixel_values=images).last_hidden_state
    torch.testing.assert_close(ViT.from_pretrained(cfg).eval()(images), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def assert_same_logits(cfg, hf):
    ids = torch.randint(cfg.lm_base_vocab_size, (2, 11))
    logits = LanguageModel.from_pretrained(cfg).eval()(ids)
    torch.testing.assert_close(logits[..., : cfg.lm_base_vocab_size], hf(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
        {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3},
        {"hidden_size": 40, "num_attention_heads": 5, "image_size": 24, "patch_size": 8, "vision_use_head": False},
    ],
)
def test_vit_equals_siglip(tmp_path, changes):
    hf = save_vision(tmp_path / "vision", **changes)
    assert_same_features(vision_config(tmp_path), hf)


def test_vit_takes_the_vision_tower_of_a_full_model(tmp_path):
    text = VISION | {"vocab_size": 9, "projection_size": 24} | NO_TOKENS
    text = {name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
    hf = randomized(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)))
    hf.save_pretrained(tmp_path / "vision", max_shard_size="10KB")
    assert (tmp_path / "vision" / "model.safetensors.index.json").exists()
    assert_same_features(vision_config(tmp_path), hf.vision_model)


def test_vit_takes_the_older_names(tmp_path):
    def old_names(tensors):
        for name in list(tensors):
            tensors[f"vision_model.{name}"] = tensors.pop(name)
        tensors["vision_model.embeddings.position_ids"] = torch.arange(16)[None]

    hf = save_vision(tmp_path / "vision")
    edit_weights(tmp_path / "vision", old_names)
    assert_same_features(vision_config(tmp_path), hf)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6, "rope_theta": 1e5},
        {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-2},
    ],
)
def test_decoder_equals_llama(tmp_path, changes):
    hf = save_language(tmp_path / "language", **changes)
    assert_same_logits(language_config(tmp_path), hf)


def test_sharded_backbones(tmp_path):
    language, vision = (tmp_path / name for name in ("language", "vision"))
    hf_language, hf_vision = save_language(language, shard="5KB"), save_vision(vision, shard="5KB")
    assert len(list(language.glob("*.safetensors"))) > 2
    assert len(list(vision.glob("*.safetensors"))) > 2
    cfg = VLMConfig(vit_model_type=str(vision), lm_model_type=str(language), lm_use_tokens=True)
    configure_from_backbones(cfg)
    assert_same_features(cfg, hf_vision)
    assert_same_logits(cfg, hf_language)


def test_configure_takes_sizes_and_leaves_the_rest(backbones):
    cfg, _, _ = backbones
    cfg.max_img_size, cfg.mp_pixel_shuffle_factor, cfg.lm_max_length = 1024, 3, 77
    configure_from_backbones(cfg)
    vit = (cfg.vit_hidden_dim, cfg.vit_inter_dim, cfg.vit_n_blocks, cfg.vit_n_heads, cfg.vit_img_size)
    assert vit == (24, 40, 2, 3, 16)
    assert (cfg.vit_patch_size, cfg.vit_ln_eps) == (4, 1e-6)
    assert (cfg.lm_hidden_dim, cfg.lm_inter_dim, cfg.lm_n_blocks, cfg.lm_n_heads, cfg.lm_n_kv_heads) == (
        24,
        40,
        2,
        6,
        2,
    )
    assert (cfg.lm_re_base, cfg.lm_rms_eps, cfg.lm_max_position_embeddings) == (500, 1e-5, 64)
    assert (cfg.lm_base_vocab_size, cfg.lm_vocab_size, cfg.lm_tie_weights) == (31, 31 + 66, True)
    assert (cfg.max_img_size, cfg.mp_pixel_shuffle_factor, cfg.lm_max_length) == (1024, 3, 77)
    assert json.loads(json.dumps(cfg.lm_re_base)) == 500


def test_configure_fills_what_config_json_leaves_out(tmp_path, backbones):
    """siglip2-base-patch16-512 writes only the model type and the image size."""
    cfg, vision, language = backbones
    (vision / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"image_size": 512}}))
    (language / "config.json").write_text(json.dumps({"model_type": "llama"}))
    configure_from_backbones(cfg)
    assert (cfg.vit_hidden_dim, cfg.vit_n_blocks, cfg.vit_n_heads, cfg.vit_inter_dim) == (768, 12, 12, 3072)
    assert (cfg.vit_img_size, cfg.vit_patch_size, cfg.vit_ln_eps) == (512, 16, 1e-6)
    assert (cfg.lm_hidden_dim, cfg.lm_n_kv_heads, cfg.lm_re_base, cfg.lm_tie_weights) == (4096, 32, 10_000, False)


def test_vision_fields_equal_to_defaults_may_be_missing(tmp_path):
    hf = save_vision(tmp_path / "vision", num_attention_heads=12)
    edit_config(tmp_path / "vision", remove=("num_attention_heads", "layer_norm_eps", "num_channels", "hidden_act"))
    assert_same_features(vision_config(tmp_path), hf)


def test_language_fields_equal_to_defaults_may_be_missing(tmp_path):
    hf = save_language(tmp_path / "language", num_key_value_heads=6)
    edit_config(tmp_path / "language", remove=("num_key_value_heads", "head_dim", "attention_bias", "hidden_act"))
    assert_same_logits(language_config(tmp_path), hf)


def test_rope_theta_of_old_files(tmp_path):
    hf = save_language(tmp_path / "language")
    edit_config(tmp_path / "language", remove=["rope_parameters"], rope_theta=500.0, rope_scaling=None)
    cfg = language_config(tmp_path)
    assert cfg.lm_re_base == 500
    assert_same_logits(cfg, hf)


def test_extra_tokens_start_at_the_mean(backbones):
    cfg, _, language = backbones
    configure_from_backbones(cfg)
    embedding = load_file(language / "model.safetensors")["model.embed_tokens.weight"]
    lm = LanguageModel.from_pretrained(cfg)
    assert lm.head.weight is lm.token_embedding.weight
    assert torch.equal(lm.token_embedding.weight[:31], embedding)
    torch.testing.assert_close(lm.token_embedding.weight[31:], embedding.mean(dim=0).expand(66, -1))


@pytest.mark.parametrize("tied", [True, False])
def test_untied_head(tmp_path, tied):
    save_language(tmp_path / "language", tie_word_embeddings=tied)
    cfg = language_config(tmp_path, lm_tie_weights=not tied)
    assert not cfg.lm_tie_weights, "an untied checkpoint or an untied config unties the head"
    tensors = load_file(tmp_path / "language" / "model.safetensors")
    expected = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    lm = LanguageModel.from_pretrained(cfg)
    assert lm.head.weight is not lm.token_embedding.weight
    assert torch.equal(lm.head.weight[:31], expected)
    torch.testing.assert_close(lm.head.weight[31:], expected.mean(dim=0).expand(66, -1))


def test_bfloat16_files_load_into_float32(backbones):
    cfg, _, language = backbones
    edit_weights(language, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    configure_from_backbones(cfg)
    lm = LanguageModel.from_pretrained(cfg)
    stored = load_file(language / "model.safetensors")["model.norm.weight"]
    assert torch.equal(lm.norm.weight, stored.float())


def test_whole_model_from_backbones(backbones):
    cfg, _, _ = backbones
    cfg.lm_use_tokens, cfg.mp_pixel_shuffle_factor, cfg.mp_image_token_length = False, 2, 4
    configure_from_backbones(cfg)
    model = VisionLanguageModel(cfg, load_backbone=True)
    ids = torch.tensor([[1, *[cfg.image_token_id] * 4, 2]])
    assert model(ids, torch.randn(1, 3, 16, 16))[0].shape == (1, 6, 97)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("vision", {"model_type": "clip"}, "--vit_model_type .*'clip', must be siglip or siglip_vision_model"),
        ("vision", {"hidden_act": "gelu"}, "hidden_act 'gelu', must be 'gelu_pytorch_tanh'"),
        ("language", {"model_type": "qwen3"}, "--lm_model_type .*'qwen3', must be llama"),
        ("language", {"head_dim": 8}, "head_dim 8, must be 4"),
        (
            "language",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "hidden_act": "gelu"},
            "hidden_act 'gelu', must be 'silu'; rope_type 'linear', must be 'default'",
        ),
    ],
)
def test_other_architectures_are_refused(backbones, tower, changes, message):
    cfg, vision, language = backbones
    edit_config(vision if tower == "vision" else language, **changes)
    with pytest.raises(ValueError, match=message):
        configure_from_backbones(cfg)


def test_a_config_that_differs_from_the_backbone_is_refused(backbones):
    cfg, _, _ = backbones
    configure_from_backbones(cfg)
    cfg.vit_n_heads, cfg.lm_re_base = 2, 400
    with pytest.raises(ValueError, match=r"vit_n_heads 3, config 2: call .*configure_from_backbones"):
        ViT.from_pretrained(cfg)
    with pytest.raises(ValueError, match=r"lm_re_base 500, config 400: call .*configure_from_backbones"):
        LanguageModel.from_pretrained(cfg)


def test_all_bad_tensors_of_the_vision_tower_are_listed(backbones):
    def damage(tensors):
        del tensors["post_layernorm.bias"], tensors["encoder.layers.0.self_attn.k_proj.weight"]
        tensors["encoder.layers.1.mlp.fc1.bias"] = torch.zeros(7)
        tensors["encoder.layers.2.mlp.fc1.bias"] = torch.zeros(40)

    cfg, vision, _ = backbones
    configure_from_backbones(cfg)
    edit_weights(vision, damage)
    with pytest.raises(ValueError, match="4 tensors do not fit") as error:
        ViT.from_pretrained(cfg)
    assert "post_layernorm.bias: missing" in str(error.value)
    assert "encoder.layers.0.self_attn.k_proj.weight: missing" in str(error.value)
    assert "encoder.layers.1.mlp.fc1.bias: shape [7], must be [40]" in str(error.value)
    assert "encoder.layers.2.mlp.fc1.bias: left over" in str(error.value)


def test_all_bad_tensors_of_the_decoder_are_listed(backbones):
    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 40)
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)

    cfg, _, language = backbones
    cfg.lm_tie_weights = False
    configure_from_backbones(cfg)
    edit_weights(language, damage)
    with pytest.raises(ValueError, match="5 tensors do not fit") as error:
        LanguageModel.from_pretrained(cfg)
    for problem in (
        "norm.weight: missing",
        "embed_tokens.weight: missing",
        "lm_head.weight: missing",
        "layers.0.mlp.up_proj.weight: shape [24, 40], must be [40, 24]",
        "layers.0.self_attn.q_norm.weight: left over",
    ):
        assert problem in str(error.value)


def test_missing_files_are_named(backbones):
    cfg, vision, language = backbones
    configure_from_backbones(cfg)
    (vision / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vision: no model\.safetensors"):
        ViT.from_pretrained(cfg)
    (language / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"language.config\.json"):
        LanguageModel.from_pretrained(cfg)


@pytest.fixture
def no_network(monkeypatch):
    """Every look-up and connection fails as without a network; returns the addresses that were asked for."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def test_local_folders_need_no_network(backbones, no_network):
    cfg, _, _ = backbones
    configure_from_backbones(cfg)
    ViT.from_pretrained(cfg)
    LanguageModel.from_pretrained(cfg)
    assert no_network == []


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("call", ["configure", "vision", "language", "checkpoint"])
def test_hub_out_of_reach_says_so_at_once(no_network, monkeypatch, call, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    name = "nobody/no-such-model"
    cfg = VLMConfig(vit_model_type=name, lm_model_type=name, vit_n_blocks=1, lm_n_blocks=1)
    cfg.lm_hidden_dim = cfg.vit_hidden_dim = 120
    cfg.vit_img_size = 16
    calls = {
        "configure": lambda: configure_from_backbones(cfg),
        "vision": lambda: ViT.from_pretrained(cfg),
        "language": lambda: LanguageModel.from_pretrained(cfg),
        "checkpoint": lambda: checkpoint_folder(name),
    }
    start = time.monotonic()
    with pytest.raises(BackboneUnavailable) as error:
        calls[call]()
    assert time.monotonic() - start < 5
    flag = {"configure": "vit_model_type", "vision": "vit_model_type", "language": "lm_model_type"}
    assert f"--{flag.get(call, 'vlm_checkpoint_path')} {name}: no such local folder, and the hub" in str(error.value)
    assert "--vit_model_type, --lm_model_type, --lm_tokenizer and --vlm_checkpoint_path accept" in str(error.value)
    assert "\n" not in str(error.value)
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


def test_a_mistyped_folder_is_no_hub_id(no_network):
    with pytest.raises(BackboneUnavailable, match=r"\./not/a/folder: no such local folder"):
        checkpoint_folder("./not/a/folder")
    assert no_network == []


def test_the_cache_serves_where_the_hub_does_not_answer(tmp_path, monkeypatch, no_network):
    """What was downloaded before loads without a network."""
    repository = tmp_path / "models--somebody--backbone"
    save_language(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_folder("somebody/backbone") == repository / "snapshots" / "abc"
