"""The unit that tau is in, and taus that are found in the grace period."""

import statistics

import pytest
from tiny.grades import Loop, make_model, train

from grades import GradESConfig, find_components
from grades.config import METRICS
from grades.scales import AUTO_CHECKS, AUTO_SHARE, Relative, resolve_taus


def test_relative_is_the_share_of_the_peak_so_far():
    scale = Relative()
    series = [(2.0, 1.0), (4.0, None), (1.0, 0.5), (8.0, 2.0)]
    found = [scale.apply({"a": a, "b": b}) for a, b in series]
    assert [(f["a"], f["b"]) for f in found] == [(1.0, 1.0), (1.0, None), (0.25, 0.5), (1.0, 1.0)]
    resumed = Relative()
    resumed.load_state_dict(scale.state_dict())
    assert resumed.apply({"a": 4.0, "b": 0.2}) == {"a": 0.5, "b": 0.1}


def test_relative_over_a_run_is_the_metric_by_its_own_peak():
    absolute, relative = (train({"tau_mode": mode, "alpha": 0.9}, 8).monitor for mode in ("absolute", "relative"))
    peaks = [0.0] * len(absolute.components)
    for raw, shares in zip(absolute.checks[1:], relative.checks[1:], strict=True):
        peaks = [max(peak, value) for peak, value in zip(peaks, raw["values"], strict=True)]
        assert shares["values"] == [value / peak for value, peak in zip(raw["values"], peaks, strict=True)]


COMPONENTS = find_components(make_model())
BOTH_AUTO = GradESConfig(vision_tau="auto", language_tau="auto")


def checks_of(value_of, checks: int) -> list[dict]:
    """Checks 1, 2 ... with the values value_of(component, step)."""
    return [{"step": step, "values": [value_of(c, step) for c in COMPONENTS]} for step in range(1, checks + 1)]


def test_an_auto_tau_is_half_the_median_of_its_tower_and_kind_at_the_end_of_the_grace_period():
    grace = checks_of(lambda c, step: None if step == 9 else (1 + c.layer) * len(c.kind) * step, checks=10)
    taus = resolve_taus(BOTH_AUTO, COMPONENTS, grace)
    measured = [step for step in range(11 - AUTO_CHECKS, 11) if step != 9]
    for component in COMPONENTS:
        like = [(1 + layer) * len(component.kind) * step for layer in (0, 1) for step in measured]
        assert taus[component.name] == AUTO_SHARE * statistics.median(like)


def test_what_the_grace_period_never_measured_does_not_freeze():
    grace = checks_of(lambda c, step: None if c.tower == "vision" else 1.0, checks=5)
    taus = resolve_taus(BOTH_AUTO, COMPONENTS, grace)
    assert {(c.tower, taus[c.name]) for c in COMPONENTS} == {("vision", 0), ("language", AUTO_SHARE)}


def test_auto_for_one_tower_a_number_for_the_other_and_parts_with_their_own():
    config = GradESConfig(vision_tau="auto", vision_mlp_tau=0.7, language_tau=6.0, language_attention_tau=5)
    assert resolve_taus(config, COMPONENTS) == {}
    taus = resolve_taus(config, COMPONENTS, checks_of(lambda c, step: 8.0, checks=3))
    assert {(c.tower, c.part, taus[c.name]) for c in COMPONENTS} == {
        ("vision", "attention", 8.0 * AUTO_SHARE), ("vision", "mlp", 0.7),
        ("language", "attention", 5.0), ("language", "mlp", 6.0),
    }  # fmt: skip
    overridden = GradESConfig(vision_tau="auto", vision_mlp_tau=0.7, vision_attention_tau=0.6)
    assert set(resolve_taus(overridden, COMPONENTS).values()) == {0.7, 0.6, 1e-4}


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
    assert [c["tau"] for c in monitor.history()["components"]] == list(expected.values())


@pytest.mark.parametrize(
    ("metric", "alpha", "interval", "needed"), [("weight_change", 0.1, 20, 2), ("gradient_norm", 0.15, 20, 1)]
)
def test_a_grace_period_too_short_for_auto_is_an_error_before_the_first_step(metric, alpha, interval, needed):
    config = GradESConfig(metric=metric, vision_tau="auto", language_tau=1.0, alpha=alpha, compute_interval=interval)
    with pytest.raises(ValueError, match=f"^alpha {alpha}.* {needed} or more"):
        Loop(make_model(), config, 100)
    loop = Loop(make_model(), config, 100 * interval)
    loop.monitor.total_steps = 100
    with pytest.raises(ValueError, match=f"^alpha {alpha}"):
        loop.run()
