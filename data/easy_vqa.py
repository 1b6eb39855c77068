"""Everything about easy-VQA, the data set that comes with the package of this name: rows, words, tokenizer, baseline.

5,000 images of one shape each, with questions about its shape and its color.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data.formats import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "easy-vqa"  # as --train_dataset_path, --test_dataset_path and --lm_tokenizer
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("shape", "color", "yes_no_shape", "yes_no_color")  # of question
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# fmt: off
WORDS = (
    "\n", "system", "user", "assistant", "?", "a", "black", "blue", "brown", "circle", "color", "contain", "does",
    "gray", "green", "image", "in", "is", "no", "not", "of", "present", "rectangle", "red", "shape", "teal", "the",
    "there", "triangle", "what", "yellow", "yes",
)
# fmt: on
VOCAB_SIZE = 1 + len(SPECIAL_TOKENS) + len(WORDS)


def rows(split: str, kinds: Sequence[str] = ("all",), flag: str = "train_dataset_path") -> list[Row]:
    """One row per image with its questions of these kinds; split: train or test.

    The source of a turn is the kind of question: shape, color, or yes_no_shape and yes_no_color, which ask whether
    there is a certain one. Raises ValueError that names `flag` for another split, --train_dataset_name for a kind.
    """
    import easy_vqa

    if unknown := [kind for kind in kinds if kind not in (*KINDS, "all")]:
        raise ValueError(f"--train_dataset_name {' '.join(unknown)}: {NAME} has {', '.join(KINDS)}; or all")
    asked = set(KINDS if "all" in kinds else kinds)
    readers = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    if split not in readers:
        raise ValueError(f"--{flag} {NAME}: no split {split}; there are train and test")
    read_questions, read_paths = readers[split]
    turns: dict[int, list[dict]] = defaultdict(list)
    for question, answer, image in zip(*read_questions(), strict=True):
        if (kind := _kind(question, answer)) in asked:
            turns[image].append({"user": question, "assistant": answer, "source": kind})
    paths = read_paths()
    return [{"images": [paths[i]], "texts": turns[i], "id": f"{NAME}/{split}/{i}"} for i in sorted(turns)]


def _kind(question: str, answer: str) -> str:
    yes_no = answer in ("yes", "no")
    asked = question if yes_no else answer  # "what color is the circle?" asks for a color
    kind = "shape" if any(shape in asked for shape in SHAPES) else "color"
    return f"yes_no_{kind}" if yes_no else kind


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token for each of the words, by default those of the questions and answers; any other word is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", *SPECIAL_TOKENS, *words]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    made.add_special_tokens(list(SPECIAL_TOKENS))
    made.normalizer = normalizers.Lowercase()
    # Matches are the tokens, what lies between them (spaces) is removed; a line break is a token of ChatML.
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    joined = [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse()]  # spaces between words, none before "?"
    chatml = [("<|im_start|> ", "<|im_start|>"), (" <|im_end|>", "<|im_end|>"), (" \n", "\n"), ("\n ", "\n")]
    made.decoder = decoders.Sequence(joined + [decoders.Replace(old, new) for old, new in chatml])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def question_only(train_rows: Iterable[Row], test_rows: Iterable[Row]) -> float | None:
    """Exact match of answering each question with its most frequent answer in training, without the image.

    What a model must beat to have looked at the image. A question that is not in the training rows gets the most
    frequent answer of all. A share in [0, 1]; None without rows.
    """
    by_question: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for row in train_rows:
        for turn in row["texts"]:
            by_question[turn["user"]][turn["assistant"]] += 1
            overall[turn["assistant"]] += 1
    if not overall:
        return None
    right = []
    for row in test_rows:
        for turn in row["texts"]:
            answers = by_question.get(turn["user"], overall)
            right.append(answers.most_common(1)[0][0] == turn["assistant"])
    return sum(right) / len(right) if right else None
