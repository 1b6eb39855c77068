"""Towers of models that their names do not give away, what has no tau, and the table of a model's components."""

import json
import warnings

import pytest
import torch
import torch.nn as nn
from tiny.grades import ALWAYS

from grades import GradEarlyStoppingConfig, GradESConfig, GradESMonitor, VLMGradEarlyStoppingConfig, find_components
from grades.__main__ import main
from grades.components import block_of
from grades.freezing import Freezer
from grades.plots import convergence, freezing
from grades.towers import Towers

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDE | {"vocab_size": 32}
VISION = WIDE | {"image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
AUDIO_TEXT = {
    "text_config": TEXT | {"model_type": "llama"},
    "audio_config": SEQ2SEQ | {"model_type": "qwen2_audio_encoder", "num_mel_bins": 8},
}
WAV2VEC = WIDE | {
    "conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
    "num_conv_pos_embeddings": 4, "num_feat_extract_layers": 1,
}  # fmt: skip


def vision_encoder_decoder(transformers, encoder: str, decoder: str, encoder_settings: dict):
    encoder_config = transformers.CONFIG_MAPPING[encoder](**encoder_settings)
    decoder_config = transformers.CONFIG_MAPPING[decoder](**SEQ2SEQ)
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder_config, decoder_config)


SWIN = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
# What is built: its configuration, and the towers with the beginnings of the names that are in each.
MODELS = {
    "TrOCR": (
        lambda t: (t.VisionEncoderDecoderModel, vision_encoder_decoder(t, "deit", "trocr", VISION)),
        {"vision": {"encoder"}, "language": {"decoder"}},
    ),
    "Donut": (
        lambda t: (t.VisionEncoderDecoderModel, vision_encoder_decoder(t, "donut-swin", "mbart", SWIN)),
        {"vision": {"encoder"}, "language": {"decoder"}},
    ),
    "Pix2Struct": (
        lambda t: (
            t.Pix2StructForConditionalGeneration,
            t.Pix2StructConfig(text_config={"num_layers": 2}, vision_config={"num_hidden_layers": 2}),
        ),
        {"vision": {"encoder"}, "language": {"decoder"}},
    ),
    "DINOv3": (lambda t: (t.DINOv3ViTModel, t.DINOv3ViTConfig(**VISION)), {"vision": {"model"}}),
    "Pixtral": (lambda t: (t.PixtralVisionModel, t.PixtralVisionConfig(**VISION)), {"vision": {"transformer"}}),
    "DETR's blocks are vision, a decoder's too": (
        lambda t: (
            t.ConditionalDetrForObjectDetection,
            t.ConditionalDetrConfig(
                **SEQ2SEQ, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                backbone_config=t.ResNetConfig(out_features=["stage4"]),
            ),
        ),
        {"vision": {"model"}},
    ),
    "Whisper": (
        lambda t: (t.WhisperForConditionalGeneration, t.WhisperConfig(**SEQ2SEQ, num_mel_bins=8)),
        {"audio": {"model.encoder"}, "language": {"model.decoder"}},
    ),
    "wav2vec2": (lambda t: (t.Wav2Vec2ForCTC, t.Wav2Vec2Config(**WAV2VEC)), {"audio": {"wav2vec2"}}),
    "Qwen2-Audio": (
        lambda t: (t.Qwen2AudioForConditionalGeneration, t.Qwen2AudioConfig(**AUDIO_TEXT)),
        {"audio": {"model.audio_tower"}, "language": {"model.language_model"}},
    ),
    "speech encoder-decoder": (
        lambda t: (
            t.SpeechEncoderDecoderModel,
            t.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
                t.Wav2Vec2Config(**WAV2VEC), t.BertConfig(**TEXT)
            ),
        ),
        {"audio": {"encoder"}, "language": {"decoder"}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def build(transformers, name: str, device: str = "meta") -> nn.Module:
    kind, config = MODELS[name][0](transformers)
    with torch.device(device):
        return kind(config)


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_tells_the_tower(transformers, name):
    found: dict[str, set[str]] = {}
    expected = MODELS[name][1]
    for component in find_components(build(transformers, name)):
        depth = 1 + max(prefix.count(".") for prefix in expected[component.tower])
        found.setdefault(component.tower, set()).add(".".join(component.name.split(".")[:depth]))
    assert found == expected


def test_models_of_transformers_in_a_plain_one_tell_their_own(transformers):
    with torch.device("meta"):
        model = nn.ModuleDict({
            "first": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
            "bridge": nn.Sequential(nn.Linear(16, 16)),
            "second": transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        })  # fmt: skip
    tower_of = Towers(model).of
    assert {c.name.split(".")[0]: c.tower for c in find_components(model)} == {"first": "vision", "second": "language"}
    assert tower_of("first.vision_model.post_layernorm.weight") == "vision"
    assert tower_of("second.lm_head.weight") == "language"


def test_of_a_model_from_outside_of_transformers_the_names_tell_it(transformers):
    class Base(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.visual = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
            self.layers = nn.ModuleList([Block()])

    class Whole(Base):
        def __init__(self, config):
            super().__init__(config)
            self.transformer = Base(config)

    found = find_components(Whole(transformers.LlamaConfig(**TEXT)))
    assert {c.name.split(".")[-3]: c.tower for c in found if c.kind.endswith("qkv")} == {
        "blocks": "vision", "layers": "language",
    }  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(4, 12), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 4))


def plain_vision() -> nn.ModuleDict:
    """As timm names it."""
    embedding = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2, 2)})
    blocks = nn.Sequential(Block(), Block())
    return nn.ModuleDict({"patch_embed": embedding, "blocks": blocks, "head": nn.Linear(4, 3)})


def test_plain_models_are_vision_where_they_begin_with_patches_and_embed_no_tokens():
    assert {c.tower for c in find_components(plain_vision())} == {"vision"}
    gpt = nn.ModuleDict({"wte": nn.Embedding(8, 4), "h": nn.ModuleList([Block()])})
    assert {c.tower for c in find_components(gpt)} == {"language"}
    timm = nn.ModuleDict({"embeds": nn.ModuleDict({"proj": nn.Linear(12, 4)}), "blocks": nn.Sequential(Block())})
    timm.pretrained_cfg = {"input_size": (3, 224, 224)}  # which all models of timm have
    assert {c.tower for c in find_components(timm)} == {"vision"}
    both = nn.ModuleDict({"encoder": plain_vision(), "gpt": gpt})
    assert {(c.name.split(".")[0], c.tower) for c in find_components(both)} == {
        ("encoder", "vision"), ("gpt", "language"),
    }  # fmt: skip


def test_blocks_that_are_no_list_are_blocks_as_torchvision_names_them():
    layers = nn.Sequential()
    for i in range(2):
        layers.add_module(f"encoder_layer_{i}", Block())
    model = nn.ModuleDict({"conv_proj": nn.Conv2d(3, 4, 2, 2), "encoder": nn.ModuleDict({"layers": layers})})
    found = find_components(model)
    assert [(c.layer, c.kind, c.tower) for c in found] == [
        (layer, kind, "vision") for layer in range(2) for kind in ("qkv", "0", "3")
    ]
    assert block_of(found[-1].name) == ("encoder.layers.encoder_layer_1", "mlp.3")


def test_a_tower_without_a_tau_trains_on_and_counts_and_with_one_freezes_by_it(transformers):
    model = build(transformers, "Whisper", "cpu")
    with pytest.warns(UserWarning, match=r'12 matrices of the audio tower train on unwatched; taus={"audio"'):
        monitor = GradESMonitor(GradESConfig(language_tau=ALWAYS, alpha=0), model, total_steps=3)
    assert {c.tower for c in monitor.components} == {"language"}
    assert monitor.num_matrices == len(monitor.components) + 12
    given = GradESConfig(language_tau=1e-30, taus={"audio": ALWAYS}, alpha=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = GradESMonitor(given, model, total_steps=3)
    for step in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        monitor.after_step(step)
    audio = {c.name for c in monitor.components if c.tower == "audio"}
    assert set(monitor.frozen) == audio
    assert len(audio) == 12
    assert monitor.scalars()["grades/frozen_share_audio"] == 1
    pytest.importorskip("matplotlib")
    titles = [axis.get_title(loc="left") for axis in convergence(monitor.history()).axes]
    assert titles == ["language tower", "audio tower"]
    assert len(freezing(monitor.history()).axes) == 4


def test_one_tau_is_for_every_tower_and_taus_for_some(transformers):
    one = GradEarlyStoppingConfig(tau=0.5, taus={"audio": 0.25})
    assert (one.tau_of("vision", "mlp"), one.tau_of("audio", "mlp"), one.tau_of("time", "mlp")) == (0.5, 0.25, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = GradESMonitor(one, build(transformers, "wav2vec2"), total_steps=3)
    assert {monitor.taus[c.name] for c in monitor.components} == {0.25}


def test_taus_that_cannot_be_are_refused(transformers):
    model = build(transformers, "wav2vec2")
    with pytest.raises(ValueError, match=r'no tower with a tau.* 12 matrices of the audio tower; .*taus={"audio"'):
        GradESMonitor(GradESConfig(), model, total_steps=3)
    with pytest.warns(UserWarning, match="taus: no trainable projection matrix in the tower adio"):
        GradESMonitor(GradESConfig(taus={"audio": 1.0, "adio": 1.0}), model, total_steps=3)
    for taus in ({"audio": 0}, {"audio": "often"}, {"vision": 1.0}):
        with pytest.raises(ValueError, match="taus"):
            VLMGradEarlyStoppingConfig(taus=taus).check()
    VLMGradEarlyStoppingConfig(taus={"audio": "auto"}).check()


def test_a_vision_tower_that_its_name_does_not_tell_has_a_prefix(transformers):
    model = build(transformers, "TrOCR", "cpu")
    components = find_components(model)
    freezer = Freezer(model, components, None)
    size, tokens = model.config.encoder.image_size, torch.tensor([[1, 2, 3]])
    model(pixel_values=torch.rand(1, 3, size, size), decoder_input_ids=tokens)  # tells what feeds what
    freezer.freeze(c.name for c in components if c.tower == "vision")
    trains = {name.split(".")[0] for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert trains == {"layernorm", "pooler"}, "all but what comes after the blocks"
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_the_table_says_of_every_matrix_whether_it_is_watched(transformers, tmp_path, capsys):
    config = transformers.Qwen2AudioConfig(**AUDIO_TEXT, architectures=["Qwen2AudioForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        main(["components", str(source)])
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
        assert "Qwen2AudioForConditionalGeneration" in lines
        query = lines["model.language_model.layers.*.self_attn.q_proj"]
        assert query.split() == [*query.split()[:1], "2", "language", "16", "x", "16", "q_proj", "yes"]
        assert lines["model.audio_tower.layers.*.fc1"].endswith('no: no tau: taus={"audio": ...}')
        assert lines["model.multi_modal_projector.linear"].endswith("no: joins the towers")
        assert lines["lm_head"].endswith("no: in no block")
        assert lines["model.language_model.embed_tokens"].endswith("no: no projection")
        assert lines["language:"] == "language: 14 matrices watched"
        assert lines["audio:"] == "audio: 0 matrices watched"
    for taus in (["audio"], ["audio=0.1"], ["time", "audio"], ["time=auto,audio=0.1"]):
        main(["components", str(tmp_path), "--taus", *taus])
        assert "audio: 12 matrices watched" in capsys.readouterr().out
    for taus in ("", "=0.1", "audio,"):
        with pytest.raises(SystemExit):
            main(["components", str(tmp_path), "--taus", taus])
        assert "must be names of towers" in capsys.readouterr().err


def test_of_adapters_the_table_shows_the_pairs(transformers, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers.LlamaConfig(**TEXT).save_pretrained(tmp_path / "base")
    adapter = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for base in (str(tmp_path / "base"), None):
        peft.LoraConfig(**adapter, base_model_name_or_path=base).save_pretrained(tmp_path)
        if base is None:
            with pytest.raises(SystemExit):
                main(["components", str(tmp_path)])
            assert "base_model_name_or_path must name the model" in capsys.readouterr().err
        else:
            main(["components", str(tmp_path)])
            lines = capsys.readouterr().out.splitlines()
            assert " ".join(lines[4].split()) == "model.layers.*.self_attn.q_proj 2 language 4 x 16 q_proj (A, B) yes"
            assert lines[-1] == "language: 2 matrices watched"


def test_what_is_no_configuration_is_told_in_a_sentence(transformers, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(SystemExit):
        main(["components", str(tmp_path)])
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert "must be a hub id, a folder or a config.json" in said
