"""Sections of check_cuda.py: how fast it is, by the other benchmarks, whose tables go into the report."""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts import bench_data, bench_freeze, bench_monitor, bench_step
from scripts.bench_common import SHAPES
from scripts.cuda_cases import Case, run_section, tell

MEMORY_BATCHES = (1, 16, 32, 64, 128, 256)  # with 128 tokens a row, as nanoVLM publishes it


def measure_rate(case: Case) -> None:
    """bfloat16 products of large square matrices."""
    n, repeats = (256, 3) if case.tiny else (8192, 30)
    a, b = (torch.randn(n, n, device=case.device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(repeats):
            a @ b
        if case.on_cuda:
            torch.cuda.synchronize()

    products()
    best_s = min(_seconds(products) for _ in range(3))
    tell("bfloat16 TFLOP/s", repeats * 2 * n**3 / best_s / 1e12)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def flags_of(case: Case, size: str, rows: int, length: int, images: int) -> list[str]:
    """The recipe of that size, one micro-batch a step; tiny: the quickstart."""
    recipe = "quickstart" if case.tiny else f"nanovlm_{size}"
    if case.tiny:
        rows, length, images = 2, 128, 2
    shape = {"batch_size": rows, "sequence_length": length, "images_per_row": images, "turns_per_image": 1}
    fixed = {"config": f"configs/{recipe}.yaml", "gradient_accumulation_steps": 1, "device": case.device.type}
    fixed["compile"] = "off"  # a flag after it turns it on
    if case.tiny:  # GradES's default there is rollback, and its rows are not packed
        fixed |= {"cache_rows": "false", "compute_interval": 20}
    return [f"--{name}={value}" for name, value in (fixed | shape).items()]


def measure_step(case: Case, size: str, compiled: bool) -> None:
    """The step of packed rows."""
    rows, length, images, documents = SHAPES[size]
    flags = [
        *flags_of(case, size, rows, length, images),
        f"--documents={min(documents, 2) if case.tiny else documents}",
    ]
    flags += ["--packing", f"--steps={1 if case.tiny else 10}", f"--warmup_steps={1 if case.tiny else 3}"]
    text = printed(bench_step.main, [*flags, *(["--compile"] if compiled else [])])
    tell("step", f"{size}{', compiled' if compiled else ''}", step=numbers_of(text))


def printed(main: Callable[[list[str]], None], argv: list[str]) -> str:
    """What the script prints, which goes into the report as well."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        main(argv)
    print(told.getvalue(), flush=True)
    return told.getvalue()


def numbers_of(text: str) -> dict[str, Any]:
    """What bench_step.py printed. Memory of a process is not that of a device: None."""

    def find(pattern: str) -> float | None:
        match = re.search(pattern, text, re.MULTILINE)
        return float(match[1].replace(",", "")) if match else None

    return {
        "step_s": find(r"^step +([\d.]+) s"),
        "tokens_per_s": find(r"^tokens/s +([\d,]+)"),
        "tflop_per_s": find(r"([\d.]+) TFLOP/s"),
        "peak_gib": find(r"^peak memory +([\d.]+) GiB$"),
    }


def measure_switches(case: Case, size: str) -> None:
    """Each switch of the step alone."""
    rows, length, images, _ = SHAPES[size]
    flags = flags_of(case, size, rows, length, images)
    steps = ["--steps=1", "--warmup_steps=0"] if case.tiny else ["--steps=5", "--warmup_steps=2"]
    bench_step.main([*flags, *steps, "--switches", "64" if case.tiny else str(length)])


def measure_monitor(case: Case) -> None:
    """What checks of GradES cost beside the recipe's step."""
    flags = [*flags_of(case, "222m", *SHAPES["222m"][:3]), f"--rounds={1 if case.tiny else 5}"]
    bench_monitor.main(flags)


def measure_freeze(case: Case, compiled: bool) -> None:
    """What a step takes with parts frozen, and compiled, what a round of freezing costs."""
    flags = [*flags_of(case, "222m", *SHAPES["222m"][:3]), *(["--compile"] if compiled else [])]
    bench_freeze.main([*flags, *(["--rounds=1", "--steps=1", "--no_peaks"] if case.tiny else [])])


def measure_memory(case: Case) -> None:
    """Peak memory by batch size; out of memory is a result."""
    flags = [*flags_of(case, "222m", 1, 128, 1), "--no_packing", "--steps=2", "--warmup_steps=1", "--batch_sizes"]
    bench_step.main([*flags, *map(str, MEMORY_BATCHES[: 2 if case.tiny else None])])


def measure_data(case: Case) -> None:
    """The loader of the 450M recipe on all cores."""
    workers = 0 if case.tiny else max(1, (os.cpu_count() or 2) - 1)
    words = ["--lm_tokenizer=easy-vqa", "--lm_base_vocab_size=36"]
    counts = {"random_rows": 400, "micro_batches": 4 * workers, "steps": 4, "step_s": 0.5, "num_workers": workers}
    if case.tiny:
        counts |= {"random_rows": 32, "micro_batches": 1, "steps": 1, "step_s": 0.1}
    for size in ("quickstart",) if case.tiny else ("nanovlm_222m", "nanovlm_450m"):
        tiny = ["--no_cache_rows", "--turns_per_image=1", "--val_size=0"] if case.tiny else []
        bench_data.main([f"--config=configs/{size}.yaml", *words, *tiny, *(f"--{k}={v}" for k, v in counts.items())])


if __name__ == "__main__":
    sys.exit(
        run_section(
            {
                "rate": measure_rate,
                "step_222m": lambda case: measure_step(case, "222m", False),
                "step_222m_compiled": lambda case: measure_step(case, "222m", True),
                "step_450m": lambda case: measure_step(case, "450m", False),
                "step_450m_compiled": lambda case: measure_step(case, "450m", True),
                "monitor": measure_monitor,
                "freeze": lambda case: measure_freeze(case, False),
                "freeze_compiled": lambda case: measure_freeze(case, True),
                "memory": measure_memory,
                "switches_222m": lambda case: measure_switches(case, "222m"),
                "switches_450m": lambda case: measure_switches(case, "450m"),
                "data": measure_data,
            }
        )
    )
