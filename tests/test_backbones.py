"""Pretrained backbones: our towers against transformers', and what an error says of a bad folder or an absent hub."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from models.backbones import configure_from_backbones
from models.config import SCRATCH, VLMConfig
from models.language_model import KVCache, LanguageModel
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


def save_vision(folder, shard="5GB", family="Siglip", **changes):
    config = getattr(transformers, f"{family}VisionConfig")(**(VISION | changes))
    return save(getattr(transformers, f"{family}VisionModel")(config), folder, shard)


def save_language(folder, shard="5GB", family="Llama", **changes):
    config = getattr(transformers, f"{family}Config")(**(LANGUAGE | changes))
    return save(getattr(transformers, f"{family}ForCausalLM")(config), folder, shard)


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


def assert_same_gradients(ours, tensors, hf, skip=()):
    """After a backward pass of both. tensors(): transformers' names -> our tensors."""
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    theirs = {name.removeprefix("model."): p.grad for name, p in hf.named_parameters() if p.grad is not None}
    mine = {name: tensor for name, tensor in tensors().items() if not name.startswith(skip)}
    theirs = {name: gradient for name, gradient in theirs.items() if not name.startswith(skip)}
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(mine[name].detach() / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


def assert_same_features(folder, hf, layers=(), skip=()):
    """layers: vit_feature_layers. skip: tensors of transformers' that no feature depends on."""
    vit = ViT.from_pretrained(config(vision=folder, vit_feature_layers=list(layers))).eval()
    images = torch.randn(2, 3, vit.cfg.vit_img_size, vit.cfg.vit_img_size)
    found = hf(pixel_values=images, output_hidden_states=bool(layers))
    expected = torch.cat([found.hidden_states[i] for i in layers], dim=-1) if layers else found.last_hidden_state
    if vit.cfg.vit_architecture == "clip":
        expected = expected[:, 1:]
    features, weights = vit(images), torch.randn_like(expected)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    (features * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(vit, vit.siglip_tensors, hf, ("head.", *skip))


def assert_same_logits(folder, hf):
    lm = LanguageModel.from_pretrained(config(language=folder)).eval()
    ids, base = torch.randint(lm.cfg.lm_base_vocab_size, (2, 11)), lm.cfg.lm_base_vocab_size
    logits, expected = lm.head(lm(lm.token_embedding(ids)))[..., :base], hf(ids).logits[..., :base]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        cache = KVCache(lm.cfg, 2, 11, "cpu", torch.float32)
        steps = [lm(lm.token_embedding(part), cache=cache) for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1))]
        torch.testing.assert_close(lm.head(torch.cat(steps, dim=1))[..., :base], expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(lm, lambda: lm.llama_tensors(hf.config.vocab_size), hf)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1, "layer_norm_eps": 1e-3},
        {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3, "shard": "5KB"},
        {"hidden_size": 40, "num_attention_heads": 5, "image_size": 24, "patch_size": 8, "vision_use_head": False},
        {"family": "CLIP"},
        {"family": "CLIP", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "layer_norm_eps": 1e-3},
    ],
)
def test_vit_equals_transformers(tmp_path, changes):
    hf = save_vision(tmp_path, **changes)
    skip = ("post_layernorm",) if "family" in changes else ()
    assert_same_features(tmp_path, hf, skip=skip)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
@pytest.mark.parametrize(("layers", "built"), [((-1,), 6), ((-2,), 5), ((-3, -6), 4), ((-6, -4), 3)])
def test_features_of_chosen_blocks_need_no_block_above(tmp_path, family, layers, built):
    hf = save_vision(tmp_path, family=family, num_hidden_layers=6)
    skip = ("post_layernorm", *(f"encoder.layers.{i}." for i in range(built, 6)))
    assert_same_features(tmp_path, hf, layers, skip)
    cfg = config(vision=tmp_path, vit_feature_layers=list(layers))
    vit = ViT.from_pretrained(cfg)
    assert (len(vit.blocks), cfg.vit_n_blocks, cfg.vit_feature_dim) == (built, 6, 24 * len(layers))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_clip_loads_from_what_torch_saved(tmp_path, zipped):
    """Older repositories hold pytorch_model.bin alone; here with both towers and old names."""
    hf = save_vision(tmp_path, family="CLIP")
    tensors = {f"vision_model.{name}": tensor for name, tensor in hf.state_dict().items()}
    tensors |= {"text_model.final_layer_norm.bias": torch.zeros(3), "logit_scale": torch.tensor(2.0)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_features(tmp_path, hf, skip=("post_layernorm",))
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: is damaged"):
        ViT.from_pretrained(config(vision=tmp_path))


def test_a_clip_brings_its_pixel_statistics(tmp_path):
    save_vision(tmp_path, family="CLIP")
    cfg, own = config(vision=tmp_path), config(vision=tmp_path, image_mean=0.3)
    vit = ViT.from_pretrained(cfg)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.image_mean, cfg.image_std))
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    assert mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    torch.testing.assert_close(vit(pixels), vit((pixels / 255 - mean) / std), atol=1e-5, rtol=0)
    ViT.from_pretrained(own)
    assert own.image_mean == 0.3
    assert config(image_mean=[0.5, 0.5], lm_tokenizer="t").problems() == [
        "--image_mean [0.5, 0.5]: must be one number or three"
    ]
    assert config(image_std=[0.5, 0.0, 0.5], lm_tokenizer="t").problems() == [
        "--image_std [0.5, 0.0, 0.5]: must be > 0 each"
    ]


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
def test_vit_is_the_vision_tower_of_a_full_model(tmp_path, family):
    configuration, model = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}Model")
    text = SIZES | NO_TOKENS | {"num_attention_heads": 3, "vocab_size": 9, "projection_size": 24}
    hf = save(model(configuration(vision_config=VISION, text_config=text, projection_dim=24)), tmp_path, "10KB")
    assert_same_features(tmp_path, hf.vision_model, skip=("post_layernorm",) if family == "CLIP" else ())


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
def test_vit_loads_older_names_and_a_config_without_what_equals_defaults(tmp_path, family):
    def old_names(tensors):
        for name in list(tensors):
            tensors[f"vision_model.{name}"] = tensors.pop(name)
        tensors["vision_model.embeddings.position_ids"] = torch.arange(16)[None]

    hf = save_vision(tmp_path, family=family, num_attention_heads=12)
    edit_weights(tmp_path, old_names)
    edit_config(tmp_path, remove=("num_attention_heads", "layer_norm_eps", "num_channels", "hidden_act"))
    assert_same_features(tmp_path, hf, skip=("post_layernorm",) if family == "CLIP" else ())


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": "5KB"},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6, "rope_theta": 1e5},
        {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-2},
        {"head_dim": 8},
        {"family": "Qwen2"},
        {"family": "Qwen2", "tie_word_embeddings": False, "num_key_value_heads": 1, "rope_theta": 1e6},
        {"family": "Qwen3", "head_dim": 16},
        {"family": "Qwen3", "head_dim": 4, "tie_word_embeddings": False, "rms_norm_eps": 1e-2, "rope_theta": 1e6},
    ],
)
def test_decoder_equals_transformers(tmp_path, changes):
    assert_same_logits(tmp_path, save_language(tmp_path, **changes))
    assert (tmp_path / "model.safetensors.index.json").exists() == ("shard" in changes)


def test_decoder_loads_an_old_config_without_what_equals_defaults(tmp_path):
    hf = save_language(tmp_path, num_key_value_heads=6)
    missing = ("num_key_value_heads", "head_dim", "attention_bias", "hidden_act", "rope_parameters")
    edit_config(tmp_path, remove=missing, rope_theta=500.0, rope_scaling=None)
    assert_same_logits(tmp_path, hf)


@pytest.mark.parametrize(("words", "extra", "base", "rows"), [(25, 4, 25, 31), (25, 9, 25, 34), (31, 2, 31, 33)])
def test_extra_tokens_take_the_spare_rows_of_a_matrix(tmp_path, words, extra, base, rows):
    """Qwen3 has 151,669 tokens in a matrix of 151,936 rows. words: of the tokenizer, two of them added to it."""
    hf = save_language(tmp_path, family="Qwen3", head_dim=4)
    vocab, added = {f"w{i}": i for i in range(words - 2)}, [{"id": words - 2 + i, "content": f"<{i}>"} for i in (0, 1)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    tokens = {"image_token": "<|image|>"} | {f"t{i}": f"<t{i}>" for i in range(1, extra)}
    cfg = config(language=tmp_path, extra_token_amount=extra, vlm_extra_tokens=tokens)
    matrix, theirs = LanguageModel.from_pretrained(cfg).token_embedding.weight, hf.get_input_embeddings().weight
    assert (cfg.image_token_id, cfg.lm_vocab_size, len(matrix)) == (base, rows, rows)
    assert torch.equal(matrix[:base], theirs[:base])
    torch.testing.assert_close(matrix[base : base + extra], theirs[:base].mean(dim=0).expand(extra, -1))
    assert torch.equal(matrix[base + extra :], theirs[base + extra :])  # rows that no token has
    again = VLMConfig.from_dict(json.loads(json.dumps(vars(cfg))))
    assert (again.image_token_id, again.lm_vocab_size) == (base, rows)


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
    # siglip2-so400m-patch14-384 sees 27 x 27 whole patches
    (vision / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": {"image_size": 384, "patch_size": 14}})
    )
    configure_from_backbones(cfg)
    assert (cfg.vit_img_size, cfg.vit_grid) == (378, 27)
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
        ("vit", {"model_type": "dinov2"}, "'dinov2', must be siglip or siglip_vision_model or clip or clip_vision_m"),
        ("vit", {"model_type": "clip_vision_model"}, "hidden_act 'gelu_pytorch_tanh', must be 'quick_gelu'"),
        ("vit", {"hidden_act": "gelu"}, "hidden_act 'gelu', must be 'gelu_pytorch_tanh'"),
        ("lm", {"model_type": "gemma3"}, "'gemma3', must be llama or qwen2 or qwen3"),
        ("lm", {"model_type": "qwen3", "attention_bias": True}, "attention_bias True, must be False"),
        ("lm", {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True, must be False"),
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
