"""From vision features to image tokens: pixel shuffle, then one linear layer without bias."""

import torch
import torch.nn as nn

from models.config import VLMConfig


class ModalityProjector(nn.Module):
    """Features [B, T, C] on a square grid -> image embeddings [B, T / s^2, lm_hidden_dim], each of s x s patches."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.factor = cfg.mp_pixel_shuffle_factor
        self.proj = nn.Linear(cfg.vit_hidden_dim * self.factor**2, cfg.lm_hidden_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fan-in initialisation."""
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """[B, h * w, C] -> [B, h/s * w/s, s * s * C], rows before columns. ValueError where s does not divide h = w."""
        B, T, C = x.shape
        side, s = int(T**0.5), self.factor
        if side * side != T or side % s:
            raise ValueError(f"{T} patches do not form a square grid whose side divides by {s}")
        x = x.view(B, side // s, s, side // s, s, C).transpose(2, 3)  # [B, h/s, w/s, s, s, C]
        return x.reshape(B, (side // s) ** 2, s * s * C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pixel_shuffle(x))
