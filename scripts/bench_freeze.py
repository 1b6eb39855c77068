"""What freezing saves of a step: time beside FLOPs, and memory, from nothing frozen to all but the projector.

    python scripts/bench_freeze.py --config configs/nanovlm_222m.yaml --batch_size 2 --sequence_length 128 \\
        --gradient_accumulation_steps 1

Random weights and rows; nothing is downloaded. Takes every flag of train.py too. The states take turns on one model;
time of full is the median over the rounds of a state's seconds divided by those of nothing frozen in the same round.
Time / FLOPs saved: the share of the time that is saved over the share of the FLOPs in matrix products; 100 % is what
the FLOPs promise, more comes from what they do not count, such as the optimizer. Saved for backward: what autograd
keeps of one micro-batch. Peak: of a process (with CUDA of the device) that trains in this state only.
With --compile: the first step in a state compiles what is new in it, as after a round of freezing; pays after: the
steps that make up for that step's extra time. What inductor's cache on disk holds from earlier runs is compiled faster.
"""

import argparse
import contextlib
import copy
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

from data.collators import to_device
from grades import find_components
from grades.components import Component
from grades.feeds import Feeds
from grades.freezing import Freezer
from grades.optimizers import release
from scripts.bench_common import Bench, make_parser, parse
from scripts.runs import markdown_table
from training.activations import saved_bytes
from training.arguments import Settings


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


def known_feeds(bench: Bench, components: Sequence[Component]) -> dict[str, list[str]]:
    """What feeds what, told by a forward pass that needs no memory and so leaves the peak alone."""
    twin, device = copy.deepcopy(bench.model).to("meta"), torch.device("meta")
    feeds = Feeds(twin, components)
    twin(**to_device(bench.micro_batches[0], device))
    return feeds.state_dict()


@contextlib.contextmanager
def frozen(bench: Bench, state: State) -> Iterator[None]:
    """The bench's model in this state, frozen as GradES does it; before and after nothing is frozen."""
    components = find_components(bench.model, bench.settings.grades.target_components)
    freezer = Freezer(bench.model, components, bench.optimizer, state.prefix)
    if freezer.feeds is not None:
        freezer.feeds.stop()
        freezer.feeds.load_state_dict(known_feeds(bench, components))
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


def activation_bytes(bench: Bench) -> int:
    """What autograd keeps of a micro-batch from the forward to the backward pass, weights not counted."""
    inputs = to_device(bench.micro_batches[0], bench.device)
    with bench.autocast:
        return saved_bytes(lambda: bench.model(**inputs), but=bench.model.parameters())


def training_bytes(bench: Bench) -> int:
    """Gradients, which are made here, and the optimizer's state."""
    bench.backward()
    gradients = sum(p.grad.nbytes for p in bench.model.parameters() if p.grad is not None)
    bench.update()
    return gradients + sum(
        value.nbytes for state in bench.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )


def peak_gib(arguments: argparse.Namespace, settings: Settings, state: State) -> float | None:
    """Peak memory of steps in this state, for a process that has done nothing else; on CUDA it may have."""
    bench = Bench(arguments, settings)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with frozen(bench, state):
        for _ in range(2):
            bench.step()
    return bench.peak_gib()


def peaks_gib(arguments: argparse.Namespace, settings: Settings) -> list[float | None]:
    """Of each state. To be called while this process is small: Linux counts the parent's memory in a child's peak."""
    if torch.cuda.is_available() and arguments.device in ("auto", "cuda"):  # it counts for itself, and starting is slow
        return [peak_gib(arguments, settings, state) for state in STATES]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        return list(pool.map(functools.partial(peak_gib, arguments, settings), STATES))


def pays_after(first_s: float, step_s: float, full_s: float) -> str:
    """Steps until the time of a state's first step is saved, against steps with nothing frozen."""
    return f"{(first_s - step_s) / (full_s - step_s):,.0f}" if step_s < full_s else "–"


def main(argv: list[str] | None = None) -> None:
    made = make_parser(__doc__.splitlines()[0])
    made.add_argument("--rounds", type=int, default=5, help="turns of each state")
    made.add_argument("--steps", type=int, default=3, help="timed steps in a turn")
    made.add_argument("--no_peaks", action="store_true", help="spare the processes that the peak memory needs on a CPU")
    arguments, settings = parse(made, argv)
    peaks = [None] * len(STATES) if arguments.no_peaks else peaks_gib(arguments, settings)
    bench = Bench(arguments, settings)
    counts, first_s = [], []
    for state in STATES:
        with frozen(bench, state):
            first_s.append(bench.seconds(bench.step))
            counts.append((bench.flops(), training_bytes(bench) / 2**20, activation_bytes(bench) / 2**20))
    rounds = time_states(bench, STATES, arguments.rounds, arguments.steps)
    rows = []
    for state, times, (flops, *memory_mib), peak, first in zip(STATES, rounds, counts, peaks, first_s, strict=True):
        time_share = statistics.median(ours / full for ours, full in zip(times, rounds[0], strict=True))
        flop_share = flops / counts[0][0]
        cells = [f"{statistics.median(times):.4f}", f"{time_share:.3f}", f"{flops / 1e12:.4f}", f"{flop_share:.3f}"]
        cells += [f"{(1 - time_share) / (1 - flop_share):.0%}" if flop_share < 1 else "–"]
        cells += [f"{mib:,.2f}" for mib in memory_mib] + ["–" if peak is None else f"{peak:.2f}"]
        if bench.is_compiled:
            cells += [f"{first:.2f}", pays_after(first, statistics.median(times), statistics.median(rounds[0]))]
        rows.append([state.name, *cells])
    header = ["frozen", "step (s)", "time of full", "TFLOP", "FLOPs of full", "time / FLOPs saved"]
    header += ["gradients + optimizer (MiB)", "saved for backward (MiB)", "peak (GiB)"]
    header += ["first step (s)", "pays after (steps)"] if bench.is_compiled else []
    print("\n".join([*bench.describe(), "", markdown_table(header, rows)]))


if __name__ == "__main__":
    main()
