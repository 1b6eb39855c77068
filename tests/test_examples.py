"""The examples run as they stand: without network, with tiny random models."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import common
import sft_full
import sft_lora
import unsloth_vlm
import vlm_lora

EXAMPLES = (sft_full, sft_lora, unsloth_vlm, vlm_lora)
bundled_model = common.bundled_model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(common, "bundled_model", lambda: None)
    monkeypatch.setattr(common, "TOKENIZER_TEXTS", 50)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda module: module.__name__)
def test_help(example, capsys):
    with pytest.raises(SystemExit) as left:
        example.main(["--help"])
    assert left.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize("example", [sft_lora, vlm_lora], ids=lambda module: module.__name__)
def test_a_tiny_run_ends_with_a_record_and_pictures(example, tmp_path, capsys):
    example.main(["--output_dir", str(tmp_path), "--max_steps", "8", "--batch_size", "2", "--alpha", "0.5"])
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"adapter_model.safetensors", "grades_history.json", "convergence.png", "freezing.png"}
    printed = capsys.readouterr().out
    assert "random weights" in printed
    assert json.loads((tmp_path / "grades_history.json").read_text(encoding="utf-8"))["events"], "something froze"


def test_impossible_settings_end_before_anything_is_loaded(tmp_path):
    with pytest.raises(SystemExit, match="--alpha 2"):
        sft_full.main(["--output_dir", str(tmp_path), "--alpha", "2"])
    with pytest.raises(SystemExit, match="CUDA GPU and the package unsloth"):
        unsloth_vlm.main([])


def test_impossible_settings_end_before_unsloth_loads_its_model(monkeypatch):
    """With stand-ins for the GPU and for Unsloth."""
    asked = []
    model = SimpleNamespace(from_pretrained=lambda *_, **__: asked.append("model"))
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastVisionModel=model))
    monkeypatch.setitem(sys.modules, "unsloth.trainer", SimpleNamespace(UnslothVisionDataCollator=None))
    monkeypatch.setattr(unsloth_vlm.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        unsloth_vlm, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: object()))
    )
    with pytest.raises(SystemExit, match="--alpha 2"):
        unsloth_vlm.main(["--alpha", "2"])
    assert asked == []


def test_rollback_measures_on_rows_that_are_held_out(tmp_path, monkeypatch, capsys):
    """In the folder of an earlier run, whose record is not this run's."""
    made, trained = [], common.train
    monkeypatch.setattr(common, "train", lambda trainer, *rest: (made.append(trainer), trained(trainer, *rest)))
    (tmp_path / "grades_history.json").write_text("{}")
    flags = ["--output_dir", str(tmp_path), "--max_steps", "6", "--batch_size", "2", "--alpha", "0.5"]
    sft_full.main([*flags, "--metric", "rollback"])
    history = json.loads((tmp_path / "run_2" / "grades_history.json").read_text(encoding="utf-8"))
    assert all(value is not None for value in history["checks"][-1]["values"])
    assert f"python -m grades report {tmp_path / 'run_2'}" in capsys.readouterr().out
    assert (len(made[0].train_dataset), len(made[0].eval_dataset)) == (9, 3)
    texts = [{tuple(row["input_ids"]) for row in rows} for rows in (made[0].train_dataset, made[0].eval_dataset)]
    assert not texts[0] & texts[1]


def test_the_text_is_pythons_own_documentation():
    pairs = {pair["question"]: pair["answer"] for pair in common.documented(10_000)}
    assert len(pairs) > 1000
    assert pairs["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace")


def test_runs_side_by_side_convert_the_bundled_model_once(tmp_path, monkeypatch):
    folder, made = tmp_path / "backbones" / "model", []

    def convert(name, target):
        assert not target.exists()
        made.append(name)
        time.sleep(0.2)
        target.mkdir()

    monkeypatch.setattr(common, "convert", convert)
    monkeypatch.setattr(common, "SMOLLM2_FOLDER", folder)
    monkeypatch.setattr(common, "find_spec", lambda name: object())
    with ThreadPoolExecutor(3) as pool:
        assert {future.result() for future in [pool.submit(bundled_model) for _ in range(3)]} == {str(folder)}
    assert made == [common.SMOLLM2]
