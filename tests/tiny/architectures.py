"""Tiny random models of many architectures of transformers, each with a batch whose loss it trains on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn as nn
import transformers

WIDTH, LAYERS, ROWS, LENGTH, IMAGE, VOCAB = 16, 4, 2, 8, 63, 64
BLOCKS = {
    "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
}  # fmt: skip
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = BLOCKS | TOKENS | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
VISION = BLOCKS | {"image_size": 16, "patch_size": 8}  # four patches
ENCODER_DECODER = TOKENS | {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1,
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def text(*_: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids}


def pixels(*_: Any) -> torch.Tensor:
    return torch.rand(ROWS, 3, 16, 16)


def pairs() -> dict[str, Any]:
    return {"input_ids": text()["input_ids"], "pixel_values": pixels(), "return_loss": True}


def image_text(tokens: int = 4, one_more_dimension: bool = False) -> Callable[[], dict[str, torch.Tensor]]:
    """Rows that begin with the tokens of an image."""

    def make() -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 60, (ROWS, tokens + LENGTH))
        ids[:, :tokens] = IMAGE
        images = pixels()[:, None] if one_more_dimension else pixels()
        return {"input_ids": ids, "labels": ids, "pixel_values": images}

    return make


def qwen_images() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (ROWS, 1 + LENGTH))
    ids[:, 1] = IMAGE
    grid = torch.tensor([[1, 2, 2]] * ROWS)
    return {
        "input_ids": ids, "labels": ids, "pixel_values": torch.rand(ROWS * 4, 3 * 2 * 8 * 8), "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }  # fmt: skip


def mllama_images() -> dict[str, torch.Tensor]:
    ones = torch.ones(ROWS, 1, dtype=torch.long)
    return text() | {
        "pixel_values": pixels()[:, None, None], "aspect_ratio_ids": ones, "aspect_ratio_mask": ones[:, :, None],
        "cross_attention_mask": torch.ones(ROWS, LENGTH, 1, 1),
    }  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model's class, its settings, the batch, and what the prefix is once the first half of its blocks is frozen."""

    model: str
    settings: dict[str, Any]
    batch: Callable[[], dict[str, torch.Tensor]] = text
    # Blocks behind which the backward pass then ends.
    passed: tuple[str, ...] = ()
    # Beginnings of the names of what freezes outside of blocks, and of lookups in tied embeddings that are cut off.
    before: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()


def build(architecture: Architecture) -> nn.Module:
    model = getattr(transformers, architecture.model)
    torch.manual_seed(0)
    return model(model.config_class(**architecture.settings)).train()


def batch(architecture: Architecture) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return architecture.batch()


def loss(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same dropout at each call. Where the model has no loss, the sum of what it returns."""
    torch.manual_seed(2)
    output = model(**given)
    if output.get("loss") is not None:
        return output["loss"]
    return sum(value.square().mean() for value in output.values() if isinstance(value, torch.Tensor))


def halves(*stacks: str) -> tuple[str, ...]:
    return tuple(f"{stack}.{i}" for stack in stacks for i in range(LAYERS // 2))


def decoder(model: str, tied: bool, stack: str = "model.layers", embedding: str = "model.embed_tokens", **settings):
    """A language model whose first half passes."""
    name = {"cuts": (embedding,)} if tied else {"before": (embedding,)}
    return Architecture(model, TEXT | {"tie_word_embeddings": tied} | settings, text, halves(stack), **name)


T5 = {
    "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
TOWER, EMBEDDINGS = "model.vision_tower.encoder.layers", "model.vision_tower.embeddings"
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
CLIP_VISION = VISION | {"model_type": "clip_vision_model", "projection_dim": 8}
LAYER_EMBEDDINGS = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
}  # fmt: skip
GEMMA_3N = LAYER_EMBEDDINGS | {
    "laurel_rank": 4, "altup_num_inputs": 2, "layer_types": ["full_attention"] * LAYERS, "intermediate_size": 24,
    "activation_sparsity_pattern": [0.0] * LAYERS,
}  # fmt: skip

ARCHITECTURES = {
    "Llama": decoder("LlamaForCausalLM", False),
    "Llama, tied": decoder("LlamaForCausalLM", True),
    "Qwen3": decoder("Qwen3ForCausalLM", True),
    "Phi": decoder("PhiForCausalLM", False),
    "Olmo2": decoder("Olmo2ForCausalLM", False),
    "Gemma2": decoder("Gemma2ForCausalLM", True),
    "Gemma3": decoder("Gemma3ForCausalLM", True),
    "GPT-NeoX": decoder("GPTNeoXForCausalLM", False, "gpt_neox.layers", "gpt_neox.embed_in"),
    "Falcon": Architecture(
        "FalconForCausalLM", BLOCKS | TOKENS, text, halves("transformer.h"), (), ("transformer.word_embeddings",),
    ),
    "GPT-2": Architecture(
        "GPT2LMHeadModel", TOKENS | {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}, text,
        halves("transformer.h"), ("transformer.wpe",), ("transformer.wte",),
    ),
    "OPT": decoder(
        "OPTForCausalLM", False, "model.decoder.layers", "model.decoder.embed", ffn_dim=24, word_embed_proj_dim=WIDTH
    ),
    # Each block holds a matrix that trains and is not watched: a router, a convolution or the state of Mamba.
    "Mixtral": Architecture("MixtralForCausalLM", TEXT | SPARSE),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", TEXT | SPARSE),
    # Their embeddings of a token for each layer feed all layers.
    "Gemma3n": Architecture("Gemma3nForCausalLM", TEXT | GEMMA_3N),
    "Gemma4": Architecture(
        "Gemma4ForCausalLM",
        TEXT | LAYER_EMBEDDINGS | {"layer_types": ["full_attention"] * LAYERS, "global_head_dim": 8},
    ),
    "Zamba2": Architecture(
        "Zamba2ForCausalLM",
        TEXT | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                "mamba_d_state": 4, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 8, "chunk_size": 4,
                "num_mem_blocks": 1, "attention_head_dim": 16, "attention_hidden_size": 32, "use_mem_eff_path": False},
    ),
    "Falcon-H1": Architecture(
        "FalconH1ForCausalLM", TEXT | {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4,
                                       "mamba_n_groups": 1, "mamba_chunk_size": 4},
    ),
    "Bamba": Architecture(
        "BambaForCausalLM", TEXT | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
                                    "mamba_chunk_size": 4, "attn_layer_indices": [1, 3]},
    ),
    "T5": Architecture("T5ForConditionalGeneration", TOKENS | T5),
    "Bart": Architecture(
        "BartForConditionalGeneration", ENCODER_DECODER, text, halves("model.encoder.layers"),
        ("model.encoder.embed_positions", "model.encoder.layernorm_embedding"), ("model.encoder.embed_tokens",),
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration", ENCODER_DECODER | {"num_mel_bins": 4, "max_source_positions": 8},
        lambda: {"input_features": torch.rand(ROWS, 4, 16), "labels": text()["labels"]},
        halves("model.encoder.layers"), ("model.encoder.conv1", "model.encoder.conv2"),
    ),
    "ViT": Architecture(
        "ViTForImageClassification", VISION, lambda: {"pixel_values": pixels(), "labels": torch.tensor([0, 1])},
        halves("vit.layers"), ("vit.embeddings",),
    ),
    "CLIP": Architecture(
        "CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8}, pairs,
        halves("text_model.encoder.layers", "vision_model.encoder.layers"),
        ("text_model.embeddings", "vision_model.embeddings", "vision_model.pre_layrnorm"),
    ),
    "SigLIP": Architecture(
        "SiglipModel", {"text_config": TEXT | {"projection_size": WIDTH}, "vision_config": VISION}, pairs,
        halves("text_model.encoder.layers", "vision_model.encoder.layers"),
        ("text_model.embeddings", "vision_model.embeddings"),
    ),
    "SmolVLM": Architecture(
        "SmolVLMForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        image_text(1, True), halves("model.vision_model.encoder.layers"), ("model.vision_model.embeddings",),
    ),
    "LLaVA": Architecture(
        "LlavaForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP_VISION, "image_token_index": IMAGE},
        image_text(4), halves(TOWER), (EMBEDDINGS, "model.vision_tower.pre_layrnorm"),
    ),
    "PaliGemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "gemma"}, "vision_config": SIGLIP, "image_token_index": IMAGE,
            "projection_dim": WIDTH,
        },
        lambda: image_text(4)() | {"token_type_ids": torch.zeros(ROWS, 12, dtype=torch.long)},
        halves(TOWER), (EMBEDDINGS,),
    ),
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        {"text_config": TEXT | MROPE, "image_token_id": IMAGE, "vision_config": {
            "depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2,
        }},
        qwen_images, halves("model.visual.blocks"), ("model.visual.patch_embed",),
    ),
    "Idefics": Architecture(
        "IdeficsForVisionText2Text",
        TEXT | {
            "vision_config": VISION | {"embed_dim": WIDTH}, "use_resampler": False, "cross_layer_interval": 2,
            "additional_vocab_size": 0, "freeze_text_layers": False, "freeze_vision_layers": False,
        },
        lambda: text() | {"pixel_values": pixels()[:, None], "image_attention_mask": torch.ones(ROWS, LENGTH, 1)},
        halves("model.vision_model.encoder.layers"),
        ("model.vision_model.embeddings", "model.vision_model.pre_layrnorm"),
    ),
    "BLIP": Architecture(
        "BlipForConditionalGeneration",
        {
            "text_config": TEXT | {"encoder_hidden_size": WIDTH, "projection_dim": 8, "is_decoder": True},
            "vision_config": VISION, "projection_dim": 8,
        },
        lambda: text() | {"pixel_values": pixels()},
        halves("vision_model.encoder.layers"), ("vision_model.embeddings",),
    ),
    "Mllama": Architecture(
        "MllamaForConditionalGeneration",
        {
            "text_config": TEXT | {"cross_attention_layers": [2, 3]} | ROPE, "image_token_index": IMAGE,
            "vision_config": {
                "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 2,
                "attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 2 * WIDTH,
                "intermediate_layers_indices": [1], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
            },
        },
        mllama_images, (*halves("model.language_model.layers"), "model.vision_model.transformer.layers.0"),
        ("model.language_model.embed_tokens", *(f"model.vision_model.{part}" for part in (
            "class_embedding", "gated_positional", "layernorm_pre", "patch_embedding", "pre_tile"
        ))),
    ),
    # One block, called four times.
    "Albert": Architecture(
        "AlbertForMaskedLM", TEXT | {"embedding_size": 8}, text, ("albert.encoder.albert_layer_groups.0",),
        (*(f"albert.embeddings.{part}" for part in ("LayerNorm", "position", "token_type")),
         "albert.encoder.embedding_hidden_mapping_in"),
        ("albert.embeddings.word_embeddings",),
    ),
    "ModernBERT": Architecture(
        "ModernBertForMaskedLM", TEXT | {"cls_token_id": 1, "sep_token_id": 2}, text, halves("model.layers"),
        ("model.embeddings.norm",), ("model.embeddings.tok_embeddings",),
    ),
    "DeBERTa-v2": Architecture(  # one table of relative positions for all blocks
        "DebertaV2ForMaskedLM",
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    ),
}  # fmt: skip
