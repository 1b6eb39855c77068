"""compare_tasks.py with a stand-in for train.py that leaves curves written by hand."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny.curves import write_curves
from tiny.tables import read_table

from data.rows import load_rows
from scripts import compare_tasks
from training.arguments import parse_arguments

CONVERGED = {"colors": 300, "all": 500, "digits": 400, "wider": 800}


def launch(command: list[str], log: Path) -> SimpleNamespace:
    """A run of which each step takes 0.1 s, with wider towers 0.2 s."""
    given = dict(itertools.pairwise(command))
    parse_arguments(command[2:])
    folder = Path(given["--output_dir"], given["--run_name"])
    task = folder.name.split("_seed")[0]
    write_curves(folder, CONVERGED[task])
    seconds = 200.0 if task == "wider" else 100.0
    summary = {
        "steps": 1000, "train_time_s": seconds, "total_time_s": seconds + 10, "stop_reason": "max_training_steps",
        "test_exact_match": None, "val_exact_match": 0.9, "val_loss": 0.1, "frozen_share": 0.0, "train_flops": 1,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return SimpleNamespace(poll=lambda: 0, wait=lambda: 0, terminate=lambda: None)


@pytest.fixture
def digits(monkeypatch):
    """Stands in for scikit-learn's: 300 images."""
    images = np.arange(300 * 64).reshape(300, 8, 8) % 17.0
    found = SimpleNamespace(load_digits=lambda: SimpleNamespace(images=images, target=np.arange(300) % 10))
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.datasets", found)


def test_each_task_ends_at_its_own_time_and_the_control_takes_as_long(digits, tmp_path, capsys):
    output = tmp_path / "out"
    assert compare_tasks.main(["--output", str(output), "--patience", "2", "--tasks", *CONVERGED], launch) == 0
    table = {row["task"]: row for row in read_table((output / "tasks.md").read_text(encoding="utf-8"))}
    ends = {task: table[compare_tasks.TASKS[task]]["ends by gain"] for task in CONVERGED}
    assert ends == {"colors": "400", "all": "600", "digits": "500", "wider": "900"}
    # (400 + 600 + 500 + 2 * 900) / 5 steps take as long: at 700 the widest has lost a tenth.
    assert table["worst run"]["at 700 steps, the evaluation nearest to 660"] == "90.00"
    assert table["worst run"]["exact match (%)"] == "100.00"
    assert table["seconds of steps"]["exact match (%)"] == "330"
    assert (output / "tasks.png").stat().st_size > 10_000
    assert str(output) in capsys.readouterr().out

    rows = load_rows(str(output / "data" / "digits" / "train.jsonl"))
    assert len(rows) == 3
    assert rows[0]["texts"][0]["assistant"] in compare_tasks.DIGITS


def test_a_quarter_of_the_images_and_the_words_of_digits(tmp_path):
    compare_tasks.write_quarter(tmp_path / "quarter")
    assert len(load_rows(str(tmp_path / "quarter" / "train.jsonl"))) == len(load_rows("easy-vqa")) / 4
    assert set(compare_tasks.DIGITS) < set(compare_tasks.digit_words())


def test_an_interrupted_preparation_is_made_again(digits, tmp_path, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    command, data = ["--output", str(tmp_path), "--tasks", "digits"], tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(compare_tasks.easy_vqa, "tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_tasks.main(command, launch)
    assert not list(data.iterdir())
    (data / "digits.tmp" / "of a process that was killed").mkdir(parents=True)
    assert compare_tasks.main(command, launch) == 0
    assert [path.name for path in data.iterdir()] == ["digits"]
    names = {path.name for path in (data / "digits").iterdir() if path.suffix != ".png"}
    assert names == {"train.jsonl", "test.jsonl", "tokenizer"}


@pytest.mark.parametrize("words", [["--alpha", "0.5"], ["--eval_interval", "50"], ["--metric", "weight_change"]])
def test_flags_that_every_run_needs_are_refused(tmp_path, capsys, words):
    with pytest.raises(SystemExit):
        compare_tasks.main(["--output", str(tmp_path), "--", *words], launch)
    assert words[0] in capsys.readouterr().err
