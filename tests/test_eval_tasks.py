"""Benchmarks during training: asked and scored as by evaluate.py, without a trace in the run, and resumed."""

import json
import os
import re
import signal

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny.benchmarks import records
from tiny.data import encoded, picture, write_rows
from tiny.runs import TINY, arguments, assert_same, numbers, state

import evaluate
import train
from data.images import ImageDecodeError, ImageProcessor
from eval.benchmarks import drawn
from eval.prompts import STYLES
from eval.task_evaluation import TaskEvaluator
from eval.task_list import open_tasks
from grades.plots import convergence
from training.arguments import parse_arguments
from training.checkpoint_folder import CARD, follow
from training.state import LoopState

# The vision tower alone.
FREEZING = {"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e-9, "alpha": 0.3}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])


@pytest.fixture
def own(tmp_path):
    """Twenty questions about pictures, whose answers a tiny model gets right at times."""
    (tmp_path / "own").mkdir()
    rows = []
    for i in range(20):
        (tmp_path / "own" / f"{i}.png").write_bytes(encoded(picture(seed=i)))
        rows.append({"image": f"{i}.png", "question": "is there a red shape?", "answer": ["yes", "no", "red"][i % 3]})
    (tmp_path / "own" / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "own" / "own.jsonl"


def run(data, tmp_path, name, **flags) -> int:
    return train.main(parse_arguments(arguments(data, tmp_path, name, **flags)))


def values(folder, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in numbers(folder) if key in line}


def test_a_part_is_drawn_from_all_rows_and_the_same_one_each_time(tmp_path):
    lines = (json.dumps(row | {"image": None}) + "\n" for row in records("mmstar", 40))
    (tmp_path / "mmstar.jsonl").write_text("".join(lines), encoding="utf-8")
    whole, part, again = (open_tasks(name, tmp_path)[0] for name in ("mmstar", "mmstar:7", "mmstar:7"))
    assert part.questions == again.questions
    assert [one.number for one in part.questions] == list(drawn(40, 7)) != list(range(7))
    assert part.questions == [whole.questions[number] for number in drawn(40, 7)]
    assert (len(whole.questions), len(part.questions), part.fingerprint != whole.fingerprint) == (40, 7, True)
    assert len(open_tasks("mmstar:100", tmp_path)[0].questions) == 40


def test_answers_and_numbers_are_those_of_evaluate(data, own, tmp_path, monkeypatch, capsys):
    tasks, given, answers = f"{own}:9", [], TaskEvaluator.answers
    monkeypatch.setattr(TaskEvaluator, "answers", lambda tasks: given.append(answers(tasks)) or given[-1])
    assert run(data, tmp_path, "run", eval_tasks=tasks, eval_tasks_interval=3, **FREEZING) == 0
    folder = tmp_path / "out" / "run"
    found = values(folder, "eval/own/accuracy")
    assert list(found) == [3, 6, 8]  # at the end too
    flags = ["--checkpoint", folder / "checkpoints" / "last", "--tasks", tasks, "--output", tmp_path / "result"]
    evaluate.main(evaluate.parse_arguments([*map(str, flags), "--num_workers", "0", "--dtype", "float32"]))
    expected = json.loads((tmp_path / "result" / "results.json").read_text())["tasks"]["own"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_tasks"] == {"own": expected}
    assert (summary["eval_tasks_step"], expected["rows"]) == (8, 9)
    lines = map(json.loads, (tmp_path / "result" / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    assert given[-1] == {"own": {line["id"]: line["answer"] for line in lines}}
    assert any(given[-1]["own"].values())
    main = expected["rules"]["exact match"]["metrics"]["accuracy"]
    assert (found[8], values(folder, "eval/own/accuracy_stderr")[8]) == (main["value"], main["stderr"])
    assert "eval/own/accuracy [contains]" in numbers(folder)[-1]
    history = json.loads((folder / "grades_history.json").read_text())
    assert [known["tasks"]["own accuracy"][0] for known in history["validation"] if "tasks" in known] == [
        *found.values()
    ]
    assert any("loss" in known and "tasks" in known for known in history["validation"])  # step 8
    [axis] = [axis for axis in convergence(history).axes if axis.get_title("left").startswith("benchmarks")]
    assert [*axis.containers[0].lines[0].get_ydata()] == [*found.values()]
    card = (folder / "checkpoints" / "last" / CARD).read_text(encoding="utf-8")
    assert f"| own | accuracy | {main['value']:.4f} | {main['stderr']:.4f} | 9 | – | exact match:" in card
    [of_own] = [one for one in ModelCard(card).data.eval_results if one.dataset_type == "own"]
    assert of_own.metric_value == round(main["value"], 6)
    assert of_own.metric_name.startswith("accuracy of 9 rows by the rule exact match, standard error ")
    assert f"own                   accuracy {main['value']:.4f}" in capsys.readouterr().out


def test_a_run_with_benchmarks_is_the_run_without(data, own, tmp_path):
    """Weights, random numbers, and all else that a checkpoint holds."""
    flags = {"lm_dropout": 0.1, "average_weights": 0.5, "num_workers": 1}
    plain = {"sample_questions": 0}
    assert run(data, tmp_path, "plain", **flags, **plain) == 0
    assert run(data, tmp_path, "tasks", **flags, eval_tasks=own, eval_tasks_interval=2) == 0
    ours, theirs = (state(tmp_path / "out" / name) for name in ("tasks", "plain"))
    assert torch.equal(ours["states"]["random"][0]["torch"], theirs["states"]["random"][0]["torch"])
    ours, theirs = (
        load_file(tmp_path / "out" / name / "checkpoints/last/model.safetensors") for name in ("tasks", "plain")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (numbers(tmp_path / "out" / name) for name in ("tasks", "plain"))
    assert [line for line in ours if not any(key.startswith("eval/") for key in line)] == theirs


@pytest.mark.parametrize("end", ["signal", "kill"])
def test_an_interrupted_evaluation_is_made_again(data, own, tmp_path, monkeypatch, end):
    flags = FREEZING | {"eval_tasks": own, "eval_tasks_interval": 3, "metric_for_best_model": "own/accuracy",
                        "average_weights": 0.5, "keep_checkpoints": 9}  # fmt: skip
    assert run(data, tmp_path, "whole", **flags) == 0
    asked, answers = [], TaskEvaluator.answers

    def interrupted(tasks):
        asked.append(None)
        if len(asked) == 2:
            if end == "kill":
                raise SystemExit(9)
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(tasks)

    monkeypatch.setattr(TaskEvaluator, "answers", interrupted)
    if end == "kill":
        with pytest.raises(SystemExit):
            run(data, tmp_path, "parts", **flags)
    else:
        assert run(data, tmp_path, "parts", **flags) == 143
    assert list(values(tmp_path / "out" / "parts", "eval/own/accuracy")) == [3]
    assert run(data, tmp_path, "parts", **flags, resume="auto") == 0
    assert_same(tmp_path / "out" / "parts", tmp_path / "out" / "whole")
    page = (tmp_path / "out" / "parts" / "samples.html").read_text(encoding="utf-8")
    assert page.replace("of parts", "of whole") == (tmp_path / "out" / "whole" / "samples.html").read_text(
        encoding="utf-8"
    )


def test_a_question_that_cannot_be_asked_ends_no_run(data, own, tmp_path, monkeypatch, capsys):
    call, count = ImageProcessor.__call__, []

    def breaks(processor, image):
        if "own" in str(image):
            count.append(None)
            if len(count) == 6:  # the first is asked before the run
                raise ImageDecodeError("the disk is gone")
        return call(processor, image)

    monkeypatch.setattr(ImageProcessor, "__call__", breaks)
    assert run(data, tmp_path, "run", eval_tasks=own, metric_for_best_model="own/accuracy") == 0
    found = values(tmp_path / "out" / "run", "eval/own/accuracy")
    assert found[4] is None
    assert found[8] is not None
    assert re.search(r"step 4: not measured: own, question own.jsonl#4: .*the disk is gone", capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "run" / "summary.json").read_text())["best_step"] == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_tasks": "mmstars"}, "--eval_tasks mmstars: no such task, file or folder; the tasks are mmstar, gqa"),
        ({"eval_tasks": "mmstar:0", "data_root": "{root}"}, "--eval_tasks mmstar:0: the number of rows must be >= 1"),
        ({"eval_tasks": ","}, "--eval_tasks ,: names no task"),
        ({"eval_tasks": "mmstar:5", "data_root": "{root}/nowhere"}, "nowhere: no such folder"),
        ({"eval_tasks": "mmstar:5", "data_root": "{root}", "dry_run": True}, "mmstar needs the columns index"),
        ({"eval_tasks": "mmstar:5", "data_root": "{root}"}, "mmstar needs the columns index, question, image"),
        ({"eval_tasks": "{own}:3", "metric_for_best_model": "own/acuracy"},
         "--metric_for_best_model own/acuracy: must be one of loss, exact_match, own/accuracy, "
         "own/accuracy [contains]"),
        ({"metric_for_best_model": "own/accuracy"}, "--metric_for_best_model own/accuracy: must be loss or exact_match "
                                                    "without eval_tasks"),
        ({"eval_tasks_interval": 3}, "--eval_tasks None: must be given with eval_tasks_interval"),
        ({"eval_tasks": "{bad}"}, "--eval_tasks bad: question bad.jsonl#0: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_read(data, own, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "mmstar.jsonl").write_text('{"question": "what?"}\n', encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "question": "is it?", "answer": "no"}\n', encoding="utf-8")
    (tmp_path / "0.png").write_bytes(b"no image")
    places = {"own": own, "root": tmp_path / "root", "bad": tmp_path / "bad.jsonl"}
    if "{bad}" not in str(flags):
        monkeypatch.setattr(train, "load_training_rows", None)
    given = {name: str(value).format(**places) for name, value in flags.items()}
    try:
        code = run(data, tmp_path, "run", **given)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "run").exists()


def test_the_best_checkpoint_is_that_of_the_named_metric(data, own, tmp_path, monkeypatch):
    scripted, results = iter([0.3, 0.5, 0.4]), TaskEvaluator.results

    def falling(tasks, shares):
        found, _, problems = results(tasks, shares)
        return found, {"own/accuracy": next(scripted)}, problems

    monkeypatch.setattr(TaskEvaluator, "results", falling)
    flags = {"eval_tasks": own, "eval_tasks_interval": 3, "keep_checkpoints": 1}
    assert run(data, tmp_path, "run", **flags, metric_for_best_model="eval/own/accuracy") == 0
    folder = tmp_path / "out" / "run"
    assert follow(folder / "checkpoints" / "best").name == "step_00000006"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["metric_for_best_model"], summary["best_metric"], summary["best_step"]) == ("own/accuracy", 0.5, 6)


def test_best_values_have_a_direction_and_a_metric():
    state = LoopState()
    for step, loss, match in ((1, 2.0, 0.5), (2, 1.0, 0.25), (3, None, None), (4, float("nan"), 0.75)):
        state.step = step
        state.record({"val/loss": loss, "val/exact_match": match})
        state.offer("loss", state.val_of("loss"))
    assert (state.best_step, state.best_value) == (2, 1.0)
    state.offer("exact_match", state.val_of("exact_match"))  # another one, as after --resume_override
    assert (state.best_step, state.best_value) == (4, 0.75)
    older = LoopState(best_metric="own/accuracy")
    older.load_state_dict({"step": 7, "best_step": 5, "best_val_loss": 0.5})
    older.offer("loss", 0.6)
    assert (older.best_step, older.best_value) == (5, 0.5)


def test_the_loss_of_the_best_is_that_of_the_better_weights():
    state = LoopState(step=1)
    state.record({"val/loss": 2.0, "val/loss_averaged": 1.0})
    assert state.val_of("loss") == 1.0
    state.record({"val/loss": 1.0, "val/loss_averaged": 2.0})
    assert state.val_of("loss") == 1.0


def test_names_of_metrics_may_have_their_prefix(data, tmp_path):
    for name in ("val/loss", "val_loss", "eval_loss", "loss"):
        settings = parse_arguments(arguments(data, tmp_path, "run", metric_for_best_model=name))
        assert settings.train.best_metric == "loss"
    assert STYLES[0] == "lmms-eval"  # of the prompts
    assert TINY["eval_interval"] == settings.train.tasks_interval


def test_rows_of_any_format_are_a_task(tmp_path):
    folder = write_rows(tmp_path / "rows", 3)
    [one] = open_tasks(f"{folder}:2", None, "eval_tasks")
    assert (one.task.name, len(one.questions)) == ("rows", 4)
