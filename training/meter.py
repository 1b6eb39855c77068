"""What a run measures of itself: losses, gradient norm, tokens, FLOPs, memory, and where the time went."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from training.flops import FlopCounter, card_tflops
from training.memory import peak_memory_bytes, reserved_memory_bytes
from training.parallel import Parallel


class NonFiniteLossError(Exception):
    """The loss or its gradient is NaN or infinite."""


class Meter:
    """Losses stay on the device until `read`, which is the loop's one wait for it.

    Time is divided among clocks, in seconds: "startup", "train", "eval", "test", "rollback", "save". Time within
    `with meter.clock(name)` is that clock's, all other time of the loop is "train"'s.
    """

    def __init__(self, flops: FlopCounter, parallel: Parallel, device: torch.device):
        self.flops, self.parallel, self.device = flops, parallel, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.since = time.perf_counter()  # the beginning of what no clock has counted yet
        self.grad_norm: torch.Tensor | None = None  # of the latest step, before clipping
        self.unread: list[tuple[int, torch.Tensor, list[str], int]] = []  # (step, loss, row ids, tokens)
        self.losses: list[float] = []  # of the steps since the last report
        self.tokens = self.total_tokens = 0  # since the last report, and of the whole run; all ranks together
        self.images, self.wait_s = 0, 0.0  # since the last report: this rank's images or tiles, and waits for data
        self.total_wait_s = 0.0
        self.reported_flops, self.reported_s = 0, 0.0  # of training as at the last report: this rank's

    def start(self, process_started: float) -> None:
        """The loop begins. process_started: time.perf_counter() at the beginning of the process."""
        self.since = time.perf_counter()
        self.seconds["startup"] += self.since - process_started

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Within this context time counts as `name`."""
        self._count("train")
        try:
            yield
        finally:
            self._count(name)

    def _count(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self.since
        self.since = now

    def add(self, step: int, loss: torch.Tensor, batches: list[dict]) -> None:
        """Count optimizer step `step`, counted from 1; to be called while requires_grad is as it was in its passes.

        loss: float32 scalar on the device.
        """
        self.flops.add(batches)
        self.images += sum(len(batch["images"]) for batch in batches if batch["images"] is not None)
        self.wait_s += (waited := sum(batch.get("wait_s", 0.0) for batch in batches))
        self.total_wait_s += waited
        rows = [row for batch in batches for row in batch["ids"]]
        self.unread.append((step, loss, rows, sum(batch["num_tokens"] for batch in batches)))

    def read(self) -> None:
        """Read the losses since the last time. Raises NonFiniteLossError that names the step and its rows."""
        if not self.unread:
            return
        losses = self.parallel.mean(torch.stack([loss for _, loss, _, _ in self.unread])).tolist()
        norm = None if self.grad_norm is None else float(self.grad_norm)
        last = self.unread[-1][0]
        for (step, _, rows, _), loss in zip(self.unread, losses, strict=True):
            # A finite loss whose gradient is not has spoilt the weights too; before the last step the next loss tells.
            if not math.isfinite(loss) or (step == last and norm is not None and not math.isfinite(norm)):
                rows = [row for rows_of_rank in self.parallel.gather(rows) for row in rows_of_rank]
                read = norm if step == last else "not read"
                raise NonFiniteLossError(
                    f"loss {loss} at step {step} (gradient norm {read}); rows of the batch: {', '.join(rows)}"
                )
        (tokens,) = self.parallel.sum(sum(tokens for *_, tokens in self.unread))
        self.tokens += int(tokens)
        self.total_tokens += int(tokens)
        self.losses += losses
        self.unread = []

    def report(self) -> dict[str, float | None]:
        """The numbers since the last report, for metrics.jsonl and the progress bar."""
        self.read()
        self._count("train")
        seconds = self.seconds["train"] - self.reported_s
        flops, images = self.parallel.sum(self.flops.trained - self.reported_flops, self.images)
        tflops_per_s = flops / seconds / 1e12 if seconds else None
        peak, reserved, card = (known(self.device) for known in (peak_memory_bytes, reserved_memory_bytes, card_tflops))
        values = {
            "train/loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "train/grad_norm": None if self.grad_norm is None else float(self.grad_norm),
            "train/tokens_per_s": self.tokens / seconds if seconds else None,
            "train/images_per_s": images / seconds if seconds else None,
            "train/tflops_per_s": tflops_per_s,
            "train/mfu": tflops_per_s / card / self.parallel.world_size if card and tflops_per_s else None,
            "train/peak_memory_gib": None if peak is None else peak / 2**30,
            "train/reserved_memory_gib": None if reserved is None else reserved / 2**30,
            "train/data_wait_time_s": self.wait_s,
        }
        self.losses, self.tokens, self.images, self.wait_s = [], 0, 0, 0.0
        self.reported_flops, self.reported_s = self.flops.trained, self.seconds["train"]
        return values

    def sum_over_ranks(self) -> None:
        """At the end of the run: let rank 0's FLOPs be those of all ranks."""
        flops = self.flops
        flops.done, flops.measured, flops.unfrozen = map(
            int, self.parallel.sum(flops.done, flops.measured, flops.unfrozen)
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers. Raises NonFiniteLossError: of weights that are NaN no checkpoint shall be written."""
        self.read()
        self._count("train")
        return {
            "seconds": dict(self.seconds),
            "losses": list(self.losses),
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "images": self.images,
            "total_wait_time_s": self.total_wait_s,
            "reported_flops": self.reported_flops,
            "reported_s": self.reported_s,
            "flops": self.flops.state_dict(),
        }

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Continue from the states of all ranks of the saved run, which may have had another number of them."""
        rank, same = self.parallel.rank, len(states) == self.parallel.world_size
        state = states[rank if same else 0]
        self.seconds.update(state["seconds"])
        self.losses, self.tokens, self.total_tokens = list(state["losses"]), state["tokens"], state["total_tokens"]
        self.images = state.get("images", 0)  # a checkpoint from before they were counted has none
        self.total_wait_s = state.get("total_wait_time_s", 0.0)
        self.reported_s, self.reported_flops = state["reported_s"], state["reported_flops"]
        self.flops.load_rank_states([other["flops"] for other in states])
        if not same:  # rank 0 takes what all of them have counted
            self.reported_flops = sum(other["reported_flops"] for other in states) if rank == 0 else 0
