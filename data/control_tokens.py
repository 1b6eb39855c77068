"""Tokens that a text must not hold, as only the chat template and the places of images may write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from data.drops import CONTROL_TOKEN_IN_TEXT, IMAGE_TOKEN_IN_TEXT
from data.text import Tokenizer
from models.config import VLMConfig


class ControlTokens:
    """The image tokens of a config and the special tokens of its tokenizer, the end token among them."""

    def __init__(self, tokenizer: Tokenizer, vlm_cfg: VLMConfig):
        self.tokenizer = tokenizer
        self.extra = _any_of(vlm_cfg.vlm_extra_tokens.values())
        added = tokenizer.added_tokens_decoder.items()
        control = {i: token for i, token in added if token.special or i == tokenizer.eos_token_id}
        self.control = _any_of(token.content for token in control.values())
        # A token that is looked for in the normalized text is found where its letters are written in another way.
        self.normalized = {i for i, token in control.items() if token.normalized}

    def find(self, text: str) -> tuple[str, str] | None:
        """(reason why the text cannot be used, the token in it); None where it holds none."""
        for reason, tokens in ((IMAGE_TOKEN_IN_TEXT, self.extra), (CONTROL_TOKEN_IN_TEXT, self.control)):
            if found := tokens.search(text):
                return reason, found[0]
        if self.normalized:
            ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            if (number := next((i for i in ids if i in self.normalized), None)) is not None:
                return CONTROL_TOKEN_IN_TEXT, str(self.tokenizer.added_tokens_decoder[number].content)
        return None

    def reason(self, text: str) -> str | None:
        """Why the text cannot be used, as rows are counted; None where it can."""
        found = self.find(text)
        return found and found[0]

    def without(self, text: str) -> str:
        """The text without any; all of it goes where a token is only found in the normalized text."""
        while found := self.find(text):
            text = text.replace(found[1], "") if found[1] in text else ""
        return text


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))
