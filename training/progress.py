"""What the loop keeps of its steps, and tells of them: loss, gradient norm, speed.

`run` is train.py's Run.
"""

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite."""


def remember(run, loss: torch.Tensor, micro_batches: list[dict]) -> None:
    """Keep what the next report needs."""
    rows = [row for batch in micro_batches for row in batch["ids"]]
    run.unread.append((run.step, loss, rows, sum(batch["num_tokens"] for batch in micro_batches)))
    run.position = micro_batches[-1]["position"]
    for batch in micro_batches:
        run.data.dropped["train"].update(batch["dropped"])


def read_losses(run) -> None:
    """Read the losses since the last time, the only wait for the device.

    Raises NonFiniteLossError that names the step, its rows and the last good checkpoint.
    """
    losses = run.parallel.mean(torch.stack([loss for _, loss, _, _ in run.unread])).tolist() if run.unread else []
    norm = None if run.grad_norm is None else float(run.grad_norm)
    for (step, _, rows, _), loss in zip(run.unread, losses, strict=True):
        # A finite loss whose gradient is not has spoilt the weights too; before the last step the next loss tells.
        if not math.isfinite(loss) or (step == run.step and norm is not None and not math.isfinite(norm)):
            good = run.folder / "checkpoints" / "last"
            saved = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint had been saved yet"
            what = f"loss {loss} at step {step} (gradient norm {norm if step == run.step else 'not read'})"
            rows = [row for rows_of_rank in run.parallel.gather(rows) for row in rows_of_rank]
            raise NonFiniteLossError(f"{what}; {saved}; rows of the batch: {', '.join(rows)}")
    (tokens,) = run.parallel.sum(sum(tokens for *_, tokens in run.unread))
    run.unread_tokens += int(tokens)
    run.total_tokens += int(tokens)
    run.losses += losses
    run.unread = []


def evaluate(run, compute: Callable[[], T]) -> tuple[T, float]:
    """What compute returns on rank 0, and the seconds that it took; they do not count into tokens/s."""
    started = time.perf_counter()
    value = run.parallel.evaluate(compute)
    run.stop.agree()
    seconds = time.perf_counter() - started
    run.eval_time_s += seconds
    run.unread_since += seconds
    return value, seconds


def add_up_ranks(run) -> None:
    """At the end: what each rank has counted of its own rows becomes the sum over all of them."""
    run.flops.done, run.flops.unfrozen = map(int, run.parallel.sum(run.flops.done, run.flops.unfrozen))
    for counts in run.parallel.gather(dict(run.data.dropped["train"]))[1:]:
        run.data.dropped["train"].update(counts)


def log_progress(run) -> None:
    """Show and record the progress since the last report."""
    read_losses(run)
    now = time.perf_counter()
    loss = sum(run.losses) / len(run.losses)
    tokens_per_s = run.unread_tokens / (now - run.unread_since)
    lr = max(group["lr"] for group in run.optimizer.param_groups)
    values = {
        "train/loss": loss,
        "train/lr": lr,
        "train/tokens_per_s": tokens_per_s,
        "train/grad_norm": None if run.grad_norm is None else float(run.grad_norm),
    }
    postfix = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "tok/s": f"{tokens_per_s:,.0f}"}
    if run.monitor is not None:
        values |= run.monitor.scalars()
        postfix["frozen"] = f"{run.monitor.frozen_share():.0%}"
    run.log.record(run.step, values)
    run.log.show(run.step, **postfix)
    run.losses, run.unread_tokens, run.unread_since = [], 0, now
