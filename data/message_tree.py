"""--message_tree: several questions about the same images in one sequence, which has the images once.

A branch id for each token: 0 for the shared prefix, which every branch sees, and from 1 on the branches, none of which
sees another. Positions count on from the end of the prefix in every branch, as if it stood there alone.
"""

from __future__ import annotations

import numpy as np
import torch

Conversation = tuple[torch.Tensor, torch.Tensor]  # (ids, labels), int64 [T]


def grow_trees(
    conversations: list[Conversation], limit: int, image_token: int
) -> tuple[list[Conversation], list[torch.Tensor]]:
    """(conversations that hold the given ones as branches, the branch ids of each, int32 [T]).

    They have at most `limit` tokens, as the given ones have. The prefix is all that these have in common before the
    first label. Where it does not hold all of their image tokens they stay as they are.
    """
    prefix = _shared(conversations) if len(conversations) > 1 else 0
    if prefix == 0 or any(bool((ids[prefix:] == image_token).any()) for ids, _ in conversations):
        return conversations, [torch.zeros(len(ids), dtype=torch.int32) for ids, _ in conversations]
    groups: list[list[Conversation]] = []
    room = 0
    for conversation in conversations:
        added = len(conversation[0]) - prefix
        if added > room:
            groups.append([])
            room = limit - prefix
        groups[-1].append(conversation)
        room -= added
    trees, branches = [], []
    for group in groups:
        ids, labels = (torch.cat([group[0][i][:prefix], *(one[i][prefix:] for one in group)]) for i in (0, 1))
        numbers = [torch.full((len(one[0]) - prefix,), n, dtype=torch.int32) for n, one in enumerate(group, start=1)]
        trees.append((ids, labels))
        branches.append(torch.cat([torch.zeros(prefix, dtype=torch.int32), *numbers]))
    return trees, branches


def _shared(conversations: list[Conversation]) -> int:
    """How many tokens at the beginning are the same in all, and none of them has a label."""
    shortest = min(len(ids) for ids, _ in conversations)
    ids = torch.stack([ids[:shortest] for ids, _ in conversations])
    has_label = torch.stack([labels[:shortest] != -100 for _, labels in conversations])
    ends = ((ids != ids[0]) | has_label).any(0)
    return int(ends.int().argmax()) if ends.any() else 0


def positions_of(branches: np.ndarray) -> np.ndarray:
    """int64 [T]: the position of each token of a conversation with these branch ids, int32 [T]."""
    places = np.arange(len(branches))
    starts = np.maximum.accumulate(np.where(np.diff(branches, prepend=branches[:1]) != 0, places, 0))
    return np.where(branches == 0, places, np.count_nonzero(branches == 0) + places - starts)
