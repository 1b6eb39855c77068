"""Train the stages of a recipe one after the other, each from the weights of the one before.

    python scripts/make_shapes.py --output shapes_rows
    python scripts/train_stages.py configs/nanomolmo2_tiny
    python scripts/train_stages.py configs/nanomolmo2_tiny --list                      # the commands; runs nothing
    python scripts/train_stages.py configs/nanomolmo2_tiny -- --enable_grades          # flags of train.py

PREFIX, or PREFIX.yaml, stands for PREFIX_stage1.yaml, PREFIX_stage2.yaml and so on. The run of a stage is named as its
recipe, in --output_dir. The same command continues after an interruption: train.py resumes the stage that was
interrupted (--resume auto) and says of those that have finished that they have. The exit code is that of the stage
that failed.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.state import END_REASONS

OWN_FLAGS = ("--config", "--run_name", "--output_dir", "--resume", "--resume_weights",
             "--resume_from_vlm_checkpoint", "--vlm_checkpoint_path")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One run of train.py. before: the run folder whose last weights it starts from, None of the first."""

    number: int
    recipe: Path
    folder: Path
    before: Path | None

    def command(self, flags: Sequence[str]) -> list[str]:
        place = ["--output_dir", str(self.folder.parent), "--run_name", self.folder.name, "--resume", "auto"]
        weights = [] if self.before is None else ["--resume_weights", str(self.before)]
        return [sys.executable, str(ROOT / "train.py"), "--config", str(self.recipe), *place, *weights, *flags]


def find_stages(prefix: str, output_dir: Path) -> list[Stage]:
    """The stages of PREFIX_stage1.yaml, PREFIX_stage2.yaml ... Raises FileNotFoundError where there is no first one or
    one is missing between two."""
    start = Path(prefix.removesuffix(".yaml"))
    found = {
        int(match[1]): path
        for path in start.parent.glob(f"{start.name}_stage*.yaml")
        if (match := re.fullmatch(rf"{re.escape(start.name)}_stage(\d+)\.yaml", path.name))
    }
    for number in range(1, max(found, default=1) + 1):
        if number not in found:
            raise FileNotFoundError(
                f"{start}_stage{number}.yaml: no such file; PREFIX must be the path of the recipes up to _stage"
            )
    stages: list[Stage] = []
    for number, recipe in sorted(found.items()):
        before = stages[-1].folder if stages else None
        stages.append(Stage(number, recipe, output_dir / recipe.stem, before))
    return stages


def check_flags(flags: Sequence[str]) -> None:
    """Raises ValueError for flags that this script sets itself."""
    if taken := [flag for flag in flags if flag.split("=")[0] in OWN_FLAGS]:
        raise ValueError(f"{' '.join(taken)}: set for each stage by this script, must not stand after --")


def check_before(stage: Stage) -> None:
    """Raises ValueError where the stage before has not ended by itself."""
    if stage.before is None:
        return
    summary = stage.before / "summary.json"
    reason = json.loads(summary.read_text(encoding="utf-8"))["stop_reason"] if summary.is_file() else "has not finished"
    if reason not in END_REASONS:
        raise ValueError(f"{stage.before}: {reason}; stage {stage.number} starts from its weights, train it first")


def run(command: list[str]) -> int:
    """The exit code; SIGTERM and SIGINT go to the run, which saves a checkpoint and ends."""
    process = subprocess.Popen(command)

    def pass_on(number: int, frame: object) -> None:
        if process.poll() is None:
            process.send_signal(number)

    # At a terminal Ctrl-C reaches the run by itself; twice would be a second, harder request.
    before = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return process.wait()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def train_stages(stages: Sequence[Stage], flags: Sequence[str]) -> int:
    """Train them in order; returns 0, or the exit code of the first that failed or was interrupted. Raises ValueError
    where a stage before has not finished."""
    for stage in stages:
        check_before(stage)
        print(f"\nstage {stage.number}: {shlex.join(stage.command(flags))}", flush=True)
        if code := run(stage.command(flags)):
            code = code if code > 0 else 128 - code  # of a signal
            print(f"stage {stage.number} ended with exit code {code}; the same command continues it", file=sys.stderr)
            return code
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="Flags after -- are those of train.py, for every stage.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="of the recipes: configs/nanomolmo2_tiny")
    parser.add_argument("--output_dir", type=Path, default=Path("grades_output"), help="of the runs [grades_output]")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    given, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    try:
        check_flags(flags)
        stages = find_stages(given.prefix, given.output_dir)
        if given.list:
            print("\n".join(shlex.join(stage.command(flags)) for stage in stages))
            return 0
        return train_stages(stages, flags)
    except (ValueError, OSError) as error:
        print(f"train_stages.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
