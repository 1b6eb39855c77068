"""The language tower: the decoder of SmolLM2 (Llama), Qwen2.5 and Qwen3. Grouped-query attention, rotary, RMSNorm.

Shapes: B rows, T new positions, S all positions with the cached ones, C width, H query heads, G kv heads, D head size.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.attention import Mask, attention, compute_dtype, document_block_mask, takes_flex_attention
from models.backbones import configure_language
from models.buckets import bucket
from models.config import SCRATCH, VLMConfig
from models.hub import WEIGHT_FILES
from models.norms import RMSNorm
from models.tensors import copy_tensors, named_parameters, set_extra_rows, stored_tensors


class KVCache:
    """Keys and values of the positions seen so far: for each block two buffers [B, G, max_length, D]."""

    def __init__(
        self, cfg: VLMConfig, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (cfg.lm_n_blocks, 2, batch_size, cfg.lm_n_kv_heads, max_length, cfg.head_dim)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def make_room(self, length: int, max_length: int) -> None:
        """Forget all but the first `length` positions; have room for max_length, at least doubled where it grows."""
        self.length = length
        if (room := self.buffer.shape[4]) < max_length:
            larger = self.buffer.new_zeros((*self.buffer.shape[:4], max(max_length, 2 * room), self.buffer.shape[5]))
            larger[:, :, :, :, :length] = self.buffer[:, :, :, :, :length]
            self.buffer = larger

    def extend(self, block: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values [B, G, T, D]; return all of them [B, G, S, D]."""
        end = self.length + k.shape[2]
        keys, values = self.buffer[block]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class RotaryEmbedding(nn.Module):
    """int positions [B, T] -> cos, sin, float32 [B, 1, T, D], in rotate-half layout."""

    inv_freq: torch.Tensor  # float32 [D / 2]

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        exponents = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim
        self.register_buffer("inv_freq", 1.0 / cfg.lm_re_base**exponents)
        self.max_positions = cfg.lm_max_position_embeddings
        self.scaling = cfg.lm_attn_scaling

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """length: positions of the whole sequence. The host knows it, so that the device is not asked for a maximum."""
        inv_freq = self.inv_freq / max(1.0, length / self.max_positions)
        angles = position_ids[..., None].float() * inv_freq.float()  # [B, T, D/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, D]
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of the last dimension of x [B, H, T, D] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention_mask_4d(
    attention_mask: torch.Tensor | None, document_ids: torch.Tensor | None, length: int
) -> torch.Tensor | None:
    """Which of the S positions each of the last `length` may see: bool [B, 1, T, S], or None for plain causal.

    attention_mask: bool or int [B, S], zero at padding on either side. document_ids: int [B, T], attention stays
    within equal ids.
    """
    given = [ids for ids in (attention_mask, document_ids) if ids is not None]
    if not given:
        return None
    total, device = given[0].shape[1], given[0].device
    query = torch.arange(total - length, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    mask = (key <= query)[None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None].bool()
    if document_ids is not None:
        mask = mask & (document_ids[:, :, None] == document_ids[:, None])
    # A padding position that may see nothing would turn into NaN and spread; it sees itself instead.
    return (mask | (key == query))[:, None]


class LanguageModelGroupedQueryAttention(nn.Module):
    """[B, T, C] -> [B, T, C]; H / G query heads share a key/value head."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = cfg.lm_n_heads, cfg.lm_n_kv_heads
        self.head_dim = cfg.head_dim
        self.dropout = cfg.lm_dropout
        q_dim, kv_dim, bias = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, cfg.lm_qkv_bias
        self.q_proj = nn.Linear(cfg.lm_hidden_dim, q_dim, bias=bias)
        self.k_proj = nn.Linear(cfg.lm_hidden_dim, kv_dim, bias=bias)
        self.v_proj = nn.Linear(cfg.lm_hidden_dim, kv_dim, bias=bias)
        self.out_proj = nn.Linear(q_dim, cfg.lm_hidden_dim, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, eps=cfg.lm_rms_eps) if cfg.lm_qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        block: int = 0,
    ) -> torch.Tensor:
        """cos, sin: of RotaryEmbedding, in x's dtype. mask: None is causal. block: index of this block in the cache."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.head_dim)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)).transpose(1, 2)  # [B, G, T, D]
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(block, k, v)
        causal = mask is None
        if T == 1:  # a single new position may see all that came before; `and T > 1` would break torch.compile's graph
            causal = False
        y = attention(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        y = self.out_proj(y.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim))
        return F.dropout(y, self.dropout, self.training)


class LanguageModelMLP(nn.Module):
    """[B, T, C] -> [B, T, C] through lm_inter_dim, gated by a SiLU."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.up_proj = nn.Linear(cfg.lm_hidden_dim, cfg.lm_inter_dim, bias=False)
        self.down_proj = nn.Linear(cfg.lm_inter_dim, cfg.lm_hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LanguageModelBlock(nn.Module):
    """[B, T, C] -> [B, T, C]: attention, then MLP, each behind an RMSNorm and with a residual connection."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        self.norm1 = RMSNorm(cfg.lm_hidden_dim, eps=cfg.lm_rms_eps)
        self.attn = LanguageModelGroupedQueryAttention(cfg)
        self.norm2 = RMSNorm(cfg.lm_hidden_dim, eps=cfg.lm_rms_eps)
        self.mlp = LanguageModelMLP(cfg)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
        block: int = 0,
    ) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask, cache, block)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Embeddings [B, T, C] (see token_embedding) -> hidden states [B, T, C], of which head makes logits [B, T, V]."""

    def __init__(self, cfg: VLMConfig):
        super().__init__()
        assert cfg.lm_vocab_size is not None  # VLMConfig fills it in
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.lm_vocab_size, cfg.lm_hidden_dim)
        self.rotary_embd = RotaryEmbedding(cfg)
        self.blocks = nn.ModuleList(LanguageModelBlock(cfg) for _ in range(cfg.lm_n_blocks))
        self.norm = RMSNorm(cfg.lm_hidden_dim, eps=cfg.lm_rms_eps)
        self.head = nn.Linear(cfg.lm_hidden_dim, cfg.lm_vocab_size, bias=False)
        if cfg.lm_tie_weights:
            self.head.weight = self.token_embedding.weight
        self.in_buckets = False  # training pads rows that are neither masked nor packed to a bucket
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in initialisation; projections into the residual stream start at half of it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=self.cfg.lm_hidden_dim**-0.5)
        for block in self.blocks:
            assert isinstance(block, LanguageModelBlock)
            block.attn.out_proj.weight.mul_(0.5)
            block.mlp.down_proj.weight.mul_(0.5)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """attention_mask: [B, S], zero at padding; None without padding or with padding on the right.

        position_ids: int [B, T], counting from 0 along the row by default. document_ids: int [B, T]; attention is
        confined to equal ids. cache: holds the S - T positions before x and takes in the new ones.
        """
        x = x.to(compute_dtype(x))
        T, start = x.shape[1], cache.length if cache is not None else 0
        if position_ids is None:
            if self.in_buckets and self.training and attention_mask is None and document_ids is None and cache is None:
                x = F.pad(x, (0, 0, 0, bucket(T) - T))  # on the right, where causal attention does not look
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
        cos, sin = (table.to(x.dtype) for table in self.rotary_embd(position_ids, start + T))
        mask = self._mask(attention_mask, document_ids, T)
        if mask is None and T > 1 and start > 0:  # SDPA's causal would let the first new one see the first cached one
            mask = attention_mask_4d(torch.ones(1, start + T, dtype=torch.bool, device=x.device), None, T)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache, index)
        if cache is not None:
            cache.length += T
        return self.norm(x[:, :T])

    def _mask(self, attention_mask: torch.Tensor | None, document_ids: torch.Tensor | None, length: int) -> Mask:
        """Which positions each of the last `length` may see, in the form with which attention is fastest here."""
        if attention_mask is None and document_ids is not None:
            dropout = self.cfg.lm_dropout if self.training else 0.0
            if takes_flex_attention(document_ids.device, length, self.cfg.head_dim, dropout):
                return document_block_mask(document_ids)
        return attention_mask_4d(attention_mask, document_ids, length)

    @classmethod
    def from_pretrained(cls, cfg: VLMConfig) -> "LanguageModel":
        """The Llama (SmolLM2), Qwen2 or Qwen3 model cfg.lm_model_type: a hub id or a local folder; `scratch`: random.

        Sets cfg's lm_* sizes to the model's; the embeddings of the extra tokens start at the mean embedding. Raises
        ValueError for another architecture and for tensors that do not fit, BackboneUnavailable without folder and hub.
        """
        if cfg.lm_model_type == SCRATCH:
            return cls(cfg)
        stored = stored_tensors(configure_language(cfg, WEIGHT_FILES))
        stored = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
        stored = {key: tensor for key, tensor in stored.items() if not key.endswith("rotary_emb.inv_freq")}
        if cfg.lm_tie_weights:
            stored.pop("lm_head.weight", None)
        elif "lm_head.weight" not in stored and "embed_tokens.weight" in stored:
            stored["lm_head.weight"] = stored["embed_tokens.weight"]  # a tied model's embedding starts an untied head
        lm = cls(cfg)
        found = stored.get("embed_tokens.weight")
        rows = max(found.shape[0] if found else 0, cfg.lm_base_vocab_size)
        copy_tensors(f"--lm_model_type {cfg.lm_model_type}", stored, lm.llama_tensors(rows))
        end = cfg.lm_base_vocab_size + cfg.extra_token_amount
        for matrix in {lm.token_embedding.weight, lm.head.weight}:
            set_extra_rows(matrix[:end], cfg.lm_base_vocab_size)  # spare rows above, which no token has, stay
        return lm

    def llama_tensors(self, rows: int | None = None) -> dict[str, torch.Tensor]:
        """Llama's (and Qwen's) tensor names -> our tensors; of embedding and head that many rows, by default all."""
        found = {"embed_tokens.weight": self.token_embedding.weight[:rows], "norm.weight": self.norm.weight}
        if not self.cfg.lm_tie_weights:
            found["lm_head.weight"] = self.head.weight[:rows]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, LanguageModelBlock)
            layer, attn = f"layers.{i}", block.attn
            found[f"{layer}.input_layernorm.weight"] = block.norm1.weight
            found[f"{layer}.post_attention_layernorm.weight"] = block.norm2.weight
            for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
                found |= named_parameters(f"{layer}.self_attn.{name}", getattr(attn, name))
            found[f"{layer}.self_attn.o_proj.weight"] = attn.out_proj.weight
            found |= named_parameters(f"{layer}.mlp", block.mlp)
        return found
