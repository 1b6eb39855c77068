"""Runs of train.py one after the other, with results that survive an interruption, and the tables made of them.

Shared by reproduce.py, sweep.py and compare_metrics.py. In the output folder: runs/NAME, the folder of a run, with
run.json once it has finished; logs/NAME.txt, what it printed.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from grades.files import write_json, written_beside
from training.arguments import DEFAULT_RECIPE, Settings, parse_arguments

Runner = Callable[[list[str], Path], int]  # (command, log) -> exit code
ROOT = Path(__file__).resolve().parent.parent
LAST_LINES = 20  # of a failed run's output


class RunFailed(Exception):
    """A run of train.py ended with an error."""


@dataclass(frozen=True)
class RunSpec:
    """One run to be made."""

    row: str  # of the table
    label: str
    seed: int
    flags: tuple[str, ...]  # of train.py
    needs: tuple[str, ...] = ()  # names of the runs that late_flags reads
    late_flags: Callable[["Runs"], list[str]] = lambda runs: []  # flags that follow from earlier runs
    late: str = ""  # what they will be, for --list
    base: str | None = None  # name of the run whose checkpoint this one starts from

    @property
    def name(self) -> str:
        return f"{self.row}_seed{self.seed}"


class Processes:
    """Runs commands, their output going into logs. None of them outlives this program."""

    def __init__(self) -> None:
        self.alive: set[subprocess.Popen] = set()

    def __call__(self, command: list[str], log: Path) -> int:
        """Run the command to its end; returns its exit code."""
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            self.alive.add(process)
            code = process.wait()
            self.alive.discard(process)
            return code

    def end(self) -> None:
        for process in list(self.alive):
            process.terminate()
            process.wait()


class Runs:
    """The runs to be made, in order, and the results of those that have finished."""

    def __init__(
        self, output: Path, specs: Sequence[RunSpec], runner: Runner, abort: Callable[[], None] = lambda: None
    ):
        """runner: runs a command into a log, returns its exit code. abort: ends what is under way.

        Reads what an earlier call has finished. Raises ValueError where that was run with other settings. A flag that
        train.py does not take ends the program, before any run.
        """
        self.output, self.specs, self.runner, self.abort = output, list(specs), runner, abort
        self.settings = {spec.name: parse_arguments(list(spec.flags)) for spec in specs}
        self.results: dict[str, dict] = {}  # by the run's name: {"row", "seed", "summary", ...}
        for spec in specs:
            stored = self.folder(spec.name) / "run.json"
            if stored.is_file():
                result = json.loads(stored.read_text(encoding="utf-8"))
                require_same_settings(stored, result["settings"], comparable(self.settings[spec.name]))
                self.results[spec.name] = result
        for base in {spec.base for spec in self.unfinished() if spec.base}:  # runs again where its checkpoint is gone
            if not (self.folder(base) / "checkpoints").is_dir():
                self.results.pop(base, None)

    def folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def summary(self, name: str) -> dict:
        """summary.json of a finished run."""
        return self.results[name]["summary"]

    def unfinished(self) -> list[RunSpec]:
        return [spec for spec in self.specs if spec.name not in self.results]

    def command(self, spec: RunSpec) -> list[str]:
        """The command of a run; where what it needs has not finished, without the flags that follow from that."""
        late = spec.late_flags(self) if self.is_ready(spec) else []
        place = ["--output_dir", str(self.output / "runs"), "--run_name", spec.name]
        # An interrupted run continues; one that branches off another run's checkpoint starts again.
        resume = [] if "--resume" in late else ["--resume", "auto"]
        return [sys.executable, str(ROOT / "train.py"), *spec.flags, *late, *place, *resume]

    def run_all(self, after_each: Callable[[], object], jobs: int = 1) -> None:
        """Make the unfinished runs in order, up to `jobs` at once, with a line after each. Raises RunFailed."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if self.results:
            print(f"{len(self.results)} of {len(self.specs)} runs have finished before", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                self._run_in(pool, jobs, after_each, started)
            except BaseException:
                self.abort()  # before the pool waits for what is running
                raise

    def _run_in(self, pool: ThreadPoolExecutor, jobs: int, after_each: Callable[[], object], started: float) -> None:
        waiting: list[RunSpec] = self.unfinished()
        running: dict[Future[dict], RunSpec] = {}
        while waiting or running:
            for spec in [spec for spec in waiting if self.is_ready(spec)][: jobs - len(running)]:
                waiting.remove(spec)
                number = self.specs.index(spec) + 1
                log = self.output / "logs" / f"{spec.name}.txt"
                position = f"[{number}/{len(self.specs)}] {spec.label}, seed {spec.seed}"
                print(f"{position} ... (progress in {log})", flush=True)
                running[pool.submit(self.run, spec)] = spec
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                spec = running.pop(future)
                self.results[spec.name] = future.result()  # by this thread only, which also iterates over them
                self._remove_checkpoints()
                after_each()
                left = remaining_s(self.specs, self.results) / jobs
                print(f"    {spec.label}, seed {spec.seed}: {outcome(self.results[spec.name])}; elapsed "
                      f"{clock(time.monotonic() - started)}, about {clock(left)} left", flush=True)  # fmt: skip

    def is_ready(self, spec: RunSpec) -> bool:
        return all(name in self.results for name in spec.needs)

    def run(self, spec: RunSpec) -> dict:
        """Make one run; returns its result, which is in its run.json too. Raises RunFailed."""
        folder = self.folder(spec.name)
        command, log = self.command(spec), self.output / "logs" / f"{spec.name}.txt"
        if command[-1] != "auto" or (folder / "run.json").is_file():  # finished, but its checkpoint is needed
            shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        code = self.runner(command, log)
        if code != 0:
            lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-LAST_LINES:]
            raise RunFailed("\n".join([*lines, "", f"exit code {code} of: {shlex.join(command)}", f"output: {log}"]))
        result = {
            "row": spec.row,
            "seed": spec.seed,
            "command": shlex.join(command),
            "settings": comparable(self.settings[spec.name]),
            "wall_s": time.monotonic() - started,
            "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        }
        write_json(folder / "run.json", result)
        return result

    def _remove_checkpoints(self) -> None:
        """Of all finished runs but those that an unfinished one starts from."""
        needed = {spec.base for spec in self.unfinished()}
        for name in self.results:
            if name not in needed:
                shutil.rmtree(self.folder(name) / "checkpoints", ignore_errors=True)


def comparable(settings: Settings) -> dict:
    """What two calls must have in common: every setting that the run goes by, those that are None too."""
    parts: list[Any] = [settings.vlm, settings.train, *([settings.grades] if settings.train.enable_grades else [])]
    found = {k: v for part in parts for k, v in asdict(part).items()}
    return {name: value for name, value in found.items() if name not in ("output_dir", "run_name")}


def require_same_settings(path: Path, stored: dict, now: dict) -> None:
    """Raises ValueError that names each setting that differs; one that came into the code since then does not."""
    different = [
        f"{name} {stored[name]}, now {now[name]}" for name in stored if name in now and stored[name] != now[name]
    ]
    if different:
        raise ValueError(
            f"{path.parent} was run with other settings ({'; '.join(different)}): "
            "give another --output, or delete that folder to run it again"
        )


def remaining_s(specs: Sequence[RunSpec], results: dict[str, dict]) -> float:
    """Estimated seconds of the unfinished runs: a row's mean over the seeds that have finished, else that of all."""
    by_row: dict[str, list[float]] = {}
    for result in results.values():
        by_row.setdefault(result["row"], []).append(result["wall_s"])
    overall = statistics.mean(result["wall_s"] for result in results.values())
    unfinished = [spec for spec in specs if spec.name not in results]
    return sum(statistics.mean(by_row.get(spec.row, [overall])) for spec in unfinished)


def outcome(result: dict) -> str:
    """A finished run in a line."""
    summary = result["summary"]
    accuracy = accuracy_of(summary)
    words = "" if accuracy is None else f", exact match {accuracy:.1%}"
    return f"{summary['steps']:,} steps, {summary['total_time_s']:.0f} s{words} ({summary['stop_reason']})"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def accuracy_of(summary: dict) -> float | None:
    """Exact match on the test rows, where the recipe has such, else on the validation rows."""
    test = summary["test_exact_match"]
    return summary["val_exact_match"] if test is None else test


def accuracy_name(summaries: Sequence[dict]) -> str:
    return "test exact match" if any(s["test_exact_match"] is not None for s in summaries) else "validation exact match"


def compare(summary: dict, full: dict | None) -> dict[str, float | None]:
    """A run against Full of the same seed: what a table says of it; None where there is no Full or no measurement.

    saved_s, the seconds that it took less, is the sum of: saved_steps_s, the steps that it did not make, at Full's
    seconds a step; saved_cheaper_s, what its own steps took less than Full's; saved_eval_s, evaluation; saved_rest_s,
    start-up, checkpoints and pictures.
    """
    values = {
        "accuracy": accuracy_of(summary),
        "val_loss": summary["val_loss"],
        "total_time_s": summary["total_time_s"],
        "steps": summary["steps"],
        "frozen_share": summary["frozen_share"],
        "train_flops": summary["train_flops"],
    }
    if full is None:
        return values | dict.fromkeys(("speedup", "flops_ratio", "saved_s", *PARTS))
    full_step_s = full["train_time_s"] / full["steps"]
    saved_s = full["total_time_s"] - summary["total_time_s"]
    parts = {
        "saved_steps_s": (full["steps"] - summary["steps"]) * full_step_s,
        "saved_cheaper_s": summary["steps"] * full_step_s - summary["train_time_s"],
        "saved_eval_s": full["eval_time_s"] - summary["eval_time_s"],
    }
    return values | parts | {
        "speedup": full["total_time_s"] / summary["total_time_s"],
        "flops_ratio": summary["train_flops"] / full["train_flops"],
        "saved_s": saved_s,
        "saved_rest_s": saved_s - sum(parts.values()),
    }  # fmt: skip


PARTS = {
    "saved_steps_s": "steps not made",
    "saved_cheaper_s": "cheaper steps",
    "saved_eval_s": "evaluation",
    "saved_rest_s": "rest",
}


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """mean, std (None for fewer than two), min and max of the values that were measured."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
    }


def cell(values: Sequence[float | None], pattern: str, scale: float = 1.0) -> str:
    """mean ± std (min..max) of the values times scale; a dash where nothing was measured."""
    found = {name: None if value is None else pattern.format(value * scale) for name, value in spread(values).items()}
    if found["mean"] is None:
        return "–"
    if found["std"] is None:
        return found["mean"]
    return f"{found['mean']} ± {found['std'].lstrip('+')} ({found['min']}..{found['max']})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save_figure(figure: Any, path: Path) -> None:
    """Write matplotlib's figure as a picture."""
    with written_beside(path) as beside:
        figure.savefig(beside, dpi=120)


def parser(description: str, prefix: str, seeds: int) -> argparse.ArgumentParser:
    """Flags that both scripts have; prefix: of the default output folder's name."""
    found = argparse.ArgumentParser(
        description=description, allow_abbrev=False, epilog="Flags after -- go to every run of train.py."
    )
    found.add_argument("--config", type=Path, default=DEFAULT_RECIPE, help="recipe of train.py")
    found.add_argument("--seeds", type=int, default=seeds, help=f"seeds 0 to N - 1 (default: {seeds})")
    found.add_argument("--output", type=Path, help=f"folder of the results (default: grades_output/{prefix}_<recipe>)")
    jobs = "runs at once, each with its share of the CPU's cores; times compare within one setting only"
    found.add_argument("--jobs", type=int, default=1, help=f"{jobs} (default: 1)")
    found.add_argument("--list", action="store_true", help="print the commands and run nothing")
    found.set_defaults(prefix=prefix)
    return found


def read_arguments(found: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """With `extra`, the flags after --, and `recipe`, the Settings of a plain run."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = found.parse_args(argv[:cut])
    arguments.extra = ("--config", str(arguments.config), *argv[cut + 1 :])
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            found.error(f"--{name} {getattr(arguments, name)}: must be >= 1")
    arguments.output = arguments.output or Path("grades_output") / f"{arguments.prefix}_{arguments.config.stem}"
    arguments.recipe = parse_arguments(list(arguments.extra))
    train = arguments.recipe.train
    if taken := sorted(arguments.recipe.given & {"seed", "output_dir", "run_name"}):
        found.error(", ".join(f"--{name}" for name in taken) + ": set for each run, must not stand after --")
    for name in ("enable_grades", "early_stopping", "lora_rank"):
        if getattr(train, name):
            found.error(f"--{name}: belongs to single rows, must be neither in the recipe nor after --")
    return arguments


def list_commands(runs: Runs) -> None:
    """Print what would run; a flag that follows from results in words."""
    for spec in runs.specs:
        done = "  (finished)" if spec.name in runs.results else ""
        print(f"# {spec.label}, seed {spec.seed}{done}")
        waits = spec.late and not runs.is_ready(spec)
        print(shlex.join(runs.command(spec)) + (f"  # and {spec.late}" if waits else ""))


def run_script(
    arguments: argparse.Namespace,
    specs: Sequence[RunSpec],
    write_tables: Callable[[Runs, argparse.Namespace], Path],
    draw: Callable[[Runs, argparse.Namespace], None],
    runner: Runner | None,
) -> int:
    """List or make the specs, write the tables after each and draw at the end; returns the exit code.

    write_tables returns the file to show. After a failure or an interruption the same command continues.
    """
    processes = Processes()
    try:
        made = Runs(arguments.output, specs, runner or processes, processes.end)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        list_commands(made)
        return 0
    signal.signal(signal.SIGTERM, _end)
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    try:
        made.run_all(lambda: write_tables(made, arguments), arguments.jobs)
    except RunFailed as error:
        print(f"{error}\nA run failed. The same command continues from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues, the run under way from its checkpoint.", file=sys.stderr)
        return 130
    table = write_tables(made, arguments)
    draw(made, arguments)
    print(f"\n{table.read_text(encoding='utf-8')}\nwritten to {made.output}")
    return 0


def _end(number: int, _frame: FrameType | None) -> None:
    """As an exception, which ends the run under way too."""
    sys.exit(128 + number)
