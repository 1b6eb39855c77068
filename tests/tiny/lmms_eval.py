"""A model that says letters, and benchmarks in their own columns, for the comparison with lmms-eval."""

from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eval.tasks import TASKS
from models.vision_language_model import VisionLanguageModel
from tiny.benchmarks import records
from tiny.data import encoded, picture
from tiny.grades import make_model

CONTROL = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "\n", "user", "assistant", "A", "B", "C", "D", ".", ":", "(", ")", "a", "b", "yes", "no", "Yes", "No", "is", "the",
    "answer", "what", "which", "cat", "dog", "red", "ASSISTANT:", "in", "image", "there", "Options", "3",
)  # fmt: skip
SAID = ("A", "B", "C", "D", ".", "a", "yes", "no", "dog", "(", "<|im_end|>")  # what answers are made of
ROWS = 24


def tokenizer() -> PreTrainedTokenizerFast:
    """Of whole words, letters and marks."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*CONTROL, *WORDS))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(".", "isolated"),
        ]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def save_speaking_model(folder: Path) -> VisionLanguageModel:
    """A checkpoint of an untrained model that knows tiles and whose answers depend on picture and question."""
    folder.mkdir(parents=True)
    known = tokenizer()
    known.save_pretrained(folder / "tokenizer")
    sizes = {"lm_base_vocab_size": len(known), "lm_max_length": 512, "lm_tie_weights": False}
    model = make_model(lm_tokenizer=str(folder / "tokenizer"), **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        is_said = torch.zeros(model.cfg.lm_vocab_size, 1)
        is_said[known.convert_tokens_to_ids(list(SAID))] = 1
        model.decoder.head.weight.mul_(is_said)
    model.save_pretrained(folder)
    return model


def save_data(root: Path, tasks=("mmstar", "pope", "ai2d", "vqav2_val")) -> Path:
    """The benchmarks as save_to_disk writes them, mmstar as a parquet file of the hub's name; returns the root."""
    for task in tasks:
        rows = records(task, ROWS)
        for i, row in enumerate(rows):
            row["image"] = {"bytes": encoded(picture(16 + i % 3, 16, seed=i)), "path": None}
        table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        split = TASKS[task].split
        if task == "mmstar":
            (root / task / "data").mkdir(parents=True)
            table.to_parquet(root / task / "data" / f"{split}-00000-of-00001.parquet")
        else:
            datasets.DatasetDict({split: table}).save_to_disk(root / task)
    return root
