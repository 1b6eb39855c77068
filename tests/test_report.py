"""What `python -m grades report` says of a run of train.py or of a loop of one's own."""

import os
import subprocess
import sys

import pytest
from PIL import Image
from tiny.grades import ALWAYS, NEVER, train

from grades.__main__ import main
from grades.report import HISTORY_NAME, NOTHING_TO_SAVE, still_learning, summary, undecided


def test_a_run_or_its_latest_checkpoint_is_reported_from_its_history(tmp_path, capsys):
    monitor = train({"alpha": 0.25, "vision_tau": ALWAYS, "language_tau": NEVER}, 8).monitor
    monitor.save_history(tmp_path / HISTORY_NAME)
    main(["report", str(tmp_path), "--output", str(tmp_path / "pictures")])
    printed = capsys.readouterr().out
    for component in monitor.components:
        step = monitor.frozen.get(component.name, "-")
        assert any(component.name in line and line.endswith(f" {step}") for line in printed.splitlines())
    assert "vision: 8 of 8 frozen (100%), steps 3 to 3, at " in printed
    assert "language: 0 of 14 frozen (0%)\n" in printed
    pictures = {path.name: Image.open(path).convert("RGB") for path in (tmp_path / "pictures").iterdir()}
    assert pictures.keys() == {"convergence.png", "freezing.png"}
    assert all(len(picture.getcolors(maxcolors=10**6)) > 50 for picture in pictures.values())
    latest = tmp_path / "run" / "checkpoint-8"
    latest.mkdir(parents=True)
    (tmp_path / HISTORY_NAME).rename(latest / HISTORY_NAME)
    main(["report", str(tmp_path / "run")])
    assert capsys.readouterr().out.splitlines()[-1] == str(latest / "freezing.png")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert HISTORY_NAME in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    train({"alpha": 0.25, "vision_tau": ALWAYS, "language_tau": NEVER}, 8).monitor.save_history(tmp_path / HISTORY_NAME)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "grades", "report", str(tmp_path)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "freezing.png").is_file()


@pytest.mark.parametrize("text", ['{"version": 2,\n', "{}", "[]", '{"events": 3}', "\0"])
def test_what_is_no_history_is_told_in_a_sentence_that_names_the_file(tmp_path, capsys, text):
    (tmp_path / HISTORY_NAME).write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert f"{tmp_path / HISTORY_NAME}: is no whole history" in capsys.readouterr().err


def test_a_tower_is_told_how_far_below_its_peaks_it_froze():
    history = {
        "config": {"metric": "weight_change", "tau_mode": "absolute", "compute_interval": 5},
        "total_steps": 100, "grace_steps": 10, "last_step": 100, "stopped_early": False,
        "components": [{"name": name, "tower": "vision", "layer": 0, "tau": 3.0} for name in "abc"],
        "checks": [
            {"step": 5, "values": [None, 4.0, 9.0]},
            {"step": 10, "values": [10.0, 5.0, 9.0]},
            {"step": 15, "values": [2.0, 2.5, 9.0]},
        ],
        "events": [{"step": 15, "name": "a", "value": 2.0}, {"step": 20, "name": "b", "value": 2.0}],
    }  # fmt: skip
    assert summary(history)[-1] == (
        "vision: 2 of 3 frozen (67%), steps 15 to 20, "
        "at 20% to 40% (median 30%) of each matrix's own peak weight_change"
    )


@pytest.mark.parametrize(
    ("gain", "frozen", "told"),
    [
        ([-0.004, 0.016], False, "4 times as many held-out rows"),  # 0.016 / 2 is the distance to tau
        ([0.003, 0.0005], False, None),  # below tau for certain: patience had not passed
        ([0.006, 0.016], False, None),  # it may well be learning
        ([-0.004, 0.016], True, None),
    ],
)
def test_a_gain_below_tau_within_its_error_is_told(gain, frozen, told):
    history = {
        "config": {"metric": "rollback", "tau_mode": "absolute", "compute_interval": 5},
        "total_steps": 15, "grace_steps": 0, "last_step": 15, "stopped_early": False,
        "components": [{"name": "a", "tower": "language", "layer": 0, "tau": 0.004}],
        "checks": [
            {"step": 5, "values": [None]},
            {"step": 10, "values": [0.1], "gains": {"language": gain}},
            {"step": 15, "values": [None]},
        ],
        "events": [{"step": 15, "name": "a", "value": 0.1}] if frozen else [],
    }  # fmt: skip
    lines = undecided(history)
    assert lines == [line for line in summary(history) if "held-out rows" in line]
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]
    assert not undecided(history | {"stopped_early": True})
    assert not undecided(history | {"converged_step": 10})  # its cooldown was cut short, say
    assert not undecided(history | {"config": history["config"] | {"freeze_language": False}})


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ({}, ["language", "vision"]),
        ({"language": [0.001, 0.001]}, ["vision"]),
        ({"language": [0.1, 0.001]}, []),  # above tau: the vision tower was not measured after it
        ({"language": [0.001, 0.001], "vision": [0.001, 0.001]}, []),
    ],
)
def test_a_tower_that_could_not_be_measured_is_told(gains, told):
    towers = ["language", "vision"]
    history = {
        "config": {"metric": "rollback", "freeze_order": "together", "rollback_parts": "towers"},
        "stopped_early": False, "events": [],
        "components": [{"name": tower, "tower": tower, "layer": 0, "tau": 0.004} for tower in towers],
        "checks": [{"step": 5, "values": [None, None]}, {"step": 10, "values": [None, None], "gains": gains}],
    }  # fmt: skip
    lines = undecided(history)
    assert [line.split(":")[0] for line in lines] == told
    assert all("no gain could be measured" in line for line in lines)
    assert not undecided(history | {"checks": history["checks"][:1]})
    every = history | {"config": {"metric": "rollback", "freeze_order": "any", "rollback_parts": "towers"}}
    missing = [tower for tower in towers if tower not in gains]  # there all towers are measured
    assert [line.split(":")[0] for line in undecided(every)] == missing
    assert not undecided(history | {"config": {"freeze_language": False, "freeze_vision": False}})


@pytest.mark.parametrize(
    ("values", "freezes", "learns"),
    [([None, None], True, False), ([9.0, None], True, False), ([9.0, 0.5], True, True), ([9.0, 0.5], False, False),
     ([9.0, 0.1], True, False)],
)  # fmt: skip
def test_only_a_measurement_says_that_a_run_is_still_learning(values, freezes, learns):
    """The first check is of the grace period. A run that is not over, or froze something, is not told so."""
    history = {
        "config": {"freeze_language": freezes, "metric": "rollback", "tau_mode": "absolute", "compute_interval": 5},
        "total_steps": 10, "grace_steps": 5, "last_step": 10, "stopped_early": False, "events": [],
        "components": [{"name": "a", "tower": "language", "tau": 0.4}],
        "checks": [{"step": 5 * i, "values": [value]} for i, value in enumerate(values, start=1)],
    }  # fmt: skip
    assert still_learning(history) == learns
    assert (NOTHING_TO_SAVE in summary(history)) == learns
    assert NOTHING_TO_SAVE not in summary(history | {"last_step": 9})
    assert NOTHING_TO_SAVE not in summary(history | {"events": [{"step": 5, "name": "a", "value": 0.1}]})
