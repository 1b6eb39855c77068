"""What autograd keeps from the forward to the backward pass, counted on the meta device, where nothing takes memory."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from models.vision_language_model import VisionLanguageModel


class FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: q, k, v, bias, result and one float32 per query. Forward alone."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = torch.empty_like(q)
        bias = None if mask is None else mask.to(q.dtype)  # what SDPA makes of it for its kernels
        ctx.save_for_backward(q, k, v, bias, y, torch.empty(q.shape[:-1], device=q.device))
        return y


class FusedKernels(TorchFunctionMode):
    """Within this context SDPA is a fused kernel. By itself the meta device would save the scores of all pairs."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args, kwargs.get("attn_mask"))
        return func(*args, **kwargs)


def saved_bytes(forward: Callable[[], object], but: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd saves in forward, on the meta device: each storage once, those of the tensors `but` never."""
    saved: set[torch.UntypedStorage] = set()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor), FusedKernels():
        forward()
    return sum(storage.nbytes() for storage in saved - {tensor.untyped_storage() for tensor in but})


def activation_bytes(model: VisionLanguageModel, batch: dict, bfloat16: bool, sharded: bool) -> int:
    """Bytes that a forward pass of the micro-batch keeps for the backward pass, the batch itself not counted.

    model: on the meta device; becomes bfloat16 where matrix products are, as autocast does not
    know that device. The copies of the weights that autocast makes count, but for FSDP (sharded), which frees them.
    With activation checkpointing the largest block counts besides, which is computed again when nearly all is kept.
    """
    inputs = {name: tensor for name, tensor in batch.items() if torch.is_tensor(tensor)}
    if bfloat16:
        model.bfloat16()
        inputs["images"] = inputs["images"].bfloat16()
    first = [model.vision_encoder.blocks[0], model.decoder.blocks[0]]  # the others of a tower are alike
    block_inputs: dict[nn.Module, tuple] = {}
    for block in first:
        block.register_forward_pre_hook(lambda block, args: block_inputs.update({block: args}))
    weights = [] if bfloat16 and not sharded else list(model.parameters())
    kept = saved_bytes(lambda: model(**inputs), [*inputs.values(), *weights])
    if "forward" not in vars(first[0]):  # setup.apply_to_model gives it one that checkpoints
        return kept
    again = []
    for block in first:
        args = block_inputs[block]
        forward = functools.partial(type(block).forward, block, *args)
        again.append(saved_bytes(forward, [*filter(torch.is_tensor, args), *model.parameters()]))
    return kept + max(again)
