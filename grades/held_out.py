"""For the metric rollback under transformers.Trainer: averaged weights, and losses on rows of its eval_dataset."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from grades.averaging import AveragedWeights, OwnState
from grades.components import clean_name
from grades.rollback import FIRST, OTHERS, VisionIs, mean_and_error

logger = logging.getLogger("grades")


class HeldOut:
    """The averages of a trainer's model, kept beside the optimizer, and the loss of each of a fixed sample of rows."""

    def __init__(self, trainer: Any, config: Any) -> None:
        """config: with average_weights and rollback_rows. Raises ValueError without an eval_dataset."""
        if trainer.eval_dataset is None:
            raise ValueError("metric rollback: needs the trainer's eval_dataset, rows that it does not train on")
        self.trainer, self.rows = trainer, config.rollback_rows
        self.averages = AveragedWeights(trainer.model.parameters(), OwnState(), config.average_weights)
        with torch.random.fork_rng(devices=[]):
            self.batches = self._sample()
        # Encoder-decoders and masked language models: the logits at t are for the labels at t.
        masked = any(type(module).__name__.endswith("ForMaskedLM") for module in trainer.model.modules())
        self.is_aligned = masked or getattr(trainer.model.config, "is_encoder_decoder", False)

    def losses(self, vision: VisionIs, first: bool) -> list[tuple[float, int]]:
        """(summed loss in nats, label tokens) of each row of a part of the batches (see grades.rollback.Evaluate), in
        the same order on all ranks. Draws no random number."""
        model, found = self.trainer.model, []
        every = 4 if len(self.batches) >= 4 else len(self.batches) + 1  # of few batches none stands for all
        batches = [batch for i, batch in enumerate(self.batches, start=1) if (i % every == 0) == first]
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for batch in batches:
                    inputs = self.trainer._prepare_inputs(batch)
                    with self.trainer.compute_loss_context_manager():
                        logits = model(**inputs).logits
                    found += row_losses(logits, inputs["labels"], self.is_aligned)
        finally:
            model.train(was_training)
            for module in model.modules():  # FSDP2 keeps some weights whole; what is exchanged later are their shards
                if isinstance(module, FSDPModule):
                    module.reshard()
        return [row for rows in of_all_ranks(found) for row in rows]

    def mean_loss(self) -> float:
        """Of all rows, under the model's present weights."""
        mean, _ = mean_and_error(self.losses("other", FIRST) + self.losses("other", OTHERS))
        return mean

    def _sample(self) -> list[Any]:
        """The first batches of the eval_dataset, or of the first one of several, on the CPU: with at least `rows` rows
        on all ranks together. Raises ValueError where a batch has no labels, or none of all rows a label token."""
        from accelerate.utils import send_to_device

        batches, count, labels = [], 0, 0
        processes, given = self.trainer.accelerator.num_processes, self.trainer.eval_dataset
        name = next(iter(given)) if isinstance(given, dict) else None
        for batch in self.trainer.get_eval_dataloader(name):
            there = batch.get("labels")
            if there is None or there.dim() != 2:
                raise ValueError(
                    f"metric rollback: a batch of eval_dataset has no labels of tokens [rows, tokens], but "
                    f"{', '.join(batch)}; it compares losses of tokens: take another metric"
                )
            batches.append(send_to_device(batch, "cpu"))
            count, labels = count + len(there) * processes, labels + int((there != -100).sum())
            if count >= self.rows:
                break
        if not sum(of_all_ranks(labels)):  # no rank may end alone
            raise ValueError(
                f"metric rollback: the {count} rows of eval_dataset that it would compare have no label but -100"
            )
        return batches

    def take_better(self) -> None:
        """Leave the model with the averaged weights if their loss on the sample is lower, else with the last ones."""
        last = self.mean_loss()
        self.averages.swap()
        averaged = self.mean_loss()
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


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def row_losses(logits: torch.Tensor, labels: torch.Tensor, is_aligned: bool) -> list[tuple[float, int]]:
    """(summed loss in nats, label tokens) of each row. logits: [B, T, V]; labels: int [B, T], -100 where there is none.

    is_aligned: logits at t are for labels at t (encoder-decoders, masked language models); else for those at t + 1.
    """
    if not is_aligned:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    sums, counts = losses.view(labels.shape).sum(1), (labels != -100).sum(1)
    return list(zip(sums.tolist(), counts.tolist(), strict=True))
