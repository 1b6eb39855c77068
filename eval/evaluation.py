"""Running a model over evaluation batches: mean loss, and greedy answers to questions."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from data.collators import PromptCollator, TrainCollator, to_device
from data.drops import DropCounter, nothing_usable
from data.loader import PromptBatch, batches_of_both, eval_batches, prompt_batches, whole_row_batches
from data.pipeline import Data
from eval.scoring import score
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel

BLOCKS = 4  # into which at least the rows of row_losses are divided, so that every fourth stands for all
Autocast = contextlib.AbstractContextManager
Answered: TypeAlias = tuple[str, str | tuple[str, ...], str | None]
RowLosses: TypeAlias = list[tuple[float, int]]  # of each row: summed loss in nats, label tokens
Complete: TypeAlias = Callable[[dict[str, torch.Tensor], VisionLanguageModel], dict[str, torch.Tensor]]


def _as_they_are(inputs: dict[str, torch.Tensor], model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return inputs


@dataclass
class Evaluator:
    """Measures the model on the validation and test rows of a run's data.

    Draws no random numbers and leaves every weight as it is, so that a run with an evaluation more is the same run.
    """

    model: VisionLanguageModel
    data: Data
    cfg: TrainConfig
    device: torch.device
    autocast: Autocast
    until: Callable[[Iterable], Iterator] = iter  # ends the batches early where the run is to stop
    share: tuple[int, int] = (0, 1)  # this rank, of how many, that compute row_losses together
    complete: Complete = _as_they_are  # what goes into the model where ranks do so
    held_out: list[dict] = field(default_factory=list)  # the batches of row_losses, once they are made
    # Of each one's images, at its "new" call and at the check before: on the CPU, as those of many tiles are many.
    features: list[torch.Tensor | None] = field(default_factory=list)
    before: list[torch.Tensor | None] = field(default_factory=list)
    measured: list[dict] = field(default_factory=list)  # those of them that the latest call took

    def loss(self) -> float | None:
        """Mean loss over the label tokens of the validation rows, in nats; None where there is none."""
        self.data.dropped["val"] = DropCounter()
        collator = TrainCollator(self.data.tokenizer.pad_token_id, self.model.cfg)
        batches = eval_batches(self.data.val_dataset, collator, self.cfg, self.data.dropped["val"])
        return mean_loss(self.model, self.until(batches), self.device, self.autocast)

    def loss_and_answers(self) -> dict[str, float | None]:
        """val/loss and what `answers` gives of the validation rows, each of which is decoded once for both."""
        dropped = self.data.dropped["val"] = DropCounter()
        pad_id, cfg = self.data.tokenizer.pad_token_id, self.model.cfg
        collators = TrainCollator(pad_id, cfg), PromptCollator(pad_id, cfg)
        total, labels, pairs = torch.zeros((), device=self.device), 0, []
        for batches, prompts in self.until(batches_of_both(self.data.val_dataset, *collators, self.cfg, dropped)):
            loss, count = summed_loss(self.model, batches, self.device, self.autocast)
            total, labels = total + loss, labels + count
            pairs += self._answered(prompts)
        return {"val/loss": total.item() / labels if labels else None} | _named("val", score(pairs))

    def hold_out(self, rows: int) -> list[dict]:
        """The batches of row_losses, which are made at the first call. Raises ValueError where they have no label.

        However many ranks there are, the blocks of which every fourth stands for all hold the same rows.
        """
        if not self.held_out:
            collator, dropped = TrainCollator(self.data.tokenizer.pad_token_id, self.model.cfg), DropCounter()
            size = max(1, self.cfg.eval_batch_size // (self.cfg.turns_per_image or 1))
            size, parts = min(size, math.ceil(rows / BLOCKS)), self.share[1]
            if self.cfg.tiles_per_row:  # then a micro-batch is what fits
                size = min(size, self.cfg.batch_size)
            drawn = self.data.drawn_validation_rows()
            self.held_out = list(whole_row_batches(drawn, collator, self.cfg, dropped, rows, size, parts))
            self.features, self.before = [None] * len(self.held_out), [None] * len(self.held_out)
            if not any(batch["num_labels"] for batch in self.held_out):
                if dropped:
                    raise nothing_usable(dropped, f"validation row of --rollback_rows {rows}")
                raise ValueError(f"rollback_rows {rows}: none of these validation rows has a label token")
        return self.held_out

    def row_losses(self, rows: int, vision: str = "other", first: bool | None = None) -> list[RowLosses]:
        """(summed loss in nats, label tokens) of each row of this rank's share of the batches, batch by batch.

        They hold the first `rows` validation rows, whose draws are those of training (turns_per_image, its weights,
        mirroring) and the same at each call. A row's conversations are about one image, so that for the standard error
        they are one observation.
        vision: which weights the vision tower has (see grades.rollback.Evaluate). first: every fourth block alone;
        False: all others.
        """
        self.hold_out(rows)
        blocks = [batch["block"] for batch in self.held_out]
        numbers = [i for i, block in enumerate(blocks) if first is None or (block % BLOCKS == 0) == first]
        rank, ranks = self.share
        own = numbers[rank::ranks]
        # Ranks whose weights are sharded meet in the layers: each makes as many passes, one of no use at the end.
        made = [*own, *numbers[:1]][: math.ceil(len(numbers) / ranks)]
        self.measured = [self.held_out[i] for i in made]
        kept = {"same": self.features, "before": self.before}.get(vision)
        known = None if kept is None else [kept[i] for i in made]
        losses, used = row_losses(self.model, self.measured, self.device, self.autocast, known, self.complete)
        for i, batch, features in zip(made, self.measured, used, strict=True):
            if vision == "before":
                self.before[i] = None  # nobody asks for it again
            elif vision != "other":
                self.features[i] = None if features is None else features.cpu()
            # For the FLOPs; what a resumed run has to compute once more is not counted, so that it counts the same.
            is_spared = kept is not None and batch["images"] is not None
            batch["cached_images"] = len(features) if is_spared and features is not None else 0
        return losses[: len(own)]

    def next_check(self, vision: str) -> None:
        """What the vision tower of this check is at the next one: "same", "before" or "other"."""
        self.before = list(self.features) if vision == "before" else [None] * len(self.held_out)
        if vision != "same":
            self.features = [None] * len(self.held_out)

    def answers(self, split: str = "val") -> dict[str, float | None]:
        """{split}/exact_match of the greedy answers to the questions of "val" or "test", and {split}/exact_match/SOURCE
        of each source of questions: shares in [0, 1], None where there is no question."""
        tokenizer, dataset = self.data.tokenizer, self.data.val_dataset if split == "val" else self.data.test_dataset
        assert dataset is not None, "there are test questions"
        # The validation rows' drops are counted by their loss already.
        counter = self.data.dropped.setdefault("test", DropCounter()) if split == "test" else None
        batches = prompt_batches(dataset, PromptCollator(tokenizer.pad_token_id, self.model.cfg), self.cfg, counter)
        return _named(split, score(self._answered(self.until(batches))))

    def _answered(self, batches: Iterable[PromptBatch]) -> list[Answered]:
        length, tokenizer = self.cfg.max_new_tokens, self.data.tokenizer
        return answered(self.model, tokenizer, batches, length, self.device, self.autocast)


def _named(split: str, scores: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{split}/exact_match" + ("" if key == "all" else f"/{key}"): value for key, value in scores.items()}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and compiled blocks in eager mode: the changing lengths of answers would recompile them."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        yield
    model.train()


@torch.no_grad()
def mean_loss(
    model: VisionLanguageModel, batches: Iterable[dict], device: torch.device, autocast: Autocast
) -> float | None:
    """Mean loss over the label tokens of the batches, in nats; None where there is none."""
    total, labels = summed_loss(model, batches, device, autocast)
    return total.item() / labels if labels else None


@torch.no_grad()
def summed_loss(
    model: VisionLanguageModel, batches: Iterable[dict], device: torch.device, autocast: Autocast
) -> tuple[torch.Tensor, int]:
    """(loss in nats, float32 [] on the device, label tokens) of all the batches."""
    total, labels = torch.zeros((), device=device), 0
    with evaluating(model):
        for batch in batches:
            with autocast:
                total += model(**to_device(batch, device))
            labels += batch["num_labels"]
    return total, labels


@torch.no_grad()
def row_losses(
    model: VisionLanguageModel,
    batches: list[dict],
    device: torch.device,
    autocast: Autocast,
    features: list[torch.Tensor | None] | None = None,
    complete: Complete = _as_they_are,
) -> tuple[list[RowLosses], list[torch.Tensor | None]]:
    """((summed loss in nats, label tokens) of each row of each batch, the features of each batch's images).

    A batch's "row_sizes" says how many of its conversations each row has; without it, one. features: those of an
    earlier call, where the vision tower is the same. complete: see Parallel.complete. Waits for the device once.
    """
    sums, counts, used = [], [], []
    with evaluating(model):
        for batch, known in zip(batches, features or [None] * len(batches), strict=True):
            inputs = complete(to_device(batch, device), model)
            conversations, length = batch["input_ids"].shape
            if known is not None:
                inputs.pop("images")
            given: list[torch.Tensor] = []
            # A hook, as sharded weights are whole only while the model itself is called.
            hook = model.vision_encoder.register_forward_hook(
                lambda module, images, output, given=given: given.append(output)
            )
            of_images = None if known is None else known.to(device, non_blocking=True)
            with autocast:
                losses = model(**inputs, image_features=of_images, loss_per_label=True)
            hook.remove()
            used.append(given[0] if given else known)
            sizes = batch.get("row_sizes", [1] * conversations)
            of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))  # int64 [conversations]
            rows = of_row[batch["label_positions"] // length]  # int64 [L]
            there = rows.to(device, non_blocking=True)
            sums.append(torch.zeros(len(sizes), device=device).index_add_(0, there, losses))
            counts.append(torch.bincount(rows, minlength=len(sizes)).tolist())
    found = iter(torch.cat(sums).tolist() if sums else [])
    return [[(next(found), count) for count in of_batch] for of_batch in counts], used


def answered(
    model: VisionLanguageModel,
    tokenizer: Any,
    batches: Iterable[PromptBatch],
    max_new_tokens: int,
    device: torch.device,
    autocast: Autocast,
) -> list[Answered]:
    """The greedy answer to each question of the batches, the expected one and its source.

    batches: (left-padded prompts, expected answers, their sources, row ids) as data.loader.prompt_batches gives.
    """
    pairs: list[Answered] = []
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "greedy": True, "eos_token_id": tokenizer.eos_token_id}
    with evaluating(model):
        for batch, expected, sources, _ in batches:
            with autocast:
                new_ids = model.generate(**options | to_device(batch, device))
            answers = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
            pairs += zip(answers, expected, sources, strict=True)
    return pairs
