"""What is said of GradES's settings before the first step."""

import pytest
import torch
from test_rollback import loop
from tiny.grades import make_model
from tiny.runs import arguments

import train
from grades import GradESConfig, GradESMonitor
from grades.advice import advice
from grades.averaging import AVERAGE, AveragedWeights, OwnState
from training.arguments import parse_arguments
from training.report import tau_words

MEASURED = {"compute_interval": 100, "patience": 2, "freeze_order": "together", "alpha": 0.35, "monitor_grace": False}


def said(steps: int, schedule: str | None = "constant", **changes) -> list[str]:
    monitor = loop(MEASURED | changes).monitor
    monitor.total_steps = steps
    return advice(monitor, schedule, "--")


def test_what_was_measured_needs_no_advice():
    assert not said(2400)
    assert not advice(GradESMonitor(GradESConfig(alpha=0.5), make_model(), total_steps=4), "cosine")
    assert not said(100, "cosine", freeze_vision=False, freeze_language=False, patience=1)


@pytest.mark.parametrize(("steps", "schedule", "changes", "words"), [
    (300, "constant", {}, "1 of the checks of these 300 steps can be judged, and --patience is 2: nothing can freeze"),
    (2400, "constant", {"patience": 1}, "--patience 1: one check can take a plateau for the end"),
    (2400, "constant", {"compute_interval": 20}, "--compute_interval 20: each check evaluates the held-out rows"),
    (2400, "cosine", {}, "the learning rate falls (cosine): so does the gain"),
])  # fmt: skip
def test_what_freezes_nothing_or_too_early_is_said(steps, schedule, changes, words):
    [line] = said(steps, schedule, **changes)
    assert line.startswith(words)


@pytest.mark.parametrize(("steps", "patience"), [(9, 2), (12, 2), (12, 3), (15, 3)])
@pytest.mark.parametrize("grace", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_run_of_which_it_says_that_nothing_can_freeze_freezes_nothing(steps, patience, grace, alpha):
    config = {"compute_interval": 3, "patience": patience, "monitor_grace": grace, "alpha": alpha}
    run = loop(config | {"vision_tau": 1e9, "language_tau": 1e9})
    run.monitor.total_steps = run.total_steps = steps
    lines = [line for line in advice(run.monitor) if "nothing can freeze" in line]
    run.run()
    assert bool(run.monitor.frozen) == (not lines)


def test_a_run_says_it_with_its_taus_and_which_weights_it_ended_with(data, tmp_path):
    flags = {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "cosine",
             "rollback_rows": 3, "val_size": 5, "max_training_steps": 2, "compute_interval": 30,
             "vision_tau": 0.5, "language_tau": 1e-4, "patience": 2}  # fmt: skip
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    log = (tmp_path / "out" / "run" / "log.txt").read_text()
    assert "; tau 0.5 (vision), tau 0.004 (language)" in log
    assert "NOTE the learning rate falls (cosine)" in log
    assert "NOTE 0 of the checks of these 2 steps can be judged, and --patience is 2" in log
    assert "\nweights               " in log
    assert "(validation loss: last " in log


def test_thresholds_in_words():
    monitor = GradESMonitor(GradESConfig(alpha=0.5), make_model(), total_steps=4)
    monitor.taus = {}
    assert tau_words(monitor) == "taus are found in the grace period"
    monitor.taus = {name: 0.25 if "q_proj" in name else 0.5 for name in monitor.by_name}
    assert tau_words(monitor) == "tau 0.5 (vision), tau 0.25 to 0.5 (language)"


def test_what_is_decided_and_waits_has_no_average_once_it_is_applied():
    """As under DDP with a Trainer, whose averages are not in the optimizer: until then it requires a gradient."""
    model = make_model()
    averages = AveragedWeights(model.parameters(), OwnState(), 0.5)
    config = GradESConfig(metric="rollback", compute_interval=1, vision_tau=1e9, language_tau=1e-12, alpha=0.0)
    monitor = GradESMonitor(
        config, model, None, 9, rewrap=lambda: None, averages=averages, evaluate=lambda vision, first: [(1.0, 1)] * 3
    )
    vision = [component for component in monitor.components if component.tower == "vision"]
    averages.update()
    for component in vision:  # one by one: a round comes once all of the tower are decided
        monitor.freezer.freeze([component.name])
        with torch.no_grad():
            averages.update()
    assert monitor.freezer.applied == {component.name for component in vision}
    assert not any(AVERAGE in averages.state.get(p, ()) for component in vision for p in component.parameters)
