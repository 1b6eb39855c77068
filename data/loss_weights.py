"""How much each learned token of a message counts in the loss: --loss_weighting, and the loss_weight of a set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch


class LossWeight(NamedTuple):
    """How the learned tokens of a sample count."""

    fixed: float | None  # each of them; None: by the length of its message
    messages: int = 1  # of the sample, over all of its conversations

    def of_labels(self, labels: np.ndarray) -> np.ndarray:
        """float32 [L]: the weight of each of the labels, int64 [T], of a conversation; L of them are not -100.

        2 / sqrt(tokens of the message) / sqrt(messages), as Molmo2 (arXiv:2601.10611) weights them.
        """
        if self.fixed is not None:
            return np.full(np.count_nonzero(labels != -100), self.fixed, dtype=np.float32)
        lengths = message_lengths(labels)
        weights = 2 / np.sqrt(lengths * float(self.messages))
        return np.repeat(weights, lengths).astype(np.float32)


def message_lengths(labels: np.ndarray) -> np.ndarray:
    """int64 [messages]: the learned tokens of each message; no two messages follow each other without a gap."""
    learned = np.concatenate([[0], labels != -100, [0]]).astype(np.int8)
    steps = np.diff(learned)
    return np.flatnonzero(steps == -1) - np.flatnonzero(steps == 1)


def loss_weight_of(
    conversations: Iterable[tuple[torch.Tensor, torch.Tensor]], weighting: str, fixed: float | None
) -> LossWeight | None:
    """That of a sample with these conversations, by --loss_weighting; fixed: the loss_weight of its set, which comes
    first. None: each learned token counts 1."""
    if fixed is not None:
        return LossWeight(fixed)
    if weighting == "sqrt_answer":
        return LossWeight(None, sum(len(message_lengths(labels.numpy())) for _, labels in conversations))
    return None
