"""Scaled dot-product attention for both towers.

Shapes: B rows, H query heads, G key/value heads (G divides H), T queries, S keys, D head size.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
import torch.nn.functional as F

if TYPE_CHECKING:  # takes seconds to import
    from torch.nn.attention.flex_attention import BlockMask

# bool, broadcasts to [B, 1, T, S], True where a key is seen; or what block_mask makes; None: no mask.
Mask: TypeAlias = Union[torch.Tensor, "BlockMask", None]

# Longest sequence for which plain_attention is used: its scores take T * S memory, those of SDPA's kernels do not.
MAX_PLAIN_LENGTH = 512
# SDPA's kernels for CUDA take no more rows (pytorch issue 142228), and Molmo's pooling has a row for each window.
MAX_ROWS = 65535
# FlexAttention skips whole blocks of this many queries and keys where a document ends.
FLEX_BLOCK = 128


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products of x, which is also that of the residual stream."""
    device = x.device.type
    if device == "meta":  # which autocast does not know
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, causal: bool, dropout: float
) -> torch.Tensor:
    """q [B, H, T, D], k and v [B, G, S, D] -> [B, H, T, D]. causal: only without a mask. dropout: of the weights."""
    if mask is not None and not isinstance(mask, torch.Tensor):
        # Not compiled, it would store the scores of all pairs of positions. A compiled block compiles it along.
        within_documents = attend_flex if torch.compiler.is_compiling() else compiled_attend_flex()
        return within_documents(q, k, v, mask)
    if len(q) > MAX_ROWS:
        if mask is not None:
            mask = mask.expand(len(q), -1, -1, -1)
        parts = [slice(start, start + MAX_ROWS) for start in range(0, len(q), MAX_ROWS)]
        masks = [None if mask is None else mask[part] for part in parts]
        found = [attention(q[p], k[p], v[p], m, causal, dropout) for p, m in zip(parts, masks, strict=True)]
        return torch.cat(found)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and dropout == 0 and k.shape[2] <= MAX_PLAIN_LENGTH:
        return plain_attention(q, k, v, mask, causal)
    if expands_heads(q, k, mask):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=gqa)


def expands_heads(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether keys and values are repeated for the query heads that share them, as SDPA cannot do it cheaply.

    On CUDA only the flash kernel takes grouped heads, and it takes neither a mask nor float32: all else would fall back
    to the MATH kernel, which keeps the scores of all pairs (pytorch issue 181528). Repeated, they go to the
    memory-efficient kernel.
    """
    return q.device.type == "cuda" and q.shape[1] != k.shape[1] and (mask is not None or q.dtype == torch.float32)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """`attention` as two matrix products: in bfloat16 on a CPU 1.2 to 10 times as fast as SDPA, forward and backward.

    The query heads that share a key/value head are rows of one product, so that keys and values are not repeated.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    scores = (q * D**-0.5).reshape(B, G, H // G * T, D) @ k.transpose(-1, -2)
    scores = scores.view(B, H, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).view(B, G, H // G * T, S)
    return (weights @ v).view(B, H, T, D)


def takes_flex_attention(device: torch.device, length: int, head_dim: int, dropout: float) -> bool:
    """Whether FlexAttention can be used within documents: only on CUDA, with a compiler, where it suits."""
    return device.type == "cuda" and suits_flex_attention(length, head_dim, dropout) and has_compiler()


def suits_flex_attention(length: int, head_dim: int, dropout: float) -> bool:
    """Whether FlexAttention knows such attention: lengths in whole blocks, heads of 16, 32, 64, ..., no dropout."""
    return length % FLEX_BLOCK == 0 and head_dim >= 16 and head_dim & (head_dim - 1) == 0 and dropout == 0


@functools.cache
def has_compiler() -> bool:
    """Whether kernels can be compiled for CUDA: Triton, and a C compiler and Python.h for what launches them."""
    from torch.utils._triton import has_triton

    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return headers and has_triton() and any(map(shutil.which, compilers))


def block_mask(document_ids: torch.Tensor | None, branch_ids: torch.Tensor | None = None) -> BlockMask:
    """FlexAttention's mask of what attention_mask_4d describes, of which one is given. Made once per forward pass."""
    from torch.nn.attention.flex_attention import create_block_mask

    def is_seen(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query
        if document_ids is not None:
            seen = seen & (document_ids[row, query] == document_ids[row, key])
        if branch_ids is not None:
            seen = seen & ((branch_ids[row, key] == 0) | (branch_ids[row, query] == branch_ids[row, key]))
        return seen

    given = document_ids if document_ids is not None else branch_ids
    assert given is not None
    B, T = given.shape
    return create_block_mask(is_seen, B, None, T, T, device=given.device, BLOCK_SIZE=FLEX_BLOCK)


def attend_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """q [B, H, T, D], k and v [B, G, T, D] -> [B, H, T, D], within documents."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compiled_attend_flex() -> Callable[..., torch.Tensor]:
    """attend_flex, compiled once per process."""
    return torch.compile(attend_flex)
