"""The examples run as they stand: without network, with tiny random models."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
