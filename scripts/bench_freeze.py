"""What freezing saves of a step: time beside FLOPs, and memory, from nothing frozen to all but the projector.

    python scripts/bench_freeze.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128 \\
        --gradient_accumulation_steps 1

Random weights and rows; nothing is downloaded. Every flag of train.py works besides. The states take turns on one
model; of full, for the time, is the median over the rounds of a state's seconds divided by those of nothing frozen in
the same round. Time / FLOPs saved: the share of the time that is saved over the share of the FLOPs in matrix products;
100 % is what these promise, more comes from what they leave out, as the optimizer. Saved for backward: what autograd
keeps of one micro-batch. Peak: of a process (with CUDA of the device) that trains in this state alone.
"""

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from grades import find_components
from grades.freezing import Freezer, release
from scripts.bench_common import Bench, parse, parser, peak_memory_gib, table
from training.arguments import Settings
from training.step import forward_backward


@dataclass(frozen=True)
class State:
    """How far a run's freezing has come."""

    name: str
    towers: tuple[str, ...]  # whose components are frozen
    prefix: bool = False  # and what lies before the first trainable matrix
    rest: bool = False  # and all else but the projector


STATES = (
    State("nothing frozen", ()),
    State("language components", ("language",)),
    State("+ vision components", ("language", "vision")),
    State("+ vision tower without autograd", ("language", "vision"), prefix=True),
    State("all but the projector", ("language", "vision"), prefix=True, rest=True),
)


@contextlib.contextmanager
def frozen(bench: Bench, state: State) -> Iterator[None]:
    """The bench's model in this state, as GradES brings it about; before and after it nothing is frozen."""
    components = find_components(bench.model, bench.settings.grades.target_components)
    freezer = Freezer(bench.model, components, bench.optimizer, state.prefix)
    names = [component.name for component in components if component.tower in state.towers]
    freezer.freeze(names)
    projector = set(bench.model.MP.parameters())
    rest = [p for p in bench.model.parameters() if state.rest and p.requires_grad and p not in projector]
    for parameter in rest:
        parameter.requires_grad_(False)
    release(rest, bench.optimizer)
    yield
    for parameter in rest:
        parameter.requires_grad_(True)
    freezer.unfreeze(names)


def time_states(bench: Bench, states: Sequence[State], rounds: int, steps: int) -> list[list[float]]:
    """For each state its median seconds a step in each round; a first step in each turn is not timed."""
    found: list[list[float]] = [[] for _ in states]
    for number in range(rounds):
        turns = list(enumerate(states))
        for index, state in turns if number % 2 == 0 else reversed(turns):
            with frozen(bench, state):
                bench.step()
                found[index].append(statistics.median(bench.seconds(bench.step) for _ in range(steps)))
    return found


def saved_bytes(bench: Bench) -> int:
    """What autograd keeps of a micro-batch from the forward to the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in bench.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_backward(bench.model, bench.micro_batches[:1], bench.device, bench.autocast)
    bench.optimizer.zero_grad(set_to_none=True)
    return sum(storage.nbytes() for storage in kept.values())


def training_bytes(bench: Bench) -> int:
    """Gradients, which are made here, and the optimizer's state."""
    bench.backward()
    gradients = sum(p.grad.nbytes for p in bench.model.parameters() if p.grad is not None)
    bench.update()
    return gradients + sum(
        value.nbytes for state in bench.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )


def peak_gib(arguments: argparse.Namespace, settings: Settings, state: State) -> float:
    """Peak memory of steps in this state, for a process that has done nothing else."""
    bench = Bench(arguments, settings)
    with frozen(bench, state):
        for _ in range(2):
            bench.step()
    return peak_memory_gib(bench.device)


def peaks_gib(arguments: argparse.Namespace, settings: Settings) -> list[float]:
    """Of each state. To be called while this process is small: Linux counts it in where a child starts."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(functools.partial(peak_gib, arguments, settings), STATES))


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=int, default=5, help="turns of each state")
    made.add_argument("--steps", type=int, default=3, help="timed steps in a turn")
    arguments, settings = parse(made, argv)
    peaks = peaks_gib(arguments, settings)
    bench = Bench(arguments, settings)
    flops, training, saved = [], [], []
    for state in STATES:
        with frozen(bench, state):
            bench.step()
            flops.append(bench.flops())
            training.append(training_bytes(bench))
            saved.append(saved_bytes(bench))
    rounds = time_states(bench, STATES, arguments.rounds, arguments.steps)
    rows = []
    for i, state in enumerate(STATES):
        time_share = statistics.median(ours / full for ours, full in zip(rounds[i], rounds[0], strict=True))
        flop_share = flops[i] / flops[0]
        promise = f"{(1 - time_share) / (1 - flop_share):.0%}" if i else ""
        time_cells = [f"{statistics.median(rounds[i]):.4f}", f"{time_share:.3f}"]
        flop_cells = [f"{flops[i] / 1e12:.4f}", f"{flop_share:.3f}", promise]
        memory_cells = [f"{training[i] / 2**20:,.2f}", f"{saved[i] / 2**20:,.2f}", f"{peaks[i]:.2f}"]
        rows.append([state.name, *time_cells, *flop_cells, *memory_cells])
    header = ["frozen", "step (s)", "of full", "TFLOP", "of full", "time / FLOPs saved"]
    header += ["gradients + optimizer (MiB)", "saved for backward (MiB)", "peak (GiB)"]
    print("\n".join([*bench.describe(), "", table(header, rows)]))


if __name__ == "__main__":
    main()
