"""compare_stopping.py on runs whose curves are written by hand."""

import pytest
from tiny.curves import write_curves
from tiny.tables import read_table

from scripts import compare_stopping


def test_each_rule_ends_where_it_would_have(tmp_path, capsys):
    folders = [write_curves(tmp_path / name, converged) for name, converged in (("a", 400), ("b", 800))]
    assert compare_stopping.main([*folders, "--patience", "2"]) == 0
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


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_stopping.main([str(tmp_path), str(tmp_path)])
    assert str(tmp_path) in capsys.readouterr().err
