"""Rates of a run: FLOPs and the time in which they were done belong together."""

import json

import pytest
import torch
from tiny import grades as tiny
from tiny.runs import arguments

import train
from training.arguments import parse_arguments
from training.flops import FlopCounter, model_cost
from training.meter import Meter
from training.parallel import Parallel


def make_meter(model) -> Meter:
    return Meter(FlopCounter(model), Parallel(), torch.device("cpu"))


def test_measuring_counts_in_the_flops_but_not_in_the_rates_also_of_a_resumed_run():
    model = tiny.make_model()
    batch = tiny.batch(0) | {"num_labels": 5, "num_tokens": 20, "ids": ["a", "b"]}
    step_flops, meter, reported_s = model_cost(model).of(batch), make_meter(model), 0.0
    for step in (1, 2, 3):
        meter.add(step, torch.tensor(1.0), [batch])
        with meter.clock("rollback"):
            meter.flops.add_forward([batch] * 10)
        if step == 2:  # the steps since the last report are those of both runs
            states = json.loads(json.dumps([meter.state_dict()]))
            meter = make_meter(model)
            meter.load_rank_states(states)
            continue
        rate = meter.report()["train/tflops_per_s"]
        steps, seconds = 1 if step == 1 else 2, meter.seconds["train"] - reported_s
        assert rate * 1e12 * seconds == pytest.approx(steps * step_flops)
        reported_s = meter.seconds["train"]
    assert meter.flops.trained == meter.flops.unfrozen == 3 * step_flops
    measured = meter.flops.done - meter.flops.trained
    meter.sum_over_ranks()
    assert measured == 30 * meter.flops.cost_forward.of(batch) == meter.flops.measured > 0


def test_a_summary_has_the_flops_of_measuring_and_the_speed_of_the_steps(data, tmp_path):
    flags = {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant",
             "alpha": 0.1, "rollback_rows": 3, "vision_tau": 1e-12, "language_tau": 1e-12, "val_size": 5}  # fmt: skip
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    unfrozen = summary["train_flops_unfrozen_per_step"] * summary["steps"]
    assert summary["frozen_share"] == 0
    assert summary["rollback_time_s"] > 0
    assert summary["train_flops"] > unfrozen
    assert summary["train_tflops_per_s"] * 1e12 * summary["train_time_s"] == pytest.approx(unfrozen)
