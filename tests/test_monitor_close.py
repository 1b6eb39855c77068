"""GradESMonitor.close: the model is as it was before, whatever ended the loop and wherever it was interrupted."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from tiny.grades import ALWAYS, NEVER, Loop, batch, make_model, same_weights, train, unfreezing_loop

from grades import GradESConfig, GradESMonitor
from grades.marks import MARK

STOPS_VISION = {"vision_tau": ALWAYS, "language_tau": NEVER, "alpha": 0.2}


def state_of(model):
    """What a run must not leave behind."""
    return {
        "trains": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "attributes": [set(vars(one)) for one in (*model.modules(), *model.parameters())],
    }


def frozen_by_user():
    model = make_model()
    model.decoder.blocks[0].mlp.up_proj.weight.requires_grad_(False)
    model.vision_encoder.layer_norm.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("config", [STOPS_VISION, {**STOPS_VISION, "language_attention_tau": ALWAYS}])
def test_the_context_leaves_the_model_as_it_was(config, error):
    model = frozen_by_user()
    before = state_of(model)
    loop = Loop(model, GradESConfig(**config), 8)
    with contextlib.nullcontext() if error is None else pytest.raises(error), loop.monitor as monitor:
        loop.run(5)
        assert monitor.frozen
        assert state_of(model) != before
        if error is not None:
            raise error("at step 6")
    assert state_of(model) == before
    assert not monitor.metric.kept, "no copy of a weight"
    assert monitor.history()["last_step"] == 5
    assert len(monitor.history()["events"]) == len(monitor.frozen)
    monitor.close()
    with pytest.raises(ValueError, match="closed"):
        monitor.after_step(6)


@pytest.mark.parametrize("where", ["settling the prefix", "hooks", "probe"])
def test_it_holds_where_freezing_itself_was_interrupted(monkeypatch, where):
    before = state_of(make_model())
    if where == "probe":
        loop = unfreezing_loop()
        loop.run(8)  # the next step is a probe: what is frozen has gradients
    else:
        loop = Loop(make_model(), GradESConfig(**STOPS_VISION), 8)
        calls = []

        def interrupt(*args):
            calls.append(args)
            if where == "hooks" or len(calls) == 2:
                raise KeyboardInterrupt

        if where == "hooks":
            monkeypatch.setattr("grades.freezing.release", interrupt)
        else:
            loop.monitor.freezer.settle = interrupt
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    loop.monitor.close()
    assert state_of(loop.model) == before


def test_a_new_monitor_thaws_what_a_lost_one_froze_and_only_that(caplog):
    model = frozen_by_user()
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    Loop(model, GradESConfig(**STOPS_VISION), 8).run(5)  # and its monitor is lost
    assert any(MARK in vars(module) for module in model.modules())
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    second = Loop(model, GradESConfig(**STOPS_VISION), 8)
    assert state_of(model)["trains"] == before["trains"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    second.run()
    third = Loop(frozen_by_user(), GradESConfig(**STOPS_VISION), 8).run()
    assert second.monitor.history() == third.monitor.history()
    assert same_weights(second.model, third.model)


def test_marks_go_with_what_trains_again():
    loop = unfreezing_loop().run(8)
    marked = [name for name, module in loop.model.named_modules() if MARK in vars(module)]
    assert any(name.startswith("vision_encoder.blocks") for name in marked)
    loop.run(9)
    assert not any(MARK in vars(module) for module in loop.model.modules())
    assert all(p.requires_grad for p in loop.model.parameters())


@pytest.mark.parametrize("metric", ["weight_change", "gradient_rms"])
def test_a_closed_monitor_holds_no_optimizer(metric):
    loop = train(STOPS_VISION | {"metric": metric}, 8)
    optimizer, monitor = weakref.ref(loop.optimizer), loop.monitor
    monitor.close()
    del loop
    gc.collect()
    assert optimizer() is None
    assert monitor.frozen


def test_an_optimizer_that_lacks_what_thaws_is_an_error():
    model = make_model()
    train(STOPS_VISION, 5, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="make the optimizer"):
        GradESMonitor(GradESConfig(), model, optimizer, 8)
    model(**batch(1))[1].backward()
