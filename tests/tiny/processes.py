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


# Arguments of TrainingArguments with which accelerate shards the tiny Llama; the process has to claim GPUs.
SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2, "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}  # fmt: skip


def claim_gpus():
    """In this process: accelerate shards on GPUs alone, though torch does so on a CPU as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    init = PartialState.__init__

    def claim(self, *args, **kwargs):
        init(self, *args, **kwargs)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = claim
