"""Held-out rows of the rollback gain in train.py: what they cannot tell is said before the first step."""

import json

import pytest
from tiny.runs import arguments

import train
from training.arguments import parse_arguments

ROLLBACK = {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant",
            "vision_tau": 1e9, "language_tau": 1e9, "alpha": 0.0, "max_training_steps": 6,
            "freeze_order": "together"}  # fmt: skip


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """start(validation rows) -> exit code of a run."""
    monkeypatch.setattr("grades.plots.draw", lambda history: [])

    def run(rows: list[dict]) -> int:
        path = tmp_path / "held_out.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        words = arguments(data, tmp_path, "run", **ROLLBACK | {"val_dataset_path": path})
        return train.main(parse_arguments(words))

    return run


def row(user: str = "is there a red shape?") -> dict:
    return {"images": [], "texts": [{"user": user, "assistant": "yes"}]}


def test_rows_without_a_picture_are_said_to_tell_nothing_of_the_vision_tower(start, tmp_path, capsys):
    assert start([row()] * 4) == 0
    assert "none of these validation rows has an image" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["frozen_share"]) == (6, 0)
    assert [line.split(":")[0] for line in summary["undecided"]] == ["vision"]


def test_rows_of_which_none_can_be_used_are_refused_before_the_first_step(start, tmp_path, capsys):
    assert start([row("")] * 4) == 2
    assert "no validation row of --rollback_rows 200 can be used: dropped 4 rows" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run").exists()
