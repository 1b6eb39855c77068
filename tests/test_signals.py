"""Ctrl-C and SIGTERM while train.py runs; tests/test_faults.py sends them to whole runs."""

import os
import signal
import time

import pytest

from training.signals import SAME_S, StopSignal


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # the handler runs between two instructions


def test_a_signal_that_comes_twice_at_once_is_one():
    """`timeout` and `uv run` pass on what the process has got from its group."""
    said = []
    with StopSignal(said.append) as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.requested
        assert stop.signal == signal.SIGTERM
        assert said == ["SIGTERM: saving and ending after this step; a second one ends at once"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_program_at_once(monkeypatch, number):
    with StopSignal(lambda line: None):
        send(signal.SIGINT)
        now = time.monotonic() + 1.1 * SAME_S
        monkeypatch.setattr(time, "monotonic", lambda: now)
        with pytest.raises(KeyboardInterrupt):
            send(number)
