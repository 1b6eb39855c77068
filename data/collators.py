"""Samples to batches. Every index that the model needs is computed here, on the CPU: no step waits for a device.

In NumPy: on a busy CPU torch's threads take far longer for such small tables.

Shapes: B conversations, T tokens of the longest, N images or tiles, S vit_img_size, K image slots, L labels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from data.datasets import Questions, Sample
from data.drops import count_drops, drop_records
from data.layouts import joined
from data.loss_weights import LossWeight
from data.message_tree import positions_of
from models.config import VLMConfig


def to_device(batch: dict, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The tensors of a batch, which are the model's arguments, on the device.

    On CUDA, from pinned memory, on a stream of their own: the copy overlaps with what the device still computes.
    """
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    if torch.device(device).type != "cuda":
        return {name: value.to(device) for name, value in tensors.items()}
    copies, current = _copy_stream(torch.device(device)), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
    current.wait_stream(copies)
    for value in moved.values():
        value.record_stream(current)  # its memory is not used again before the step has
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Collator:
    """What the collators share. Picklable, as each worker process gets one."""

    def __init__(self, pad_id: int, vlm_cfg: VLMConfig, with_keys: bool = False):
        """with_keys: batches get the image_keys that a feature cache asks for."""
        self.pad_id, self.vlm_cfg, self.with_keys = pad_id, vlm_cfg, with_keys

    def _inputs(self, input_ids: np.ndarray, targets: np.ndarray, samples: list[Sample]) -> dict:
        """The model's arguments, num_labels, and total_weight where labels have weights; from ids and targets (int64
        [B, T]), which hold the samples' conversations one after the other."""
        label_positions = np.flatnonzero(targets != -100)
        ids = [[conversation.numpy() for conversation, _ in sample.conversations] for sample in samples]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "targets": torch.from_numpy(targets),
            **_image_inputs(input_ids, samples, ids, self.vlm_cfg),
            **({"image_keys": image_keys(samples)} if self.with_keys else {}),
            "label_positions": torch.from_numpy(label_positions),
            "num_labels": len(label_positions),
            **_label_weights(samples),
        }


class TrainCollator(Collator):
    """Samples to a padded batch with targets."""

    def __call__(self, samples: list[Sample]) -> dict:
        """The keyword arguments of the model's forward, and what the loop counts.

        input_ids, targets: int64 [B, T], padded on the right, targets -100 there; images: uint8 [N, 3, S, S] or None;
        image_slots, image_sources: int64 [K] or None (see VisionLanguageModel.forward); label_positions: int64 [L].
        pool_index: int64 [M, patches of a window] over all N images, only where the layout needs it (data.layouts).
        position_ids, int64 [B, T], and branch_ids, int32 [B, T], -1 at padding, with message trees.
        label_weights: float32 [L], and total_weight: float, their sum, where a sample has a loss_weight.
        num_labels, num_tokens: int, without padding; ids: the rows' names; dropped: {reason: count}; drop_records: of
        the rows in it; image_keys: see there, with_keys.
        If every row was dropped, input_ids is None and the batch has only ids, dropped and drop_records besides.
        """
        dropped, records = count_drops(samples), drop_records(samples)
        samples = [sample for sample in samples if sample.conversations]
        rest = {"ids": [sample.id for sample in samples], "dropped": dict(dropped), "drop_records": records}
        if not samples:
            return {"input_ids": None} | rest
        conversations = [conversation for sample in samples for conversation in sample.conversations]
        lengths = np.array([len(ids) for ids, _ in conversations])
        filled = np.arange(lengths.max()) < lengths[:, None]  # [B, T]
        input_ids = _fill(filled, [ids.numpy() for ids, _ in conversations], self.pad_id)
        targets = _fill(filled, [labels.numpy() for _, labels in conversations], -100)
        trees = {}
        if any(sample.branches for sample in samples):
            branches = branches_of(samples)
            trees = {
                "position_ids": torch.from_numpy(_fill(filled, [positions_of(one) for one in branches], 0)),
                "branch_ids": torch.from_numpy(_fill(filled, branches, -1).astype(np.int32)),
            }
        return self._inputs(input_ids, targets, samples) | trees | {"num_tokens": int(lengths.sum()), **rest}

    def blank(self) -> dict:
        """The inputs of a batch without a row: two positions of padding, B 1, T 2."""
        shape = (1, 2)
        return self._inputs(np.full(shape, self.pad_id), np.full(shape, -100), []) | {"num_tokens": 0}


class PromptCollator(Collator):
    """Questions to a padded batch for generation."""

    def __call__(self, rows: list[Questions]) -> dict:
        """The keyword arguments of the model's generate.

        input_ids: int64 [B, T], padded on the left; attention_mask: int64 [B, T], 0 at padding, None without padding;
        images, image_slots, image_sources, pool_index as in TrainCollator's batch.
        """
        ids = [[np.array(prompt) for prompt in row.prompts] for row in rows]
        prompts = [prompt for of_row in ids for prompt in of_row]
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = lengths.max()
        filled = np.arange(longest) >= longest - lengths[:, None]  # [B, T]
        input_ids = _fill(filled, prompts, self.pad_id)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": None if filled.all() else torch.from_numpy(filled.astype(np.int64)),
            **_image_inputs(input_ids, rows, ids, self.vlm_cfg),
        }


def image_keys(samples: list[Sample]) -> list[bytes]:
    """For each of the N images of a batch what tells it from others: the SHA-256 of its pixels.

    The vision tower sees nothing else. So a picture has one key in whatever row, file or video it is, and another one
    for each tile, layout or mirroring of it.
    """
    present = [sample.images.numpy() for sample in samples if sample.images is not None]
    return [hashlib.sha256(np.ascontiguousarray(image).data).digest() for images in present for image in images]


def branches_of(samples: list[Sample]) -> list[np.ndarray]:
    """The branch ids, int32 [T], of each conversation of the samples; 0 where there is no message tree."""
    found = []
    for sample in samples:
        given = [branches.numpy() for branches in sample.branches]
        found += given or [np.zeros(len(ids), dtype=np.int32) for ids, _ in sample.conversations]
    return found


def _label_weights(samples: list[Sample]) -> dict:
    """label_weights and total_weight of the samples' conversations; nothing where each label counts 1."""
    if all(sample.loss_weight is None for sample in samples):
        return {}
    each = [
        (sample.loss_weight or LossWeight(1.0)).of_labels(labels.numpy())
        for sample in samples
        for _, labels in sample.conversations
    ]
    weights = np.concatenate(each)
    return {"label_weights": torch.from_numpy(weights), "total_weight": float(weights.sum(dtype=np.float64))}


def _fill(filled: np.ndarray, values: list[np.ndarray], padding: int) -> np.ndarray:
    """int64 [B, T]: the values where `filled`, row by row, the padding elsewhere."""
    table = np.full(filled.shape, padding)
    table[filled] = np.concatenate(values)
    return table


def _image_inputs(
    input_ids: np.ndarray, rows: Sequence[Sample | Questions], ids: list[list[np.ndarray]], cfg: VLMConfig
) -> dict[str, torch.Tensor | None]:
    """images, image_slots and image_sources, and where a row has it pool_index, of rows with the given conversations.

    A conversation shows the first of its row's images, as many as it has image tokens for: those that stand up to its
    last question. image_sources is None where it counts from 0: where each image is used exactly once.
    """
    present = [row.images.numpy() for row in rows if row.images is not None]
    if not present:
        return {"images": None, "image_slots": None, "image_sources": None}
    image_slots = np.flatnonzero(input_ids == cfg.image_token_id)
    sources, start = [], 0
    for row, conversations in zip(rows, ids, strict=True):
        tokens = 0 if row.images is None else len(row.images) * cfg.mp_image_token_length
        stop = start + (tokens if row.pool_index is None else len(row.pool_index))
        for conversation in conversations:
            used = start + int(np.count_nonzero(conversation == cfg.image_token_id))
            assert used <= stop, "a conversation has more image tokens than its row's images"
            sources.append(np.arange(start, used))
        start = stop
    image_sources = np.concatenate(sources)
    assert len(image_sources) == len(image_slots), "image tokens and images of a row do not match"
    counts = [0 if row.images is None else len(row.images) for row in rows]
    pool_index = joined([row.pool_index for row in rows], counts, cfg)
    natural = len(image_sources) == start and bool((image_sources == np.arange(start)).all())
    return {
        "images": torch.from_numpy(np.concatenate(present)),
        "image_slots": torch.from_numpy(image_slots),
        "image_sources": None if natural else torch.from_numpy(image_sources),
    } | ({} if pool_index is None else {"pool_index": pool_index})
