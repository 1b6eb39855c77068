"""One optimizer step, as the training loop and the benchmarks run it."""

import contextlib

import torch
import torch.nn as nn


def model_inputs(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch's tensors are the model's arguments; the copies overlap with what the device still computes."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}


def forward_backward(
    model: nn.Module, micro_batches: list[dict], device: torch.device, autocast: contextlib.AbstractContextManager
) -> torch.Tensor:
    """Accumulate the gradient over the micro-batches; returns the step's loss, a float32 scalar on the device.

    Each micro-batch's loss is a sum over its label tokens; it is divided by their number over all micro-batches, so
    that every label token weighs the same wherever it stands.
    """
    num_labels = sum(batch["num_labels"] for batch in micro_batches)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        with autocast:
            loss = model(**model_inputs(batch, device)) / num_labels
        loss.backward()
        total += loss.detach()
    return total


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor | None:
    """Scale the gradient down to max_norm; returns its norm before that, None where max_norm is 0."""
    if max_norm == 0:
        return None
    return nn.utils.clip_grad_norm_((p for p in model.parameters() if p.grad is not None), max_norm)
