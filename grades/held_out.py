"""For the metric rollback under transformers.Trainer: averaged weights, and losses on rows of its eval_dataset."""

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from grades.averaging import AveragedWeights, OwnState
from grades.components import clean_name
from grades.rollback import mean_and_error

logger = logging.getLogger("grades")


class HeldOut:
    """The averages of a trainer's model, kept beside the optimizer, and the loss of each of a fixed sample of rows."""

    def __init__(self, trainer: Any, config: Any) -> None:
        """config: with average_weights and rollback_rows. Raises ValueError without an eval_dataset."""
        if trainer.eval_dataset is None:
            raise ValueError("metric rollback: needs the trainer's eval_dataset, rows that it does not train on")
        self.trainer, self.rows = trainer, config.rollback_rows
        self.averages = AveragedWeights(trainer.model.parameters(), OwnState(), config.average_weights)
        self.batches: list[Any] | None = None  # on the CPU

    def losses(self, same_vision: bool = False, begin: float = 0.0, end: float = 1.0) -> list[tuple[float, int]]:
        """(summed loss in nats, label tokens) of each row of this share of the batches (see grades.rollback.Evaluate),
        in the same order on all ranks. Draws no random number."""
        model, sample, found = self.trainer.model, self._sample(), []
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for batch in sample[math.ceil(begin * len(sample)) : math.ceil(end * len(sample))]:
                    inputs = self.trainer._prepare_inputs(batch)
                    with self.trainer.compute_loss_context_manager():
                        logits = model(**inputs).logits
                    is_aligned = getattr(model.config, "is_encoder_decoder", False)
                    found.append(row_losses(logits, inputs["labels"], is_aligned))
        finally:
            model.train(was_training)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, found)
            # Batch by batch, so that shares of the sample stand one after the other as they do in the whole.
            found = [rows for batches in itertools.zip_longest(*everyone, fillvalue=()) for rows in batches]
        return [row for rows in found for row in rows]

    def _sample(self) -> list[Any]:
        """The first batches of the eval_dataset, with at least `rows` rows on all ranks together."""
        if self.batches is None:
            self.batches, count = [], 0
            processes = self.trainer.accelerator.num_processes
            for batch in self.trainer.get_eval_dataloader():
                self.batches.append(batch)
                count += len(batch["labels"]) * processes
                if count >= self.rows:
                    break
        return self.batches

    def take_better(self) -> None:
        """Leave the model with the averaged weights if their loss on the sample is lower, else with the last ones."""
        last, _ = mean_and_error(self.losses())
        self.averages.swap()
        averaged, _ = mean_and_error(self.losses())
        if not averaged <= last:
            self.averages.swap()
        taken = "averaged" if averaged <= last else "last"
        logger.info(f"GradES: held-out loss {averaged:.4f} of the averaged weights, {last:.4f} of the last: {taken}")

    def state_dict(self) -> dict[str, Any]:
        """What is held of each parameter, by its name."""
        names = {parameter: clean_name(name) for name, parameter in self.trainer.model.named_parameters()}
        held = {names[p]: dict(state) for p, state in self.averages.state.items() if state}
        return self.averages.state_dict() | {"held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        for name, parameter in self.trainer.model.named_parameters():
            for key, value in state["held"].get(clean_name(name), {}).items():
                self.averages.state[parameter][key] = value.to(parameter.device, copy=True)
        self.averages.load_state_dict(dict(state))


def row_losses(logits: torch.Tensor, labels: torch.Tensor, is_aligned: bool) -> list[tuple[float, int]]:
    """(summed loss in nats, label tokens) of each row. logits: [B, T, V]; labels: int [B, T], -100 where there is none.

    is_aligned: logits at t are for labels at t (encoder-decoders); else for those at t + 1.
    """
    if not is_aligned:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    sums, counts = losses.view(labels.shape).sum(1), (labels != -100).sum(1)
    return list(zip(sums.tolist(), counts.tolist(), strict=True))
