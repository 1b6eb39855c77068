"""Rollback gain: per how many steps it is told, against which losses a part is watched, and what a resume keeps."""

import pytest
import torch
from test_rollback import NEVER, ROWS, cut, loop, row_losses

from grades import GradESConfig
from grades.rollback import PER_STEPS

ALWAYS = {"vision_tau": 1e9, "language_tau": 1e9}


def gains(check: dict) -> list[float]:
    return [value for pair in check.get("gains", {}).values() for value in pair]


def resumed(run, config: dict):
    """Another run with what the first has come to, as from a checkpoint."""
    again = loop(config)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    again.averages.load_state_dict(run.averages.state_dict())
    again.monitor.load_state_dict(run.monitor.state_dict())
    again.step = run.step
    return again


def test_a_gain_is_told_per_the_steps_that_were_made():
    """After a resume with another interval: the older averages are of step 3, not of 4 steps before."""
    run = loop(NEVER | {"compute_interval": 3})
    run.run(5)
    metric = run.monitor.metric
    assert (metric.older_at, run.averages.updates) == (3, 5)
    again = resumed(run, NEVER | {"compute_interval": 4})
    again.run(8)
    assert again.monitor.metric.scale == PER_STEPS / 5
    again.run(12)
    assert again.monitor.metric.scale == PER_STEPS / 4


def test_an_error_in_a_check_does_not_shorten_the_next_gain():
    fails = [False]

    def evaluate(vision, first):
        if fails[0]:
            raise torch.OutOfMemoryError
        return row_losses(run.model, first)

    run = loop(NEVER, evaluate=evaluate)
    run.run(5)
    fails[0] = True
    with pytest.raises(torch.OutOfMemoryError):
        run.run(6)
    again = resumed(run, NEVER)
    again.run(9)
    assert again.monitor.metric.scale == PER_STEPS / 6


def test_a_change_over_other_steps_is_not_compared():
    config = {"metric": "weight_change", "compute_interval": 3}
    run = loop(NEVER | config)
    run.run(5)
    for interval, measured in ((3, True), (2, False)):
        again = resumed(run, NEVER | config | {"compute_interval": interval})
        again.run(6)
        values = again.monitor.checks[-1]["values"]
        assert again.monitor.checks[-1]["step"] == 6
        assert any(value is not None for value in values) == measured


@pytest.mark.parametrize("kept", ["average", "last"])
def test_a_freeze_alone_thaws_nothing(kept):
    """Whatever value the vision tower keeps: its last one has a higher loss here than its average has."""

    def evaluate(vision, first):
        weight = run.model.get_parameter("vision_encoder.blocks.0.mlp.fc1.weight")
        return [(20.0 + float(weight.detach().mean()) * (99 + i / 9), 20) for i in cut(ROWS, first)]

    run = loop({"vision_tau": 1e9, "language_tau": 1e-12, "freeze_to": kept}, evaluate=evaluate)
    step = run.optimizer.step

    def climbs(*args):
        step(*args)
        with torch.no_grad():
            for parameter in run.model.vision_encoder.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)

    run.optimizer.step = climbs
    run.run()
    assert set(run.monitor.frozen.values()) == {6}
    assert not any(event.get("unfrozen") for event in run.monitor.events)


def test_a_resumed_run_logs_the_gains_of_the_check_before():
    run = loop(NEVER)
    run.run(8)
    again = resumed(run, NEVER)
    logged = run.monitor.scalars()
    assert any(name.startswith("grades/gain_") for name in logged)
    assert again.monitor.scalars() == logged


def test_a_check_that_measures_nothing_has_no_loss():
    """Nothing can go back: the language tower is frozen, and the vision tower begins anew."""
    run = loop({"vision_tau": 1e-12, "language_tau": 1e9})
    run.run(6)
    assert {run.monitor.by_name[name].tower for name in run.monitor.frozen} == {"language"}
    for parameter in run.model.vision_encoder.parameters():
        run.averages.settle([parameter], "last")
    for parameter in [*run.model.MP.parameters(), *run.model.decoder.parameters()]:
        run.averages.settle([parameter], "last")
    run.run(9)
    assert gains(run.monitor.checks[-2])
    assert set(run.monitor.checks[-1]) == {"step", "values"}
    assert set(run.monitor.frozen.values()) == {6}


def test_the_history_says_that_it_ended_the_run_only_where_it_did():
    run = loop(ALWAYS | {"on_converged": "cooldown"})
    run.run()
    history = run.monitor.history()
    assert (history["converged_step"], history["stopped_early"]) == (6, False)
    run.monitor.has_cooled = True
    assert run.monitor.history()["stopped_early"]
    assert GradESConfig().on_converged == "stop"
