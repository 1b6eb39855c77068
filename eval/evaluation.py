"""Running a model over evaluation batches: mean loss, and greedy answers to questions."""

import contextlib
from collections.abc import Iterable

import torch

from eval.scoring import score


def on_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch's tensors, which are the model's arguments, on its device."""
    return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}


@torch.no_grad()
def mean_loss(model, batches: Iterable[dict], device: torch.device, autocast: contextlib.AbstractContextManager):
    """Mean loss over the label tokens of the batches, in nats; None where there is none."""
    model.eval()
    total, labels = torch.zeros((), device=device), 0
    for batch in batches:
        with autocast:
            total += model(**on_device(batch, device))
        labels += batch["num_labels"]
    model.train()
    return total.item() / labels if labels else None


def exact_match(
    model,
    tokenizer,
    batches: Iterable[tuple[dict, list[str], list[str | None], list[str]]],
    max_new_tokens: int,
    device: torch.device,
    autocast: contextlib.AbstractContextManager,
) -> dict[str, float | None]:
    """Share of the questions whose greedy answer is the expected one: "all" and one entry a source.

    batches: (left-padded prompts, expected answers, their sources, row ids) as data.loader.prompt_batches gives.
    """
    model.eval()
    pairs: list[tuple[str, str, str | None]] = []
    for batch, expected, sources, _ in batches:
        with autocast:
            new_ids = model.generate(
                **on_device(batch, device),
                max_new_tokens=max_new_tokens,
                greedy=True,
                eos_token_id=tokenizer.eos_token_id,
            )
        answers = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        pairs += zip(answers, expected, sources, strict=True)
    model.train()
    return score(pairs)
