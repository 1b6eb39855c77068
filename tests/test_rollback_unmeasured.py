"""Rollback gain: what cannot be measured does not freeze, and nothing that goes wrong in a measurement stays."""

import json
import math

import pytest
import torch
from test_rollback import NEVER, ROWS, STEPS, cut, loop, row_losses

from grades.averaging import AVERAGE

ALWAYS = {"vision_tau": 1e9, "language_tau": 1e9}


def gains(run) -> list[dict]:
    return [check.get("gains") for check in run.monitor.checks]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_convergence(loss):
    run = loop(ALWAYS, evaluate=lambda vision, first: [(loss, 20)] * 8).run()
    assert (run.step, run.monitor.frozen) == (STEPS, {})
    assert gains(run)[1:] == [{}] * (STEPS // 3 - 1)
    assert not any("loss" in check for check in run.monitor.checks)  # JSON has neither


def test_rows_without_labels_are_no_convergence():
    assert loop(ALWAYS, evaluate=lambda vision, first: [(0.0, 0)] * 8).run().monitor.frozen == {}
    assert loop(ALWAYS, evaluate=lambda vision, first: []).run().monitor.frozen == {}


def test_a_part_that_no_update_reaches_is_no_convergence():
    """No gradient for the vision tower, so that the optimizer holds nothing of it; or rows that it does not change."""
    run = loop(ALWAYS)
    for name, parameter in run.model.named_parameters():
        if name.startswith("vision_encoder."):
            parameter.register_hook(torch.zeros_like)
    drop = [p for name, p in run.model.named_parameters() if name.startswith("vision_encoder.")]
    step = run.optimizer.step

    def without_vision(*args):
        for parameter in drop:
            parameter.grad = None
        return step(*args)

    run.optimizer.step = without_vision
    run.run()
    towers = {run.monitor.by_name[name].tower for name in run.monitor.frozen}
    assert towers == {"language"}
    blind = loop(NEVER)
    known = iter(range(9**9))
    calls = [0]

    def losses(vision, first):  # the language tower alone changes them
        calls[0] += 1
        height = next(known) / 1e6 if calls[0] % 6 in (3, 4) else 0.0
        return [(20.0 + height + i, 20) for i in cut(ROWS, first)]

    blind.monitor.metric.evaluate = losses
    blind.run()
    assert {name for check in gains(blind) for name in check or ()} == {"language"}


def test_an_error_in_a_measurement_leaves_weights_and_averages():
    calls = [0]

    def fails(vision, first):
        calls[0] += 1
        if calls[0] > 2:  # with a part put back
            raise torch.OutOfMemoryError
        return row_losses(run.model, first)

    run, before = loop(NEVER, evaluate=fails), {}
    measure = run.monitor.metric.measure

    def watched(components):
        if calls[0] == 0 and run.monitor.last_step == 6:
            before.update({p: run.averages.state[p][AVERAGE].clone() for p in run.averages.averaged})
            before["weights"] = [p.detach().clone() for p in run.model.parameters()]
        return measure(components)

    run.monitor.metric.measure = watched
    with pytest.raises(torch.OutOfMemoryError):
        run.run()
    weights = before.pop("weights")
    assert before
    assert all(torch.equal(run.averages.state[p][AVERAGE], average) for p, average in before.items())
    assert all(torch.equal(p, weight) for p, weight in zip(run.model.parameters(), weights, strict=True))


def test_a_replayed_freeze_is_not_thawed(tmp_path):
    """The control freezes what it has drawn, whatever the losses say; all rows are measured with what is frozen."""
    never = loop(NEVER).run().monitor.history()
    names = [component["name"] for component in never["components"] if component["tower"] == "vision"]
    never["events"] = [{"step": 7, "name": name, "value": 1.0, "tau": 1.0} for name in names]
    (tmp_path / "history.json").write_text(json.dumps(never))
    heights = iter(range(99))  # the loss rises
    config = ALWAYS | {"freeze_order": "together", "replay_history": str(tmp_path / "history.json")}
    run = loop(config, evaluate=lambda vision, first: [(20.0 + next(heights) + i / 9, 20) for i in cut(ROWS, first)])
    run.run()
    assert set(run.monitor.frozen.values()) == {7}
    assert run.step == STEPS


def test_limits_are_those_of_the_matrices_that_are_watched():
    run = loop({"target_components": ["mlp"], "language_attention_tau": 1e-12, "vision_attention_tau": 1e-12,
                "language_mlp_tau": 3.0, "vision_mlp_tau": 2.0, "freeze_order": "together"})  # fmt: skip
    assert run.monitor.metric.limits == {"vision": 2.0, "language": 3.0}
