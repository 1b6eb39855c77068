"""The metrics of GradES written down a second time, slowly and in numpy, over random models."""

import math
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from grades import GradESConfig, GradESMonitor
from grades.config import METRICS

STEPS, INTERVAL, ROWS, BETA2, CLIP, WORLD = 6, 2, 6, 0.95, 0.05, 2
NEVER = 1e-9  # a tau that nothing is below
RUN, LEAST = 8, 4096  # a sample is made of runs of so many elements, and is of at least so many
Arrays = dict[str, list[np.ndarray]]  # by component, one for each of its weights


class Adapted(nn.Module):
    """A linear with adapters, built as peft builds it."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.base_layer = nn.Linear(width, inner).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, inner, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Experts(nn.Module):
    """Two stacks of matrices; every expert sees every row."""

    def __init__(self, experts: int, width: int, inner: int):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, inner) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / inner**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("bi,eio->beo", x, self.up).tanh().unsqueeze(2) @ self.down).mean(dim=(1, 2))


class Block(nn.Module):
    def __init__(self, kind: str, rng: random.Random, width: int):
        super().__init__()
        self.norm, inner = nn.LayerNorm(width), rng.choice((24, 88, 130))
        if kind == "experts":
            self.mix: nn.Module = Experts(rng.choice((2, 3)), width, inner)
        else:
            first = Adapted(width, inner) if kind == "adapted" else nn.Linear(width, inner, bias=rng.random() < 0.5)
            self.mix = nn.Sequential()
            self.mix.add_module("fc_in", first)
            self.mix.add_module("act", nn.Tanh())
            self.mix.add_module("fc_out", nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class Random(nn.Module):
    """Blocks of all kinds and of random sizes, in random order."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        rng = random.Random(seed)
        width, kinds = rng.choice((17, 64, 72)), ["linear", "adapted", "experts", "linear"]
        rng.shuffle(kinds)
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList(Block(kind, rng, width) for kind in kinds)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return x.square().mean()


def rows(step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """This rank's share of a step's rows."""
    ids = torch.randint(10, (ROWS,), generator=torch.Generator().manual_seed(step))
    return ids[rank::world]


def arrays(components, get) -> Arrays:
    """Copies in float64; get: of a weight."""
    return {c.name: [get(weight).detach().double().numpy().copy() for weight in c.weights] for c in components}


class Record:
    """A run's weights after each step, its whole gradients before clipping, and what the monitor measured."""

    def __init__(self, seed: int, metric: str, sample: int, rank: int = 0, world: int = 1):
        torch.manual_seed(0)
        model = Random(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, BETA2))
        config = GradESConfig(
            metric=metric, monitor_sample=sample, compute_interval=INTERVAL, alpha=0, vision_tau=NEVER,
            language_tau=NEVER,
        )  # fmt: skip
        module = model if world == 1 else DistributedDataParallel(model)
        rewrap = None if world == 1 else lambda: None
        self.monitor = GradESMonitor(config, module, optimizer, STEPS, rewrap=rewrap)
        self.components = self.monitor.components
        self.weights, self.gradients = {0: arrays(self.components, lambda w: w)}, {}
        self.clips: dict[int, float] = {}
        for step in range(1, STEPS + 1):
            # Of this rank's rows alone, by a plain backward pass.
            model(rows(step, rank, world)).backward()
            self.gradients[step] = arrays(self.components, lambda w: w.grad)
            optimizer.zero_grad(set_to_none=True)
            module(rows(step, rank, world)).backward()
            self.monitor.after_backward(step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            self.clips[step] = min(1.0, CLIP / (norm + 1e-6))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.monitor.after_step(step)
            self.weights[step] = arrays(self.components, lambda w: w)

    def plain(self) -> dict:
        """What another process can compare."""
        return {
            "checks": self.monitor.checks, "names": [c.name for c in self.components], "weights": self.weights,
            "gradients": self.gradients, "clips": self.clips,
        }  # fmt: skip


def looked_at(x: np.ndarray, sample: int) -> tuple[np.ndarray, float]:
    """The elements that a sample of 1/sample looks at, and by what their sum is scaled up."""
    flat = x.reshape(-1)
    if sample == 1 or flat.size < LEAST:
        return flat, 1.0
    number = flat.size // RUN
    count = min(number, max(math.ceil(number / sample), LEAST // RUN))
    luck = torch.rand(count, generator=torch.Generator().manual_seed(number), dtype=torch.float64).numpy()
    chosen = []
    for i in range(count):
        place = min(int((i + luck[i]) * number / count), number - 1)
        chosen.append(flat[place * RUN : (place + 1) * RUN])
    taken = np.concatenate(chosen)
    return taken, flat.size / taken.size


def total(x: list[np.ndarray], sample: int, function=np.abs) -> float:
    found = 0.0
    for part in x:
        taken, factor = looked_at(part, sample)
        found += factor * function(taken).sum()
    return found


def expected(metric: str, run: dict, name: str, step: int, sample: int) -> float | None:
    """What a metric is at a check, by its definition; None where there is nothing to compare with."""
    weights, gradients, clips = run["weights"], run["gradients"], run["clips"]
    if metric == "gradient_norm":
        return total(gradients[step][name], sample)
    if metric == "gradient_change":
        return total([a - b for a, b in zip(gradients[step][name], gradients[step - 1][name], strict=True)], sample)
    if metric == "weight_change":
        before = weights[step - INTERVAL][name] if step > INTERVAL else None  # the first look is no comparison
        return None if before is None else total(
            [a - b for a, b in zip(weights[step][name], before, strict=True)], sample
        )  # fmt: skip
    v = [np.zeros_like(part) for part in gradients[1][name]]
    for now in range(1, step + 1):
        v = [BETA2 * old + (1 - BETA2) * (clips[now] * g) ** 2 for old, g in zip(v, gradients[now][name], strict=True)]
    return total([part / (1 - BETA2**step) for part in v], sample, np.sqrt)


def one_rank(rank: int, port: int, folder: str, seed: int, sample: int) -> None:
    """In a process of its own: a run for each metric, and what came out."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {metric: Record(seed, metric, sample, rank, WORLD).plain() for metric in METRICS}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
