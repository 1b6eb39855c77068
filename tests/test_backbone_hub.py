"""What an error says of a hub that is absent, silent or not asked."""

import time

import pytest

from models.backbones import configure_from_backbones
from models.config import SCRATCH, VLMConfig
from models.hub import BackboneUnavailable, checkpoint_folder
from models.language_model import LanguageModel
from models.vision_transformer import ViT


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
    waits: list[float] = []  # not the time it takes: here transformers is imported, which takes long on a busy machine
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(BackboneUnavailable, match=rf"^--{flag} {name}: no such local folder, and the hub [^\n]*$"):
        load(VLMConfig(vit_model_type=name, lm_model_type=name))
    assert sum(waits) < 5
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
        LanguageModel.from_pretrained(VLMConfig(vit_model_type=SCRATCH, lm_model_type=name))
    assert no_network == []


def test_the_cache_serves_where_the_hub_does_not_answer(tmp_path, monkeypatch, no_network):
    """What was downloaded before loads without a network."""
    repository = tmp_path / "models--somebody--backbone"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_folder("somebody/backbone") == repository / "snapshots" / "abc"
