"""The folder of a run: its name, its lock, and the record of what machine made the result."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny.runs import ROOT

from training import run_folder
from training.environment import commit, describe_environment, record_environment, without_private
from training.resume import RunStart
from training.run_folder import lock, new_run_folder

# Holds the folder, and has a worker that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from training.run_folder import lock
held = lock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""
WITHOUT_FCNTL = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
from training.run_folder import lock
print(lock(Path(sys.argv[1])).note)
"""


def test_no_run_gets_the_folder_of_another(tmp_path):
    named = new_run_folder(str(tmp_path), "Versuch ä 1", "recipe")
    assert named == tmp_path / "Versuch ä 1"
    with pytest.raises(ValueError, match="--run_name Versuch ä 1"):
        new_run_folder(str(tmp_path), "Versuch ä 1", "recipe")
    made = {new_run_folder(str(tmp_path), None, "recipe") for _ in range(3)}  # in one second, mostly
    assert len(made) == 3
    assert all(folder.name.startswith("recipe_") and ":" not in folder.name for folder in made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_folder_is_held_until_its_process_is_killed_whatever_its_workers_do(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} "):
            lock(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # is there
        for _ in range(100):  # the worker lets go as soon as it runs
            try:
                held = lock(tmp_path)
                break
            except ValueError:
                time.sleep(0.1)
        assert held.note is None
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_a_process_may_open_its_own_run_again(tmp_path):
    held = lock(tmp_path)
    assert lock(tmp_path) is held
    held.release()
    assert lock(tmp_path) is not held


def test_a_run_that_failed_to_start_leaves_no_folder(tmp_path):
    folder = new_run_folder(str(tmp_path), "run", "recipe")
    start = RunStart(folder, {}, True, lock(folder))
    start.remove_new_folder()
    assert start.lock._file.closed  # before: Windows removes no open file
    assert not folder.exists()


def test_a_file_system_without_locks_is_a_line_in_the_log(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "lock_descriptor", refuse)
    (note,) = RunStart(tmp_path, {}, False, lock(tmp_path)).notes
    assert "No locks available" in note
    done = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert str(tmp_path) in done.stdout, done.stderr


def test_each_start_of_a_run_is_described(tmp_path):
    for step in (0, 4, 8, 6):
        record_environment(tmp_path, torch.device("cpu"), "float32", step)
    starts = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    assert [start["step"] for start in starts] == [0, 4, 6]  # the run went back from 8 to 6
    assert starts[0].keys() >= {"time", "command", "commit", "platform", "cpu", "gpu", "memory_gib", "cores"}
    assert (starts[0]["device"], starts[0]["dtype"]) == ("cpu", "float32")
    assert starts[0]["threads"] == torch.get_num_threads()
    assert starts[0]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_description_keeps_what_is_private(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "alice"))
    monkeypatch.setenv("LOGNAME", "alice")
    words = [f"--data={tmp_path / 'alice'}/a b", f"/scratch{tmp_path}/alice", "alice", r"D:\alice\x", "/malice/x"]
    found = without_private(words)
    assert found == ["--data=~/a b", f"/scratch{tmp_path}/USER", "alice", r"D:\USER\x", "/malice/x"]
    monkeypatch.setattr(sys, "argv", [f"{tmp_path}/alice/train.py", *words[:2]])
    found = describe_environment(torch.device("cpu"), "float32")
    assert found["command"][0] == "train.py"
    assert os.uname().nodename not in json.dumps(found) or len(os.uname().nodename) < 4


def test_the_commit_is_that_of_this_checkout_alone(tmp_path):
    def git(*words: str) -> None:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    assert commit(tmp_path) is None
    git("init", "-q")
    assert commit(tmp_path) is None  # nothing is committed yet
    (tmp_path / "a.txt").write_text("1", encoding="utf-8")
    git("add", "a.txt")
    git("commit", "-qm", "first")
    found = commit(tmp_path.resolve())
    assert (len(found["id"]), found["is_dirty"]) == (40, False)
    (tmp_path / "a.txt").write_text("2", encoding="utf-8")
    assert commit(tmp_path.resolve())["is_dirty"]
    (tmp_path / "inside").mkdir()
    assert commit((tmp_path / "inside").resolve()) is None
