"""What a run says and writes: lines, numbers, progress, and its first line."""

import io
import json
import math
import sys

import pytest

from training import logging
from training.arguments import parse_arguments
from training.logging import NoLog, RunLog
from training.report import announce


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(tmp_path):
    """The log of a run of 100 steps, in a folder with spaces and umlauts."""
    folder = tmp_path / "Läufe mit Leerzeichen"
    folder.mkdir()
    log = RunLog(folder, 100)
    yield log
    log.close()


def test_lines_and_numbers_are_in_the_files_at_once(log, capsys):
    log.say("für alle")
    log.detail("for the file")
    log.record(3, {"loss": 0.5, "norm": math.inf, "none": None})
    assert capsys.readouterr().out == "für alle\n"
    text, metrics = (open(file.name, encoding="utf-8").read() for file in (log.text, log.metrics))  # noqa: PTH123, SIM115
    assert text == "für alle\nfor the file\n"
    assert json.loads(metrics) == {"step": 3, "loss": 0.5, "norm": None, "none": None}
    sizes = {"log.txt": len(text.encode()), "metrics.jsonl": len(metrics.encode()), "dropped.jsonl": 0}
    assert log.state_dict()["bytes"] == sizes


def test_in_a_pipe_progress_is_a_line_now_and_then(log, capsys, monkeypatch):
    log.show(0, loss="9")  # before it starts
    log.start_bar(40)
    log.show(41, loss="1.5")
    log.show(42, loss="1.4")  # within a minute
    log.say("froze one")
    monkeypatch.setattr(logging, "LINE_INTERVAL_S", 0.0)
    log.line_due = 0.0
    log.show(50, loss="1.3")
    log.close_bar()
    log.show(60, loss="9")
    printed, progress = capsys.readouterr()
    assert printed == "froze one\n"
    lines = progress.splitlines()
    assert [line.split()[1] for line in lines] == ["41/100", "50/100"]
    assert [line.split("loss=")[1] for line in lines] == ["1.5]", "1.3]"]
    assert "\r" not in progress


def test_in_a_terminal_lines_stand_above_the_bar(log, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    log.start_bar(40)
    log.show(50, loss="1.5")
    log.say("froze one")
    log.bar.refresh()
    log.close_bar()
    screen = terminal.getvalue()
    assert "\rfroze one\n\r" in screen
    assert "50/100" in screen.split("froze one")[1]


def test_a_full_disk_is_said_once_and_ends_nothing(log, capsys):
    class Full:
        name = "log.txt"

        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

    log.text, file = Full(), log.text
    log.say("one")
    log.say("two")
    log.text = file
    printed, error = capsys.readouterr()
    assert printed == "one\ntwo\n"
    assert error.count("No space left on device") == 1


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = NoLog()
    public = [name for name in vars(RunLog) if not name.startswith("_")]
    arguments = {"say": ["x"], "detail": ["x"], "record": [1, {"a": 1}], "show": [1], "load_state_dict": [{}]}
    for name in public:
        getattr(log, name)(*arguments.get(name, []))
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "present", "absent"),
    [
        ("", ["quickstart.yaml", "easy-vqa", "--enable_grades", "table10"], ["with GradES"]),
        ("--enable_grades", ["quickstart.yaml", "with GradES"], ["without"]),
        ("--train_dataset_path my/rows", ["my/rows", "without GradES"], ["able 10", "table10"]),
        ("--config configs/nanovlm_222m.yaml", ["nanovlm_222m.yaml"], ["quickstart", "table10"]),
        ("--alpha 0.3", ["have no effect: --alpha"], []),
    ],
)
def test_the_first_line_says_what_runs(flags, present, absent, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    announce(parse_arguments(flags.split()))
    printed = capsys.readouterr().out
    assert all(words in printed for words in present)
    assert not any(words in printed for words in absent)
