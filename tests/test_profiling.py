"""--profile: a trace of the steps that were asked for, and torch's table of them; peak memory."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from training.arguments import parse_arguments
from training.memory import peak_memory_bytes
from training.profiling import TRACE, WARMUP_STEPS, StepProfiler

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "done", "profiled"), [(2, 8, 2), (2, 6, 1), (2, WARMUP_STEPS, 0), (0, 8, 0)])
def test_the_steps_after_warm_up_are_profiled(steps, done, profiled, tmp_path):
    said = []
    profiler = StepProfiler(steps, tmp_path, CPU, said.append)
    for _ in range(done):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.step()
    profiler.close()
    assert (tmp_path / TRACE).exists() == bool(profiled)
    assert len(said) == (2 if profiled else done == WARMUP_STEPS)  # which is too few, and said
    if profiled:
        names = [event.get("name") for event in json.loads((tmp_path / TRACE).read_text())["traceEvents"]]
        assert f"ProfilerStep#{WARMUP_STEPS}" in names
        assert names.count("aten::mm") == profiled
        assert "aten::mm" in said[0]
        assert "Self CPU %" in said[0]


def test_the_number_of_steps_can_be_left_out():
    assert parse_arguments(["--profile", "--seed", "1"]).train.profile == 5
    assert parse_arguments([]).train.profile == 0


def test_peak_memory_is_in_bytes(monkeypatch):
    resource = pytest.importorskip("resource")
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 50 * 2**20 < peak_memory_bytes(CPU) < installed  # Python and torch take more than 50 MiB
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        assert peak_memory_bytes(CPU) == 3 * 2**20 * unit


def test_peak_memory_is_unknown_where_nobody_tells(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert peak_memory_bytes(CPU) is None
    assert peak_memory_bytes(torch.device("mps")) is None
