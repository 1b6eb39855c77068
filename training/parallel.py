"""One run on several processes (torchrun): DDP, or FSDP2, which shards the weights. A single process is a run of one.

Each process, or rank, takes its rows of every global batch; gradients are averaged over the ranks. What decides how the
run goes on is the same on all of them: it comes from reduced numbers or from rank 0, which alone writes.

What only a sharded model needs of torch.distributed is imported where it is used: that takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from models.config import TrainConfig

# How long the ranks wait for rank 0 to evaluate and to save. When one of them dies torchrun ends the others.
PATIENCE = timedelta(hours=12)
T = TypeVar("T")


class Parallel:
    """The processes of a run. With one of them every method does nothing, and every value is the process's own."""

    def __init__(self, kind: str = "none", rank: int = 0, world_size: int = 1):
        """kind: "none", "ddp" or "fsdp"."""
        self.kind, self.rank, self.world_size = kind, rank, world_size
        # What the host has to know goes over gloo, so that no device is waited for.
        self.hosts = None if world_size == 1 else dist.new_group(backend="gloo", timeout=PATIENCE)
        self.ddp: DistributedDataParallel | None = None
        self.sharded: nn.Module | None = None
        self.skeleton: nn.Module | None = None  # the sharded model without its weights, not sharded

    @classmethod
    def start(cls, cfg: TrainConfig) -> Parallel:
        """Join the processes that torchrun has started; without it, a single process."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if torch.cuda.is_available():
            gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if gpu >= gpus:
                raise ValueError(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: must be at most {gpus}, the GPUs")
            torch.cuda.set_device(gpu)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(cfg.parallel, dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    def close(self) -> None:
        """Leave the other processes, at the good end of a run."""
        if not self.is_alone:
            self.ddp = None
            dist.destroy_process_group()

    # Values of the host

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks; whole numbers are exact."""
        if self.is_alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.hosts)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.is_alone else self.sum(flag)[0] > 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on rank 0; an empty list on the others."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, values or None, dst=0, group=self.hosts)
        return values

    def from_main(self, compute: Callable[[], T], together: bool = False) -> T:
        """What rank 0 computes, on every rank; the others wait, or compute `together`. Where it fails they exit."""
        if self.is_alone:
            return compute()
        values: list[Any] = [None]  # (value,) where there is one
        try:
            if self.is_main or together:
                values = [(compute(),)]
        finally:
            dist.broadcast_object_list(values, src=0, group=self.hosts)
        if values[0] is None:
            raise SystemExit(2)
        return values[0][0]

    def evaluate(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes with the model, on every rank; where weights are sharded the others compute along."""
        value = self.from_main(compute, together=self.sharded is not None)
        if self.sharded is not None:
            self.sharded.reshard()  # a forward pass alone leaves the root's weights whole
        return value

    # Tensors

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """x averaged over the ranks."""
        if self.is_alone:
            return x
        x = x / self.world_size
        dist.all_reduce(x)
        return x

    # The model

    def shard(self, model: nn.Module, bfloat16: bool) -> None:
        """Under FSDP2 divide the weights among the ranks, in place; to be called before the optimizer is made.

        bfloat16: compute in it on a GPU; weights, optimizer and the sum of the gradients stay in float32.
        """
        if self.kind != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        empty = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
        self.skeleton = copy.deepcopy(model, empty | {id(buffer): buffer.to("meta") for buffer in model.buffers()})
        device = next(model.parameters()).device.type
        options: dict[str, Any] = {"mesh": init_device_mesh(device, (self.world_size,))}
        if bfloat16 and device == "cuda":
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in (*model.vision_encoder.blocks, *model.decoder.blocks):
            fully_shard(block, **options)
        self.sharded = fully_shard(model, **options)
        register_fsdp_forward_method(model, "generate")

    def module(self, model: nn.Module) -> nn.Module:
        """What the training step calls in place of the model; under DDP its wrapper, made at the first call."""
        if self.kind == "ddp" and self.ddp is None:
            # Checks that the same weights train on all ranks, and lets them begin with rank 0's.
            self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        return self.ddp or model

    @property
    def on_round(self) -> Callable[[], None] | None:
        """What is to be called after requires_grad has changed; None under FSDP2, which looks at it in every step."""
        return self.rewrap if self.kind == "ddp" else None

    def rewrap(self) -> None:
        """Let the next step wrap the model anew: DDP waits for the gradients of all that trained when it wrapped."""
        self.ddp = None

    @property
    def agree(self) -> Callable[[T], T] | None:
        """Gives every rank what rank 0 holds; None where the ranks hold the same for certain."""
        return (lambda value: self.from_main(lambda: value)) if self.kind == "ddp" else None

    def accumulation(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """The context of one micro-batch's forward and backward pass: gradients are exchanged in the last one alone."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(last)
        return self.module(model).no_sync() if self.kind == "ddp" and not last else contextlib.nullcontext()

    def complete(self, inputs: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        """The inputs of a micro-batch; where it holds no image, with a blank one that goes into no slot.

        The ranks meet in the layers: where one has an image, all have to go through the vision tower.
        """
        if self.is_alone or "images" in inputs:
            return inputs
        ids, size = inputs["input_ids"], model.cfg.vit_img_size
        nowhere = ids.new_empty(0)
        blank = torch.zeros(1, 3, size, size, device=ids.device)
        return inputs | {"images": blank, "image_slots": nowhere, "image_sources": nowhere}

    def forget_blanks(self, model: nn.Module, images: float) -> None:
        """After the backward passes of a step with so many images on all ranks: where it had none, nothing that sees
        images has a gradient, as in a single process."""
        if not self.is_alone and images == 0:
            for parameter in (*model.vision_encoder.parameters(), *model.MP.parameters()):
                parameter.grad = None

    # Checkpoints, which load on any number of ranks

    def whole_model(self, model: nn.Module) -> nn.Module:
        """The model with all its weights: the model itself, or on rank 0 a copy of the sharded one on the CPU."""
        if self.skeleton is None:
            return model
        weights: dict[nn.Parameter, torch.Tensor] = {}  # so that tied ones stay one
        for weight in model.state_dict(keep_vars=True).values():
            if weight not in weights:
                weights[weight] = self._whole(weight.detach())
        state = {name: weights[weight] for name, weight in model.state_dict(keep_vars=True).items()}
        if self.is_main:
            self.skeleton.load_state_dict(state, assign=True)
        return self.skeleton

    def own_part(self, optimizer: torch.optim.Optimizer, state: dict[int, dict]) -> dict[int, dict]:
        """What this rank's optimizer is to load of the "state" of the whole optimizer's state_dict."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {i: {key: _like(value, parameters[i]) for key, value in of.items()} for i, of in state.items()}

    def write_optimizer(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state of a sharded model's optimizer as safetensors, each rank its part. Raises where one fails."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        tensors = {
            f"{name}.{key}": value
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.hosts)
        except CheckpointException as error:  # which Exception does not cover
            raise next(reason for reason, _ in error.failures.values()) from None

    def read_optimizer(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, dict]:
        """What this rank's optimizer is to load of what write_optimizer wrote, whatever the number of ranks then."""
        import torch.distributed.checkpoint as dcp

        reader = dcp.HuggingFaceStorageReader(str(folder))
        parameters = dict(model.named_parameters())
        tensors, of = {}, {}
        for name, saved in reader.read_metadata().state_dict_metadata.items():
            parameter = parameters[name.rpartition(".")[0]]
            same = saved.size == parameter.shape  # else a number, the steps
            tensors[name] = torch.zeros_like(parameter.detach()) if same else torch.zeros(saved.size)
            of.setdefault(parameter, {})[name.rpartition(".")[2]] = tensors[name]
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of no_dist that it is
            if tensors:
                dcp.load(tensors, storage_reader=reader, process_group=self.hosts, no_dist=self.is_alone)
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {i: of[parameter] for i, parameter in enumerate(ordered) if parameter in of}

    def _whole(self, value: Any) -> Any:
        from torch.distributed.tensor import DTensor

        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.to("cpu", copy=True) if self.is_main else whole[:0]  # a copy is without the padding of the shards


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """The optimizer's tensor for a parameter, sharded as this is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
