"""reproduce.py, sweep.py and compare_metrics.py with a stand-in for train.py that only writes what a run leaves."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from tiny.runs import TINY
from tiny.stand_in import Trainer, start_in, summary, value_of
from tiny.tables import read_table

from grades import find_components
from models.vision_language_model import VisionLanguageModel
from scripts import compare_metrics, reproduce, runs, sweep
from training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
MODEL = [f"--{name}={value}" for name, value in TINY.items() if name.startswith(("vit_", "mp_", "lm_", "max_img"))]


@pytest.fixture
def start(tmp_path):
    return functools.partial(start_in, tmp_path)


def test_rows_start_from_each_other(start):
    code, commands, out = start(
        reproduce, "--seeds=2", "--peak=3", "--lora_flags=--lora_rank 4", "--", "--val_size", "100"
    )
    assert code == 0
    assert sorted(commands) == sorted(f"{row}_seed{seed}" for row in ("lora_base", *reproduce.ROWS) for seed in (0, 1))
    recipe = parse_arguments([]).train
    expected = {
        ("lora_base", "--max_training_steps"): str(round(0.25 * recipe.max_training_steps)),
        ("lora", "--vlm_checkpoint_path"): str(out / "runs" / "lora_base_seed0"),
        ("lora", "--lora_rank"): "4",
        ("lora", "--lr_language_backbone"): f"{6 * recipe.lr_language_backbone:g}",
        ("full_cosine", "--lr_mp"): f"{3 * recipe.lr_mp:g}",
        ("shortened_linear", "--min_lr_ratio"): "0",
        ("paper", "--vision_tau"): "0.30",
        ("lora_grades", "--metric"): "gradient_norm",
        ("random", "--replay_history"): str(out / "runs" / "paper_seed0" / "grades_history.json"),
        ("other_time", "--replay_history"): str(out / "runs" / "full_grades_seed1" / "grades_history.json"),
        ("random", "--replay_seed"): "0",
        ("shortened", "--max_training_steps"): str(
            reproduce.shortened_steps(summary(), summary(1200)["total_time_s"], recipe.eval_interval)
        ),
    }
    assert {(row, flag): value_of(commands[f"{row}_seed0"], flag) for row, flag in expected} == expected
    assert {value_of(command, "--val_size") for command in commands.values()} == {"100"}
    stopping = {name for name, command in commands.items() if "--early_stopping" in command}
    assert stopping == {f"{row}_es_seed{seed}" for row in ("full", "lora") for seed in (0, 1)}
    assert not list(out.glob("runs/*/checkpoints"))


def test_pretrained_backbones_need_no_base(start, capsys):
    code, commands, out = start(reproduce, "--seeds", "1", "--list", config="table10_nanovlm")
    assert (code, commands, out.exists()) == (0, {}, False)
    rows = [row for row in reproduce.ROWS if row not in (*reproduce.CONSTANT_ALONE, *reproduce.LAST)]
    rows += [row for row in reproduce.LAST if row not in (*reproduce.CONSTANT_ALONE, "other_time")]  # of one seed
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [value_of(command, "--run_name") for command in listed] == [f"{row}_seed0" for row in rows]
    assert {value_of(command, "--lora_rank") for command in listed} == {None, "32"}
    assert not any("--resume_from_vlm_checkpoint" in command for command in listed)


def test_the_same_command_continues_after_a_failure(start, capsys):
    rows = ("--seeds", "2", "--rows", "full", "lora", "lora_es")
    code, first, out = start(reproduce, *rows, trainer=Trainer(fails_at=4))
    assert code == 1
    error = capsys.readouterr().err
    assert "line 49" in error
    assert "line 29" not in error
    assert (out / "runs" / "lora_base_seed0" / "checkpoints").exists()  # lora_es still starts from it
    assert len(json.loads((out / "results.json").read_text(encoding="utf-8"))["summaries"]) == 3
    code, second, _ = start(reproduce, *rows)
    assert code == 0
    names = [f"{row}_seed{seed}" for seed in (0, 1) for row in ("lora_base", *rows[3:])]
    assert (list(first), list(second)) == (names[:4], names[3:])
    assert value_of(second["lora_es_seed0"], "--resume") == "auto"  # from its own last checkpoint
    assert start(reproduce, *rows)[1] == {}
    more = start(reproduce, *rows, "lora_grades")[1]  # the bases run again, because their checkpoints are gone
    assert list(more) == [f"{row}_seed{seed}" for seed in (0, 1) for row in ("lora_base", "lora_grades")]


def test_what_follows_from_other_results_is_made_again_when_these_are_others(start, capsys):
    rows = ("--rows", "full", "full_grades", "paper", "random", "shortened", "--seeds")
    _, first, out = start(reproduce, *rows, "1")
    assert start(reproduce, *rows, "1")[1] == {}
    again = start(reproduce, *rows, "3")[1]  # shortened_seed0 was as short as one seed's runs
    assert list(again) == [name for name in again if name not in first or name == "shortened_seed0"]
    assert len(again) == 5 * 2 + 1
    assert "Full, shortened, seed 0: runs again" in capsys.readouterr().err
    shutil.rmtree(out / "runs" / "full_grades_seed1")
    slower = Trainer(more_s=50.0)
    assert list(start(reproduce, *rows, "3", trainer=slower)[1]) == [
        "full_grades_seed1", *(f"shortened_seed{seed}" for seed in range(3))
    ]  # fmt: skip


def test_metrics_with_other_taus_run_again(start):
    def history(frozen: bool) -> dict:
        return history_of(4, 6, 8) | {"events": []}

    def made(saved: str, trainer=None) -> list[str]:
        flags = ("--seeds", "1", "--rows", "gradient_rms", "--saved", saved, "--", *MODEL)
        return list(start(compare_metrics, *flags, trainer=trainer or Trainer(history=history))[1])

    assert len(made("0.2")) == 4
    again = ["gradient_rms_seed0", "random_gradient_rms_seed0"]
    assert made("0.5", Trainer(history=history, more_s=1.0)) == again
    assert made("0.5") == []


@pytest.mark.parametrize(
    ("words", "difference"), [(["--", "--lr_mp", "0.5"], "now 0.5"), (["--grades_flags=--vision_mlp_tau 3"], "now 3.0")]
)
def test_results_of_other_settings_are_refused(start, capsys, words, difference):
    rows = ("--seeds", "1", "--rows", "full", "full_grades")
    start(reproduce, *rows)
    assert start(reproduce, *rows, *words)[:2] == (2, {})
    assert difference in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (reproduce, ["--rows", "random"], "--rows random needs paper"),
        (reproduce, ["--seeds", "1", "--rows", "full_grades", "other_time"], "--rows other_time needs --seeds 2"),
        (reproduce, ["--rows", "full_cosine", "--", "--lr_schedule", "cosine"], "--rows full_cosine needs a recipe"),
        (reproduce, ["--lora_base_share", "0"], "--lora_base_share 0.0"),
        (reproduce, ["--peak", "0"], "--peak 0.0"),
        (reproduce, ["--seeds", "0"], "--seeds 0"),
        (reproduce, ["--", "--seed", "3"], "--seed:"),
        (reproduce, ["--", "--enable_grades"], "--enable_grades:"),
        (reproduce, ["--", "--lr_map", "1"], "--lr_map"),
        (reproduce, ["--es_flags=--es_patience 0"], "--es_patience 0"),
        (sweep, ["--", "--vision_tau", "auto"], "--vision_tau auto"),
        (sweep, ["--", "--monitor_grace", "false"], "--monitor_grace false"),
        (compare_metrics, ["--saved", "0.9"], "--saved 0.9"),
        (compare_metrics, ["--", "--compute_interval", "801"], "--compute_interval 801"),
    ],
)
def test_errors_come_before_any_run(start, capsys, tmp_path, script, words, said):
    with pytest.raises(SystemExit) as end:
        start(script, *words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("target_s", "steps"), [(141, 1200), (144, 1200), (144.5, 1205), (1000, 1600), (3, 1)])
def test_the_shortened_run_fills_the_time_it_is_given(target_s, steps):
    """1,200 steps: 120 s, 3 stops of 3 s, 12 s once. One more step means a fourth stop."""
    assert reproduce.shortened_steps(summary(), target_s, eval_interval=400) == steps


def test_saved_time_is_attributed_and_adds_up():
    full, run = summary(), summary(1000, train_time_s=80.0, eval_time_s=20.0)
    found = runs.compare(run, full)
    parts = {
        "saved_steps_s": 60,  # 600 steps of 0.1 s
        "saved_cheaper_s": 20,  # 1,000 steps of 0.1 s took 80 s
        "saved_eval_s": 12 - 20,
        "saved_rest_s": 1,  # one checkpoint less
        "saved_s": full["total_time_s"] - run["total_time_s"],
    }
    assert {name: found[name] for name in parts} == pytest.approx(parts)
    assert found["flops_ratio"] == 1000 / 1600
    alone = runs.compare(run, None)
    assert (alone.get("saved_s"), alone["steps"]) == (None, 1000)


def test_tables_say_mean_and_spread_of_every_row(start):
    _, _, out = start(reproduce, "--seeds", "3", "--rows", "full", "full_grades")
    rows, saved = (read_table((out / "table.md").read_text(encoding="utf-8"), number) for number in (0, 1))
    assert [row[""] for row in rows] == [row[""] for row in saved] == ["Full", "Full + GradES"]
    assert rows[0]["test exact match (%)"] == "92.0 ± 2.0 (90.0..94.0)"
    assert rows[0]["time (s)"] == "184 ± 0 (184..184)"
    assert saved[1]["steps not made"] == "+40.0 ± 0.0 (+40.0..+40.0)"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [values["seed"] for values in results["full_grades"]["seeds"]] == [0, 1, 2]
    accuracy = {"mean": 0.92, "std": 0.02, "min": 0.90, "max": 0.94}
    assert results["full"]["spread"]["accuracy"] == pytest.approx(accuracy)
    assert (out / "table.png").stat().st_size > 10_000


def test_what_was_not_measured_is_a_dash_and_validation_stands_in_for_a_test():
    known = {"–": [{"steps": None}, {}], "5": [{"steps": 5}], "2 ± 1 (1..3)": [{"steps": n} for n in (1, None, 3)]}
    assert {text: runs.cell(seeds, "steps") for text, seeds in known.items()} == {text: text for text in known}
    assert runs.accuracy_of(summary(test_exact_match=None)) == summary()["val_exact_match"]


def test_the_remaining_time_comes_from_the_same_row_where_there_is_one(tmp_path):
    made = runs.Runs(tmp_path, [runs.RunSpec(row, row, seed, ()) for seed in (0, 1) for row in ("full", "lora")])
    made.results["full_seed0"] = {"row": "full", "wall_s": 100.0}
    assert made.remaining_s() == 300
    made.results["lora_seed0"] = {"row": "lora", "wall_s": 40.0}
    assert made.remaining_s() == 140


def interrupted(tmp_path: Path, child: str, how) -> int:
    """The exit code of reproduce.py, whose run is this child, which writes the file `up`; how(process): the signal."""
    script = f"""
import signal, sys
from scripts import reproduce, runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, though the tests may run in the background
launch = lambda command, log: runs.launch([sys.executable, "-c", {child!r}], log)
sys.exit(reproduce.main(["--output", {str(tmp_path)!r}, "--rows", "full"], launch))"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    how(process)
    return process.wait(timeout=20)


def test_a_run_does_not_outlive_the_script(tmp_path):
    child = f"import time, pathlib; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    code = interrupted(tmp_path, child, lambda process: process.send_signal(signal.SIGTERM))
    assert code == 128 + signal.SIGTERM  # it waits for its child, which would sleep for a minute


def test_a_run_that_ctrl_c_interrupts_has_the_time_to_save(tmp_path):
    child = f"""
import pathlib, signal, time
def save(*_):
    time.sleep(1)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    raise SystemExit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path({str(tmp_path / "up")!r}).touch()
time.sleep(60)"""
    assert interrupted(tmp_path, child, lambda process: os.killpg(process.pid, signal.SIGINT)) == 130
    assert (tmp_path / "saved").exists()


def test_jobs_run_at_once_and_wait_for_what_they_need(tmp_path, monkeypatch):
    trainer, needs = Trainer(), {"a": (), "c": ("a_seed0",), "b": ()}
    monkeypatch.setattr(runs, "POLL_S", 0)
    may_end = set()

    def launch(command, log):
        done, name = trainer(command, log), value_of(command, "--run_name")
        if name == "b_seed0":  # a is still running, c waits for it
            assert list(trainer.commands) == ["a_seed0", "b_seed0"]
            may_end.add("a_seed0")
        if name == "c_seed0":
            assert (tmp_path / "runs" / "a_seed0" / "run.json").exists()
            may_end.update(("b_seed0", "c_seed0"))
        return SimpleNamespace(poll=lambda: 0 if name in may_end else None, wait=done.wait, terminate=done.terminate)

    made = runs.Runs(tmp_path, [runs.RunSpec(row, row, 0, ("--seed", "0"), needs[row]) for row in needs])
    made.run_all(lambda: None, jobs=2, launch=launch)
    assert set(made.results) == {"a_seed0", "b_seed0", "c_seed0"}


def test_a_sweep_branches_off_the_full_run_and_shows_the_grid(start):
    words = ("--alphas", "0.2", "0.4", "--taus", "1", "2", "--grades_flags=--patience 2")
    code, first, out = start(sweep, *words, trainer=Trainer(fails_at=3))
    assert code == 1
    code, rest, _ = start(sweep, *words)
    assert code == 0
    names = ["full_seed0", *(f"alpha{a}_tau{t}_seed0" for a in ("0.2", "0.4") for t in ("1", "2"))]
    assert (list(first), list(rest)) == (names[:3], names[2:])
    last, recipe = rest[names[-1]], parse_arguments(["--config", str(runs.PAPER_RECIPE)]).grades
    values = [value_of(last, f"--{name}") for name in ("alpha", "vision_tau", "language_tau", "patience")]
    assert values == ["0.4", f"{2 * recipe.vision_tau:g}", f"{2 * recipe.language_tau:g}", "2"]
    assert "--resume_override" in last
    starts = [Path(value_of(command, "--resume")) for command in (first[names[1]], last)]  # where grace periods end
    assert starts == [out / "runs" / "full_seed0" / "checkpoints" / f"step_{step}" for step in (320, 640)]
    tables = [read_table((out / "sweep.md").read_text(encoding="utf-8"), number) for number in range(4)]
    assert [table[1]["taus x 2"] for table in tables] == ["90.0", "141", "0.750", "1200"]
    points = json.loads((out / "results.json").read_text(encoding="utf-8"))["points"]
    assert [(point["alpha"], point["tau_factor"]) for point in points] == [(0.2, 1), (0.2, 2), (0.4, 1), (0.4, 2)]
    assert (out / "sweep.png").stat().st_size > 10_000


def test_a_sweep_of_rollback_multiplies_its_own_tau(start):
    words = ("--alphas", "0.2", "--taus", "0.5", "2", "--", "--monitor_grace")
    _, commands, _ = start(sweep, *words, config="quickstart")
    taus = [value_of(commands[f"alpha0.2_tau{factor}_seed0"], "--vision_tau") for factor in ("0.5", "2")]
    assert taus == ["0.002", "0.008"]


def history_of(vision: int, language: int, steps: int) -> dict:
    """grades_history.json of a run whose values fall from 2 to 1 at these steps of the towers."""
    with torch.device("meta"):
        components = find_components(VisionLanguageModel(parse_arguments(MODEL).vlm))
    falls = [{"vision": vision, "language": language}[c.tower] for c in components]
    checks = [{"step": at, "values": [1.0 + (at < fall) for fall in falls]} for at in range(1, steps + 1)]
    listed = [{"name": c.name, "tower": c.tower, "layer": c.layer, "elements": c.elements} for c in components]
    return {"total_steps": steps, "grace_steps": 2, "components": listed, "checks": checks, "events": []}


def test_flops_that_freezing_would_save():
    def saved(vision: int, language: int, tau: float = 1.5, front: bool = False) -> float:
        history = history_of(vision, language, 10)
        frozen = compare_metrics.frozen_by_taus(history, {"vision": tau, "language": tau}, front)
        return compare_metrics.saved_flops(history, summary(10), frozen, tuple(MODEL))

    assert saved(4, 4) == pytest.approx(0.6)  # the run ends after step 4
    assert saved(4, 4, tau=0.5) == 0
    assert 0 < saved(99, 4) < 0.6
    assert 0 < saved(4, 99) < 0.6
    assert saved(6, 4, front=True) == saved(6, 6)  # the language tower waits for the vision tower
    assert saved(99, 4, front=True) == 0


def test_metrics_are_compared_at_equal_flops(start):
    def history(frozen: bool) -> dict:
        found = history_of(4, 6, 8)
        vision = [c["name"] for c in found["components"] if c["tower"] == "vision"]
        return found | {"events": [{"name": name, "step": 4} for name in vision if frozen]}

    code, commands, out = start(
        compare_metrics, "--seeds", "1", "--saved", "0.2", "--", *MODEL, trainer=Trainer(history=history)
    )
    assert code == 0
    taus = [float(value_of(commands["gradient_norm_seed0"], f"--{tower}_tau")) for tower in ("vision", "language")]
    assert taus == pytest.approx([1, 1])
    replayed = value_of(commands["random_weight_change_seed0"], "--replay_history")
    assert Path(replayed) == out / "runs" / "weight_change_seed0" / "grades_history.json"
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == list(compare_metrics.LABELS)
    assert (rows["gradient_norm"][0]["saved_vision"], rows["gradient_norm"][0]["saved_language"]) == (0.5, 0)
    assert (out / "metrics.png").stat().st_size > 10_000


def test_costs_are_drawn_of_the_rows_that_have_any():
    axis = Figure().subplots()
    compare_metrics.draw_costs(axis, {"front": [{"cost": None}], "gradient_rms": [{"cost": 0.01}, {"cost": 0.03}]})
    assert [list(line.get_xdata()) for line in axis.lines[:2]] == [[1.0, 3.0], [2.0]]


def test_some_metrics_alone(start):
    def history(frozen: bool) -> dict:
        return history_of(4, 6, 8) | {"events": []}

    trainer, flags = Trainer(history=history), ("--seeds", "1", "--rows", "gradient_rms", "front", "--", *MODEL)
    code, commands, out = start(compare_metrics, *flags, trainer=trainer)
    curves = [f"curves_{metric}_seed100" for metric in ("weight_change", "gradient_rms")]
    assert (code, list(commands)) == (
        0,
        [*curves, "full_seed0", "front_seed0", "gradient_rms_seed0", "random_gradient_rms_seed0"],
    )
    assert (out / "metrics.png").is_file()


def test_the_tau_that_saves_a_share_of_the_updates():
    """Two matrices of one element, measured at steps 1 to 4 of 4, the first of which is grace."""
    components = [{"name": name, "tower": "vision", "layer": 0, "elements": 1} for name in "ab"]
    checks = [{"step": step, "values": values} for step, values in enumerate([(9, 9), (8, 5), (2, 4), (1, 3)], start=1)]
    history = {"total_steps": 4, "grace_steps": 1, "components": components, "checks": checks}
    found = {saved: compare_metrics.find_tau(history, "vision", saved) for saved in (0.1, 0.3, 0.5)}
    assert found == pytest.approx({0.1: 2, 0.3: 5, 0.5: 8}, rel=1e-5)
    steps = compare_metrics.frozen_by_taus(history, {"vision": found[0.3]})
    assert compare_metrics.saved_share(history, "vision", steps) == pytest.approx((1 + 2) / 8)


def test_the_papers_row_is_its_recipe():
    """On the quickstart, whose own rule is another one: all of GradES but where its files are."""
    arguments = reproduce.parse(["--rows", "paper", "random", "--seeds", "1"])
    [paper, random] = reproduce.make_specs(arguments)
    recipe = parse_arguments(["--config", str(runs.PAPER_RECIPE), "--enable_grades"])
    for spec in (paper, random):
        ours = parse_arguments(list(spec.flags))
        assert ours.grades == recipe.grades
        for name in ("lr_mp", "lr_vision_backbone", "lr_language_backbone", "lr_schedule", "average_weights"):
            assert getattr(ours.train, name) == getattr(recipe.train, name), name
