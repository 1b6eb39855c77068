"""The learning rate of each step."""

import pytest

from training.arguments import parse_arguments
from training.schedule import cooldown_steps, lr_factor


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    cfg = parse_arguments(["--max_training_steps", "1000", "--lr_schedule", "cosine"]).train
    factors = [lr_factor(step, cfg) for step in range(1, 1001)]
    assert factors[0] == pytest.approx(1 / 30)
    assert factors[29] == 1.0
    assert factors[30 + 485 - 1] == pytest.approx(0.55, abs=1e-3)  # half-way down
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("converged", [500, 950])
def test_the_rate_never_rises_when_a_run_cools_down(schedule, converged):
    """Not even where the schedule was falling already; at the end of the cooldown it is as low as either says."""
    flags = [
        "--max_training_steps",
        "1000",
        "--lr_schedule",
        schedule,
        "--min_lr_ratio",
        "0",
        "--cooldown_ratio",
        "0.2",
    ]
    cfg = parse_arguments(flags).train
    factors = [lr_factor(step, cfg, None if step <= converged else converged) for step in range(31, 1001)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == 0  # of a constant rate, too, that has 50 steps left for a cooldown of 190
    assert factors[converged - 31] == lr_factor(converged, cfg)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_never_rises_in_a_cooldown_that_begins_in_a_warm_up(schedule):
    flags = ["--max_training_steps", "1000", "--lr_schedule", schedule, "--min_lr_ratio", "0"]
    cfg = parse_arguments(flags).train
    factors = [lr_factor(step, cfg, 400, warmup_ratio=0.5) for step in range(400, 1001)]
    assert factors[0] == lr_factor(400, cfg, warmup_ratio=0.5) == 0.8
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == 0


def test_shares_of_a_run_are_exact():
    flags = [
        "--max_training_steps",
        "100",
        "--lr_schedule",
        "wsd",
        "--cooldown_ratio",
        "0.07",
        "--warmup_ratio",
        "0.29",
    ]
    cfg = parse_arguments(flags).train
    assert cooldown_steps(cfg, 100) == 7  # 0.07 * 100 is more in floats
    factors = [lr_factor(step, cfg) for step in range(1, 101)]
    assert factors.index(1.0) == 28  # step 29; 0.29 * 100 is less in floats
    assert factors.count(1.0) == 93 - 28
