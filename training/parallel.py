"""One run on several processes (torchrun): DDP, or FSDP2, which shards the weights. A single process is a run of one.

Each process, or rank, takes its rows of every global batch; gradients are averaged over the ranks. What decides how the
run continues is the same on all of them: it comes from reduced numbers or from rank 0, which alone writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from training.sharding import ShardedModel

# How long the ranks wait for rank 0 to evaluate and to save. When one of them dies torchrun ends the others.
LONGEST_WAIT = timedelta(hours=12)
T = TypeVar("T")


class Parallel:
    """The processes of a run. With one of them every method does nothing, and every value is the process's own."""

    def __init__(self, kind: str = "none", rank: int = 0, world_size: int = 1):
        """kind: "none", "ddp" or "fsdp"."""
        self.kind, self.rank, self.world_size = kind, rank, world_size
        # What the host has to know goes over gloo, so that no device is waited for.
        self.hosts: Any = None if world_size == 1 else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self.ddp: DistributedDataParallel | None = None
        self.sharded: ShardedModel | None = None

    @classmethod
    def start(cls, cfg: TrainConfig) -> Parallel:
        """Join the processes that torchrun has started; without it, a single process.

        Raises ValueError where a node has more processes than GPUs.
        """
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
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
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

    def with_model(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes with the model, on every rank; where weights are sharded the others compute along."""
        value = self.from_main(compute, together=self.sharded is not None)
        if self.sharded is not None:
            self.sharded.reshard()
        return value

    @property
    def place(self) -> tuple[int, int]:
        """(which, of how many) processes this one is."""
        return self.rank, self.world_size

    @property
    def share(self) -> tuple[int, int]:
        """(which, of how many) of what is divided among the ranks this one has; where weights are sharded all of it."""
        return self.place if self.sharded is None else (0, 1)

    def shares_with_model(self, compute: Callable[[], T]) -> list[T]:
        """What each rank computes with the model of its share, on rank 0; where weights are sharded all compute the
        same, and it is there once."""
        value = compute()
        if self.sharded is None:
            return self.gather(value)
        self.sharded.reshard()
        return [value] if self.is_main else []

    def divided(self, compute: Callable[[], list[T]]) -> list[T]:
        """The items of a list, in order and on every rank; each computes every world_size-th, with the model."""
        own = compute()
        if self.sharded is not None:
            self.sharded.reshard()
        if self.is_alone:
            return own
        shares: list[Any] = [None] * self.world_size
        dist.all_gather_object(shares, own, group=self.hosts)
        return [shares[i % self.world_size][i // self.world_size] for i in range(sum(map(len, shares)))]

    # Tensors

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """x averaged over the ranks."""
        if self.is_alone:
            return x
        x = x / self.world_size
        dist.all_reduce(x)
        return x

    # The model

    def shard(self, model: VisionLanguageModel, bfloat16: bool) -> None:
        """Under FSDP2 divide the weights among the ranks, in place; to be called before the optimizer is made.

        bfloat16: compute in it on a GPU; weights, optimizer and the sum of the gradients stay in float32.
        """
        if self.kind == "fsdp":
            from training.sharding import ShardedModel  # which takes a second to import

            self.sharded = ShardedModel(model, self.world_size, bfloat16)

    def module(self, model: nn.Module) -> nn.Module:
        """What the training step calls in place of the model; under DDP its wrapper, made at the first call."""
        if self.kind == "ddp" and self.ddp is None:
            # Checks that the same weights train on all ranks, and lets them begin with rank 0's.
            # No buffers: the only one, of the rotary embedding, is the same everywhere.
            self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        return self.ddp or model

    @property
    def on_requires_grad_change(self) -> Callable[[], None] | None:
        """To be called after requires_grad has changed; None under FSDP2, which looks at it in every step.

        Lets the next step wrap the model again: DDP waits for the gradients of all that trained when it wrapped.
        """
        return self._unwrap if self.kind == "ddp" else None

    def _unwrap(self) -> None:
        self.ddp = None

    @property
    def same_on_all(self) -> Callable[[T], T] | None:
        """Gives every rank what rank 0 holds; None where the ranks hold the same for certain."""
        return (lambda value: self.from_main(lambda: value)) if self.kind == "ddp" else None

    def accumulation(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """The context of one micro-batch's forward and backward pass: gradients are exchanged in the last one alone."""
        if self.sharded is not None:
            self.sharded.exchange_gradients(last)
        module = self.module(model)
        return (
            module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()
        )

    def complete(self, inputs: dict[str, torch.Tensor], model: VisionLanguageModel) -> dict[str, torch.Tensor]:
        """The inputs of a micro-batch; where it holds no image, with a blank one that goes into no slot.

        The ranks meet in the layers: where one has an image, all have to go through the vision tower.
        """
        if self.is_alone or "images" in inputs:
            return inputs
        ids, size = inputs["input_ids"], model.cfg.vit_img_size
        nowhere = ids.new_empty(0)
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=ids.device)
        return inputs | {"images": blank, "image_slots": nowhere, "image_sources": nowhere}

    def forget_blanks(self, model: VisionLanguageModel, images: float) -> None:
        """After the backward passes of a step with `images` images on all ranks: where it had none, nothing that sees
        images has a gradient, as in a single process."""
        if not self.is_alone and images == 0:
            for parameter in (*model.vision_encoder.parameters(), *model.MP.parameters()):
                parameter.grad = None
