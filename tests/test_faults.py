"""What ends a run from outside: signals, SIGKILL, a full disk, damaged files, a dead worker, a second run.

Each fault befalls a real process: a fork of this one, in which all is imported already.
"""

import ast
import contextlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import tqdm
from safetensors.torch import load_file
from tiny.runs import ROOT, UNEQUAL, arguments, assert_same, before_steps, numbers, same, state
from torch.utils.data import get_worker_info

import train
from data.datasets import VQADataset
from data.pipeline import Data
from training.arguments import parse_arguments
from training.checkpoint_folder import STATE, damage, follow, step_folders, write_manifest
from training.evaluation import EvaluationSchedule
from training.state import LoopState

tqdm.tqdm.monitor_interval = 0  # no thread that a fork would lose
STEPS = 12


class Child:
    """A process that runs train.py's main; what it prints is in `printed`."""

    def __init__(self, flags: list[str], output: Path, before_step=None):
        """before_step(step): called in it before each step, counted from 1."""
        self.output, self.ended = output, False
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            with output.open("w", buffering=1) as sys.stdout:
                sys.stderr = sys.stdout
                try:
                    if before_step is not None:
                        before_steps(before_step)
                    code = train.main(parse_arguments(flags))
                except SystemExit as ended:
                    code = ended.code
                except BaseException:
                    traceback.print_exc()
            os._exit(code)

    def wait(self) -> int:
        """Its exit code; of a killed one the negative signal."""
        status = os.waitpid(self.pid, 0)[1]
        self.ended = True
        return os.waitstatus_to_exitcode(status)

    @property
    def printed(self) -> str:
        return self.output.read_text()


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """start(name, before_step, **flags) -> Child."""
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    # What a run imports late is imported here, so that the forks need not.
    assert train.main(parse_arguments(arguments(data, tmp_path / "warm", "run", max_training_steps=1))) == 0
    children: list[Child] = []

    def run(name: str = "run", before_step=None, **flags) -> Child:
        given = {
            "max_training_steps": STEPS, "eval_interval": 4, "resume": "auto", "enable_grades": True, "alpha": 0.25,
            "tau_mode": "relative", "vision_tau": 0.97, "language_tau": 1e-9,
        }  # fmt: skip
        words = arguments(data, tmp_path, name, **given | flags)
        children.append(Child(words, tmp_path / f"printed{len(children)}.txt", before_step))
        return children[-1]

    yield run
    for child in children:
        if not child.ended:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def until(condition) -> None:
    """Wait for it, at most a minute."""
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_run_goes_on(start, out, number):
    def signalled(step):
        for _ in range(2 * (step == 7)):  # as under `timeout` and `uv run`
            os.kill(os.getpid(), number)

    assert start("whole").wait() == 0
    child = start(before_step=signalled)
    assert child.wait() == 128 + number
    assert f"{number.name}: saving and ending after this step" in child.printed
    assert state(out / "run")["step"] == 7
    assert start().wait() == 0
    assert_same(out / "run", out / "whole")


def test_workers_serve_the_step_when_all_processes_of_a_run_get_the_signal(start, out, monkeypatch):
    """As timeout, Slurm and systemd send it. Here the run waits for a batch when it comes."""
    read, made = Data.start_reading, []

    def signalled(dataset, keys):
        made.append(keys)
        if len(made) == 24 and get_worker_info().id == 0:
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.2)
        return getitem(dataset, keys)

    getitem = VQADataset.__getitem__
    monkeypatch.setattr(VQADataset, "__getitem__", signalled)
    monkeypatch.setattr(Data, "start_reading", lambda data: (os.setsid(), read(data)))
    child = start(num_workers=2, gradient_accumulation_steps=8)
    assert child.wait() == 128 + signal.SIGTERM, child.printed
    assert "SIGTERM: saving and ending after this step" in child.printed
    assert state(out / "run")["step"] in (1, 2)
    with pytest.raises(ProcessLookupError):  # no worker is left either
        os.killpg(child.pid, 0)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_comes_to_the_same_end(start, out):
    """At random moments of its start-up, steps, evaluations and savings, of which there is one after each step."""
    flags = {"max_training_steps": 80, "checkpoint_interval": 1, "eval_interval": 8}
    started = time.monotonic()
    assert start("whole", **flags).wait() == 0
    whole_s = time.monotonic() - started
    rng, kills, unfinished, damaged = random.Random(0), 0, 0, 0
    while kills < 20:
        child = start(**flags)
        time.sleep(rng.uniform(0, whole_s / 5))
        os.kill(child.pid, signal.SIGKILL)
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.printed
        if code == 0:  # it had come to its end: the next kills are of a run that begins anew
            shutil.rmtree(out / "run")
            continue
        kills += 1
        unfinished += any(out.glob("run/checkpoints/*.tmp"))
        folders = step_folders(out / "run")
        damaged += sum(damage(folder) is not None for folder in folders)
    print(f"{whole_s:.1f} s in one go; {unfinished} of 20 kills left a checkpoint unfinished; came to {folders[:1]}")
    assert damaged == 0
    assert start(**flags).wait() == 0
    assert_same(out / "run", out / "whole")


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int):
    """A file system of its own; the test is skipped where none may be made."""
    folder.mkdir()
    size = f"size={mebibytes}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)


@pytest.mark.parametrize("recovers", [True, False])
def test_a_full_disk_is_said_and_survived(start, out, recovers):
    with small_disk(out, 2):

        def crowded(step):
            if step == 7:
                fill(out / "ballast")
            if step == 11 and recovers:
                (out / "ballast").unlink()

        assert start("whole").wait() == 0
        child = start(before_step=crowded)
        code = child.wait()
        assert "NOT SAVED: step_00000008 could not be written" in child.printed
        assert child.printed.count("lines may be missing") <= 2
        assert [damage(folder) for folder in step_folders(out / "run")] == [None] * (2 if recovers else 1)
        assert not list(out.glob("run/checkpoints/*.tmp"))
        if recovers:
            assert code == 0
        else:
            assert code == 1
            assert "train.py: error: " in child.printed.splitlines()[-1]
            (out / "ballast").unlink()
            assert start().wait() == 0
            assert_same(out / "run", out / "whole")


def without_best(saved: dict) -> dict:
    loop = {name: value for name, value in saved["states"]["loop"].items() if not name.startswith("best")}
    return saved | {"best_step": None, "states": saved["states"] | {"loop": loop}}


def limited(step):
    """No file may be long in the steps from 7 to 10."""
    size = 20_000 if 7 <= step < 11 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_file_that_cannot_grow_is_said_and_survived(start, out):
    """As on a full disk, where nothing may be mounted: the weights cannot be written, the log can."""

    assert start("whole").wait() == 0
    child = start(before_step=limited)
    assert child.wait() == 0
    assert child.printed.count("NOT SAVED: step_00000008 could not be written") == 1
    assert numbers(out / "run") == numbers(out / "whole")
    ours, theirs = (load_file(out / name / "checkpoints/last/model.safetensors") for name in ("run", "whole"))
    assert same(ours, theirs)
    ours, theirs = (without_best(state(out / name)) for name in ("run", "whole"))
    assert all(same(ours[key], theirs[key]) for key in ours.keys() - UNEQUAL)
    child = start("other", before_step=limited, max_training_steps=8)
    assert child.wait() == 1
    assert "the end of the run is not saved: step_00000008" in child.printed.splitlines()[-1]
    assert [damage(folder) for folder in step_folders(out / "other")] == [None]


def test_a_step_that_the_disk_refused_is_not_the_best(start, out):
    """`best` leads to the best of those that are there."""

    losses = {4: 3.0, 8: 1.0, 12: 2.0}
    record = LoopState.record

    def measured(state, val):
        record(state, val | {"val/loss": losses[state.step], "val/loss_averaged": None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopState, "record", measured)
        child = start(before_step=limited)
        assert child.wait() == 0, child.printed
    assert "NOT SAVED: step_00000008" in child.printed
    assert follow(out / "run/checkpoints/best").name == "step_00000012"
    found = json.loads((out / "run/summary.json").read_text())
    assert (found["best_step"], found["best_metric"]) == (12, 2.0)


def test_an_end_that_the_disk_refused_is_tried_once_more(start, out, monkeypatch):
    run = EvaluationSchedule.run
    monkeypatch.setattr(EvaluationSchedule, "run", lambda *args: (run(*args), limited(0)))  # the disk recovers
    child = start(before_step=limited, max_training_steps=8)
    assert child.wait() == 0
    assert "NOT SAVED: step_00000008" in child.printed
    assert state(out / "run")["step"] == 8
    assert follow(out / "run/checkpoints/best").name == "step_00000008"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "spoil", "what"),
    [
        ("model.safetensors", flip, "model.safetensors is not what was written"),
        (STATE, flip, f"{STATE} is not what was written"),
        (STATE, shorten, f"{STATE} has"),
        ("tokenizer.json", Path.unlink, "no tokenizer.json"),
        ("manifest.json", shorten, "manifest.json or what it names cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(start, out, name, spoil, what):
    assert start("whole").wait() == 0
    stopped = start(before_step=lambda step: step == 10 and os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.wait() == 143
    newest = out / "run" / "checkpoints" / "step_00000010"
    spoil(newest / name)
    child = start()
    assert child.wait() == 0
    assert f"step_00000010 is damaged ({what}" in child.printed
    assert "resuming from" in child.printed
    assert "after step 8" in child.printed
    assert_same(out / "run", out / "whole")
    assert newest.with_suffix(".damaged").is_dir()
    for folder in step_folders(out / "run"):
        flip(folder / "config.json")
    (out / "run" / "summary.json").unlink()
    child = start()
    assert child.wait() == 2
    assert "no checkpoint to resume from: step_00000012 is damaged" in child.printed
    assert "step_00000008 is damaged" in child.printed


def test_a_worker_that_dies_is_named_and_nothing_is_lost(start, out):
    def kills(step):
        if step == 7:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    flags = {"num_workers": 1}
    assert start("whole", **flags).wait() == 0
    child = start(before_step=kills, **flags)
    assert child.wait() == 1
    print(child.printed)
    assert "a process of --num_workers has died" in child.printed.splitlines()[-1]
    assert "Traceback" not in child.printed
    assert start(**flags).wait() == 0
    assert_same(out / "run", out / "whole")


def test_two_runs_do_not_share_a_folder(start, out):
    first = start(before_step=lambda step: time.sleep(60 * (step == 6)), num_workers=1)
    until(lambda: (out / "run" / "checkpoints" / "last").exists())
    second = start()
    assert second.wait() == 2
    last = second.printed.splitlines()[-1]
    assert last == f"train.py: error: {out / 'run'}: process {first.pid} is running in it; one run at a time"
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert start().wait() == 0  # at once, though the worker of the first may live a little longer


class Trap:
    """Would run code where a checkpoint is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(start, out, tmp_path):
    stopped = start(before_step=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.wait() == 143
    newest, trap = step_folders(out / "run")[0], tmp_path / "trap"
    torch.save(state(out / "run") | {"kind": Trap(trap)}, newest / STATE)
    write_manifest(newest, 6)
    child = start()
    assert child.wait() == 2
    assert f"{STATE} cannot be loaded" in child.printed
    assert not trap.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / STATE, weights_only=True)


def test_nothing_is_loaded_that_could_run_code():
    for path in [*ROOT.glob("*.py"), *(p for room in ROOT.glob("[a-z]*/") for p in room.glob("*.py"))]:
        if path.parent.name in ("tests", "build"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name != "torch.load" or given.get("weights_only") == "True", path
                loader = [ast.unparse(argument) for argument in node.args[1:]]
                assert name != "yaml.load" or loader in (["RecipeLoader"], ["TaskLoader"]), path  # both SafeLoaders
                assert name not in ("pickle.load", "pickle.loads", "eval", "exec"), path
                assert given.get("trust_remote_code", "False") == "False", path


def test_no_secret_is_written_down(start, out, monkeypatch):
    pytest.importorskip("wandb")
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_ThisIsNoRealTokenButLooksLikeOne"}
    for name, value in (secrets | {"WANDB_MODE": "offline"}).items():
        monkeypatch.setenv(name, value)
    child = start(log_wandb=True, max_training_steps=2)
    assert child.wait() == 0, child.printed
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()] + [child.output.read_bytes()]
    assert list(out.glob("run/wandb/offline-run-*/*.wandb"))
    for value in secrets.values():
        assert not any(value.encode() in content for content in written)
    assert json.loads((out / "run" / "summary.json").read_text())["steps"] == 2
