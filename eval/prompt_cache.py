"""What the model has computed of a conversation, so that the next turn computes only what is new."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from data.datasets import Questions
from models.config import VLMConfig
from models.language_model import KVCache


@dataclass
class PromptCache:
    """The latest prompt and its answer, and their keys and values as far as the model has read them.

    A prompt that begins with the same tokens must begin with the same images: it continues the conversation.
    """

    ids: list[int] = field(default_factory=list)
    cache: KVCache | None = None

    def continued(
        self, question: Questions, max_new_tokens: int, cfg: VLMConfig, device: torch.device, dtype: torch.dtype
    ) -> Questions:
        """The part of a question with one prompt that has still to be read; `cache` then holds what comes before it.

        dtype: of the model's matrix products.
        """
        [prompt] = question.prompts
        length, room = self._known(prompt, cfg), len(prompt) + max_new_tokens
        if self.cache is None:
            self.cache = KVCache(cfg, 1, room, device, dtype)
        self.cache.make_room(length, room)
        self.ids = list(prompt)
        seen = prompt[:length].count(cfg.image_token_id)
        images, windows = question.images, question.pool_index
        if windows is not None and images is not None:
            windows = windows[seen:]
            first = int(windows[windows >= 0].min()) // cfg.vit_grid**2 if len(windows) else len(images)
            windows = torch.where(windows >= 0, windows - first * cfg.vit_grid**2, -1)
        else:
            first = seen // cfg.mp_image_token_length
        if images is not None:
            images = images[first:] if first < len(images) else None
        windows = windows if images is not None else None
        return replace(question, prompts=[prompt[length:]], images=images, pool_index=windows)

    def _known(self, prompt: list[int], cfg: VLMConfig) -> int:
        """How many of its first tokens are in the cache: all but the last at most, and no image in part."""
        known = self.ids[: self.cache.length] if self.cache is not None else []
        most = min(len(known), len(prompt) - 1)
        length = next((i for i in range(most) if known[i] != prompt[i]), most)
        rest = prompt[:length].count(cfg.image_token_id) % cfg.mp_image_token_length
        while rest:
            length -= 1
            rest -= prompt[length] == cfg.image_token_id
        return length
