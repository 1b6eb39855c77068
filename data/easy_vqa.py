"""The words and the tokenizer of easy-VQA, the data set that comes with the package of this name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "easy-vqa"  # as --train_dataset_path, --test_dataset_path and --lm_tokenizer
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# fmt: off
WORDS = (
    "\n", "system", "user", "assistant", "?", "a", "black", "blue", "brown", "circle", "color", "contain", "does",
    "gray", "green", "image", "in", "is", "no", "not", "of", "present", "rectangle", "red", "shape", "teal", "the",
    "there", "triangle", "what", "yellow", "yes",
)
# fmt: on
VOCAB_SIZE = 1 + len(SPECIAL_TOKENS) + len(WORDS)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the questions and answers; any other word is <unk>. VOCAB_SIZE tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *SPECIAL_TOKENS, *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
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
