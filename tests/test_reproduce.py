"""reproduce.py and sweep.py with runs that only write what train.py would."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from grades import find_components
from models.vision_language_model import VisionLanguageModel
from scripts import compare_metrics, reproduce, runs, sweep
from training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


def summary(steps: int = 1600, **given) -> dict:
    """A summary.json: 0.1 s a step, 5 s to start, 2 s a validation, 4 s for the test, 1 s a checkpoint, 3 s of rest."""
    stops = -(-steps // 400)
    times = {
        "startup_time_s": 5.0, "train_time_s": 0.1 * steps, "eval_time_s": 2.0 * stops + 4.0, "test_time_s": 4.0,
        "save_time_s": 1.0 * stops,
    }  # fmt: skip
    times |= {name: value for name, value in given.items() if name in times}
    total_time_s = sum(times.values()) - times["test_time_s"] + 3.0
    rest = {
        "total_time_s": total_time_s, "steps": steps, "stop_reason": "max_training_steps", "train_flops": steps * 10**9,
        "val_loss": 0.5, "val_exact_match": 0.8, "test_exact_match": 0.9, "frozen_share": None,
    }  # fmt: skip
    return rest | times | given


class Trainer:
    """Stands in for train.py; `fails_at`: the number of the run that fails after writing half of its folder."""

    def __init__(self, fails_at: int = 0):
        self.commands: list[list[str]] = []
        self.fails_at = fails_at

    @property
    def names(self) -> list[str]:
        return [value_of(command, "--run_name") for command in self.commands]

    def __call__(self, command: list[str], log: Path) -> int:
        self.commands.append(command)
        folder = Path(value_of(command, "--output_dir")) / value_of(command, "--run_name")
        for step in (320, 640):
            goes_on = value_of(command, "--resume") == "auto"  # else raises where train.py would: it exists
            (folder / "checkpoints" / f"step_{step}").mkdir(parents=True, exist_ok=goes_on)
            (folder / "checkpoints" / f"step_{step}" / "manifest.json").write_text(json.dumps({"step": step}))
        log.write_text("\n".join(f"line {i}" for i in range(50)))
        if len(self.commands) == self.fails_at:
            return 1
        steps = int(value_of(command, "--max_training_steps") or 1600)
        grades = "--enable_grades" in command and "--freeze_vision" not in command
        found = summary(1200, frozen_share=1.0, stop_reason="frozen") if grades else summary(steps)
        seed = int(value_of(command, "--seed"))
        found |= {"test_exact_match": found["test_exact_match"] + 0.02 * seed}
        (folder / "summary.json").write_text(json.dumps(found))
        (folder / "grades_history.json").write_text("{}")
        return 0


def value_of(command: list[str], flag: str) -> str | None:
    """The last value of the flag."""
    places = [i for i, word in enumerate(command) if word == flag]
    return command[places[-1] + 1] if places else None


@pytest.fixture
def start(tmp_path):
    def run(script, *words, trainer=None, config="quickstart") -> tuple[int, Trainer, Path]:
        trainer = trainer or Trainer()
        argv = ["--config", str(ROOT / f"configs/{config}.yaml"), "--output", str(tmp_path / "out"), *words]
        return script.main(argv, trainer), trainer, tmp_path / "out"

    return run


def test_the_rows_run_seed_by_seed_and_start_from_each_other(start):
    code, trainer, out = start(reproduce, "--seeds", "2", "--lora_flags=--lora_rank 4", "--", "--val_size", "100")
    assert code == 0
    rows = ["lora_base", "full", "full_es", "full_grades", "lora", "lora_es", "lora_grades", "shortened", "random"]
    assert trainer.names == [f"{row}_seed{seed}" for seed in (0, 1) for row in rows]
    by_name = dict(zip(trainer.names, trainer.commands, strict=True))
    assert all(value_of(command, "--val_size") == "100" for command in trainer.commands)
    assert value_of(by_name["lora_base_seed0"], "--max_training_steps") == "400"
    lora = by_name["lora_seed1"]
    assert value_of(lora, "--vlm_checkpoint_path") == str(out / "runs" / "lora_base_seed1")
    assert (value_of(lora, "--lora_rank"), value_of(lora, "--lr_language_backbone")) == ("4", "0.0045")
    assert "--early_stopping" in by_name["lora_es_seed0"]
    assert value_of(by_name["lora_grades_seed0"], "--metric") == "gradient_norm"
    history = out / "runs" / "full_grades_seed1" / "grades_history.json"
    assert value_of(by_name["random_seed1"], "--replay_history") == str(history)
    assert value_of(by_name["random_seed1"], "--replay_seed") == "1"
    assert not list(out.glob("runs/*/checkpoints"))
    assert history.exists()


def test_pretrained_backbones_need_no_base(start, capsys):
    code, trainer, out = start(reproduce, "--seeds", "1", "--list", config="table10_nanovlm")
    assert (code, trainer.commands, out.exists()) == (0, [], False)
    printed = capsys.readouterr().out
    assert "lora_base" not in printed
    assert "--resume_from_vlm_checkpoint" not in printed
    assert "--lora_rank 32 --lr_vision_backbone 0.0005" in printed
    assert printed.count("train.py") == len(reproduce.ROWS)


def test_an_interrupted_reproduction_goes_on_where_it_was(start, capsys):
    rows = ("--seeds", "2", "--rows", "full", "lora", "lora_es")
    code, first, out = start(reproduce, *rows, trainer=Trainer(fails_at=4))  # lora_es of seed 0
    assert code == 1
    error = capsys.readouterr().err
    assert "line 49" in error
    assert "line 29" not in error
    assert "lora_es_seed0" in error
    assert (out / "runs" / "lora_base_seed0" / "checkpoints").exists()  # lora_es still starts from it
    assert "3 of 8 runs" in (out / "table.md").read_text()
    code, second, _ = start(reproduce, *rows)
    assert code == 0
    assert second.names[0] == "lora_es_seed0"
    assert value_of(second.commands[0], "--resume") == "auto"  # from its own last checkpoint
    assert first.names[:3] + second.names == [f"{row}_seed{s}" for s in (0, 1) for row in ("lora_base", *rows[3:])]
    assert not list(out.glob("runs/*/checkpoints"))
    code, third, _ = start(reproduce, *rows)
    assert (code, third.commands) == (0, [])
    _, fourth, _ = start(reproduce, *rows[:2], "--rows", "full", "lora", "lora_es", "lora_grades")
    assert fourth.names == [f"{row}_seed{s}" for s in (0, 1) for row in ("lora_base", "lora_grades")]  # bases are gone


def test_results_of_other_settings_are_not_mixed_in(start, capsys):
    start(reproduce, "--seeds", "1", "--rows", "full")
    code, trainer, _ = start(reproduce, "--seeds", "1", "--rows", "full", "--", "--lr_mp", "0.5")
    assert (code, trainer.commands) == (2, [])
    assert "lr_mp 0.0015, now 0.5" in capsys.readouterr().err
    rows = ("--seeds", "1", "--rows", "full", "full_grades")
    assert start(reproduce, *rows)[1].names == ["full_grades_seed0"]
    code, trainer, _ = start(reproduce, *rows, "--grades_flags=--vision_mlp_tau 3")
    assert (code, trainer.commands) == (2, [])
    assert "vision_mlp_tau None, now 3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "random"], "--rows random needs full_grades too"),
        (["--lora_base_share", "0"], "--lora_base_share 0.0: must be in (0, 1]"),
        (["--seeds", "0"], "--seeds 0: must be >= 1"),
        (["--", "--seed", "3"], "--seed: set for each run"),
        (["--", "--enable_grades"], "--enable_grades: belongs to single rows"),
        (["--", "--lr_map", "1"], "--lr_map"),
        (["--es_flags=--es_patience 0"], "--es_patience 0: must be >= 1"),
    ],
)
def test_errors_come_before_any_run(start, capsys, tmp_path, words, said):
    with pytest.raises(SystemExit) as end:
        start(reproduce, *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_shortened_run_fills_the_time_it_is_given():
    full = summary()  # 160 s of steps, 4 stops of 3 s, 12 s once
    assert full["total_time_s"] == pytest.approx(184)
    # 1,200 steps: 120 s and 3 stops, 141 s. One step more is a fourth stop.
    assert reproduce.shortened_steps(full, 141.0, eval_interval=400) == 1200
    assert reproduce.shortened_steps(full, 144.0, eval_interval=400) == 1200
    assert reproduce.shortened_steps(full, 144.5, eval_interval=400) == 1205
    assert reproduce.shortened_steps(full, 1000.0, eval_interval=400) == 1600
    assert reproduce.shortened_steps(full, 3.0, eval_interval=400) == 1


def test_the_shortened_run_is_planned_from_the_runs_of_its_seed(start):
    _, trainer, _ = start(reproduce, "--seeds", "1", "--rows", "full", "full_grades", "shortened")
    grades_s = summary(1200)["total_time_s"]
    expected = reproduce.shortened_steps(summary(), grades_s, 400)
    assert value_of(trainer.commands[-1], "--max_training_steps") == str(expected) == "1200"


def test_saved_time_is_attributed_and_adds_up():
    full = summary()
    run = summary(1000, train_time_s=80.0, eval_time_s=20.0, frozen_share=0.5, train_flops=8 * 10**11)
    found = runs.compare(run, full)
    assert found["saved_steps_s"] == pytest.approx(60)  # 600 steps of 0.1 s
    assert found["saved_cheaper_s"] == pytest.approx(20)  # 1,000 steps of 0.1 s took 80 s
    assert found["saved_eval_s"] == pytest.approx(12 - 20)
    assert found["saved_rest_s"] == pytest.approx(1)  # a checkpoint less
    assert found["saved_s"] == pytest.approx(sum(found[part] for part in runs.PARTS))
    assert found["saved_s"] == pytest.approx(full["total_time_s"] - run["total_time_s"])
    assert (found["flops_ratio"], found["frozen_share"]) == (0.5, 0.5)
    alone = runs.compare(run, None)
    assert (alone["speedup"], alone["saved_s"], alone["steps"]) == (None, None, 1000)


def test_the_tables_say_mean_and_spread_of_every_row(start):
    _, _, out = start(reproduce, "--seeds", "3", "--rows", "full", "full_grades", "lora")
    text = (out / "table.md").read_text()
    assert "| Full | 92.0 ± 2.0 (90.0..94.0) | 184 ± 0 (184..184) | 1.00 ± 0.00 (1.00..1.00) |" in text
    assert "|  | test exact match (%) | time (s) |" in text
    grades = runs.compare(summary(1200, frozen_share=1.0), summary())
    assert f"{grades['speedup']:.2f} ± 0.00" in text
    assert "| Full + GradES | +43.0 ± 0.0 (+43.0..+43.0) | +40.0 ± 0.0" in text
    assert "base trained for 400 steps" in text
    results = json.loads((out / "results.json").read_text())
    assert set(results["rows"]) == {"full", "full_grades", "lora"}
    assert results["rows"]["full"]["spread"]["accuracy"] == pytest.approx(
        {"mean": 0.92, "std": 0.02, "min": 0.90, "max": 0.94}
    )
    assert [values["seed"] for values in results["rows"]["lora"]["seeds"]] == [0, 1, 2]
    assert (out / "table.png").stat().st_size > 10_000


def test_what_was_not_measured_is_a_dash_and_validation_stands_in_for_a_test():
    assert runs.cell([None, None], "{:.1f}") == "–"
    assert runs.cell([0.5], "{:.1f}", 100) == "50.0"
    assert runs.cell([1.0, None, 3.0], "{:.1f}") == "2.0 ± 1.4 (1.0..3.0)"
    without_test = summary(test_exact_match=None)
    assert runs.accuracy_of(without_test) == 0.8
    assert runs.accuracy_name([without_test]) == "validation exact match"


def test_the_remaining_time_comes_from_the_same_row_where_there_is_one():
    specs = [runs.RunSpec(row, row, seed, ()) for seed in (0, 1) for row in ("full", "lora")]
    results = {"full_seed0": {"row": "full", "wall_s": 100.0}}
    assert runs.remaining_s(specs, results) == 300
    results["lora_seed0"] = {"row": "lora", "wall_s": 40.0}
    assert runs.remaining_s(specs, results) == 140
    assert runs.clock(3725) == "1:02:05"


def test_a_run_does_not_outlive_the_script(tmp_path):
    child = f"import time, pathlib; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    script = "import signal, sys; from pathlib import Path; from scripts import runs; "
    script += "signal.signal(signal.SIGTERM, runs._end); "
    script += "processes = runs.Processes(); "
    script += f"runner = lambda command, log: processes([sys.executable, '-c', {child!r}], log); "
    script += f"specs = [runs.RunSpec('row', 'row', 0, ())]; made = runs.Runs(Path({str(tmp_path)!r}), specs, runner, "
    script += "processes.end); made.run_all(lambda: None)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    for _ in range(600):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM  # it waits for its child, which would sleep for a minute


def test_jobs_run_at_once_and_wait_for_what_they_need(tmp_path):
    together = threading.Barrier(2)  # a and b meet here, or it breaks

    def runner(command, log):
        name = value_of(command, "--run_name")
        if name == "c_seed0":
            assert (tmp_path / "runs" / "a_seed0" / "run.json").exists()
        else:
            together.wait(timeout=60)
        summary = {"steps": 1, "total_time_s": 1.0, "test_exact_match": 0.5, "stop_reason": "max_training_steps"}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text(json.dumps(summary))
        return 0

    specs = [runs.RunSpec("a", "a", 0, ()), runs.RunSpec("c", "c", 0, (), ("a_seed0",)), runs.RunSpec("b", "b", 0, ())]
    made = runs.Runs(tmp_path, specs, runner)
    made.run_all(lambda: None, jobs=2)
    assert set(made.results) == {"a_seed0", "b_seed0", "c_seed0"}


def test_the_sweep_goes_over_the_grid_and_draws_it(start):
    words = ("--alphas", "0.2", "0.4", "--taus", "0.5", "1", "2", "--grades_flags=--patience 2")
    code, trainer, out = start(sweep, *words, trainer=Trainer(fails_at=5))
    assert code == 1
    code, rest, _ = start(sweep, *words)
    assert code == 0
    assert trainer.names[:4] + rest.names == ["full_seed0"] + [
        f"alpha{a}_tau{t}_seed0" for a in ("0.2", "0.4") for t in ("0.5", "1", "2")
    ]
    last = rest.commands[-1]
    values = [value_of(last, f"--{name}") for name in ("alpha", "vision_tau", "language_tau", "patience")]
    assert values == ["0.4", "15", "48", "2"]
    assert "--resume_override" in last
    starts = [Path(value_of(command, "--resume")) for command in (trainer.commands[1], last)]
    assert starts == [out / "runs" / "full_seed0" / "checkpoints" / f"step_{step}" for step in (320, 640)]
    text = (out / "sweep.md").read_text()
    assert text.count("| 0.4 |") == 4
    assert "| 0.2 | 90.0 | 90.0 | 90.0 |" in text
    assert "| 0.2 | 1200 | 1200 | 1200 |" in text
    assert "Full: 1600" in text
    assert "| 0.2 | 0.750 |" in text
    assert (out / "sweep.png").stat().st_size > 10_000
    points = json.loads((out / "results.json").read_text())["points"]
    assert (len(points), points[0]["spread"]["steps"]["mean"]) == (6, 1200)


def test_the_sweep_needs_taus_to_multiply(start, capsys):
    with pytest.raises(SystemExit):
        start(sweep, "--", "--vision_tau", "auto")
    assert "--vision_tau auto: must be a number" in capsys.readouterr().err


def test_the_study_of_metrics_lists_runs_that_train_py_takes(start, capsys):
    assert start(compare_metrics, "--seeds", "2", "--list")[0] == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    rows = len(compare_metrics.ROWS)
    assert len(lines) == rows + 2 * (rows + 3)
    assert "# random, at gradient_rms's steps, seed 1" in lines


def watched(freeze_at: dict[str, int], steps: int) -> tuple[dict, dict]:
    """(history, summary) of a run of the quickstart's model that would freeze a tower's matrices after these steps."""
    with torch.device("meta"):
        components = find_components(VisionLanguageModel(parse_arguments([]).vlm))
    checks = [
        {"step": step, "values": [float(step < freeze_at[c.tower]) + 1 for c in components]}
        for step in range(1, steps + 1)
    ]
    listed = [{"name": c.name, "tower": c.tower, "elements": c.elements} for c in components]
    history = {"total_steps": steps, "grace_steps": 2, "components": listed, "checks": checks}
    return history | {"events": []}, {"train_tokens": 96 * 40 * steps, "steps": steps}


def test_flops_that_freezing_would_save():
    def saved(vision: int, language: int, tau=1.5) -> float:
        history, summary = watched({"vision": vision, "language": language}, 10)
        return compare_metrics.saved_flops(history, summary, {"vision": tau, "language": tau}, ())

    assert saved(4, 4) == pytest.approx(0.6)  # the run ends after step 4
    assert saved(4, 4, tau=0.5) == 0
    vision, language = saved(4, 99), saved(99, 4)
    assert 0 < language < vision < 0.6  # only the vision tower is spared whole, with its backward pass


@pytest.mark.slow
def test_metrics_are_compared_at_equal_flops(start):
    class Watched(Trainer):
        """Every run that freezes nothing has curves of which the towers cross a tau after half and three quarters."""

        def __call__(self, command, log):
            code = super().__call__(command, log)
            folder = Path(value_of(command, "--output_dir")) / value_of(command, "--run_name")
            history, counts = watched({"vision": 4, "language": 6}, 8)
            if "--enable_grades" in command and "--freeze_vision" not in command:
                history["events"] = [{"name": c["name"], "step": 4} for c in history["components"][:12]]
            (folder / "grades_history.json").write_text(json.dumps(history))
            (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text()) | counts))
            return code

    code, trainer, out = start(compare_metrics, "--seeds", "1", "--saved", "0.2", trainer=Watched())
    assert code == 0
    by_name = dict(zip(trainer.names, trainer.commands, strict=True))
    taus = [float(value_of(by_name["gradient_norm_seed0"], f"--{tower}_tau")) for tower in ("vision", "language")]
    assert taus == [pytest.approx(1), pytest.approx(1)]
    replayed = value_of(by_name["random_weight_change_seed0"], "--replay_history")
    assert Path(replayed) == out / "runs" / "weight_change_seed0" / "grades_history.json"
    found = json.loads((out / "results.json").read_text())["rows"]
    assert found["gradient_norm"][0]["saved_vision"] == pytest.approx(0.5)
    assert found["gradient_norm"][0]["saved_language"] == 0
    assert "| 50 |" in (out / "metrics.md").read_text()
    assert (out / "metrics.png").stat().st_size > 10_000


def test_the_tau_that_saves_a_share_of_the_updates():
    """Two matrices of one element, measured at steps 1 to 4 of 4, the first of which is grace."""
    components = [{"name": name, "tower": "vision", "elements": 1} for name in "ab"]
    checks = [{"step": step, "values": values} for step, values in enumerate([(9, 9), (8, 5), (2, 4), (1, 3)], start=1)]
    history = {"total_steps": 4, "grace_steps": 1, "components": components, "checks": checks}
    found = {saved: compare_metrics.find_tau(history, "vision", saved) for saved in (0.1, 0.3, 0.5)}
    assert found == {0.1: pytest.approx(2), 0.3: pytest.approx(5), 0.5: pytest.approx(8)}
    assert compare_metrics.saved_by_tau(history, "vision", found[0.3]) == pytest.approx((1 + 2) / 8)
