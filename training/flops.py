"""FLOPs of training in matrix products, from shapes and requires_grad alone: the device is not asked.

The product of [n, i] with [i, o] is 2 * n * i * o. Each linear has one in the forward pass, and in the backward pass
one for the gradient of its input, where something before it trains, and one for its weight, where that trains. The
two products of attention likewise, over all pairs of positions, those that a causal mask hides included; what a fused
kernel computes a second time is not counted. The head is counted at label positions only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn as nn


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward by what they grow with."""

    image: int
    token: int  # a position of a row, padding included
    pair: int  # a pair of positions of one row
    label: int

    def of(self, batch: dict) -> int:
        """FLOPs of a micro-batch as the collator makes it."""
        rows, length = batch["input_ids"].shape
        images = 0 if batch["images"] is None else len(batch["images"])
        positions = rows * length
        return (
            images * self.image
            + positions * self.token
            + positions * length * self.pair
            + batch["num_labels"] * self.label
        )


class FlopCounter:
    """Adds up what a run's steps cost, and what they would have cost with nothing frozen."""

    def __init__(self, model: nn.Module):
        """model: a VisionLanguageModel with all frozen that never trains, and nothing else frozen yet."""
        self.model = model
        self.parameters = list(model.parameters())
        self.flags = self._flags()
        self.cost = self.cost_unfrozen = model_cost(model)
        self.done = self.unfrozen = 0

    def add(self, micro_batches: Iterable[dict]) -> None:
        """Count a step, with requires_grad as it was in it: a freeze that it brings about lowers the next one."""
        flags = self._flags()
        if flags != self.flags:
            self.flags, self.cost = flags, model_cost(self.model)
        for batch in micro_batches:
            self.done += self.cost.of(batch)
            self.unfrozen += self.cost_unfrozen.of(batch)

    def _flags(self) -> bytes:
        return bytes(parameter.requires_grad for parameter in self.parameters)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done, "unfrozen": self.unfrozen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done, self.unfrozen = state["done"], state["unfrozen"]


def model_cost(model: nn.Module) -> Cost:
    """The cost of a VisionLanguageModel as its parameters' requires_grad now stand."""
    image, image_grad = _vision(model.vision_encoder)
    factor = model.MP.factor**2
    patches = model.vision_encoder.cfg.vit_grid**2
    projector = Flow(image_grad).linears(model.MP.proj)
    image += patches // factor * projector.flops

    decoder = model.decoder
    flow = Flow(projector.grad or _trains(decoder.token_embedding))
    pair = sum(_decoder_block(block, flow) for block in decoder.blocks)
    token = flow.flops
    head = Flow(flow.grad or _trains(decoder.norm)).linears(decoder.head)
    return Cost(image, token, pair, head.flops)


def _vision(vit: nn.Module) -> tuple[int, bool]:
    """(FLOPs an image, whether the features need a gradient)."""
    embedding = vit.patch_embedding
    patches = vit.cfg.vit_grid**2
    flow = Flow(False)  # pixels need no gradient
    flow.multiply(embedding.conv)
    flow.grad = _trains(embedding)
    pair = 0
    for block in vit.blocks:
        inside = flow.branch(block.ln1).linears(block.attn.qkv_proj)
        pair += _attention(block.attn.out_proj.in_features, inside.grad, inside.grad, inside.grad)
        flow.join(inside.linears(block.attn.out_proj))
        flow.join(flow.branch(block.ln2).linears(block.mlp.fc1, block.mlp.fc2))
    return patches * flow.flops + patches**2 * pair, flow.grad or _trains(vit.layer_norm)


def _decoder_block(block: nn.Module, flow: "Flow") -> int:
    """Take the flow through the block; returns the FLOPs a pair of positions."""
    attn, mlp = block.attn, block.mlp
    q, k, v = (flow.branch(block.norm1).linears(linear) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    inside = Flow(q.grad or k.grad or v.grad, q.flops + k.flops + v.flops)
    flow.join(inside.linears(attn.out_proj))
    gate, up = (flow.branch(block.norm2).linears(linear) for linear in (mlp.gate_proj, mlp.up_proj))
    flow.join(Flow(gate.grad or up.grad, gate.flops + up.flops).linears(mlp.down_proj))
    return _attention(attn.out_proj.in_features, q.grad, k.grad, v.grad)


def _attention(width: int, q_grad: bool, k_grad: bool, v_grad: bool) -> int:
    """FLOPs a pair of positions of queries times keys and weights times values; width: of all heads together."""
    weights_grad = q_grad or k_grad
    return 2 * width * ((1 + q_grad + k_grad) + (1 + weights_grad + v_grad))


@dataclass
class Flow:
    """What goes through the model: whether what it carries needs a gradient, and the FLOPs a position so far."""

    grad: bool
    flops: int = 0

    def branch(self, norm: nn.Module) -> "Flow":
        """What leaves the residual stream through its norm."""
        return Flow(self.grad or _trains(norm))

    def join(self, branch: "Flow") -> None:
        """What a branch gives back to the residual stream."""
        self.grad = self.grad or branch.grad
        self.flops += branch.flops

    def multiply(self, linear: nn.Module) -> None:
        """Through one linear (or what is computed as one)."""
        self.flops += 2 * linear.weight.numel() * (1 + self.grad + linear.weight.requires_grad)
        self.grad = self.grad or _trains(linear)

    def linears(self, *linears: nn.Module) -> "Flow":
        """Through linears one after the other, each with its LoRA adapters (A, then B, beside it)."""
        for linear in linears:
            adapted = [Flow(self.grad) for _ in getattr(linear, "lora_A", {})]
            for adapter, name in zip(adapted, getattr(linear, "lora_A", {}), strict=True):
                adapter.multiply(linear.lora_A[name])
                adapter.multiply(linear.lora_B[name])
            self.multiply(getattr(linear, "base_layer", linear))
            for adapter in adapted:
                self.join(adapter)
        return self


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
