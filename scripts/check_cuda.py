"""Is training right on this device, and how fast is it? One call, at most --budget seconds, with a report.

    python scripts/check_cuda.py                                # on a machine with a GPU
    python scripts/check_cuda.py --tiny                         # every section with tiny shapes, on a CPU
    python scripts/check_cuda.py --only parity generation       # --list names the sections

First what has to be right, a few sections at a time, then the measurements, one after the other, the most wanted first.
Each section is a process of its own with a time limit: one that fails, crashes or hangs takes no other with it, and one
that no longer fits into the budget is left out and named. Random weights and rows; nothing is downloaded.

--output gets report.md, results.json and a log per section. Exit code 1: something is not right.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = "RESULT "  # begins a line of a section's output; the rest is JSON
TINY_PATIENCE = 3  # the limits are those of a machine with a GPU, where --tiny is rarely used
PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass(frozen=True)
class Section:
    """A process: `python script name --device ... --folder ...`, which prints text and lines of RESULT."""

    name: str
    what: str
    script: Path
    limit_s: float
    least_s: float = 15  # with less time left it is not started
    is_check: bool = True  # it can be wrong; else it measures


@dataclass
class Found:
    """What became of a section."""

    name: str
    status: str
    why: str = ""  # of a failure, or of being left out: one line
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)  # of its RESULT lines
    printed: str = ""  # all else


def _sections(file: str, is_check: bool, *rows: tuple[str, float, str]) -> list[Section]:
    script = Path(__file__).with_name(file)
    return [Section(name, what, script, limit_s, is_check=is_check) for name, limit_s, what in rows]


SECTIONS = [
    *_sections(
        "cuda_checks.py",
        True,
        ("parity", 120, "loss and gradients as on the CPU: float32, TF32, bfloat16; plain, padded and packed rows"),
        ("documents", 150, "packed documents see nothing of each other, eager and compiled"),
        ("generation", 60, "greedy answers as on the CPU, and of rows together as alone"),
        ("waiting", 120, "a step does not wait for the device (CUDA)"),
        ("kernels", 60, "the attention kernel of each case"),
    ),
    *_sections(
        "cuda_grades_checks.py",
        True,
        ("freezing", 150, "what is frozen does not move, the rest trains on as before, memory is freed"),
        ("metrics", 90, "every metric as on the CPU"),
        ("resume", 120, "train.py resumed ends like the whole run (needs easy-vqa)"),
        ("parallel", 150, "train.py under DDP and FSDP2 with one process has the losses of the plain run"),
    ),
    *_sections(
        "cuda_measures.py",
        False,
        ("rate", 40, "the device's bfloat16 rate"),
        ("step_222m", 90, "the 222M recipe's step"),
        ("step_222m_compiled", 120, "with --compile"),
        ("step_450m", 90, "the 450M recipe's step"),
        ("step_450m_compiled", 120, "with --compile"),
        ("monitor", 60, "what GradES's checks cost"),
        ("freeze", 90, "what freezing saves"),
        ("freeze_compiled", 120, "with --compile, and what a round of freezing costs"),
        ("memory", 60, "memory by batch size"),
        ("switches_222m", 150, "each switch alone, 222M"),
        ("switches_450m", 150, "each switch alone, 450M"),
        ("data", 90, "the loader on all cores"),
    ),
]


def main(argv: Sequence[str] | None = None, sections: Sequence[Section] = tuple(SECTIONS)) -> int:
    """All wanted sections and the report; returns the exit code."""
    arguments = parse(argv, sections)
    if arguments.list:
        print("\n".join(f"{section.name:20} {section.what}" for section in sections))
        return 0
    runner = Runner(arguments, [s for s in sections if arguments.only is None or s.name in arguments.only])
    runner.run_all()
    print(f"\n{runner.report()}\n\nwritten to {arguments.output}")
    return runner.exit_code()


def parse(argv: Sequence[str] | None, sections: Sequence[Section]) -> argparse.Namespace:
    """The flags; impossible ones end the program."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--output", type=Path, default=ROOT / "grades_output" / "check_cuda", help="folder of the report")
    made.add_argument("--budget", type=float, default=530, help="seconds of all sections together")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--only", nargs="+", metavar="NAME", help="these sections alone")
    made.add_argument("--jobs", type=int, help="checks at a time; measurements have the machine to themselves")
    made.add_argument("--tiny", action="store_true", help="tiny shapes and counts: shows that every section runs")
    made.add_argument("--list", action="store_true", help="name the sections and end")
    arguments = made.parse_args(argv)
    names = [section.name for section in sections]
    if unknown := [name for name in arguments.only or () if name not in names]:
        made.error(f"--only {' '.join(unknown)}: must be of {', '.join(names)}")
    if arguments.jobs is None:
        arguments.jobs = 1 if arguments.tiny else max(1, min(4, (os.cpu_count() or 1) // 2))
    return arguments


class Runner:
    """Runs sections within the budget and keeps what they found; the report is on the disk after each of them."""

    def __init__(self, arguments: argparse.Namespace, sections: Sequence[Section]):
        self.arguments, self.sections = arguments, sections
        self.output: Path = arguments.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + arguments.budget
        self.found: dict[str, Found] = {}

    def run_all(self) -> None:
        """First the checks, a few at a time, then the measurements, one at a time."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(self.run, [section for section in self.sections if section.is_check]))
        for section in self.sections:
            if not section.is_check:
                self.run(section)

    def run(self, section: Section) -> None:
        """One section, if it fits; its process and all that it started are gone afterwards."""
        left = self.deadline - time.monotonic()
        if left < section.least_s:
            self._note(
                Found(section.name, LEFT_OUT, f"{max(left, 0):.0f} s of the budget left, needs {section.least_s:g}")
            )
            return
        limit_s = min(section.limit_s * (TINY_PATIENCE if self.arguments.tiny else 1), left)
        log = self.output / f"{section.name}.log"
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                self._command(section), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(),
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its workers and compilers
                process.wait()
        seconds = time.monotonic() - started
        self._note(judge(section.name, code, limit_s, seconds, log.read_text(encoding="utf-8", errors="replace")))

    def _command(self, section: Section) -> list[str]:
        folder = self.output / section.name
        given = [str(section.script), section.name, "--device", self.arguments.device, "--folder", str(folder)]
        return [sys.executable, *given, *(["--tiny"] if self.arguments.tiny else [])]

    def _note(self, found: Found) -> None:
        self.found[found.name] = found
        print(f"{found.name:20} {found.status:9} {found.seconds:6.1f} s  {found.why}", flush=True)
        lines = [asdict(self.found[s.name]) for s in self.sections if s.name in self.found]
        (self.output / "results.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
        (self.output / "report.md").write_text(self.report() + "\n", encoding="utf-8")

    def exit_code(self) -> int:
        """1 where a check failed. What was only measured, or left out, is not wrong."""
        return int(
            any(s.is_check and self.found[s.name].status == FAILED for s in self.sections if s.name in self.found)
        )

    def report(self) -> str:
        """Markdown: the device, what became of the sections, then what each found."""
        found = [self.found[s.name] for s in self.sections if s.name in self.found]
        machines = [r["machine"] for one in found for r in one.results if "machine" in r]
        lines = ["# Check on a device", "", f"- device: {machines[0] if machines else 'unknown'}"]
        for status in (PASSED, FAILED, LEFT_OUT):
            those = [one for one in found if one.status == status]
            lines.append(f"- {status}: {', '.join(one.name for one in those) or 'none'}")
            lines += [f"  - {one.name}: {one.why}" for one in those if one.why]
        if steps := step_table(found):
            lines += ["", "## Steps", "", steps]
        about = {section.name: section.what for section in self.sections}
        for one in found:
            if one.status != LEFT_OUT:
                lines += ["", f"## {one.name}: {about[one.name]}", "", f"{one.status}, {one.seconds:.1f} s", ""]
                lines += [result_line(result) for result in one.results if "name" in result]
                lines += printed_lines(one.printed)
        return "\n".join(lines)


def environment() -> dict[str, str]:
    """Of a section: the checkout first, no network, tracebacks of crashes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1"}
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ | fixed  # as train.py sets it


def judge(name: str, code: int | None, limit_s: float, seconds: float, text: str) -> Found:
    """code: the exit code of the process, negative for a signal; None: it was over its limit and was ended."""
    lines = text.splitlines()
    results = [json.loads(line[len(RESULT) :]) for line in lines if line.startswith(RESULT)]
    printed = [line for line in lines if not line.startswith((RESULT, "USDT:"))]  # the latter of PyTorch's profiler
    wrong = [result for result in results if result.get("ok") is False]
    absent = [result["left_out"] for result in results if "left_out" in result]
    status, why = PASSED, ""
    if code is None:
        status, why = FAILED, f"not finished after {limit_s:.0f} s"
    elif wrong:
        status, why = (
            FAILED,
            f"{wrong[0]['name']}: {wrong[0]['value']}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1),
        )
    elif code < 0:
        status, why = FAILED, f"crashed: {signal.Signals(-code).name}"
    elif code > 0:
        last = next((line for line in reversed(printed) if line.strip()), "")
        status, why = FAILED, f"exit code {code}: {last.strip()[:200]}"
    elif absent:
        status, why = LEFT_OUT, absent[0]
    return Found(name, status, why, seconds, results, "\n".join(printed).strip())


def result_line(result: dict[str, Any]) -> str:
    """A result as an item of a list."""
    mark = {True: "ok: ", False: "WRONG: ", None: ""}[result.get("ok")]
    return f"- {mark}{result['name']}: {result['value']}"


def printed_lines(text: str) -> list[str]:
    """What a section printed besides: tables as they are, the rest verbatim, of very much the end."""
    if not text:
        return []
    lines: list[str] = []
    in_block = False
    for line in text.splitlines()[-60:]:
        if not line.strip():
            continue
        is_table = line.startswith("|")
        if is_table == in_block:
            lines += ["```", ""] if in_block else ["", "```"]
            in_block = not in_block
        lines.append(line)
    return ["", *lines, *(["```"] if in_block else [])]


def step_table(found: Sequence[Found]) -> str:
    """The measured steps side by side, with their share of the device's rate."""
    known = {result["name"]: result["value"] for one in found for result in one.results if "name" in result}
    rate = known.get("bfloat16 TFLOP/s")
    rows = []
    for one in found:
        for step in (result["step"] for result in one.results if "step" in result):
            share = f"{step['tflop_per_s'] / rate:.1%}" if rate else "–"
            peak = "–" if step["peak_gib"] is None else f"{step['peak_gib']:.2f}"
            cells = (f"{step['step_s']:.4f}", f"{step['tokens_per_s']:,.0f}", f"{step['tflop_per_s']:.3f}", share, peak)
            rows.append(f"| {' | '.join([one.name, *cells])} |")
    if not rows:
        return ""
    header = "| section | step (s) | tokens/s | TFLOP/s | of the device's rate | peak (GiB) |"
    return "\n".join([header, "| --- | ---: | ---: | ---: | ---: | ---: |", *rows])


if __name__ == "__main__":
    sys.exit(main())
