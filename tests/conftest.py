"""Tests run on tiny tensors: one thread is fastest, and its sums come out the same on every machine."""

import contextlib
import importlib
import os
import socket

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that a test starts inherit it


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Up to four processes for the whole suite, none besides this one where files or a keyword were given.

    Each process imports torch and collects all tests, which takes longer than a few tests run.
    """
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    return 0 if chosen else min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws from torch, and finds in the state of Python's random numbers, does not depend on which tests
    ran before it."""
    import torch

    with contextlib.suppress(ImportError):
        importlib.import_module("rich.style")  # torch 2.11 does so late, and the import draws a number
    torch.manual_seed(0)


@pytest.fixture
def small_scale(monkeypatch):
    """Sample the matrices of the tiny model too, which are otherwise so small that they are measured whole."""
    from grades import sampling

    monkeypatch.setattr(sampling, "MIN_SAMPLE_ELEMENTS", 64)


@pytest.fixture
def no_network(monkeypatch):
    """Every look-up and connection fails as without a network; returns the addresses that were asked for. Processes of
    this machine may talk to each other.
    """
    asked, connect = [], socket.socket.connect

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda own, *address: connect(own, *address) if own.family == socket.AF_UNIX else refuse(own, *address),
    )
    return asked


@pytest.fixture
def data(tmp_path):
    """Sixteen rows in the_cauldron's shape, one of which holds no image that decodes."""
    from tiny.data import write_rows

    return write_rows(tmp_path / "rows", 16)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub and a server of pictures on this machine, which are asked without long waits."""
    from tiny.web import REVISION, HubHandler, impatient, serving

    from data.fetching import hub, pictures

    impatient(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(pictures, "PAUSE_S", 0.05)
    monkeypatch.setattr(hub, "WAITS_S", (0.0, 0.0))
    with serving(HubHandler) as made:
        made.repos, made.revision = {}, REVISION
        yield made


@pytest.fixture(scope="session")
def hf():
    """The module tiny.trainer, which imports transformers."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tiny import trainer

    return trainer
