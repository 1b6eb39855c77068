"""scripts/verify_model_setup.py, and the true counts of nanoMolmo2's parts."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_backbones import save_language, save_vision

from grades import find_components
from models.language_model import LanguageModel
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT
from scripts.verify_model_setup import GPU_GIB, RECIPE, fit_lines, main
from training.arguments import parse_arguments
from training.plan import COUNTED_SHARE

SMALL = "--vit_n_blocks 1 --lm_n_blocks 1"
QWEN3 = {  # of Qwen3-1.7B and -4B, whose class the 0.6B's is: config.json's sizes and parameters
    1_720_574_976: "--lm_hidden_dim 2048 --lm_inter_dim 6144 --lm_n_heads 16 --lm_n_blocks 28",
    4_022_468_096: "--lm_hidden_dim 2560 --lm_inter_dim 9728 --lm_n_heads 32 --lm_n_blocks 36",
}


def size(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def recipe(*words: str):
    return parse_arguments([f"--config={RECIPE}", *words]).vlm


@pytest.fixture(scope="module")
def whole():
    with torch.device("meta"):
        return VisionLanguageModel(recipe())


def test_the_counts_are_those_of_the_published_parts(whole):
    cfg = whole.cfg
    with torch.device("meta"):
        clip = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=cfg.vit_hidden_dim, intermediate_size=cfg.vit_inter_dim, image_size=cfg.vit_img_size,
                num_hidden_layers=cfg.vit_n_blocks, num_attention_heads=cfg.vit_n_heads, patch_size=cfg.vit_patch_size,
            )
        )  # fmt: skip
        qwen = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                hidden_size=cfg.lm_hidden_dim, intermediate_size=cfg.lm_inter_dim, num_hidden_layers=cfg.lm_n_blocks,
                num_attention_heads=cfg.lm_n_heads, num_key_value_heads=cfg.lm_n_kv_heads, tie_word_embeddings=True,
            )
        )  # fmt: skip
    assert size(clip) == 303_507_456
    assert size(whole.vision_encoder) == size(clip) - 2 * 1024  # the norm that the class token alone goes through
    assert size(whole.MP) == 1_049_600
    assert size(whole.decoder) == size(qwen) == 596_049_920
    assert len(find_components(clip)) == 24 * 6
    assert len(find_components(whole.decoder)) == len(find_components(qwen)) == 28 * 7
    assert len(find_components(whole.vision_encoder)) == 24 * 4  # queries, keys and values are one matrix


@pytest.mark.parametrize("parameters", QWEN3)
def test_larger_qwens_are_a_matter_of_configuration(parameters):
    with torch.device("meta"):
        assert size(LanguageModel(recipe(*QWEN3[parameters].split()))) == parameters


def test_molmos_choice_of_layers_leaves_the_last_block_out():
    cfg = recipe("--mp_type", "molmo", "--vit_feature_layers", "-2", "-9", "--mp_image_token_length", "144")
    with torch.device("meta"):
        vit = ViT(cfg)
    assert (len(vit.blocks), cfg.vit_feature_blocks, cfg.vit_feature_dim) == (23, [22, 15], 2048)


def test_it_says_what_the_whole_model_takes(capsys, no_network):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for count in ("303,505,408", "1,049,600", "596,049,920", "597,099,520", "66.3%"):
        assert count in printed
    gib = float(re.search(r"memory: ([\d.]+) GiB", printed).group(1))
    assert 8 * 2**30 < gib * 2**30 < COUNTED_SHARE * GPU_GIB * 2**30
    assert re.search(r"step: \d\.\d+e\+\d+ FLOPs; about [\d.]+ s", printed)
    assert no_network == []


def test_too_little_memory_and_wrong_settings_have_their_exit_codes(capsys, monkeypatch):
    small = SMALL.split()
    assert main([*small, "--gpu_gib", "2"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*small, "--gpu_gib", "30"]) == 0
    assert "196" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["scripts/verify_model_setup.py"])
    for words, named in (("--gpu_gib 0", "--gpu_gib 0"), ("--lm_head_dim 3", "--lm_head_dim 3: must be even")):
        with pytest.raises(SystemExit) as ended:
            main([*small, *words.split()])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert named in error
        assert "verify_model_setup.py: error:" in error


@pytest.mark.parametrize(("card", "rate"), [("NVIDIA H100 80GB", "NVIDIA H100 80GB)"), ("Foo 9", "A100 by its data")])
def test_the_rate_of_a_step_is_told_with_whose_it_is(monkeypatch, card, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**36))
    plan = SimpleNamespace(memory={"weights": 2**30}, step_flops=10**12)
    _, lines = fit_lines(plan, torch.device("cuda"), None)
    assert f"(an estimate; {rate}" in lines[-1]
    assert card in lines[-1]


def test_load_runs_one_picture(tmp_path, capsys, no_network):
    vision, language = tmp_path / "vision", tmp_path / "language"
    save_vision(vision, family="CLIP", image_size=336, patch_size=14)
    save_language(language, family="Qwen3", head_dim=4)
    words = f"--load --vit_model_type {vision} --lm_model_type {language}"
    assert main(words.split()) == 0
    assert "logits [1, 584, 32], all finite" in capsys.readouterr().out
    (language / "model.safetensors").unlink()
    assert main(words.split()) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    assert no_network == []
