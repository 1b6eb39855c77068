"""Processes beside the test's own."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

TIMEOUT_S = 300


def fork_of(monkeypatch: pytest.MonkeyPatch, preload: str, target: Callable, *arguments: Any) -> Any:
    """A process, not yet started, that is forked from one which has imported the module preload but never run a
    backward pass. Skips the test where processes cannot be forked."""
    if not hasattr(os, "fork"):
        pytest.skip("forks processes")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context.Process(target=target, args=arguments)


def run_two_ranks(monkeypatch: pytest.MonkeyPatch, preload: str, target: Callable, *arguments: Any) -> None:
    """target(rank, port, *arguments) in two processes at once, of which both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork_of(monkeypatch, preload, target, rank, port, *arguments) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=TIMEOUT_S)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]
