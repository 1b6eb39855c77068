"""compare_stopping.py on runs whose curves are written by hand."""

import json
from pathlib import Path

import pytest
from tiny.curves import write_curves
from tiny.tables import read_table

from scripts import compare_stopping


def test_each_rule_ends_where_it_would_have(tmp_path, capsys):
    folders = [write_curves(tmp_path / name, converged) for name, converged in (("a", 400), ("b", 800))]
    assert compare_stopping.main([*folders, "--alpha", "0"]) == 0
    table = read_table(capsys.readouterr().out)
    steps = {row["ends by"]: row["steps"] for row in table}
    assert steps == {
        "rollback gain": "700 (500..900)",
        "at the end of another run (all pairs)": "700 (500..900)",
        "at their mean": "700 (700..700)",
        "early stopping, averaged weights": "850 (700..1,000)",
        "early stopping, last weights": "850 (700..1,000)",
        "full length": "1,000 (1,000..1,000)",
    }
    worst = {row["ends by"]: row["worst (%)"] for row in table}
    assert (worst["rollback gain"], worst["at the end of another run (all pairs)"]) == ("100.00", "70.00")


@pytest.mark.parametrize(
    ("flags", "steps"),
    [([], "750 (600..900)"), (["--alpha=0.3"], "750 (600..900)"), (["--alpha=0.6"], "900 (900..900)")],
)
def test_no_run_ends_before_its_grace_period(tmp_path, capsys, flags, steps):
    """The quickstart's is 0.35: of 1,000 steps the check at 400 has nothing to put back, and 500 is the first gain."""
    folders = [write_curves(tmp_path / name, converged) for name, converged in (("a", 100), ("b", 800))]
    assert compare_stopping.main([*folders, *flags]) == 0
    assert read_table(capsys.readouterr().out)[0]["steps"] == steps


def drop_vision(history: dict) -> None:
    del history["checks"][-1]["gains"]["vision"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("grades_history.json", drop_vision, "b: no gain of vision at step 1,000"),
        ("grades_history.json", lambda history: history["checks"].pop(2), "a has no gain at step 200"),
        ("grades_history.json", lambda history: history["checks"].pop(), "b: was measured at other steps than a"),
        ("summary.json", lambda summary: summary.update(stop_reason="converged"), "b: ended early (converged)"),
    ],
)
def test_unsuitable_runs_are_refused_by_name(tmp_path, capsys, file, change, said):
    folders = [write_curves(tmp_path / name, 400) for name in ("a", "b")]
    for folder in folders if said.startswith("a ") else folders[1:]:
        content = json.loads(Path(folder, file).read_text())
        change(content)
        Path(folder, file).write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        compare_stopping.main([*folders, "--alpha", "0"])
    assert said in capsys.readouterr().err


def test_what_is_missing_or_unreadable_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_stopping.main([str(tmp_path), str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
    folder = write_curves(tmp_path / "a", 400)
    with Path(folder, "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 1')
    with pytest.raises(SystemExit):
        compare_stopping.main([folder, folder])
    assert f"{folder}: must be the folder of a finished run" in capsys.readouterr().err
