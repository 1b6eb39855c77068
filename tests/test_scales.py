"""The unit that tau is in, and taus that are found in the grace period."""

import statistics

import pytest
import torch
from tiny.grades import LR, Loop, make_model

from grades import GradESConfig, find_components
from grades.config import METRICS
from grades.scales import AUTO_CHECKS, AUTO_SHARE, PerElementLr, Relative, resolve_taus


def test_relative_is_the_share_of_the_peak_so_far():
    scale = Relative()
    series = [(2.0, 1.0), (4.0, None), (1.0, 0.5), (8.0, 2.0)]
    found = [scale.apply({"a": a, "b": b}) for a, b in series]
    assert [(f["a"], f["b"]) for f in found] == [(1.0, 1.0), (1.0, None), (0.25, 0.5), (1.0, 1.0)]
    resumed = Relative()
    resumed.load_state_dict(scale.state_dict())
    assert resumed.apply({"a": 4.0, "b": 0.2}) == {"a": 0.5, "b": 0.1}


def test_relative_over_a_run_is_the_metric_by_its_own_peak():
    absolute = Loop(make_model(), GradESConfig(alpha=0.9), 8).run().monitor
    relative = Loop(make_model(), GradESConfig(tau_mode="relative", alpha=0.9), 8).run().monitor
    peaks = [0.0] * len(absolute.components)
    for raw, shares in zip(absolute.checks[1:], relative.checks[1:], strict=True):
        peaks = [max(peak, value) for peak, value in zip(peaks, raw["values"], strict=True)]
        assert shares["values"] == [value / peak for value, peak in zip(raw["values"], peaks, strict=True)]


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
def test_per_element_lr_over_a_run_matches_hand_computation(interval, as_tensor):
    """Two groups of different learning rates, both of which change in every step."""
    model = make_model()
    vision, rest = list(model.vision_encoder.parameters()), [*model.decoder.parameters(), *model.MP.parameters()]
    rates = [LR, 3 * LR]
    groups = [
        {"params": params, "lr": torch.tensor(lr) if as_tensor else lr}
        for params, lr in zip((vision, rest), rates, strict=True)
    ]
    loop = Loop(
        model, GradESConfig(tau_mode="per_element_lr", compute_interval=interval, alpha=0.9), 12,
        torch.optim.AdamW(groups, foreach=False),
    )  # fmt: skip
    copies = {}
    loop.on_step = lambda step: copies.update(
        {step: {c.name: c.weights[0].detach().double().clone() for c in loop.monitor.components}}
    )
    monitor = loop.run().monitor
    assert [check["step"] for check in monitor.checks] == list(range(interval, 13, interval))
    for check in monitor.checks[1:]:
        step = check["step"]
        factors = [1 - 0.9 * s / 12 for s in range(step - interval + 1, step + 1)]  # the loop's schedule
        for component, value in zip(monitor.components, check["values"], strict=True):
            now, before = copies[step][component.name], copies[step - interval][component.name]
            lr_sum = sum(factors) * rates[component.tower == "language"]
            assert value == pytest.approx((now - before).abs().mean().item() / lr_sum, rel=1e-4)
            assert 0.01 < value < 2  # Adam's updates are about the learning rate


def test_steps_without_learning_rate_are_not_measured():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scale = PerElementLr(find_components(model), optimizer)
    optimizer.step()
    name = find_components(model)[0].name
    assert scale.apply({name: 1.0}) == {name: None}


def test_per_element_lr_needs_the_optimizer_that_holds_the_components():
    model = make_model()
    config = GradESConfig(tau_mode="per_element_lr")
    with pytest.raises(ValueError, match="does not hold decoder"):
        Loop(model, config, 10, torch.optim.AdamW(model.vision_encoder.parameters()))
    with pytest.raises(ValueError, match="weight_change"):
        GradESConfig(tau_mode="per_element_lr", metric="gradient_norm").check()


COMPONENTS = find_components(make_model())


def checks_of(value_of, checks: int) -> list[dict]:
    """Checks 1, 2 ... with the values value_of(component, step)."""
    return [{"step": step, "values": [value_of(c, step) for c in COMPONENTS]} for step in range(1, checks + 1)]


def test_an_auto_tau_is_half_the_median_of_its_tower_and_kind_at_the_end_of_the_grace_period():
    grace = checks_of(lambda c, step: None if step == 9 else (1 + c.layer) * len(c.kind) * step, checks=10)
    taus = resolve_taus(GradESConfig(vision_tau="auto", language_tau="auto"), COMPONENTS, grace)
    for component in COMPONENTS:
        like = [(1 + layer) * len(component.kind) * step for layer in (0, 1) for step in (6, 7, 8, 10)]
        assert taus[component.name] == AUTO_SHARE * statistics.median(like)
    assert AUTO_CHECKS == 5  # 6 to 10, one of which measured nothing


def test_what_the_grace_period_never_measured_does_not_freeze():
    grace = checks_of(lambda c, step: None if c.tower == "vision" else 1.0, checks=5)
    taus = resolve_taus(GradESConfig(vision_tau="auto", language_tau="auto"), COMPONENTS, grace)
    assert {taus[c.name] for c in COMPONENTS if c.tower == "vision"} == {0}
    assert {taus[c.name] for c in COMPONENTS if c.tower == "language"} == {AUTO_SHARE}


def test_auto_for_one_tower_a_number_for_the_other_and_parts_with_their_own():
    config = GradESConfig(vision_tau="auto", vision_mlp_tau=0.7, language_tau=6.0, language_attention_tau=5)
    assert resolve_taus(config, COMPONENTS) == {}
    taus = resolve_taus(config, COMPONENTS, checks_of(lambda c, step: 8.0, checks=3))
    by_part = {(c.tower, c.part): taus[c.name] for c in COMPONENTS}
    assert by_part == {
        ("vision", "attention"): 4.0, ("vision", "mlp"): 0.7, ("language", "attention"): 5.0, ("language", "mlp"): 6.0,
    }  # fmt: skip
    assert len(taus) == 22
    overruled = GradESConfig(vision_tau="auto", vision_mlp_tau=0.7, vision_attention_tau=0.6)
    assert set(resolve_taus(overruled, COMPONENTS).values()) == {0.7, 0.6, 1e-4}


@pytest.mark.parametrize("metric", METRICS)
def test_auto_taus_are_found_in_a_run_and_recorded(metric):
    config = GradESConfig(metric=metric, vision_tau="auto", language_tau="auto", alpha=0.5, compute_interval=2)
    loop = Loop(make_model(), config, 24)
    known = []
    loop.on_step = lambda step: known.append(bool(loop.monitor.taus))
    monitor = loop.run().monitor
    assert known.index(True) + 1 == 14  # at the first check after the grace period
    expected = resolve_taus(config, monitor.components, monitor.checks[:6])
    assert monitor.taus == expected
    assert [c["tau"] for c in monitor.history()["components"]] == [expected[c.name] for c in monitor.components]


@pytest.mark.parametrize(
    ("metric", "alpha", "interval", "needed"),
    [("weight_change", 0.1, 20, 2), ("gradient_norm", 0.15, 20, 1)],
)
def test_a_grace_period_too_short_for_auto_is_an_error_before_the_first_step(metric, alpha, interval, needed):
    config = GradESConfig(metric=metric, vision_tau="auto", language_tau=1.0, alpha=alpha, compute_interval=interval)
    with pytest.raises(ValueError, match=f"--alpha {alpha}.*must hold {needed} or more"):
        Loop(make_model(), config, 100)
    loop = Loop(make_model(), config, 100 * interval)
    loop.monitor.total_steps = 100
    with pytest.raises(ValueError, match=f"--alpha {alpha}"):
        loop.run()


def test_settings_that_a_unit_rules_out():
    for flags, flag in [
        ({"tau_mode": "relative", "language_tau": 6.0}, "tau_mode relative"),
        ({"tau_mode": "relative", "vision_mlp_tau": 1.5}, "tau_mode relative"),
        ({"tau_mode": "relative", "monitor_grace": False}, "monitor_grace"),
        ({"vision_tau": "auto", "monitor_grace": False}, "monitor_grace"),
        ({"language_tau": "auto", "alpha": 0.0}, "alpha"),
        ({"vision_tau": "0.3"}, "vision_tau"),
        ({"tau_mode": "share"}, "tau_mode"),
    ]:
        with pytest.raises(ValueError, match=f"^--{flag}") as error:
            GradESConfig(**flags).check()
        assert len(str(error.value).splitlines()) == 1
    # A tower that does not freeze may have any tau.
    GradESConfig(tau_mode="relative", vision_tau=0.5, language_tau=6.0, freeze_language=False).check()
