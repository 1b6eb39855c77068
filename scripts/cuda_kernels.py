"""Kernels and bytes of a pass on one GPU, counted on the meta device; and SDPA's kernel for fake CUDA tensors.

For count_cuda.py. Eager: a kernel for each operator that is no view. Attention and norms are the fused ones that CUDA
has; the copies of weights that autocast makes are counted, the optimizer is not.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import attention
from models.vision_language_model import VisionLanguageModel
from training.activations import FusedAttention

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
NO_KERNEL = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}


def _bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.nbytes
    return sum(map(_bytes, values)) if isinstance(values, list | tuple) else 0


class Counter(TorchDispatchMode):
    """Within this context operators count: as kernels, and what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.product_bytes = self.other_bytes = 0

    def add(self, kernels: int, size: int) -> None:
        self.kernels += kernels
        self.other_bytes += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in NO_KERNEL:
            return result
        self.kernels += 1
        size = _bytes(args) + _bytes(result)
        if func.overloadpacket in PRODUCTS:
            self.product_bytes += size
        else:
            self.other_bytes += size
        return result


class Attention(FusedAttention):
    """Flash attention: one kernel forward, three backward."""

    counter: Counter

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = FusedAttention.forward(ctx, q, k, v, mask)
        Attention.counter.add(1, _bytes([q, k, v, y]))
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        q, k, v, _, y, _ = ctx.saved_tensors
        Attention.counter.add(3, 2 * _bytes([q, k, v, y]) + _bytes(grad))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Norm(torch.autograd.Function):
    """RMSNorm: one kernel forward, two backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        Attention.counter.add(1, 2 * x.nbytes)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        Attention.counter.add(2, 5 * x.nbytes)  # x and the gradient twice, what it becomes once
        return torch.empty_like(x), torch.empty_like(weight)


class CudaKernels(TorchFunctionMode):
    """Within this context attention and RMSNorm are the fused kernels of CUDA, which the meta device does not have."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return Attention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        if func is F.rms_norm:
            return Norm.apply(args[0], (kwargs or {})["weight"])
        return func(*args, **(kwargs or {}))


def count_kernels(model: VisionLanguageModel, batch: dict, fused: bool = False) -> Counter:
    """Of the forward and backward pass of a micro-batch in bfloat16.

    model, batch: on the meta device; the model becomes bfloat16. fused: q, k, v are one product, and gate, up, of
    weights that stay apart as parameters.
    """
    model.bfloat16()
    if fused:
        for block in model.decoder.blocks:
            _fuse(block)
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    pixels, inputs["images"] = inputs["images"].numel(), inputs["images"].bfloat16()
    Attention.counter = counter = Counter()
    counter.add(4, (1 + 4 + 8 + 8 + 4 + 2) * pixels)  # uint8 to float32, scaled, shifted, to bfloat16
    with counter, CudaKernels():
        loss = model(**inputs)
    with counter:
        loss.backward()
    for parameter in model.parameters():  # autocast: a bfloat16 copy forward, its gradient in float32 backward
        counter.add(2, 2 * (4 + 2) * parameter.numel())
    return counter


def _fuse(block: Any) -> None:
    attn, mlp = block.attn, block.mlp

    def joined(x: torch.Tensor, *linears: Any) -> tuple[torch.Tensor, ...]:
        weights = [linear.weight for linear in linears]
        return F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)

    def once(linears: tuple) -> Iterator[Callable]:
        """In place of each linear layer: the first makes the product of all."""
        made: list[torch.Tensor] = []

        def part(index: int, x: torch.Tensor) -> torch.Tensor:
            if index == 0:
                made[:] = joined(x, *linears)
            return made[index]

        return (functools.partial(part, index) for index in range(len(linears)))

    for module, names in ((attn, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
        linears = tuple(getattr(module, name) for name in names)
        for linear, call in zip(linears, once(linears), strict=True):
            linear.forward = call


def kernel_choices() -> Iterator[tuple[str, str, str, str, str]]:
    """(case, heads of queries and keys, mask, dtype, kernel) for every case of the project on CUDA."""
    cases = {
        "vision tower": (12, 12, False, False),
        "language model, padded on the right": (9, 3, False, True),
        "language model, padded on the left, or packed without FlexAttention": (9, 3, True, False),
    }
    for case, (heads, groups, masked, causal) in cases.items():
        for dtype in (torch.bfloat16, torch.float32):
            asked = _asked(heads, groups, masked, causal, dtype)
            counts = f"{asked[0].shape[1]}, {asked[1].shape[1]}"
            yield case, counts, "yes" if masked else "no", str(dtype).removeprefix("torch."), sdpa_kernel(*asked)


def _asked(heads: int, groups: int, masked: bool, causal: bool, dtype: torch.dtype) -> tuple:
    """(q, k, mask) that `attention` hands to SDPA on CUDA; fake tensors, so that no GPU is needed."""
    found: list = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
            if func is F.scaled_dot_product_attention:
                found.extend((args[0], args[1], (kwargs or {})["attn_mask"]))
                return args[0]
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Listener(), torch.device("cuda"):
        q, k = torch.empty(2, heads, 128, 64, dtype=dtype), torch.empty(2, groups, 128, 64, dtype=dtype)
        attention(q, k, k, torch.ones(2, 1, 128, 128, dtype=torch.bool) if masked else None, causal, 0.0)
    return tuple(found)


def sdpa_kernel(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The first of SDPA's kernels on CUDA, cuDNN's off, that takes these: by PyTorch's sources, 2.11 to 2.15.

    Flash attention takes neither a mask nor float32, the memory-efficient kernel no unequal heads.
    """
    if mask is None and q.dtype != torch.float32:
        return "flash"
    return "memory-efficient" if q.shape[1] == k.shape[1] else "MATH"
