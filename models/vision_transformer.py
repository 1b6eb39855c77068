"""The vision tower: the ViT of SigLIP (tanh gelu, last LayerNorm) or CLIP (class token, first LayerNorm, quick gelu).

Shapes: B images, T patches, C width, H heads, D = C / H.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.attention import attention
from models.backbones import configure_vision
from models.buckets import bucket, sized_alike
from models.config import SCRATCH, VLMConfig
from models.hub import WEIGHT_FILES
from models.norms import LayerNorm
from models.tensors import copy_tensors, named_parameters, stored_tensors


class ViTPatchEmbeddings(nn.Module):
    """Pixels [B, 3, S, S] -> patch embeddings with their positions added [B, T, C]; CLIP's class token is the first.

    uint8 pixels are normalised here, on the device: a quarter of the bytes is handed over. Others already are.
    """

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.scaling, self.patch_size, C = cfg.pixel_scaling(), cfg.vit_patch_size, cfg.vit_hidden_dim
        self.has_class_token = cfg.vit_architecture == "clip"
        self.conv = nn.Conv2d(3, C, self.patch_size, stride=self.patch_size, bias=not self.has_class_token)
        self.position_embedding = nn.Parameter(torch.zeros(1, cfg.vit_grid**2 + self.has_class_token, C))
        if self.has_class_token:
            self.class_embedding = nn.Parameter(torch.zeros(C))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # The patches do not overlap, so the convolution is one matrix product over flattened patches, which is
        # several times faster on a CPU than the strided convolution and the same on a GPU.
        patches = F.pixel_unshuffle(images, self.patch_size)  # [B, 3 * P * P, S/P, S/P]
        patches = patches.flatten(2).transpose(1, 2)  # [B, T, 3 * P * P]
        if images.dtype == torch.uint8:
            patches = patches.to(torch.float32)
            for color, (scale, shift) in zip(patches.chunk(len(self.scaling), dim=-1), self.scaling, strict=True):
                color.mul_(scale).sub_(shift)
            patches = patches.to(self.conv.weight.dtype)  # of a model cast to half precision
        x = F.linear(patches, self.conv.weight.flatten(1), self.conv.bias)
        if self.has_class_token:
            x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.to(x.dtype)


class ViTMultiHeadAttention(nn.Module):
    """[B, T, C] -> [B, T, C]; every patch attends to every other."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.n_heads = cfg.vit_n_heads
        self.dropout = cfg.vit_dropout
        self.qkv_proj = nn.Linear(cfg.vit_hidden_dim, 3 * cfg.vit_hidden_dim)
        self.out_proj = nn.Linear(cfg.vit_hidden_dim, cfg.vit_hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        y = attention(q, k, v, mask=None, causal=False, dropout=self.dropout if self.training else 0.0)
        y = self.out_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution's integral up to x, approximated by tanh."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """The same, approximated by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


class ViTMLP(nn.Module):
    """[B, T, C] -> [B, T, C] through vit_inter_dim and a GELU: by tanh, or CLIP's quick one."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.dropout = cfg.vit_dropout
        self.activation = quick_gelu if cfg.vit_architecture == "clip" else tanh_gelu
        self.fc1 = nn.Linear(cfg.vit_hidden_dim, cfg.vit_inter_dim)
        self.fc2 = nn.Linear(cfg.vit_inter_dim, cfg.vit_hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc2(self.activation(self.fc1(x)))
        return F.dropout(x, self.dropout, self.training)


class ViTBlock(nn.Module):
    """[B, T, C] -> [B, T, C]: attention, then MLP, each behind a LayerNorm and with a residual connection."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.ln1 = LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.attn = ViTMultiHeadAttention(cfg)
        self.ln2 = LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.mlp = ViTMLP(cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


def sincos_positions(cfg: VLMConfig) -> torch.Tensor:
    """[1, T, C]: sine and cosine of row and column at C / 4 wavelengths each, as in MoCo v3."""
    quarter = cfg.vit_hidden_dim // 4
    frequencies = 10_000 ** (-torch.arange(quarter) / max(1, quarter))
    angles = torch.arange(cfg.vit_grid)[:, None] * frequencies  # [side, C / 4]
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = line[:, None].expand(-1, cfg.vit_grid, -1)
    table = torch.cat((rows, rows.transpose(0, 1)), dim=-1).flatten(0, 1)
    positions = torch.zeros(1, cfg.vit_grid**2, cfg.vit_hidden_dim)  # the columns beyond 4 * (C // 4) stay zero
    positions[0, :, : table.shape[1]] = table
    return positions


class ViT(nn.Module):
    """Images [B, 3, S, S], uint8, or float and already normalised -> features of the T patches [B, T, C].

    With vit_feature_layers the features are the outputs of those blocks, side by side: [B, T, layers * C].
    """

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = ViTPatchEmbeddings(cfg)
        self.features, is_clip = cfg.vit_feature_blocks, cfg.vit_architecture == "clip"
        self.first_norm = LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps) if is_clip else nn.Identity()
        built = max(self.features) + 1 if self.features else cfg.vit_n_blocks
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(built))
        # CLIP's last norm sees the class token alone, for what compares it with a text.
        no_norm = is_clip or bool(self.features)
        self.layer_norm = nn.Identity() if no_norm else LayerNorm(cfg.vit_hidden_dim, eps=cfg.vit_ln_eps)
        self.most_images: int | None = None  # with a number, training pads images to a bucket, at most to this one
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in initialisation, sine and cosine positions, and attention that starts near what trained ones become.

        Mimetic initialisation (Trockman and Kolter, arXiv:2305.09828): keys equal to queries make each patch attend
        to similar ones (W_q^T W_k near the identity), and an output projection of minus 0.4 times the transposed
        values makes the block subtract what it has seen. From scratch on small data this halves the steps until the
        model begins to recognise shapes.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, ViTBlock)
            query, key, value = block.attn.qkv_proj.weight.chunk(3)
            key.copy_(query)
            block.attn.out_proj.weight.copy_(-0.4 * value.T)
            block.mlp.fc2.weight.mul_(0.5)
        positions = self.patch_embedding.position_embedding
        positions[:, -(self.cfg.vit_grid**2) :] = sincos_positions(self.cfg)  # the class token has none

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        count, in_buckets = len(images), self.training and self.most_images is not None
        if in_buckets and (padding := bucket(count, self.most_images) - count):
            images = torch.cat((images, images.new_zeros(padding, *images.shape[1:])))
        x = self.patch_embedding(images)
        x = self.first_norm(F.dropout(x, self.cfg.vit_dropout, self.training))
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(sized_alike(x) if in_buckets else x)
            if index in self.features:
                outputs[index] = x
        x = torch.cat([outputs[layer] for layer in self.features], dim=-1) if self.features else x
        # Contiguous, as features that were kept are: the projector's gradient is then the same to the last bit.
        return self.layer_norm(x[:count, 1:] if self.patch_embedding.has_class_token else x[:count]).contiguous()

    @classmethod
    def from_pretrained(cls, cfg: VLMConfig) -> "ViT":
        """The SigLIP, SigLIP2 or CLIP model cfg.vit_model_type: a hub id or a local folder; `scratch`: random weights.

        It may be a vision tower alone or a full model, whose text tower and pooling head are ignored. Sets cfg's vit_*
        sizes to the model's. Raises ValueError for another architecture and for tensors that do not fit,
        BackboneUnavailable without folder and hub.
        """
        if cfg.vit_model_type == SCRATCH:
            return cls(cfg)
        stored = stored_tensors(configure_vision(cfg, WEIGHT_FILES))
        if any(key.startswith("vision_model.") for key in stored):
            stored = {key: tensor for key, tensor in stored.items() if key.startswith("vision_model.")}
        stored = {key.removeprefix("vision_model."): tensor for key, tensor in stored.items()}
        # Old files hold position_ids, a constant.
        vit = cls(cfg)
        ignored = ["head.", "embeddings.position_ids"]
        ignored += [f"encoder.layers.{layer}." for layer in range(len(vit.blocks), cfg.vit_n_blocks)]
        ignored += ["post_layernorm."] if isinstance(vit.layer_norm, nn.Identity) else []
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith(tuple(ignored))}
        copy_tensors(f"--vit_model_type {cfg.vit_model_type}", stored, vit.siglip_tensors())
        return vit

    def siglip_tensors(self) -> dict[str, torch.Tensor]:
        """SigLIP's (and CLIP's) tensor names -> our tensors, or the part of one that a name fills."""
        embedding = self.patch_embedding
        found = {
            **named_parameters("embeddings.patch_embedding", embedding.conv),
            "embeddings.position_embedding.weight": embedding.position_embedding[0],
            **named_parameters("pre_layrnorm", self.first_norm),  # CLIP alone, spelled like this
            **named_parameters("post_layernorm", self.layer_norm),
        }
        if embedding.has_class_token:
            found["embeddings.class_embedding"] = embedding.class_embedding
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ViTBlock)
            layer, qkv = f"encoder.layers.{i}", block.attn.qkv_proj
            for letter, weight, bias in zip("qkv", qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
                found[f"{layer}.self_attn.{letter}_proj.weight"] = weight
                found[f"{layer}.self_attn.{letter}_proj.bias"] = bias
            parts = {
                "self_attn.out_proj": block.attn.out_proj, "layer_norm1": block.ln1, "layer_norm2": block.ln2,
                "mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2,
            }  # fmt: skip
            for name, module in parts.items():
                found |= named_parameters(f"{layer}.{name}", module)
        return found
