"""FSDP2: a model whose weights, gradients and optimizer state are divided among the ranks, and its checkpoints, which
load on any number of ranks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.vision_language_model import VisionLanguageModel


class ShardedModel:
    """Divides the weights of a model among the ranks, in place."""

    def __init__(self, model: VisionLanguageModel, world_size: int, bfloat16: bool):
        """bfloat16: compute in it on a GPU; weights, optimizer and the sum of the gradients stay in float32."""
        empty = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
        # The model without its weights, not sharded.
        self.skeleton = copy.deepcopy(model, empty | {id(buffer): buffer.to("meta") for buffer in model.buffers()})
        device = next(model.parameters()).device.type
        options: dict[str, Any] = {"mesh": init_device_mesh(device, (world_size,))}
        if bfloat16 and device == "cuda":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
            fully_shard(block, **options)
        self.model = fully_shard(model, **options)
        for method in ("generate", "stream"):
            register_fsdp_forward_method(model, method)

    def reshard(self) -> None:
        """After an evaluation: a forward pass alone leaves the root's weights whole."""
        self.model.reshard()

    def exchange_gradients(self, now: bool) -> None:
        """Whether the next backward pass adds the gradients up over the ranks."""
        self.model.set_requires_gradient_sync(now)

    def whole(self, is_main: bool) -> VisionLanguageModel:
        """On rank 0 a copy of the model with all its weights, on the CPU; on the others one without."""
        weights: dict[nn.Parameter, torch.Tensor] = {}  # so that tied ones stay one
        module = cast(nn.Module, self.model)
        for weight in module.state_dict(keep_vars=True).values():
            if weight not in weights:
                weights[weight] = _whole(weight.detach(), is_main)
        state = {name: weights[weight] for name, weight in module.state_dict(keep_vars=True).items()}
        if is_main:
            self.skeleton.load_state_dict(state, assign=True)
        return self.skeleton

    def write_optimizer(self, folder: Path, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None) -> None:
        """Write the optimizer's state as safetensors, each rank its part. Raises where one of them fails."""
        tensors = {
            f"{name}.{key}": value
            for name, parameter in cast(nn.Module, self.model).named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=group)
        except CheckpointException as error:  # which Exception does not cover
            raise next(reason for reason, _ in error.failures.values()) from None


def own_part(optimizer: torch.optim.Optimizer, state: dict[int, dict]) -> dict[int, dict]:
    """What this rank's optimizer is to load of the "state" of the whole optimizer's state_dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {i: {key: _like(value, parameters[i]) for key, value in of.items()} for i, of in state.items()}


def read_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None
) -> dict[int, dict]:
    """What this rank's optimizer is to load of what `write_optimizer` wrote, whatever the number of ranks then.

    group: of the processes; None for a single one.
    """
    reader = HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    of: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata)
        parameter = parameters[name.rpartition(".")[0]]
        same = saved.size == parameter.shape  # else a number, the steps
        tensors[name] = torch.zeros_like(parameter.detach()) if same else torch.zeros(saved.size)
        of.setdefault(parameter, {})[name.rpartition(".")[2]] = tensors[name]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no_dist is deliberate
        if tensors:
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    ordered = [parameter for of_part in optimizer.param_groups for parameter in of_part["params"]]
    return {i: of[parameter] for i, parameter in enumerate(ordered) if parameter in of}


def _whole(value: Any, is_main: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.to("cpu", copy=True) if is_main else whole[:0]  # a copy is without the padding of the shards


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """The optimizer's tensor for a parameter, sharded as this is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
