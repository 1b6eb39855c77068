"""SIGKILL of all processes of scripts/train_stages.py inside a stage: the same command continues to the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny.runs import same

import train
from scripts import make_shapes, train_stages
from training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs/nanomolmo2_tiny")
STEPS, INTERVAL = 8, 2
# The third checkpoint is complete beside its place, and will never stand there.
KILLED_AT = "step_00000006"
FLAGS = (
    "--batch_size 2 --eval_batch_size 8 --max_new_tokens 4 --keep_checkpoints 9 "
    f"--checkpoint_interval {INTERVAL} --max_training_steps {STEPS} --eval_interval {STEPS}"
).split()
# Python imports it at its start. At a moment that is the same on every machine, however slow.
KILLER = """
import os, signal, sys

def look(event, arguments):
    if event == "os.rename" and os.fsdecode(arguments[1]).endswith(os.environ["KILLED_AT"]):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(look)
"""


@pytest.fixture(autouse=True)
def shapes(tmp_path, monkeypatch):
    """The working directory, with the rows where the recipes look for them."""
    assert make_shapes.main(["--output", str(tmp_path / "shapes_rows"), "--scale", "0.01"]) == 0
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grades.plots.draw", lambda history: [])


def in_process(command: list[str]) -> int:
    return train.main(parse_arguments(command[2:]))


def kill_inside(command: list[str], stage: int) -> None:
    """Run the command until it puts that checkpoint of the stage in its place; then all its processes are killed."""
    at = f"nanomolmo2_tiny_stage{stage}/checkpoints/{KILLED_AT}"
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "KILLED_AT": at}
    done = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def checkpoints(output: str, stage: int) -> set[str]:
    """The names of those of a stage that are in their place."""
    folder = Path(output, f"nanomolmo2_tiny_stage{stage}", "checkpoints")
    return {path.name for path in folder.glob("step_*") if path.suffix == ""}


def stages(output: str, *flags: str) -> list[str]:
    return [TINY, "--output_dir", output, "--", *FLAGS, *flags]


def last(output: str, stage: int) -> dict:
    return load_file(Path(output, f"nanomolmo2_tiny_stage{stage}", "checkpoints", "last", "model.safetensors"))


def assert_same_weights(stage: int) -> None:
    assert same(last("killed", stage), last("whole", stage))
    assert stage == 1 or not same(last("whole", stage - 1), last("whole", stage))
    summary = json.loads(Path("killed", f"nanomolmo2_tiny_stage{stage}", "summary.json").read_text())
    assert summary["resumed_at_steps"] == [4]


@pytest.mark.slow
def test_three_stages_each_of_which_is_killed_end_with_the_same_weights(monkeypatch):
    """And with GradES, which freezes in each of them."""
    flags = ["--enable_grades", "--vision_tau", "1e9", "--language_tau", "1e-9", "--alpha", "0.3"]
    command = [sys.executable, str(ROOT / "scripts/train_stages.py")]
    monkeypatch.setattr(train_stages, "run", in_process)
    assert train_stages.main(stages("whole", *flags)) == 0
    for stage in (1, 2, 3):
        kill_inside([*command, *stages("killed", *flags)], stage)
        assert not checkpoints("killed", stage + 1)
        assert KILLED_AT not in checkpoints("killed", stage)
    assert train_stages.main(stages("killed", *flags)) == 0
    for stage in (1, 2, 3):
        assert_same_weights(stage)
