"""One optimizer step, as the training loop and the benchmarks run it."""

import contextlib

import torch
import torch.nn as nn

from data.collators import to_device
from models.vision_language_model import VisionLanguageModel
from training.feature_cache import FeatureCache
from training.parallel import Parallel


def forward_backward(
    model: VisionLanguageModel,
    micro_batches: list[dict],
    device: torch.device,
    autocast: contextlib.AbstractContextManager,
    parallel: Parallel | None = None,
    cache: FeatureCache | None = None,
) -> torch.Tensor:
    """Accumulate the gradient over the micro-batches; returns the step's loss, a float32 scalar on the device.

    Each micro-batch's loss is a sum over its label tokens; it is divided by their number, or by the sum of their
    weights where they have some, over all micro-batches of all ranks: a label token counts the same wherever it stands.
    With several ranks the mean of what they
    return is the step's loss. cache: of a frozen vision tower's features; a micro-batch gets the number of
    "cached_images" that it spared.
    """
    parallel = parallel or Parallel()
    weight, num_images = parallel.sum(
        sum(batch.get("total_weight", batch["num_labels"]) for batch in micro_batches),
        sum(len(batch["images"]) for batch in micro_batches if batch.get("images") is not None),
    )
    weight_per_rank = (weight or 1) / parallel.world_size  # gradients are averaged over the ranks
    total = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, start=1):
        inputs = parallel.complete(to_device(batch, device), model)
        with parallel.accumulation(model, last=number == len(micro_batches)):
            with autocast:
                if cache is not None:
                    inputs, batch["cached_images"] = cache.complete(inputs, batch["image_keys"])
                loss = parallel.module(model)(**inputs) / weight_per_rank
            loss.backward()
        total += loss.detach()
    parallel.forget_blanks(model, num_images)
    return total


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor | None:
    """Scale the gradient down to max_norm; returns its norm before that, None where max_norm is 0."""
    if max_norm == 0:
        return None
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded weights it is a DTensor
    # On a CPU the norm is known at once, and a pass over the gradients is spared where it would multiply by 1.
    if whole.device.type != "cpu" or not max_norm / (whole + 1e-6) >= 1:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole
