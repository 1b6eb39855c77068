"""A model that is asked: text and images to token ids, and ids to answers, as in training."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.collators import PromptCollator, to_device
from data.datasets import Questions
from data.images import ImageProcessor
from data.places import with_images
from data.text import encode_prompt, get_tokenizer, image_string
from models.attention import compute_dtype
from models.vision_language_model import VisionLanguageModel


@dataclass
class Reader:
    """Makes prompts; holds no weights, so that worker processes can have it."""

    tokenizer: Any
    processor: ImageProcessor

    def read(
        self, turn: Mapping[str, Any], images: Sequence[Any], system: str = "", answer_prefix: str = "", id: str = ""
    ) -> Questions:
        """One question as the model gets it.

        turn: {"user": text}, with the places of its images where they do not stand before it (data.places). images: in
        any form that rows may have. answer_prefix: stands after the assistant's header. Raises ImageDecodeError.
        """
        processed = [self.processor(image) for image in images]
        texts = [image_string([grid], self.processor.cfg) for _, grid in processed]
        prompt = encode_prompt(self.tokenizer, with_images(dict(turn), texts)[0], "", system)
        if answer_prefix:
            prompt = prompt + self.tokenizer.backend_tokenizer.encode(answer_prefix, add_special_tokens=False).ids
        tiles = torch.cat([tiles for tiles, _ in processed]) if processed else None
        return Questions(tiles, [prompt], [""], [None], id)


class Asker:
    """A checkpoint that answers."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
        lm_tokenizer: str | None = None,
    ):
        """folder: a checkpoint in nanoVLM's format. lm_tokenizer: in place of the checkpoint's own.

        Raises ValueError or OSError for a checkpoint that cannot be used.
        """
        self.folder, self.device, self.autocast = folder, device, autocast
        self.model = VisionLanguageModel.from_pretrained(folder).to(device).eval()
        self.model.cfg.lm_tokenizer = lm_tokenizer or self.model.cfg.lm_tokenizer
        self.tokenizer = get_tokenizer(self.model.cfg, None if lm_tokenizer else folder)
        self.reader = Reader(self.tokenizer, ImageProcessor(self.model.cfg))
        self.collator = PromptCollator(self.tokenizer.pad_token_id, self.model.cfg)

    def answer(self, questions: Sequence[Questions], max_new_tokens: int, **sampling: Any) -> list[str]:
        """The answer to each; greedy, unless `sampling`, as the model's generate takes it, says otherwise."""
        options: dict[str, Any] = {"greedy": not sampling, "eos_token_id": self.tokenizer.eos_token_id} | sampling
        options |= to_device(self.collator(list(questions)), self.device)
        with self.autocast:
            new_ids = self.model.generate(max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]

    def compute_dtype(self) -> torch.dtype:
        """Of its matrix products."""
        with self.autocast:
            return compute_dtype(next(self.model.parameters()))

    @torch.inference_mode()
    def likeliest(self, questions: Sequence[Questions], choices: Sequence[Sequence[str]]) -> list[str]:
        """Which of its choices each answer most likely begins with, by the probability of the choice's first token."""
        batch = to_device(self.collator(list(questions)), self.device)
        mask = batch.pop("attention_mask", None)
        with self.autocast:
            x = self.model.embed(**batch)
            positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_(min=0)
            hidden = self.model.decoder(x, mask, positions)[:, -1]
            scores = self.model.decoder.head(hidden).float().log_softmax(dim=-1)
        return [max(given, key=lambda one: self._score(row, one)) for row, given in zip(scores, choices, strict=True)]

    def _score(self, scores: torch.Tensor, choice: str) -> float:
        """The larger one of the first token with and without a space before it, as the prompt may end in either."""
        encode = self.tokenizer.backend_tokenizer.encode
        starts = {encode(text, add_special_tokens=False).ids[0] for text in (choice, f" {choice}")}
        return max(scores[start].item() for start in starts)
