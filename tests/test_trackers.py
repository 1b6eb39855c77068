"""Trackers of a run: which one, what of the environment is respected, and what they record."""

import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny.runs import arguments

import train
from training.arguments import parse_arguments
from training.trackers import GuardedTracker, NoTracker, check_tracker, has_wandb_account, make_tracker, tracker_name

# As much of trackio's interface as is used: it stores what it is given.
TRACKIO = """
import json
from pathlib import Path
STORE = Path(__file__).with_name("store.jsonl")
class Image:
    def __init__(self, value, caption=None):
        assert Path(value).exists()
class Run:
    def log(self, metrics, step=None):
        with STORE.open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.name, step, metrics], default=lambda image: "image") + "\\n")
def init(project, name=None, config=None, resume="never", embed=True, auto_log_gpu=None, auto_log_cpu=None):
    print("a screen of its own")
    run = Run()
    known = {json.loads(line)[0] for line in STORE.read_text(encoding="utf-8").splitlines()} if STORE.exists() else ()
    run.name = "brave-sunset-0" if resume == "never" and name in known else name
    return run
def finish():
    pass
"""


def settings(**flags):
    return SimpleNamespace(**({"log_with": None, "log_wandb": False, "wandb_project": "project"} | flags))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No account anywhere."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


@pytest.fixture
def wandb(environment):
    """wandb reads the environment once for a process."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.mark.parametrize(
    ("flags", "variables", "name"),
    [
        ({}, {}, None),
        ({"log_wandb": True}, {}, "wandb"),
        ({"log_with": "wandb"}, {"WANDB_MODE": "offline"}, "wandb"),
        ({"log_with": "wandb"}, {"WANDB_MODE": "disabled"}, None),
        ({"log_wandb": True}, {"WANDB_DISABLED": "true"}, None),
        ({"log_wandb": True}, {"WANDB_DISABLED": "false"}, "wandb"),
        ({"log_with": "tensorboard"}, {"WANDB_MODE": "disabled"}, "tensorboard"),
    ],
)
def test_the_settings_name_the_tracker(flags, variables, name, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert tracker_name(settings(**flags)) == name


@pytest.mark.parametrize("flags", [{"log_wandb": True}, {"log_with": "tensorboard"}, {"log_with": "trackio"}])
def test_an_absent_package_is_named_with_its_command(flags, monkeypatch, tmp_path):
    name = flags.get("log_with", "wandb")
    (tmp_path / name).mkdir()  # as wandb leaves it where runs were started: no package, though Python takes it for one
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != name})
    with pytest.raises(ValueError, match=f"{name}: uv sync --extra {name}, or pip install {name}") as error:
        check_tracker(settings(**flags))
    assert ("--log_wandb" if "log_wandb" in flags else f"--log_with {name}") in str(error.value)


def test_an_account_is_looked_up_at_the_server_that_is_used(monkeypatch, tmp_path):
    ours, public = "https://wandb.example.org:8080", "https://api.wandb.ai"
    assert not has_wandb_account(ours)  # no file
    (tmp_path / "netrc").write_text("machine wandb.example.org:8080 login user password 0123", encoding="utf-8")
    assert (has_wandb_account(ours), has_wandb_account(public)) == (True, False)
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    assert not has_wandb_account(ours)
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # as Windows names it
    assert not has_wandb_account(public)
    (tmp_path / "_netrc").write_text("machine api.wandb.ai login user password 0123", encoding="utf-8")
    assert has_wandb_account(public)
    (tmp_path / ".netrc").write_text("not a netrc file", encoding="utf-8")
    assert not has_wandb_account(ours)
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert has_wandb_account(ours)


@pytest.mark.slow
def test_wandb_records_offline_without_an_account(wandb, data, tmp_path):
    flags = {"log_wandb": True, "enable_grades": True, "max_training_steps": 2}
    before = set(threading.enumerate())
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    folder = tmp_path / "out" / "run"
    assert "wandb sync " in (folder / "log.txt").read_text(encoding="utf-8")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    # The threads of its telemetry would ask wandb's server every minute.
    assert not [thread.name for thread in set(threading.enumerate()) - before if "Otel" in thread.name]
    tables = [json.loads(path.read_text()) for path in folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    [table] = tables
    assert table["columns"] == ["picture", "question", "source", "expected", "step 2"]
    assert {row[0] for row in table["data"]} == {"Image"}  # whose file goes with the table's artifact


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandb_asks_the_server_of_the_environment_and_its_own_settings(wandb, monkeypatch, tmp_path, mode):
    asked = []

    def init(mode=None, **options):
        asked.append(mode)
        return FakeRun(tmp_path, offline=mode == "offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {mode}\n", encoding="utf-8")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123", encoding="utf-8")
    cfg = settings(log_with="wandb", wandb_entity=None)
    assert make_tracker(cfg, {}, tmp_path, print).id == "x"
    (tmp_path / "netrc").unlink()
    make_tracker(cfg, {}, tmp_path, print)
    assert asked == {"online": [None, "offline"], "offline": ["offline"] * 2, "disabled": [None] * 2}[mode]


class FakeRun:
    """A run of wandb: it drops what is logged at a step of its own before the one it has reached."""

    id = "x"

    def __init__(self, folder, offline=True, next_step=0):
        self.dir, self.offline, self.next_step = str(folder / "files"), offline, next_step
        self.points, self.summary, self.axes = [], {}, {}

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        if step is not None and step < self.next_step:
            return
        self.points.append(values)
        self.next_step = self.next_step + 1 if step is None else step

    def finish(self):
        self.next_step += 1


def test_wandb_takes_the_evaluation_that_a_resumed_run_makes_again(wandb, monkeypatch, tmp_path):
    runs, picture = [], tmp_path / "convergence.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)

    def init(**options):
        runs.append(FakeRun(tmp_path, next_step=runs[-1].next_step if runs else 0))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    cfg = settings(log_with="wandb", wandb_entity=None)
    first = make_tracker(cfg, {}, tmp_path, print)
    first.log({"train/loss": 0.5}, 2)
    first.finish({"steps": 2}, [picture])  # interrupted in the evaluation of that step
    again = make_tracker(cfg, {}, tmp_path, print, first.id, 2)
    again.log({"val/loss": 0.25}, 2)
    again.table("samples", ["question"], [["?"]], 2)
    again.log({"train/loss": 0.125}, 4)
    assert [run.axes for run in runs] == [{"*": "step"}] * 2
    assert [(point["step"], *point) for point in runs[0].points] == [
        (2, "train/loss", "step"),
        (2, "convergence", "step"),
    ]
    assert [point["step"] for point in runs[1].points] == [2, 2, 4]
    assert runs[1].points[0]["val/loss"] == 0.25


def test_tensorboard_has_a_resumed_run_as_one(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = {"log_with": "tensorboard", "enable_grades": True, "alpha": 0.9, "max_training_steps": 4}
    assert train.main(parse_arguments(arguments(data, tmp_path, "Lauf ä", **flags))) == 0
    folder = tmp_path / "out" / "Lauf ä"
    resumed = flags | {"max_training_steps": 6, "resume": folder / "checkpoints" / "last", "resume_override": True}
    assert train.main(parse_arguments(arguments(data, tmp_path, "Lauf ä", **resumed))) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("train/loss", "val/loss", "grades/frozen_share"):
        expected = {line["step"]: line[name] for line in lines if name in line}
        points = events.Scalars(name)
        assert {event.step: event.value for event in points} == pytest.approx(expected)
        assert len(points) == len(expected)
        assert max(expected) == 6
    assert {"convergence", "freezing"} <= set(events.Tags()["images"])
    assert {"settings/text_summary", "summary/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert f'tensorboard --logdir "{folder / "tensorboard"}"' in log


def test_tensorboard_leaves_out_what_the_resumed_run_makes_again(tmp_path):
    """All after the checkpoint, and of its step what metrics.jsonl no longer has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, value in ((0, 1.0), (3, 2.0)):
        tracker = make_tracker(settings(log_with="tensorboard"), {}, tmp_path, print, step=first)
        for step in range(first + 1, 6):
            tracker.log({"loss": value}, step)
        for step in range(max(first, 1), 6):
            tracker.log({"evaluated": value}, step)
        tracker.finish({"steps": 5}, [])
        lines = ({"step": step, "loss": step / 4, "evaluated": None} for step in (2, 3))
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in ("loss", "evaluated")}
    assert points["loss"] == [(1, 1), (2, 1), (3, 0.75), (4, 2), (5, 2)]
    assert points["evaluated"] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_trackio_continues_the_run_of_that_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "trackio.py").write_text(TRACKIO, encoding="utf-8")
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("trackio")})
    monkeypatch.syspath_prepend(tmp_path)
    folder, picture, said = tmp_path / "run", tmp_path / "convergence.png", []
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(picture)
    cfg = settings(log_with="trackio")
    for name in ("run", "brave-sunset-0"):  # of the first run in a folder of that name, and of another one
        tracker = make_tracker(cfg, {"a": 1}, folder, said.append)
        tracker.log({"train/loss": 0.5}, 2)
        tracker = make_tracker(cfg, {"a": 1}, folder, said.append, tracker.id, 2)
        tracker.log({"train/loss": 0.25}, 4)
        tracker.finish({"steps": 4, "stop_step": None}, [picture])
        lines = (tmp_path / "store.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines[-3:]] == [
            [name, 2, {"train/loss": 0.5}],
            [name, 4, {"train/loss": 0.25}],
            [name, 4, {"summary/steps": 4, "convergence": "image"}],
        ]
    assert "trackio show --project project" in said[0]
    assert capsys.readouterr().out == ""


def test_a_tracker_that_fails_ends_nothing_and_keeps_its_id():
    class Failing(NoTracker):
        id = "id"

        def log(self, values, step):
            calls.append(step)
            raise ConnectionError("no server")

    calls, said = [], []
    tracker = GuardedTracker(Failing(), said.append)
    for step in (1, 2):
        tracker.log({}, step)
    tracker.finish({}, [])
    assert (calls, tracker.id, len(said)) == ([1], "id", 1)
    assert "Failing failed (ConnectionError: no server)" in said[0]


def test_a_tracker_that_cannot_begin_is_an_error_of_one_line(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file", encoding="utf-8")
    with pytest.raises(ValueError, match="tensorboard cannot begin to record"):
        make_tracker(settings(log_with="tensorboard"), {}, tmp_path, print)
