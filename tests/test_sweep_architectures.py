"""A sample of transformers' architectures: what would be watched of each, without weights."""

import json

import pytest

from scripts import sweep_architectures
from scripts.sweep_architectures import main, sweep

BLOCK = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CLIP = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
T5 = {"q", "k", "v", "o", "wi", "wo"}
BERT = {"query", "key", "value", "dense"}
# Model type: the tower's kinds of matrices, and some that are not watched, each with its reason.
EXPECTED = {
    "llama": ({"language": BLOCK}, {"lm_head": "in no block"}),
    "gpt2": ({"language": {"c_attn", "c_proj", "c_fc"}}, {}),
    "bert": ({"language": BERT}, {"decoder": "in no block"}),
    "t5": ({"language": T5}, {}),
    "mamba": ({"language": {"in_proj", "x_proj", "dt_proj", "out_proj"}}, {}),
    "mixtral": ({"language": {*BLOCK - {"gate_proj", "up_proj"}, "gate_up_proj"}}, {}),
    "qwen2_moe": ({"language": {*BLOCK, "gate_up_proj"}}, {"shared_expert_gate": "router"}),
    "deepseek_v32": (None, {"wq_b": "router", "weights_proj": "router"}),
    "funnel": ({"language": {"q_head", "k_head", "v_head", "post_proj", "linear_1", "linear_2"}}, {}),
    "vit": ({"vision": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}}, {"classifier": "in no block"}),
    "swinv2": (None, {"0": "embedding", "2": "embedding"}),
    "dinov3_vit": (None, {}),
    "pixtral": ({"vision": BLOCK}, {}),
    "sam": (None, {"proj_in": "head", "proj_out": "head"}),
    "maskformer": (None, {}),
    "resnet": ({}, {"1": "in no block"}),
    "clip": ({"vision": CLIP, "language": CLIP}, {"visual_projection": "in no block"}),
    "llava": ({"vision": CLIP, "language": BLOCK}, {"linear_1": "joins the towers"}),
    "qwen2_5_vl_vision": ({"vision": {"qkv", "proj", "gate_proj", "up_proj", "down_proj"}}, {"0": "joins the towers"}),
    "idefics3": ({"vision": CLIP, "language": BLOCK}, {"proj": "joins the towers"}),
    "blip-2": (None, {"query": "joins the towers"}),
    "whisper": ({"audio": CLIP, "language": CLIP}, {"proj_out": "in no block"}),
    "qwen2_5_omni_thinker": (None, {}),
    "grounding-dino": (None, {"0": "head"}),
    "patchtst": (None, {}),
}  # fmt: skip
TOWERS = {
    "deepseek_v32": {"language"}, "swinv2": {"vision"}, "dinov3_vit": {"vision"}, "sam": {"vision"},
    "maskformer": {"vision"}, "blip-2": {"vision", "language"}, "grounding-dino": {"vision", "language", "fusion"},
    "qwen2_5_omni_thinker": {"vision", "audio", "language"}, "patchtst": {"time"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    pytest.importorskip("transformers")
    sweep_architectures.quiet()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_what_is_watched_of_an_architecture(model_type):
    found = sweep(model_type)
    assert found.model, found.error
    assert not found.failed
    kinds, exceptions = EXPECTED[model_type]
    watched: dict[str, set[str]] = {}
    for row in found.rows:
        if sweep_architectures.is_component(row):
            watched.setdefault(row.tower, set()).add(row.kind)
    assert watched.keys() == (TOWERS[model_type] if kinds is None else kinds.keys())
    assert kinds is None or watched == kinds
    for kind, reason in exceptions.items():
        assert reason in {row.why_not for row in found.rows if row.kind == kind}, kind


def test_the_tables_hold_every_architecture_and_what_failed_is_told(tmp_path, monkeypatch, capsys):
    def fails(*given):
        raise RuntimeError("broken")

    assert main(["llama", "gpt2", "--out", str(tmp_path)]) == 0
    outcomes = {one["model_type"]: one for one in json.loads((tmp_path / "architectures.json").read_text())}
    assert {name: one["model"] for name, one in outcomes.items()} == {
        "llama": "LlamaForCausalLM",
        "gpt2": "GPT2LMHeadModel",
    }
    text = (tmp_path / "architectures.md").read_text()
    assert "2 of 2 model types were built.\n0 have no class" in text
    assert "| gpt2 | GPT2LMHeadModel | language: 2 c_attn, 4 c_proj, 2 c_fc | in no block: 1 lm_head |" in text
    monkeypatch.setattr(sweep_architectures, "rows", fails)
    assert main(["llama", "--out", str(tmp_path)]) == 1
    assert "Failed: llama: RuntimeError: broken." in capsys.readouterr().out
    monkeypatch.setattr(sweep_architectures, "build", fails)
    assert main(["llama", "--out", str(tmp_path)]) == 0
    assert "| llama | broken |" in (tmp_path / "architectures.md").read_text()
    (tmp_path / "file").touch()
    capsys.readouterr()
    with pytest.raises(OSError, match="file"):
        main(["llama", "--out", str(tmp_path / "file")])
    assert "llama" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["lama"])
    assert "lama: must be a model type of transformers (did you mean llama?)" in capsys.readouterr().err
