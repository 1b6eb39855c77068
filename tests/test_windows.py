"""A run where the system lacks what Windows lacks: links, fcntl, SIGCHLD, folders that can be opened; odd paths."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from tiny.runs import arguments, state

import train
from training.arguments import parse_arguments
from training.checkpoint_folder import find_checkpoint, follow


def refused(*args, **kwargs):
    raise OSError(1314, "A required privilege is not held by the client")


@pytest.fixture
def windows(monkeypatch):
    """Nothing in this process may use what Windows lacks."""
    opened = os.open

    def open_files_alone(path, *args, **kwargs):
        if "dir_fd" not in kwargs and Path(path).is_dir():  # with it: shutil.rmtree, which has another way on Windows
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(os, "symlink", refused)
    monkeypatch.setattr(os, "open", open_files_alone)
    monkeypatch.delattr(signal, "SIGCHLD")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr("grades.plots.draw", lambda history: [])


def test_a_run_saves_resumes_and_prunes(windows, data, tmp_path, capsys):
    flags = {"output_dir": tmp_path / "Läufe von heute", "keep_checkpoints": 1}
    assert train.main(parse_arguments(arguments(data, tmp_path, "run ü 1", **flags))) == 0
    folder = flags["output_dir"] / "run ü 1"
    checkpoints = folder / "checkpoints"
    assert not any(path.is_symlink() for path in checkpoints.iterdir())
    assert follow(checkpoints / "last").name == "step_00000008"
    more = flags | {"resume": "auto", "max_training_steps": 12, "resume_override": True}
    assert train.main(parse_arguments(arguments(data, tmp_path, "run ü 1", **more))) == 0
    last, best = follow(checkpoints / "last"), follow(checkpoints / "best")
    assert state(folder, last.name)["step"] == 12
    assert {path for path in checkpoints.iterdir() if path.is_dir()} == {last, best}
    assert find_checkpoint(folder) == best
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "generate.py" in line][-1:]
    words = shlex.split(line)
    assert words[words.index("--checkpoint") + 1] == str(folder)
