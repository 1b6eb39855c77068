"""FLOPs of training in matrix products, counted from shapes and requires_grad, without asking the device.

The product of [n, i] with [i, o] takes 2 * n * i * o. A linear layer has one product in the forward pass; in the
backward pass one for the gradient of its input, if something before it trains, and one for that of its weight, if it
trains. The same holds for the two products of attention, which are counted for all pairs of positions, also those that
a mask hides. What a fused kernel or a checkpoint computes again is not counted. The head counts at label positions.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from grades.marks import is_cut
from models.vision_language_model import VisionLanguageModel
from models.vision_transformer import ViT

# Dense bfloat16 products of a card in TFLOP/s by its maker's data sheet, by words of the name that
# torch.cuda.get_device_name gives; the first that fits. Of cards without bfloat16: float16.
CARD_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150,
    "A10G": 70, "A10": 125, "A30": 165, "L40S": 362, "L40": 181, "L4": 121, "RTX 5090": 210, "RTX 4090": 165,
    "RTX 3090": 71, "RTX 6000 Ada": 364, "RTX A6000": 155, "V100": 125, "T4": 65,
}  # fmt: skip


def card_tflops(device: torch.device) -> float | None:
    """TFLOP/s of the device by its data sheet; None for a device that CARD_TFLOPS does not know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops for card, tflops in CARD_TFLOPS.items() if re.search(rf"\b{card}\b", name)), None)


@dataclass(frozen=True)
class Cost:
    """FLOPs of the forward and backward pass, per thing that a micro-batch holds."""

    vision: int  # image (or tile), in the vision tower
    window: int  # image token: all that the projector does once for it
    patch: int  # patch of an image token's window
    image_tokens: tuple[int, int]  # of one image, without pool_index: windows, and patches of each
    token: int  # position of a row, padding included
    pair: int  # pair of positions of one row
    label: int  # label position

    @property
    def image(self) -> int:
        """Image (or tile), without pool_index."""
        windows, patches = self.image_tokens
        return self.vision + windows * (self.window + patches * self.patch)

    def of(self, batch: dict) -> int:
        """FLOPs of a micro-batch of the collator: input_ids [B, T], images [N, 3, S, S] or None, num_labels.

        It may hold pool_index [M, K].
        """
        rows, length = batch["input_ids"].shape
        images = 0 if batch["images"] is None else len(batch["images"])
        cached = batch.get("cached_images", 0)  # went through the projector alone
        positions = rows * length
        windows, patches = self.image_tokens
        windows *= images
        if images and batch.get("pool_index") is not None:
            windows, patches = batch["pool_index"].shape
        return (
            (images - cached) * self.vision
            + windows * (self.window + patches * self.patch)
            + positions * self.token
            + positions * length * self.pair
            + batch["num_labels"] * self.label
        )


class FlopCounter:
    """Adds up the FLOPs of this rank's steps, and what they would have been with nothing frozen."""

    def __init__(self, model: VisionLanguageModel, rank: int = 0, world_size: int = 1):
        """model: only what never trains is frozen in it."""
        self.model, self.rank, self.world_size = model, rank, world_size
        self.parameters = list(model.parameters())
        self.flags = self._flags()
        self.cost = self.cost_unfrozen = model_cost(model)
        self.cost_forward = forward_cost(model)
        # A cache serves a vision tower that never trains without GradES too.
        self.vision_trains = any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
        self.done = self.measured = self.unfrozen = 0  # done: measured is a part of it

    def add(self, micro_batches: Iterable[dict]) -> None:
        """Count a step; to be called while requires_grad and GradES's cuts are as they were in its passes."""
        flags = self._flags()
        if flags != self.flags:
            self.flags, self.cost = flags, model_cost(self.model)
        for batch in micro_batches:
            self.done += self.cost.of(batch)
            self.unfrozen += self.cost_unfrozen.of(batch | {"cached_images": 0} if self.vision_trains else batch)

    def add_forward(self, batches: Iterable[dict]) -> None:
        """Count forward passes without a backward one, which GradES makes to measure."""
        flops = sum(self.cost_forward.of(batch) for batch in batches)
        self.done += flops
        self.measured += flops

    @property
    def trained(self) -> int:
        """Of the training steps alone, as is their time on the clock "train"."""
        return self.done - self.measured

    def _flags(self) -> bytes:
        """All on which the cost depends that may change: what trains, and whether the lookup is cut off."""
        trains = (parameter.requires_grad for parameter in self.parameters)
        return bytes([*trains, is_cut(self.model.decoder.token_embedding)])

    def state_dict(self) -> dict[str, int]:
        """What this rank has counted."""
        return {"done": self.done, "measured": self.measured, "unfrozen": self.unfrozen}

    def load_rank_states(self, states: Sequence[dict[str, int]]) -> None:
        """states: the state_dict of each rank of the saved run. With another number of ranks now, rank 0 takes sums."""
        if len(states) == self.world_size:
            states = [states[self.rank]]
        elif self.rank > 0:
            states = []
        self.done, self.unfrozen = (sum(state[name] for state in states) for name in ("done", "unfrozen"))
        self.measured = sum(state.get("measured", 0) for state in states)  # older checkpoints count it in done alone


def model_cost(model: VisionLanguageModel) -> Cost:
    """The cost with the parameters' present requires_grad, and with what GradES has cut off."""
    vision, image_grad = _vision(model.vision_encoder)
    projector, patch = _projector(model.MP, image_grad)
    cfg = model.cfg
    decoder = model.decoder
    lookup = decoder.token_embedding  # a tied one trains as the head where only its lookup is frozen
    flow = Flow(projector.grad or (_trains(lookup) and not is_cut(lookup)))
    pair = sum(_decoder_block(block, flow) for block in decoder.blocks)
    token = flow.flops
    head = Flow(flow.grad or _trains(decoder.norm)).linears(decoder.head)
    image_tokens = (cfg.image_tokens, cfg.mp_window**2)
    return Cost(vision, projector.flops, patch, image_tokens, token, pair, head.flops)


def forward_cost(model: VisionLanguageModel) -> Cost:
    """The cost of a forward pass alone, under torch.no_grad."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    cost = model_cost(model)
    for parameter in training:
        parameter.requires_grad_(True)
    return cost


def _vision(vit: ViT) -> tuple[int, bool]:
    """(FLOPs per image, whether the features need a gradient)."""
    embedding = vit.patch_embedding
    patches = vit.cfg.vit_grid**2
    positions = embedding.position_embedding.shape[1]  # the class token's too
    flow = Flow(False)  # pixels need no gradient
    flow.multiply(embedding.conv)
    embedded, flow.flops = patches * flow.flops, 0
    flow.grad = _trains(embedding) or _trains(vit.first_norm)
    pair = 0
    block: Any
    for block in vit.blocks:
        inside = flow.branch(block.ln1).linears(block.attn.qkv_proj)
        pair += _attention(block.attn.out_proj.in_features, inside.grad, inside.grad, inside.grad)
        flow.join(inside.linears(block.attn.out_proj))
        flow.join(flow.branch(block.ln2).linears(block.mlp.fc1, block.mlp.fc2))
    return embedded + positions * flow.flops + positions**2 * pair, flow.grad or _trains(vit.layer_norm)


def _projector(projector: Any, grad: bool) -> tuple["Flow", int]:
    """(what leaves the projector, with the FLOPs per image token; FLOPs per patch of a window)."""
    if projector.kind == "mlp":
        return Flow(grad).linears(projector.fc1, projector.fc2), 0
    if projector.kind != "molmo":
        return Flow(grad).linears(projector.proj), 0
    pooling = projector.pooling
    q, k, v = (Flow(grad).linears(linear) for linear in (pooling.q_proj, pooling.k_proj, pooling.v_proj))
    patch = k.flops + v.flops + _attention(pooling.out_proj.in_features, q.grad, k.grad, v.grad)
    pooled = Flow(q.grad or k.grad or v.grad, q.flops).linears(pooling.out_proj)
    gate, up = (Flow(pooled.grad).linears(linear) for linear in (projector.gate_proj, projector.up_proj))
    inside = Flow(gate.grad or up.grad, pooled.flops + gate.flops + up.flops)
    return inside.linears(projector.down_proj), patch


def _decoder_block(block: Any, flow: "Flow") -> int:
    """Take the flow through the block; returns the FLOPs per pair of positions."""
    attn, mlp = block.attn, block.mlp
    q, k, v = (flow.branch(block.norm1).linears(linear) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    q.grad, k.grad = q.grad or _trains(attn.q_norm), k.grad or _trains(attn.k_norm)
    inside = Flow(q.grad or k.grad or v.grad, q.flops + k.flops + v.flops)
    flow.join(inside.linears(attn.out_proj))
    gate, up = (flow.branch(block.norm2).linears(linear) for linear in (mlp.gate_proj, mlp.up_proj))
    flow.join(Flow(gate.grad or up.grad, gate.flops + up.flops).linears(mlp.down_proj))
    return _attention(attn.out_proj.in_features, q.grad, k.grad, v.grad)


def _attention(width: int, q_grad: bool, k_grad: bool, v_grad: bool) -> int:
    """FLOPs per pair of positions of queries times keys and scores times values; width: of all heads together."""
    scores_grad = q_grad or k_grad
    return 2 * width * ((1 + q_grad + k_grad) + (1 + scores_grad + v_grad))


@dataclass
class Flow:
    """What passes through the model: whether it needs a gradient at this point, and the FLOPs per position so far."""

    grad: bool
    flops: int = 0

    def branch(self, norm: nn.Module) -> "Flow":
        """What leaves the residual stream through its norm."""
        return Flow(self.grad or _trains(norm))

    def join(self, branch: "Flow") -> None:
        """Add a branch to the residual stream."""
        self.grad = self.grad or branch.grad
        self.flops += branch.flops

    def multiply(self, linear: Any) -> None:
        """Through one linear layer, or a convolution that is computed as one."""
        self.flops += 2 * linear.weight.numel() * (1 + self.grad + linear.weight.requires_grad)
        self.grad = self.grad or _trains(linear)

    def linears(self, *linears: Any) -> "Flow":
        """Through linear layers one after the other, each with its LoRA adapters (A, then B) beside it."""
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
