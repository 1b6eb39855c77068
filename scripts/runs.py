"""Runs of train.py one after the other, with results that survive an interruption, and the tables made of them.

Shared by reproduce.py, sweep.py, compare_metrics.py and compare_tasks.py. In the output folder: runs/NAME, the folder
of a run, with run.json once it has finished; logs/NAME.txt, what it printed; the table, its picture and results.json.
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from grades.files import write_json, write_text, written_beside
from grades.report import HISTORY_NAME
from training.arguments import DEFAULT_RECIPE, Settings, parse_arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
LAST_LINES = 20  # of a failed run's output
POLL_S = 0.2
PAPER_RECIPE = DEFAULT_RECIPE.with_name("table10_quickstart.yaml")  # for scripts that compare the paper's rules
Launch = Callable[[list[str], Path], subprocess.Popen]

# What tables say of a run: title, how a value is printed, and what it is multiplied by.
COLUMNS = {
    "accuracy": ("{rows} exact match (%)", "{:.1f}", 100),
    "total_time_s": ("time (s)", "{:.0f}", 1),
    "speedup": ("speed-up", "{:.2f}", 1),
    "flops_ratio": ("FLOPs / Full", "{:.3f}", 1),
    "frozen_share": ("frozen (%)", "{:.0f}", 100),
    "steps": ("steps", "{:.0f}", 1),
    "saved_s": ("saved in total", "{:+.1f}", 1),
    "saved_steps_s": ("steps not made", "{:+.1f}", 1),
    "saved_cheaper_s": ("cheaper steps", "{:+.1f}", 1),
    "saved_eval_s": ("evaluation", "{:+.1f}", 1),
    "saved_rest_s": ("rest", "{:+.1f}", 1),
    "cost": ("below Full (points)", "{:+.1f}", 100),
    "saved_vision": ("vision updates saved (%)", "{:.0f}", 100),
    "saved_language": ("language updates saved (%)", "{:.0f}", 100),
}


def launch(command: list[str], log: Path) -> subprocess.Popen:
    """Start the command; its output goes into the log."""
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


class RunFailed(Exception):
    """A run of train.py ended with an error."""


@dataclass(frozen=True)
class RunSpec:
    """One run to be made."""

    row: str  # of the table
    label: str
    seed: int
    flags: tuple[str, ...]  # of train.py
    needs: tuple[str, ...] = ()  # names of the runs that have to finish first
    late_flags: Callable[["Runs"], list[str]] = lambda runs: []  # flags that follow from their results
    late: str = ""  # what late_flags will be, in words, for --list
    base: str | None = None  # name of the run whose checkpoint this one starts from

    @property
    def name(self) -> str:
        return f"{self.row}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.label}, seed {self.seed}"


class Runs:
    """The runs to be made, in order, and the results of those that have finished."""

    def __init__(self, output: Path, specs: Sequence[RunSpec]):
        """Reads what an earlier call has finished. Raises ValueError where that was run with other settings. A flag
        that train.py does not take ends the program.
        """
        self.output, self.specs = output, list(specs)
        self.settings = {spec.name: parse_arguments(list(spec.flags)) for spec in specs}
        self.results: dict[str, dict] = {}  # by the name of the run: the content of its run.json
        self.stored: dict[str, dict] = {}  # the same of earlier calls, until it is known whether they hold
        for spec in specs:
            stored = self.folder(spec.name) / "run.json"
            if stored.is_file():
                result = json.loads(stored.read_text(encoding="utf-8"))
                require_same_settings(stored, result["settings"], comparable(self.settings[spec.name]))
                self.stored[spec.name] = result
        self._take_stored()
        for name in {spec.base for spec in self.unfinished()}:  # a base without its checkpoint has to run again
            if name and not (self.folder(name) / "checkpoints").is_dir():
                self.results.pop(name, None)

    def folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.txt"

    def summary(self, name: str) -> dict:
        """summary.json of a finished run."""
        return self.results[name]["summary"]

    def history(self, name: str) -> dict:
        return json.loads((self.folder(name) / HISTORY_NAME).read_text(encoding="utf-8"))

    def replay_flags(self, name: str) -> list[str]:
        return ["--replay_history", str(self.folder(name) / HISTORY_NAME)]

    def unfinished(self) -> list[RunSpec]:
        return [spec for spec in self.specs if spec.name not in self.results]

    def is_ready(self, spec: RunSpec) -> bool:
        return all(name in self.results for name in spec.needs)

    def command(self, spec: RunSpec) -> list[str]:
        """The command of a run; without its late flags as long as a run that it needs has not finished."""
        late = spec.late_flags(self) if self.is_ready(spec) else []
        place = ["--output_dir", str(self.output / "runs"), "--run_name", spec.name]
        # An interrupted run continues; one that branches off another run's checkpoint starts again.
        resume = [] if "--resume" in late else ["--resume", "auto"]
        return [sys.executable, str(ROOT / "train.py"), *spec.flags, *late, *place, *resume]

    def _made_from(self, spec: RunSpec) -> dict:
        """What a run follows from besides its settings: its late flags, and the runs it needed, told by their times.

        Empty where it starts from another run's checkpoint, as that run is made again when the checkpoint is gone.
        """
        if spec.base or not spec.needs:
            return {}
        flags = [word.removeprefix(f"{self.output}{os.sep}") for word in spec.late_flags(self)]
        return {"late_flags": flags, "needs_s": [self.summary(name)["total_time_s"] for name in spec.needs]}

    def _take_stored(self) -> None:
        """Take over stored results whose needs have finished, as they would be made now; the others run again."""
        for spec in self.specs:
            if spec.name in self.stored and (spec.base or self.is_ready(spec)):
                result, now = self.stored.pop(spec.name), self._made_from(spec)
                if result.get("made_from", now) == now:  # older versions did not store it
                    self.results[spec.name] = result
                else:
                    print(f"{spec}: runs again, as what it follows from has changed", file=sys.stderr)

    def run_all(self, after_each: Callable[[], object], jobs: int = 1, launch: Launch = launch) -> None:
        """Make the unfinished runs, `jobs` at once, a line after each; none outlives this call. Raises RunFailed."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        started, waiting = time.monotonic(), self.unfinished()
        running: list[tuple[RunSpec, subprocess.Popen, float]] = []
        if self.results:
            print(f"{len(self.results)} of {len(self.specs)} runs have already finished", flush=True)
        try:
            while waiting or running:
                for spec in [spec for spec in waiting if self.is_ready(spec)][: jobs - len(running)]:
                    waiting.remove(spec)
                    number, log = f"[{self.specs.index(spec) + 1}/{len(self.specs)}]", self.log(spec.name)
                    print(f"{number} {spec} ... (progress in {log})", flush=True)
                    running.append((spec, launch(self._prepare(spec), log), time.monotonic()))
                ended = [entry for entry in running if entry[1].poll() is not None]
                for spec, process, began in ended:
                    running.remove((spec, process, began))
                    self._finish(spec, process.wait(), time.monotonic() - began)
                    waiting = [spec for spec in waiting if spec.name not in self.results]
                    after_each()
                    seconds = time.monotonic() - started, self.remaining_s() / jobs
                    times = "elapsed {}, about {} left".format(*(timedelta(seconds=round(s)) for s in seconds))
                    print(f"    {spec}: {outcome(self.summary(spec.name))}; {times}", flush=True)
                if not ended:
                    time.sleep(POLL_S)
        except KeyboardInterrupt:
            # At a terminal Ctrl-C reaches the runs too, which save and end; a second signal would end them at once.
            for _, process, _ in running:
                process.wait()
            raise
        finally:
            for _, process, _ in running:
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def _prepare(self, spec: RunSpec) -> list[str]:
        """The command, after removing a folder from which it must not continue."""
        command, folder = self.command(spec), self.folder(spec.name)
        if command[-1] != "auto" or (folder / "run.json").is_file():  # a base runs again for its lost checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        return command

    def _finish(self, spec: RunSpec, code: int, wall_s: float) -> None:
        """Keep the result of a run, and of all checkpoints only those that an unfinished run starts from."""
        folder, log, command = self.folder(spec.name), self.log(spec.name), shlex.join(self.command(spec))
        if code != 0:
            lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-LAST_LINES:]
            raise RunFailed("\n".join([*lines, "", f"exit code {code} of: {command}", f"output: {log}"]))
        result = {"row": spec.row, "seed": spec.seed, "command": command, "wall_s": wall_s}
        result["settings"] = comparable(self.settings[spec.name])
        result["summary"] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        result["made_from"] = self._made_from(spec)
        write_json(folder / "run.json", result)
        self.results[spec.name] = result
        self._take_stored()
        for name in self.results.keys() - {other.base for other in self.unfinished()}:
            shutil.rmtree(self.folder(name) / "checkpoints", ignore_errors=True)

    def remaining_s(self) -> float:
        """Estimated seconds of the unfinished runs: the mean of the same row where a seed has finished, else of all."""
        times: dict[str, list[float]] = {}
        for result in self.results.values():
            times.setdefault(result["row"], []).append(result["wall_s"])
        overall = [value for values in times.values() for value in values]
        return sum(statistics.mean(times.get(spec.row, overall)) for spec in self.unfinished())

    def compared(self) -> dict[str, list[dict]]:
        """Row -> for each of its finished runs the seed, and what `compare` says of it and Full of the same seed."""
        found: dict[str, list[dict]] = {}
        for spec in self.specs:
            if spec.name in self.results:
                full = self.results.get(f"full_seed{spec.seed}")
                values = compare(self.summary(spec.name), full["summary"] if full else None)
                found.setdefault(spec.row, []).append({"seed": spec.seed} | values)
        return found

    def title(self, column: str) -> str:
        """Title of one of COLUMNS; for the accuracy with the rows that it is of."""
        tested = any(result["summary"]["test_exact_match"] is not None for result in self.results.values())
        return COLUMNS[column][0].format(rows="test" if tested else "validation")

    def table(self, rows: dict[str, list[dict]], columns: Sequence[str]) -> str:
        """A Markdown table with a line per label: `cell` of its runs in each column."""
        lines = [[label, *(cell(values, column) for column in columns)] for label, values in rows.items()]
        return markdown_table(["", *map(self.title, columns)], lines)


def comparable(settings: Settings) -> dict:
    """What two calls must have in common: every setting that has an effect on the run."""
    found = asdict(settings.vlm) | asdict(settings.train)
    found |= asdict(settings.grades) if settings.train.enable_grades else {}
    return {name: value for name, value in found.items() if name not in ("output_dir", "run_name")}


def require_same_settings(path: Path, stored: dict, now: dict) -> None:
    """Raises ValueError that names each setting that differs; settings that only one of them has are left out."""
    both = [name for name in stored if name in now]
    different = [f"{name} {stored[name]}, now {now[name]}" for name in both if stored[name] != now[name]]
    if different:
        raise ValueError(
            f"{path.parent} was run with other settings ({'; '.join(different)}): "
            "choose another --output, or delete that folder to run it again"
        )


def outcome(summary: dict) -> str:
    """A finished run in a line."""
    words = "" if (accuracy := accuracy_of(summary)) is None else f", exact match {accuracy:.1%}"
    return f"{summary['steps']:,} steps, {summary['total_time_s']:.0f} s{words} ({summary['stop_reason']})"


def accuracy_of(summary: dict) -> float | None:
    """Exact match on the test rows if the recipe has any, else on the validation rows."""
    return summary["val_exact_match" if summary["test_exact_match"] is None else "test_exact_match"]


def compare(summary: dict, full: dict | None) -> dict[str, float | None]:
    """Values of a run, None where not measured; and, if there is Full of the same seed, how the two compare.

    cost: by how much the accuracy is below Full's. saved_s, the seconds saved, is the sum of saved_steps_s, for the
    steps that were not made, at Full's seconds per step; saved_cheaper_s, for the steps that were made and took less
    than Full's; saved_eval_s, evaluation; saved_rest_s, start-up, checkpoints and pictures.
    """
    same = ("val_loss", "total_time_s", "steps", "frozen_share", "train_flops")
    accuracy = accuracy_of(summary)
    values = {"accuracy": accuracy} | {name: summary[name] for name in same}
    if full is None:
        return values
    full_step_s, full_accuracy = full["train_time_s"] / full["steps"], accuracy_of(full)
    saved_s = full["total_time_s"] - summary["total_time_s"]
    parts = {
        "saved_steps_s": (full["steps"] - summary["steps"]) * full_step_s,
        "saved_cheaper_s": summary["steps"] * full_step_s - summary["train_time_s"],
        "saved_eval_s": full["eval_time_s"] - summary["eval_time_s"],
    }
    return values | parts | {
        "speedup": full["total_time_s"] / summary["total_time_s"],
        "flops_ratio": summary["train_flops"] / full["train_flops"],
        "cost": None if accuracy is None or full_accuracy is None else full_accuracy - accuracy,
        "saved_s": saved_s,
        "saved_rest_s": saved_s - sum(parts.values()),
    }  # fmt: skip


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """mean, std (None for fewer than two), min and max of the values that were measured."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
    }


def with_spread(seeds: list[dict]) -> dict:
    """The values of each seed and their spread, as results.json holds them."""
    columns = dict.fromkeys(name for values in seeds for name in values if name != "seed")
    return {"seeds": seeds, "spread": {name: spread(values.get(name) for values in seeds) for name in columns}}


def cell(seeds: Sequence[dict], column: str) -> str:
    """mean ± std (min..max) of one of COLUMNS over the seeds; a dash where nothing was measured."""
    _, pattern, scale = COLUMNS[column]
    found = spread(values.get(column) for values in seeds)
    texts = {name: None if value is None else pattern.format(value * scale) for name, value in found.items()}
    if texts["mean"] is None or texts["std"] is None:
        return texts["mean"] or "–"
    return f"{texts['mean']} ± {texts['std'].lstrip('+')} ({texts['min']}..{texts['max']})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right, all of them aligned for reading as plain text."""
    lines = [list(header), *map(list, rows)]
    first, *others = (max(3, *map(len, column)) for column in zip(*lines, strict=True))
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    padded = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in padded)


def list_commands(runs: Runs) -> None:
    """Print the commands of all runs; flags that follow from results in words."""
    for spec in runs.specs:
        print(f"# {spec}{'  (finished)' if spec.name in runs.results else ''}")
        waits = spec.late and not runs.is_ready(spec)
        print(shlex.join(runs.command(spec)) + (f"  # and {spec.late}" if waits else ""))


def run_script(
    arguments: argparse.Namespace,
    specs: Sequence[RunSpec],
    tables: Callable[[Runs, argparse.Namespace], tuple[str, dict]],
    picture: Callable[[Runs, argparse.Namespace], "Figure"],
    name: str,
    launch: Launch = launch,
) -> int:
    """List or make the runs, write the tables after each, and draw the picture at the end; returns the exit code.

    tables: gives the text of NAME.md and the content of results.json. picture: what NAME.png shows.
    """

    def write_tables() -> str:
        text, results = tables(runs, arguments)
        text = f"# {arguments.config.stem}: {len(runs.results)} of {len(runs.specs)} runs\n\n{text}"
        summaries = {name: result["summary"] for name, result in runs.results.items()}
        write_json(runs.output / "results.json", {"config": str(arguments.config)} | results | {"summaries": summaries})
        write_text(runs.output / f"{name}.md", text)
        return text

    try:
        runs = Runs(arguments.output, specs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        list_commands(runs)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an exception: it ends the runs too
    if arguments.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    try:
        runs.run_all(write_tables, arguments.jobs, launch)
    except RunFailed as error:
        print(f"{error}\nA run failed. The same command continues from here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from the last checkpoint of this run.", file=sys.stderr)
        return 130
    text = write_tables()
    with written_beside(runs.output / f"{name}.png") as beside:
        picture(runs, arguments).savefig(beside, dpi=120)
    print(f"\n{text}\nwritten to {runs.output}")
    return 0
