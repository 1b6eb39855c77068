"""The comparison of runs with and without the callback: its rows, and that it notices what it is there to notice."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import common
from tiny.tables import read_table


@pytest.fixture(scope="module")
def compare():
    """scripts/compare_callback.py, which imports transformers' Trainer: collecting the tests should not."""
    from scripts import compare_callback

    return compare_callback


def test_rows_are_made_once_and_compared(compare, tmp_path, monkeypatch, capsys):
    pairs = common.documented(60)
    monkeypatch.setattr(common, "documented", lambda limit: pairs[:limit])
    monkeypatch.setattr(common, "bundled_model", lambda: None)
    monkeypatch.setattr("grades.outputs.draw_pictures", lambda path: None)
    flags = {"max_steps": 10, "batch_size": 2, "max_length": 16, "eval_rows": 2, "compute_interval": 2, "alpha": 0.4}
    rows = ["full", "full_grades", "full_never", "lora_grades"]
    given = ["--here", "--output", str(tmp_path), *(f"--{name}={value}" for name, value in flags.items())]
    assert compare.main([*given, "--rows", *rows]) == 0

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results) == rows
    full, frozen, never = (results[row] for row in rows[:3])
    assert (full["frozen_share"], never["frozen_share"], full["parameters_frozen"]) == (None, 0, 0)
    for name in ("weights_sha256", "held_out_loss"):
        assert full[name] == never[name] != frozen[name]
    assert 0 < frozen["parameters_frozen"] <= frozen["parameters"]
    assert 0 < never["measuring"] < 1
    assert never["longer_by"] is not None
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    table = read_table(text)
    assert [row[""] for row in table] == [compare.ROWS[row] for row in rows]
    assert (table[0]["steps"], table[0]["speed-up"], table[0]["frozen (%)"]) == ("10", "1.00", "–")
    assert [table[2]["frozen (%)"], table[3]["speed-up"]] == ["0", "–"]  # there is no LoRA to compare with

    monkeypatch.setattr(compare, "run_row", None)
    assert compare.main([*given, "--rows", *rows]) == 0
    with pytest.raises(SystemExit):
        compare.main([*given, "--max_steps=11", "--rows", "full"])
    assert "max_steps 10, now 11" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--alpha 2"):
        compare.main([*given, "--alpha=2"])


def test_rollback_runs_at_a_constant_rate_and_is_not_compared_bit_for_bit(compare, tmp_path, monkeypatch):
    pairs = common.documented(60)
    monkeypatch.setattr(common, "documented", lambda limit: pairs[:limit])
    monkeypatch.setattr(common, "bundled_model", lambda: None)
    monkeypatch.setattr("grades.outputs.draw_pictures", lambda path: None)
    flags = {"max_steps": 8, "batch_size": 2, "max_length": 16, "eval_rows": 2, "compute_interval": 2, "alpha": 0.4}
    given = ["--here", "--output", str(tmp_path), *(f"--{name}={value}" for name, value in flags.items())]
    rows = ["full", "full_grades", "full_never"]
    assert compare.main([*given, "--metric=rollback", "--tau=9", "--train_rows=6", "--rows", *rows]) == 0
    full, frozen, never = json.loads((tmp_path / "results.json").read_text(encoding="utf-8")).values()
    assert (full["steps"], frozen["steps"], never["steps"]) == (8, 6, 8)
    assert full["weights_sha256"] != never["weights_sha256"]


def test_measuring_counts_the_reading_of_gradients(compare, monkeypatch):
    callback = compare.Timed(compare.GradEarlyStoppingConfig(metric="gradient_norm", save_stats=False))
    base = compare.GradEarlyStoppingCallback
    now = [0.0]
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds: float) -> None:  # a busy machine would sleep longer
        now[0] += seconds

    monkeypatch.setattr(base, "_watch_gradients", lambda self, unscale: lambda: work(5))
    monkeypatch.setattr(base, "on_step_end", lambda self, args, state, control: work(1) or control)
    callback.trainer = SimpleNamespace(state=SimpleNamespace(global_step=2))
    callback._watch_gradients(lambda: work(20))()  # clipping alone is not of the callback
    callback.on_step_end(None, SimpleNamespace(global_step=3), None)
    assert callback.spent == {3: 6}


def test_a_frozen_weight_that_moves_is_a_fault_and_a_trainable_one_that_does_not(compare):
    model, watch = torch.nn.Linear(2, 2), compare.Watch()
    model.scale = torch.nn.Parameter(torch.ones(1))
    watch.on_train_begin(None, None, None, model=model)
    model.weight.requires_grad_(False)
    watch.on_step_begin()
    watch.on_step_end(None, SimpleNamespace(global_step=3), None, model=model)
    with torch.no_grad():
        model.scale += 1
        assert watch.faults(model) == ["bias never moved"]
        model.weight[0, 0] += 1
    assert watch.faults(model) == ["weight moved, frozen at 3", "bias never moved"]
    results = {"full": {"faults": ["x"], "weights_sha256": "1"}, "full_never": {"faults": [], "weights_sha256": "2"}}
    assert compare.faults(results, "weight_change") == ["full: x", "full_never: other weights than full"]


def test_an_interval_that_divides_nothing_is_refused(capsys):
    from scripts import bench_callback

    with pytest.raises(SystemExit):
        bench_callback.main(["--interval=0"])
    assert "--interval 0" in capsys.readouterr().err


def test_what_a_check_costs_comes_from_neighbouring_steps(compare):
    steps_s = [9.0, 1.0, 1.1, 1.0, 2.0, 2.2, 2.0, 2.0]
    assert compare.longer_by(steps_s, {3, 6}) == pytest.approx(0.1)
    assert compare.longer_by(steps_s, set(range(1, 9))) is None
