"""check_cuda.py: whatever becomes of a section, the others run, and report and exit code say it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import check_cuda, cuda_grades_checks
from scripts.check_cuda import FAILED, LEFT_OUT, PASSED, Section

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = """
import json, os, signal, subprocess, sys, time
name, folder = sys.argv[1], sys.argv[sys.argv.index("--folder") + 1]
def tell(**result):
    print("RESULT " + json.dumps(result), flush=True)
tell(machine="a stand-in")
if name == "fine":
    tell(name="one", value=1, ok=True)
    print("| a | b |\\n| - | - |\\n| 1 | 2 |")
elif name == "wrong":
    tell(name="first", value=3, ok=True)
    tell(name="second", value=4, ok=False)
elif name == "error":
    raise ValueError("no such thing")
elif name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
elif name == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.makedirs(folder)
    open(folder + "/pid", "w").write(str(child.pid))
    time.sleep(60)
elif name == "absent":
    tell(left_out="not here")
elif name == "rate":
    tell(name="bfloat16 TFLOP/s", value=10.0)
elif name == "speed":
    tell(name="step", value="s", step={"step_s": 0.5, "tokens_per_s": 100, "tflop_per_s": 2.5, "peak_gib": None})
"""


@pytest.fixture
def run(tmp_path):
    """Runs stand-in sections, of which those named in `measures` are no checks: (exit code, found by name, report)."""
    script = tmp_path / "stand_ins.py"
    script.write_text(STAND_INS)

    def run(*names: str, measures=(), least_s=0.0, hang_s=60.0, flags=()):
        """hang_s: the limit of the section that hangs; to start Python takes long on a busy machine."""
        least, limits = {"large": 1e6}, {"hang": hang_s}
        sections = [
            Section(
                name, f"about {name}", script, limits.get(name, 60.0), least.get(name, least_s), name not in measures
            )
            for name in names
        ]
        code = check_cuda.main([f"--output={tmp_path / 'out'}", "--jobs=3", *flags], sections)
        found = {one["name"]: one for one in json.loads((tmp_path / "out" / "results.json").read_text())}
        return code, found, (tmp_path / "out" / "report.md").read_text()

    return run


def ended(process: int) -> bool:
    """Within five seconds, as an orphan is removed by init; where nobody removes it, it is a zombie."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_no_section_takes_others_with_it(run, tmp_path):
    code, found, report = run("crash", "error", "hang", "absent", "large", "wrong", "fine", hang_s=5)
    assert code == 1
    assert {name: one["status"] for name, one in found.items()} == {
        "crash": FAILED, "error": FAILED, "hang": FAILED, "absent": LEFT_OUT, "large": LEFT_OUT, "wrong": FAILED,
        "fine": PASSED,
    }  # fmt: skip
    for name, part in {"crash": "SIGSEGV", "error": "no such thing", "hang": "5 s", "absent": "not here"}.items():
        assert part in found[name]["why"]
    assert "second: 4" in found["wrong"]["why"]
    head = report.split("##")[0].splitlines()
    assert "- device: a stand-in" in head
    assert "- passed: fine" in head
    assert "- failed: crash, error, hang, wrong" in head
    assert "- left out: absent, large" in head
    assert "| 1 | 2 |" in report.splitlines()
    assert ended(int((tmp_path / "out" / "hang" / "pid").read_text()))  # what a section started ends with it


def test_a_failed_measurement_is_named_but_nothing_is_wrong(run):
    code, found, report = run("fine", "error", measures=["error"])
    assert code == 0
    assert found["error"]["status"] == FAILED
    assert "- failed: error" in report


def test_the_budget_ends_what_runs_and_leaves_out_the_rest(run):
    code, found, _ = run("hang", "fine", flags=["--budget=2", "--jobs=1"], least_s=0.5)
    assert code == 1
    assert found["hang"]["status"] == FAILED
    assert found["fine"]["status"] == LEFT_OUT


def test_steps_are_compared_with_the_rate_of_the_device(run):
    _, _, report = run("rate", "speed", measures=["rate", "speed"])
    assert "| speed | 0.5000 | 100 | 2.500 | 25.0% | – |" in report.splitlines()


def test_only_takes_known_names(run, capsys):
    _, found, _ = run("fine", "error", flags=["--only", "fine"])
    assert list(found) == ["fine"]
    with pytest.raises(SystemExit):
        run("fine", flags=["--only", "fin"])
    assert "--only fin" in capsys.readouterr().err


@pytest.mark.slow
def test_real_sections_run_without_the_packages_of_training(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('datasets', 'peft', 'matplotlib', 'torchvision'):\n    sys.modules[name] = None\n"
    )
    flags = ["--tiny", "--device=cpu", f"--output={tmp_path / 'out'}", "--only", "generation", "waiting", "step_222m"]
    done = subprocess.run(
        [sys.executable, "scripts/check_cuda.py", *flags],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    statuses = {one["name"]: one["status"] for one in found}
    assert statuses == {"generation": PASSED, "waiting": LEFT_OUT, "step_222m": PASSED}, done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("ours", "ok"),
    [(0.101, True), (0.0, False), (float("nan"), False), (float("inf"), False), (None, False), (0.2, False)],
)
def test_a_metric_is_right_if_every_number_is_near_that_of_the_cpu(monkeypatch, ours, ok):
    told = {}
    found = iter([{"a": 0.1, "b": ours, "c": -1.0}, {"a": 0.1, "b": 0.1, "c": -1.0}])
    monkeypatch.setattr(cuda_grades_checks, "METRICS", ())
    monkeypatch.setattr(cuda_grades_checks, "exact_products", lambda: None)
    monkeypatch.setattr(cuda_grades_checks, "measure_short", lambda case, metric, device: next(found))
    monkeypatch.setattr(cuda_grades_checks, "tell", lambda name, value, ok: told.update({name: ok}))
    cuda_grades_checks.check_metrics(SimpleNamespace(device="cpu"))
    assert told == {"rollback": ok}
    assert cuda_grades_checks.largest_error({"a": -1.5, "b": 0.0}, {"a": -1.0, "b": 0.0}) == 0.5
