"""A run that was ended and goes on is the run that was not: every weight, every number, bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny.data import write_rows
from tiny.families import FAMILIES, SIZES
from tiny.runs import arguments, assert_same, before_steps, numbers, state

import train
from eval.evaluation import Evaluator
from training import resume
from training.arguments import parse_arguments
from training.checkpoint_folder import CARD, damage, find_checkpoint
from training.trackers import NoTracker

STEPS = 12


class Killed(BaseException):
    """Ends the run as SIGKILL would: nothing is saved, nothing said."""


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """run(name, stop=step, kill=step, cut=step, **flags) -> exit code, None where it was killed.

    stop: a signal comes in that step; cut: in the evaluation after that step; kill: the step ends the process.
    """
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    monkeypatch.setattr(train, "set_learning_rate", train.set_learning_rate)  # put back at the end
    measures = {name: getattr(Evaluator, name) for name in ("loss", "loss_and_answers")}

    def start(name: str, stop: int = 0, kill: int = 0, cut: int = 0, **flags) -> int | None:
        def before(step):
            if step == kill:
                raise Killed
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            now.append(step)

        def cut_short(measure):
            def measured(evaluator):
                if now and now[-1] == cut:
                    now.append(0)  # one signal; of averaged weights the loss is evaluated too
                    os.kill(os.getpid(), signal.SIGTERM)
                return measure(evaluator)

            return measured

        now: list = []
        before_steps(before)
        for method, measure in measures.items():
            monkeypatch.setattr(Evaluator, method, cut_short(measure))
        given = {"max_training_steps": STEPS, "eval_interval": 4, "keep_checkpoints": 9} | flags
        try:
            return train.main(parse_arguments(arguments(data, tmp_path, name, **given)))
        except Killed:
            return None

    return start


# The vision tower freezes early, the attention of the language model late, its MLP never.
WATCHED = {"enable_grades": True, "alpha": 0.25, "tau_mode": "relative", "vision_tau": 0.97,
           "language_attention_tau": 0.3, "language_mlp_tau": 1e-9}  # fmt: skip
CASES = {
    "plain": {"lm_dropout": 0.1, "cache_rows": False, "early_stopping": True, "es_interval": 0.25, "es_delta": 9,
              "es_patience": 9},
    "weight_change": WATCHED | {"gradient_accumulation_steps": 2, "num_workers": 2, "turns_per_image": 1},
    "gradient_change": WATCHED | {"metric": "gradient_change", "flip_images": True, "checkpoint_interval": 3},
    "gradient_norm": WATCHED | {"metric": "gradient_norm", "tau_mode": "absolute", "vision_tau": 4.5,
                                "language_attention_tau": 3.4, "unfreeze_factor": 1.1, "probe_interval": 2},
    "sampled": WATCHED | {"monitor_sample": 2, "batch_size": 30},
    "gradient_rms": WATCHED | {"metric": "gradient_rms", "language_attention_tau": 0.95},
    "rollback": {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant",
                 "alpha": 0.1, "vision_tau": 1e9, "language_tau": 1e-12, "patience": 3, "rollback_rows": 3,
                 "val_size": 5},
    "cooldown": {"enable_grades": True, "metric": "rollback", "average_weights": 0.5, "lr_schedule": "constant",
                 "vision_tau": 1e9, "language_tau": 1e9, "patience": 3, "on_converged": "cooldown", "alpha": 0.1,
                 "cooldown_ratio": 0.9, "checkpoint_interval": 3},
    "window": WATCHED | {"average_weights": 3, "lr_schedule": "wsd", "early_stopping": True, "es_weights": "averaged",
                         "es_interval": 0.25, "es_patience": 9},
    "lora": WATCHED | {"lora_rank": 2, "lora_dropout": 0.1, "average_weights": 0.5},
    "packing": {"packing": True, "num_workers": 2, "lm_max_length": 24, "max_sample_length": 24, "batch_size": 1},
    "nanomolmo2": FAMILIES["nanomolmo2"] | WATCHED | {"average_weights": 0.5, "turns_per_image": 1},
    "molmo2": FAMILIES["molmo2"] | WATCHED | {"packing": True, "num_workers": 2, "batch_size": 1, "lm_max_length": 96,
                                              "max_sample_length": 96, "lm_dropout": 0.1, "flip_images": True},
    "stream": {"stream_dataset": True, "num_workers": 2, "gradient_accumulation_steps": 2},
}  # fmt: skip
# Steps: a signal before and one after freezing began, SIGKILL, and a signal in the last evaluation.
ENDS = {"gradient_change": (2, 5, 10, 12), "cooldown": (2, 4, 7, 10)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_goes_on_is_the_run_that_never_ended(run, tmp_path, case, capsys):
    flags, whole, parts = CASES[case], tmp_path / "out" / "whole", tmp_path / "out" / "parts"
    if "image_layout" in flags:  # pictures whose crops are not as many
        rows = write_rows(tmp_path / "uneven", 16, sizes=SIZES)
        flags = flags | {"train_dataset_path": rows, "test_dataset_path": rows}
    before, after, killed, last = ENDS.get(case, (2, 7, 10, 12))
    assert run("whole", **flags) == 0
    assert run("parts", stop=before, **flags, resume="auto") == 143
    assert run("parts", stop=after, **flags | ({"num_workers": 2} if case == "plain" else {}), resume="auto") == 143
    assert run("parts", kill=killed, **flags, resume="auto") is None
    begun = state(parts)["step"]
    assert begun < killed
    assert run("parts", cut=last, **flags, resume="auto") == 143
    assert state(parts)["states"]["loop"]["evaluated_step"] < last
    assert run("parts", **flags, resume="auto") == 0
    assert_same(parts, whole)
    assert json.loads((parts / "summary.json").read_text())["resumed_at_steps"] == [before, after, begun, last]
    if "enable_grades" in flags:
        events = json.loads((whole / "grades_history.json").read_text())["events"]
        steps = [event["step"] for event in events]
        if case == "cooldown":  # in which what converged last trains on: both towers
            assert not events
            assert json.loads((whole / "summary.json").read_text())["stop_reason"] == "converged"
            said = capsys.readouterr().out
            assert "still learning" not in said
            assert "all had converged at step" in said
        else:
            assert min(steps) <= after
            assert after < max(steps) or case == "rollback"  # one tower alone freezes
        assert any("unfrozen" in event for event in events) == ("unfreeze_factor" in flags)


def line(text: str, capsys) -> str:
    """The line of what was printed that holds the text."""
    return next(line for line in "".join(capsys.readouterr()).splitlines() if text in line)


def files(folder: Path) -> dict[str, bytes]:
    """All but the model cards, which say what was measured since."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_compile_auto_resumes_what_was_saved_with_either_and_a_change_that_was_asked_for_is_refused(run, capsys):
    flags = {"max_training_steps": 4}
    assert run("run", stop=2, **flags, compile="off") == 143
    assert run("run", stop=3, **flags, resume="auto", compile="auto") == 143
    assert run("run", **flags, resume="auto", compile="off") == 0
    assert run("other", stop=2, **flags, compile="off") == 143
    assert run("other", **flags, resume="auto", compile="on") == 2
    assert "--compile True: the run that is resumed has False" in line("has False", capsys)


def test_other_settings_are_named_and_refused(run, tmp_path, capsys):
    folder, short = tmp_path / "out" / "run", {"max_training_steps": 4, "resume": "auto"}
    assert run("run", stop=2, **short) == 143
    before = files(folder)
    assert run("run", **short | {"lr_mp": 0.5, "compute_interval": 7, "lm_n_blocks": 2}) == 2
    said = "".join(capsys.readouterr())
    for text in ("--lr_mp 0.5: the run", "--compute_interval 7: the run", "--lm_n_blocks 2: the run", "has 0.0015"):
        assert text in said
    assert said.count("the run that is resumed has") == 3
    assert files(folder) == before
    assert run("run", **short, resume_override=True, lm_n_blocks=2) == 2
    assert "--resume_override cannot" in line("cannot change", capsys)
    assert run("run", **short, resume_override=True, lr_mp=0) == 2
    assert "--lr_mp, --lr_vision_backbone" in line("must be 0 where", capsys)
    assert files(folder) == before
    free = {"num_workers": 2, "checkpoint_interval": 1, "keep_checkpoints": 1}
    assert run("run", **short, **free, lr_mp=0.5, lm_dropout=0.25, resume_override=True) == 0
    log = (folder / "log.txt").read_text()
    assert "--lr_mp 0.5: the run that is resumed has 0.0015" in log
    assert "--num_workers" not in log
    saved = state(folder)
    assert saved["optimizer"]["param_groups"][0]["peak_lr"] == 0.5
    assert json.loads((folder / "checkpoints" / "last" / "config.json").read_text())["lm_dropout"] == 0.25
    assert "resume" not in (folder / "config.yaml").read_text().replace("resume_from_vlm_checkpoint", "")


def test_other_data_are_named_and_refused(run, data, tmp_path, capsys):
    folder, flags, rows = tmp_path / "out" / "run", {"max_training_steps": 4, "resume": "auto"}, data / "rows.jsonl"
    assert run("run", stop=2, **flags) == 143
    before, lines = files(folder), rows.read_text().splitlines()
    rows.write_text("\n".join(lines[:9]))
    assert run("run", **flags) == 2
    had = "now, the run that is resumed has 16 rows"
    assert line("--resume_override", capsys).endswith(
        f"{data}: 9 rows {had}; --resume_override continues with those of now"
    )
    rows.write_text("\n".join(lines[::-1]))
    assert run("run", **flags) == 2
    assert f"{data}: 16 rows {had}, but other ones;" in line("--resume_override", capsys)
    assert files(folder) == before
    rows.write_text("\n".join(lines[:9]))
    assert run("run", **flags, resume_override=True) == 0
    assert f"{data}: 9 rows {had}\n" in (folder / "log.txt").read_text()
    assert state(folder)["data"]["size"] == "9 rows"


def test_a_subset_that_is_newly_skipped_is_noticed(run, data, tmp_path, capsys):
    flags = {"max_training_steps": 4, "resume": "auto", "skip_bad_subsets": True}
    flags["test_dataset_path"] = data / "rows.jsonl"
    (data / "more").mkdir()
    more = data / "more" / "more.jsonl"
    more.write_text("".join((data / "rows.jsonl").read_text().splitlines(True)[2:3]))  # its image is not there
    assert run("run", stop=2, **flags) == 143
    more.write_text("{")
    assert run("run", **flags) == 2
    assert "16 rows without the subsets more now, the run that is resumed has 17 rows" in line("train.py:", capsys)
    assert run("run", **flags, resume_override=True) == 0
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    assert summary["dropped"]["train"]["subset that cannot be loaded"] == 1


def test_workers_that_share_the_rows_must_stay_as_many(run, tmp_path, capsys):
    flags = CASES["packing"] | {"max_training_steps": 3, "resume": "auto"}
    assert run("run", stop=1, **flags) == 143
    assert f"and --resume {tmp_path / 'out' / 'run'}" in line("with the same command", capsys)
    assert run("run", **flags | {"num_workers": 1}) == 2
    assert line("--num_workers 1: the run that is resumed has 2", capsys)


def test_a_resumed_run_goes_on_in_weights_and_biases_too(run, monkeypatch):
    class Tracker(NoTracker):
        def __init__(self, cfg, settings, folder, say, run_id):
            self.id = run_id or "as wandb named it"
            asked.append(run_id)

    asked: list = []
    monkeypatch.setattr("training.trackers.WandbTracker", Tracker)
    assert run("run", stop=1, log_wandb=True, max_training_steps=2) == 143
    assert run("run", log_wandb=True, max_training_steps=2, resume="auto") == 0
    assert asked == [None, "as wandb named it"]


def test_a_finished_run_is_left_alone_and_can_be_made_longer(run, tmp_path, capsys):
    folder, flags = tmp_path / "out" / "run", {"resume": "auto", "max_training_steps": 4, "eval_interval": 2}
    assert run("run", **flags) == 0
    before = files(folder)
    assert run("run", **flags) == 0
    assert line("has finished", capsys)
    assert files(folder) == before
    assert run("run", **flags | {"max_training_steps": 6, "resume_override": True}) == 0
    assert [line["step"] for line in numbers(folder) if "val/loss" in line] == [2, 4, 6]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    assert run("run", **flags | {"max_training_steps": 6}) == 0
    assert state(folder)["states"]["loop"]["resumed_at"] == [4]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("flags", "reason"),
    [({}, "max_training_steps"), ({"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e9}, "frozen")],
)
def test_a_test_that_was_cut_short_is_all_that_is_left_to_do(run, tmp_path, monkeypatch, capsys, named, flags, reason):
    def cut(evaluator, split="val"):
        if split == "test":
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(evaluator, split)

    folder, answers = tmp_path / "out" / "run", Evaluator.answers
    assert run("whole", **flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answers", cut)
        assert run("run", **flags) == 143
    before = files(folder / "checkpoints")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["stop_reason"], summary["test_cut_short"], summary["test_exact_match"]) == (
        "interrupted",
        True,
        None,
    )
    assert line("the test was cut short", capsys)
    assert run("run", **flags, resume=folder if named else "auto") == 0
    assert files(folder / "checkpoints") == before  # no step was made
    summary, whole = (json.loads((tmp_path / "out" / name / "summary.json").read_text()) for name in ("run", "whole"))
    for key in ("steps", "test_exact_match", "test_exact_match_by_source", "train_flops"):
        assert summary[key] == whole[key]
    assert (summary["stop_reason"], summary["test_cut_short"]) == (reason, False)
    assert summary["test_exact_match"] is not None
    assert run("run", **flags, resume="auto") == 0
    assert line("has finished", capsys)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e9, "alpha": 0.3}, "frozen"),
        ({"early_stopping": True, "es_interval": 0.25, "es_delta": 1e9, "es_patience": 2}, "early_stopping"),
    ],
)
def test_a_run_that_ended_early_does_not_go_on(run, tmp_path, flags, reason):
    folder = tmp_path / "out" / "run"
    assert run("run", **flags, resume="auto") == 0
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    (folder / "summary.json").unlink()  # killed before it was written
    assert run("run", **flags, resume="auto") == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["stop_reason"]) == (steps, reason)
    assert steps < STEPS
    assert summary["test_exact_match"] is not None


def test_another_run_can_begin_at_any_checkpoint(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("run") == 0
    before = files(out / "run")
    older = out / "run" / "checkpoints" / "step_00000004"
    assert run("run", resume=older) == 2
    assert "has reached step_00000012" in line("--resume", capsys)
    assert run("new", resume=older) == 0
    assert_same(out / "new", out / "run")
    assert run("run", resume=out / "absent") == 2
    assert "must be auto, a run folder" in line("--resume", capsys)
    assert run("new", resume=out / "run") == 2  # --run_name new: exists already
    assert files(out / "run") == before
    flags = {"max_training_steps": STEPS + 2, "resume_override": True}
    assert run("longer", resume=out / "run", **flags) == 0
    assert state(out / "longer")["step"] == STEPS + 2


def test_the_latest_checkpoints_and_the_best_are_kept_once(run, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr("eval.evaluation.summed_loss", lambda *_: (torch.tensor(next(losses)), 1))
    assert run("run", eval_interval=2, keep_checkpoints=2) == 0
    checkpoints = tmp_path / "out" / "run" / "checkpoints"
    kept = ["step_00000004", "step_00000010", "step_00000012"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "last", *kept]
    assert (checkpoints / "best").readlink() == Path(kept[0])
    assert (checkpoints / "last").readlink() == Path(kept[2])
    assert [damage(checkpoints / name) for name in kept] == [None] * 3
    assert find_checkpoint(checkpoints.parent) == checkpoints / "best"


def test_the_best_of_a_run_that_begins_at_the_checkpoint_of_another_is_its_own(run, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr("eval.evaluation.summed_loss", lambda *_: (torch.tensor(next(losses)), 1))
    assert run("run") == 0
    assert run("new", kill=9, resume=tmp_path / "out" / "run" / "checkpoints" / "step_00000008") is None
    assert run("new", resume="auto") == 0
    folder = tmp_path / "out" / "new"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_step"], summary["best_metric"]) == (8, 3.0)
    assert find_checkpoint(folder).resolve().name == "step_00000008"


def test_a_crash_is_taken_up_only_where_it_is_named(run, tmp_path, monkeypatch, capsys):
    folder, step = tmp_path / "out" / "run", train.forward_backward
    calls: list = []

    def fails(*args):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("out of memory")
        return step(*args)

    monkeypatch.setattr(train, "forward_backward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("run")
    assert "RuntimeError after step 6" in (folder / "log.txt").read_text()
    assert run("whole") == 0
    assert run("new", resume=folder / "checkpoints" / "crash") == 0
    assert_same(tmp_path / "out" / "new", tmp_path / "out" / "whole")
    assert run("run", resume="auto") == 0
    assert "after step 6; only --resume" in line("is what an error left", capsys)
    assert_same(folder, tmp_path / "out" / "whole")
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        run("early", eval_interval=99)
    assert run("early", eval_interval=99, resume="auto") == 0
    assert "after step 6; only --resume" in line("is what an error left", capsys)  # where nothing else was saved too


def test_where_memory_runs_out_what_was_trained_is_saved_and_the_flags_to_turn_are_named(
    run, tmp_path, monkeypatch, capsys
):
    step = train.forward_backward
    calls: list = []

    def fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return step(*args)

    monkeypatch.setattr(train, "forward_backward", fails)
    with pytest.raises(SystemExit) as ended:
        run("run")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "error: CUDA out of memory. Tried to allocate 2 GiB\n" in said
    assert "--activation_checkpointing" in said
    assert state(tmp_path / "out" / "run", "crash")["step"] == 2


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    torch.save({"step": 1}, tmp_path / "training_state.pt")
    with pytest.raises(ValueError, match=r"--resume .*: another version"):
        resume.load_state(tmp_path)
