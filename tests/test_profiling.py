"""--profile: a trace of the steps that were asked for, and what took the time in them."""

import json

import pytest
from tiny.runs import arguments

import train
from training.arguments import parse_arguments
from training.profiling import OPERATORS, TRACE, WARMUP_STEPS


def profiled(data, tmp_path, **flags) -> tuple[dict | None, list[str]]:
    """The trace, and the lines of log.txt."""
    given = {"eval_interval": 100, "log_interval": 1} | flags
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **given))) == 0
    folder = tmp_path / "out" / "run"
    trace = json.loads((folder / TRACE).read_text()) if (folder / TRACE).exists() else None
    return trace, (folder / "log.txt").read_text().splitlines()


def test_the_steps_after_warm_up_are_profiled(data, tmp_path):
    trace, log = profiled(data, tmp_path, profile=2, max_training_steps=WARMUP_STEPS + 3)
    names = {event.get("name") for event in trace["traceEvents"]}
    steps = {name for name in names if str(name).startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{WARMUP_STEPS}", f"ProfilerStep#{WARMUP_STEPS + 1}"}
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= names
    header = log.index("CPU time of 2 steps by operator, without that of the operators it calls")
    rows = [line.split(maxsplit=3) for line in log[header + 2 : header + 2 + OPERATORS]]
    times, shares = [float(row[0]) for row in rows], [float(row[1].rstrip("%")) for row in rows]
    assert times == sorted(times, reverse=True)
    assert times[0] > 0
    assert 50 < sum(shares) <= 100.1
    assert any("aten::" in row[3] for row in rows)
    assert "(between operators)" in [row[3] for row in rows]
    assert log[header + 2 + OPERATORS].startswith(f"written {tmp_path}")


def test_a_run_that_ends_early_shows_what_it_has(data, tmp_path):
    trace, log = profiled(data, tmp_path, profile=9, max_training_steps=WARMUP_STEPS + 1)
    assert any(line.startswith("CPU time of 1 steps") for line in log)
    assert trace is not None


def test_the_number_of_steps_can_be_left_out():
    assert parse_arguments(["--profile", "--seed", "1"]).train.profile == 5
    assert parse_arguments([]).train.profile == 0
    with pytest.raises(SystemExit):
        parse_arguments(["--profile=-1"])


def test_a_run_that_ends_before_says_so(data, tmp_path):
    trace, log = profiled(data, tmp_path, profile=1, max_training_steps=2)
    assert trace is None
    assert f"--profile: nothing to show; it begins after {WARMUP_STEPS} steps" in log
