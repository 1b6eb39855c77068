"""From vision features to image tokens, by mp_type.

- pixel_shuffle (nanoVLM): s x s patches side by side, then one linear layer without bias.
- linear: one linear layer for each patch. mlp: two, with a GELU between.
- molmo: attention over a window of patches whose query is their mean, then a SwiGLU MLP (Molmo, arXiv:2409.17146).

Shapes: N images, T patches of an image, C channels of a patch, M image tokens, K patches of a window.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.attention import attention
from models.config import VLMConfig


class AttentionPooling(nn.Module):
    """Windows [M, K, C] -> [M, vit_hidden_dim]; the mean of a window asks its patches, with the heads of the ViT."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.n_heads, width = cfg.vit_n_heads, cfg.vit_hidden_dim
        self.q_proj = nn.Linear(cfg.vit_feature_dim, width)
        self.k_proj = nn.Linear(cfg.vit_feature_dim, width)
        self.v_proj = nn.Linear(cfg.vit_feature_dim, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, windows: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """present: bool [M, K], of patches that are there; the others are zeros. None: all are."""
        q = self.q_proj(window_mean(windows, present))[:, None]  # [M, 1, width]
        projected = (q, self.k_proj(windows), self.v_proj(windows))
        q, k, v = (x.view(*x.shape[:2], self.n_heads, -1).transpose(1, 2) for x in projected)  # [M, H, 1 or K, D]
        mask = None
        if present is not None:  # a window of nothing sees its zeros: without a key attention would give NaN
            mask = (present | ~present.any(dim=1, keepdim=True))[:, None, None]
        return self.out_proj(attention(q, k, v, mask, causal=False, dropout=0.0).transpose(1, 2).flatten(1))


class ModalityProjector(nn.Module):
    """Features [N, T, C] on a square grid -> image embeddings [N, tokens of an image, lm_hidden_dim].

    With pool_index, int [M, K], -> [M, lm_hidden_dim]: it names for each image token the flat rows in N * T of the
    patches of its window, -1 for none. pixel_shuffle takes windows of s * s patches in rows, linear and mlp the mean
    of a window.
    """

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.kind, self.side, self.hidden_dim = cfg.mp_type, cfg.mp_window, cfg.lm_hidden_dim
        C, inner, out = cfg.vit_feature_dim, cfg.connector_dim, cfg.lm_hidden_dim
        if self.kind == "pixel_shuffle":
            self.proj = nn.Linear(C * self.side**2, out, bias=False)
        elif self.kind == "linear":
            self.proj = nn.Linear(C, out)
        elif self.kind == "mlp":
            self.fc1, self.fc2 = nn.Linear(C, inner), nn.Linear(inner, out)
        else:
            self.pooling = AttentionPooling(cfg)
            self.gate_proj = nn.Linear(cfg.vit_hidden_dim, inner, bias=False)
            self.up_proj = nn.Linear(cfg.vit_hidden_dim, inner, bias=False)
            self.down_proj = nn.Linear(inner, out, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fan-in initialisation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h * w, C] -> [B, h/s * w/s, s * s * C], rows before columns. ValueError where s does not divide h = w."""
        B, T, C = x.shape
        side, s = int(T**0.5), self.side
        if side * side != T or side % s:
            raise ValueError(f"{T} patches do not form a square grid whose side divides by {s}")
        x = x.view(B, side // s, s, side // s, s, C).transpose(2, 3)  # [B, h/s, w/s, s, s, C]
        return x.reshape(B, (side // s) ** 2, s * s * C)

    def forward(self, x: torch.Tensor, pool_index: torch.Tensor | None = None) -> torch.Tensor:
        if pool_index is None and self.kind != "molmo":
            return self.project(self.pixel_shuffle(x) if self.kind == "pixel_shuffle" else x)
        images, patches, _ = x.shape
        plain = pool_index is None
        if pool_index is None:
            pool_index = grid_windows(images, int(patches**0.5), self.side, x.device)
        # Where the windows divide the plain grid, no patch is missing: no mask, which the fastest kernels do not take.
        present = None if plain and int(patches**0.5) % self.side == 0 else pool_index >= 0
        windows = x.flatten(0, 1)[pool_index.clamp(min=0)]  # [M, K, C]
        if present is not None:
            windows = windows * present[..., None]
        if self.kind == "molmo":
            pooled = self.pooling(windows, present)
        else:
            pooled = windows.flatten(1) if self.kind == "pixel_shuffle" else window_mean(windows, present)
        embeddings = self.project(pooled)
        return embeddings.view(images, -1, self.hidden_dim) if plain else embeddings

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C of an image token] -> [..., lm_hidden_dim]."""
        if self.kind == "mlp":
            return self.fc2(F.gelu(self.fc1(x)))
        if self.kind == "molmo":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.proj(x)


def window_mean(windows: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """[M, K, C] with zeros for patches that are not present, bool [M, K] -> the mean of those that are [M, C]."""
    if present is None:
        return windows.mean(dim=1)
    return windows.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1).to(windows.dtype)


def grid_windows(images: int, grid: int, side: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """pool_index of windows of side x side patches on each image's plain grid, in rows: int64 [M, side * side].

    Where side does not divide the grid, the windows reach beyond its edges, as Molmo's: half of what is missing,
    rounded down, before the first row and column, the rest behind the last.
    """
    missing = -grid % side
    before, behind = missing // 2, missing - missing // 2
    rows = torch.arange(grid**2, device=device).view(grid, grid)
    rows = F.pad(rows, (before, behind, before, behind), value=-1)
    count = len(rows) // side
    windows = rows.view(count, side, count, side).transpose(1, 2).reshape(1, -1, side**2)
    first = torch.arange(images, device=device).view(-1, 1, 1) * grid**2
    return torch.where(windows >= 0, windows + first, -1).flatten(0, 1)
