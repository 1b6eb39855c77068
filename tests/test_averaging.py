"""Averaged weights: what they are, that they come and go without a trace, and what becomes of them on a freeze."""

import json

import pytest
import torch
from tiny.grades import Loop, batch, make_model, make_optimizer, same_weights
from tiny.runs import arguments, same, state

import train
from grades import GradESConfig, GradESMonitor
from grades.averaging import AVERAGE, AveragedWeights, OwnState, exchange
from training.arguments import parse_arguments


def trained(rate: float, steps: int):
    """(model, its averages, the weights after each step)."""
    model = make_model()
    optimizer = make_optimizer(model)
    averages = AveragedWeights(model.parameters(), optimizer, rate)
    past = []
    for step in range(steps):
        model(**batch(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update()
        past.append([p.detach().clone() for p in model.parameters()])
    return model, averages, past


@pytest.mark.parametrize("rate", [0.5, 0.9, 2, 3, 5])
def test_the_average_is_what_its_definition_says(rate):
    model, averages, past = trained(rate, 8)
    weights = torch.zeros(8)
    if rate < 1:
        for i in range(8):
            weights *= rate
            weights[i] = 1 - rate if i else 1.0
    else:
        begun = 7 // rate * rate  # of the current block
        weights[max(0, begun - rate) :] = 1.0
    weights /= weights.sum()
    for i, parameter in enumerate(model.parameters()):
        expected = sum(w * step[i] for w, step in zip(weights, past, strict=True))
        torch.testing.assert_close(averages.state[parameter][AVERAGE], expected, rtol=1e-5, atol=1e-6)


def test_the_last_weights_come_back_bit_for_bit():
    model, averages, past = trained(0.5, 3)
    last = model.MP.proj.weight.detach().clone()
    with averages.applied():
        assert not torch.equal(model.MP.proj.weight, last)
    assert all(torch.equal(p, last) for p, last in zip(model.parameters(), past[-1], strict=True))


def test_training_is_the_same_with_averages():
    model, *_ = trained(0.9, 4)
    other = make_model()
    optimizer = make_optimizer(other)
    for step in range(4):
        other(**batch(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_weights(model, other)


@pytest.mark.parametrize("kept", ["average", "last"])
def test_a_weight_freezes_at_its_average_or_its_last_value(kept):
    model = make_model()
    optimizer = make_optimizer(model)
    averages = AveragedWeights(model.parameters(), optimizer, 0.5)
    config = GradESConfig(vision_tau=1e9, language_tau=1e-9, alpha=0.4, freeze_to=kept)
    loop = Loop(model, None, 6, optimizer)
    loop.monitor = GradESMonitor(config, model, optimizer, 6, averages=averages)
    weight, values = model.vision_encoder.blocks[0].mlp.fc1.weight, {}
    after_step = loop.monitor.after_step

    def measured(step):
        averages.update()
        if step == 4:  # the first after the grace period
            values.update(last=weight.detach().clone(), average=averages.state[weight][AVERAGE].clone())
        return after_step(step)

    loop.monitor.after_step = measured
    loop.run()
    assert not weight.requires_grad
    assert torch.equal(weight, values[kept])
    assert AVERAGE not in optimizer.state.get(weight, {})
    norm = model.vision_encoder.layer_norm.weight  # frozen with its tower
    assert not norm.requires_grad


def test_an_interrupted_swap_is_none(monkeypatch):
    parameters = [torch.nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    averages = AveragedWeights(parameters, OwnState(), 0.5)
    averages.update()
    for parameter in parameters:
        parameter.data.add_(10)
    calls = []

    def interrupted(one, other):
        calls.append(one)
        if len(calls) == 3:
            raise KeyboardInterrupt
        exchange(one, other)

    monkeypatch.setattr("grades.averaging.exchange", interrupted)
    with pytest.raises(KeyboardInterrupt), averages.applied():
        pass
    assert [float(p[0]) for p in parameters] == [10.0, 11.0, 12.0]
    assert not averages.is_swapped


@pytest.mark.parametrize("joins", [3, 7, 10])
def test_a_window_counts_what_joins_later_from_its_first_update(joins):
    """As a part does that thaws, or whose first image comes late."""
    late, early = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    averages = AveragedWeights([early, late], OwnState(), 5)
    for step in range(1, 31):
        late.requires_grad_(step >= joins)
        for parameter in (early, late):
            parameter.data.fill_(step)
        averages.update()
        begun = (step - 1) // 5 * 5 + 1  # of the current block
        for parameter, first in ((early, 1), (late, joins)):
            if step >= first:
                steps = range(max(first, begun - 5), step + 1)
                expected = sum(steps) / len(steps)
                assert float(averages.state[parameter][AVERAGE]) == pytest.approx(expected), (step, first)


def test_a_shorter_window_ends_its_block_after_a_resume():
    parameter = torch.nn.Parameter(torch.zeros(1))
    place = OwnState()
    averages = AveragedWeights([parameter], place, 8)
    for step in range(1, 7):
        parameter.data.fill_(step)
        averages.update()
    shorter = AveragedWeights([parameter], place, 4)
    shorter.load_state_dict(averages.state_dict())
    for step in range(7, 20):
        parameter.data.fill_(step)
        shorter.update()
    assert float(place.state[parameter][AVERAGE]) == pytest.approx(sum(range(15, 20)) / 5)  # two blocks: 15-18, and 19


@pytest.mark.slow
def test_a_run_that_averages_no_more_goes_on_from_the_last_weights(data, tmp_path):
    """Of a checkpoint that holds the averages as its model."""
    flags = {"lr_schedule": "constant", "average_weights": 0.9, "eval_interval": 4, "checkpoint_interval": 4}
    flags |= dict.fromkeys(("lr_mp", "lr_vision_backbone", "lr_language_backbone"), 0.5)  # the last weights are bad
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags, max_training_steps=4))) == 0
    folder = tmp_path / "out" / "run"
    saved = state(folder)
    assert saved["states"]["loop"]["averaged_is_better"]
    assert saved["states"]["averages"]["is_swapped"]
    flags |= {"average_weights": 0, "max_training_steps": 8, "resume_override": True}
    for name in ("run", "branch"):
        words = arguments(data, tmp_path, name, **flags, resume=folder / "checkpoints" / "step_00000004")
        assert train.main(parse_arguments(words)) == 0
        after = state(tmp_path / "out" / name)
        assert not any("average" in key for values in after["optimizer"]["state"].values() for key in values)
        assert not after["states"]["loop"]["averaged_is_better"]
        assert json.loads((tmp_path / "out" / name / "summary.json").read_text())["weights"] == "last"
    plain = flags | {"average_weights": 0, "resume_override": False}
    assert train.main(parse_arguments(arguments(data, tmp_path, "plain", **plain))) == 0
    assert same(after["optimizer"], state(tmp_path / "out" / "plain")["optimizer"])
