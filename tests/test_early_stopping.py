"""Early stopping on lists of losses."""

import json
import math

import pytest
from tiny.runs import arguments

import train
from training.arguments import parse_arguments
from training.checkpoint_folder import follow
from training.early_stopping import EarlyStopping, validation_interval


def stops_at(losses, delta=0.1, patience=3) -> int | None:
    """Index of the validation that stops, None without one."""
    early = EarlyStopping(delta, patience)
    for i, loss in enumerate(losses):
        early.update(loss)
        if early.is_over:
            return i
    return None


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([1.0, 0.8, 0.6, 0.4, 0.2], None),
        ([1.0, 1.0, 1.0, 1.0], 3),
        ([1.0, 0.95, 0.92, 0.905], 3),  # never more than delta below the best
        ([1.0, 0.95, 0.92, 0.89, 0.89, 0.88, 0.87], 6),  # the best counts, not the previous
        ([1.0, 2.0, 2.0, 0.5, 2.0, 2.0], None),  # in a row
        ([1.0, math.nan, math.nan, math.nan], 3),
        ([None, None, None, None], None),
        ([1.0, 2.0, None, 2.0, 2.0], 4),
    ],
)
def test_it_stops_after_patience_bad_validations_in_a_row(losses, index):
    assert stops_at(losses) == index


def test_without_delta_any_fall_counts_and_a_tie_does_not():
    assert stops_at([1.0, 0.999, 0.998, 0.997], delta=0, patience=1) is None
    assert stops_at([1.0, 1.0], delta=0, patience=1) == 1


def test_a_restored_one_stops_where_the_first_would_have():
    losses = [1.0, 0.5, 0.6, 0.6, 0.6]
    first = EarlyStopping(0.1, 3)
    for loss in losses[:3]:
        first.update(loss)
    second = EarlyStopping(0.1, 3)
    second.load_state_dict(first.state_dict())
    over = []
    for loss in losses[3:]:
        second.update(loss)
        over.append(second.is_over)
    assert over == [False, True]


def test_the_interval_is_exact():
    assert validation_interval(0.05, 1600) == 80
    assert validation_interval(0.07, 100) == 7
    assert validation_interval(0.05, 8) == 1


def test_a_run_that_it_ended_goes_on_with_more_patience_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])

    def run(**flags) -> dict:
        given = {"es_interval": 0.25, "es_delta": 1e9, "max_training_steps": 12, "eval_interval": 99, "resume": "auto"}
        words = arguments(data, tmp_path, "run", **given | {"early_stopping": True} | flags)
        assert train.main(parse_arguments(words)) == 0
        return json.loads((tmp_path / "out" / "run" / "summary.json").read_text())

    ended = run(es_patience=1)
    assert (ended["steps"], ended["best_step"]) == (6, 6)  # which is saved after its evaluation
    assert follow(tmp_path / "out" / "run" / "checkpoints" / "best").name == "step_00000006"
    assert run(es_patience=1)["steps"] == 6
    assert run(es_patience=2, resume_override=True)["steps"] == 9
    assert run(early_stopping=False, resume_override=True)["steps"] == 12
