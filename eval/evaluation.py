"""Running a model over evaluation batches: mean loss, and greedy answers to questions."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from data.collators import PromptCollator, TrainCollator
from data.datasets import DropCounter, VQADataset
from data.loader import eval_batches, prompt_batches
from data.pipeline import Data
from eval.scoring import score
from models.config import TrainConfig


@dataclass
class Evaluator:
    """Measures the model on the validation and test rows of a run's data."""

    model: torch.nn.Module
    data: Data
    cfg: TrainConfig
    device: torch.device
    autocast: contextlib.AbstractContextManager
    until: Callable[[Iterable], Iterator] = iter  # ends the batches early where the run is to stop

    def validate(self, loss: float | None = None) -> dict[str, float | None]:
        """val/loss, measured where it is not given, and val/exact_match over all and by source."""
        loss = self.loss() if loss is None else loss
        return {"val/loss": loss, **self.ask(self.data.val_dataset, "val")}

    def loss(self) -> float | None:
        """Mean loss over the label tokens of the validation rows, in nats."""
        self.data.dropped["val"] = DropCounter()
        collator = TrainCollator(self.data.tokenizer.pad_token_id, self.model.cfg)
        batches = eval_batches(self.data.val_dataset, collator, self.cfg, self.data.dropped["val"])
        return mean_loss(self.model, self.until(batches), self.device, self.autocast)

    def ask(self, dataset: VQADataset, split: str) -> dict[str, float | None]:
        """Exact match of the greedy answers to the dataset's questions, over all and by source."""
        tokenizer = self.data.tokenizer
        # The validation rows' drops are counted by their loss already.
        counter = self.data.dropped.setdefault("test", DropCounter()) if split == "test" else None
        batches = prompt_batches(dataset, PromptCollator(tokenizer.pad_token_id, self.model.cfg), self.cfg, counter)
        scores = exact_match(
            self.model, tokenizer, self.until(batches), self.cfg.max_new_tokens, self.device, self.autocast
        )
        return {f"{split}/exact_match" + ("" if key == "all" else f"/{key}"): value for key, value in scores.items()}


def on_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch's tensors, which are the model's arguments, on its device."""
    return {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Without dropout, and compiled blocks in eager mode: the changing lengths of answers would recompile them."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.train()


@torch.no_grad()
def mean_loss(model, batches: Iterable[dict], device: torch.device, autocast: contextlib.AbstractContextManager):
    """Mean loss over the label tokens of the batches, in nats; None where there is none."""
    total, labels = torch.zeros((), device=device), 0
    with evaluating(model):
        for batch in batches:
            with autocast:
                total += model(**on_device(batch, device))
            labels += batch["num_labels"]
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
    pairs: list[tuple[str, str, str | None]] = []
    options = {"max_new_tokens": max_new_tokens, "greedy": True, "eos_token_id": tokenizer.eos_token_id}
    with evaluating(model):
        for batch, expected, sources, _ in batches:
            with autocast:
                new_ids = model.generate(**on_device(batch, device), **options)
            answers = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
            pairs += zip(answers, expected, sources, strict=True)
    return score(pairs)
