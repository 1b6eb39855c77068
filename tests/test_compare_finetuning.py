"""The comparison of rules in fine-tuning: its runs, what is read off them, and the runs that follow from that."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import common
from tiny.tables import read_table


@pytest.fixture(scope="module")
def compare():
    """scripts/compare_finetuning.py, which imports transformers' Trainer: collecting the tests should not."""
    from scripts import compare_finetuning

    return compare_finetuning


def test_runs_are_made_once_and_rules_read_off(compare, tmp_path, monkeypatch, capsys):
    pairs, made = common.documented(60), []
    monkeypatch.setattr(common, "documented", lambda limit: pairs[:limit])
    monkeypatch.setattr(common, "bundled_model", lambda: None)
    monkeypatch.setattr("grades.outputs.draw_pictures", lambda path: None)

    def in_this_process(command):
        made.append(command[command.index("--one") + 1])
        assert (tmp_path / "table.md").exists() == (len(made) > 1)  # it is written after each run
        return SimpleNamespace(returncode=compare.main(command[2:]))

    monkeypatch.setattr(compare.subprocess, "run", in_this_process)
    flags = {"max_steps": 12, "batch_size": 2, "max_length": 16, "eval_rows": 4, "train_rows": 8, "interval": 2}
    given = ["--output", str(tmp_path), "--kinds", "full", "--tau", "1e9", "--seeds", "1"]
    given += [f"--{name}={value}" for name, value in flags.items()]
    assert compare.main(given) == 0
    assert made == ["constant", "linear", "paper", "random", "shortened"]
    lines = {row["run"]: row for row in read_table((tmp_path / "table.md").read_text(encoding="utf-8"))}
    steps = {name: line["steps"].split()[0] for name, line in lines.items()}
    # tau is so high that the rule ends at the second check after the grace period of 4 steps: 0.3 * 12, rounded up.
    assert steps["**the same, ended by rollback gain**"] == steps["linear to zero, planned for that mean"] == "8"
    assert steps["constant and averaged, full length"] == steps["linear to zero, full length"] == "12"
    assert lines["the same, all at its mean"]["each seed"] == lines["**the same, ended by rollback gain**"]["each seed"]
    assert float(lines["linear to zero, full length"]["worst"]) > 0

    assert compare.main(given) == 0  # nothing is made again
    assert len(made) == 5
    assert compare.main([*given, "--tau=1e-9"]) == 0  # the rule ends nothing: the shortened run is the linear one
    lines = {row["run"]: row for row in read_table((tmp_path / "table.md").read_text(encoding="utf-8"))}
    assert (
        lines["linear to zero, planned for that mean"]["each seed"] == lines["linear to zero, full length"]["each seed"]
    )
    assert len(made) == 5
    monkeypatch.setattr(compare, "PATIENCE", 1)  # the rule ends the runs elsewhere, as with another tau or more seeds
    assert compare.main(given) == 0
    assert made[5:] == ["shortened"]
    with pytest.raises(SystemExit) as ended:
        compare.main([*given, "--max_length=24"])
    assert ended.value.code == 2
    assert "max_length 16, now 24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--runs", "random"])


def test_rows_of_the_test_are_not_those_that_the_rules_see(compare, monkeypatch):
    pairs = common.documented(60)
    monkeypatch.setattr(common, "documented", lambda limit: pairs[:limit])
    _, held_out = compare.token_rows(common.tiny_llama()[1], 16)
    given = SimpleNamespace(max_length=16, eval_rows=len(held_out) // 2)
    seen, test = compare.two_samples(held_out, given)
    assert not any(row in test for row in seen)
    given.eval_rows += 1
    with pytest.raises(SystemExit, match=f"--eval_rows {given.eval_rows}: must be <= .* --max_length 16"):
        compare.two_samples(held_out, given)


def test_early_stopping_keeps_the_best_checkpoint_that_it_saw(compare):
    seen, test = [3.0, 2.0, 2.1, 2.2, 1.0], [3.5, 2.5, 2.4, 2.3, 1.5]
    curve = {10 * (i + 1): {"seen": s, "test": t} for i, (s, t) in enumerate(zip(seen, test, strict=True))}
    run = {"steps": 50, "curve": curve}
    end = compare.end_by_early_stopping(run, "seen")
    assert (end, compare.best_seen(run, end), compare.best_seen(run, 50)) == (40, 2.5, 1.5)
