"""evaluate.py --checkpoint: a model answers in batches, goes on where it was killed, and is scored."""

import json

import datasets
import pytest
import torch
from tiny.benchmarks import records
from tiny.data import encoded, picture
from tiny.families import SIZES, family_of, of_families
from tiny.grades import save_answering_model
from tokenizers import Tokenizer

import evaluate
import generate
from data import easy_vqa
from eval import asking
from eval.answering import cut_broken_line, read_progress
from eval.tasks import TASKS


@pytest.fixture
def checkpoint(request, tmp_path):
    return save_answering_model(tmp_path / "model", **family_of(request))


@pytest.fixture
def data(tmp_path):
    """Questions of several lengths about pictures of several sizes."""
    rows = records("mmstar", 8)
    for i, row in enumerate(rows):
        row["question"] = f"what color is the shape{' red' * (i % 3)}?"
        row["image"] = {"bytes": encoded(picture(*SIZES[i % 3], seed=i)), "path": None}
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({TASKS["mmstar"].split: table}).save_to_disk(tmp_path / "mmstar")
    return tmp_path


def run(checkpoint, data, output, *more):
    flags = ["--checkpoint", checkpoint, "--tasks", "mmstar", "--data_root", data, "--output", output]
    flags += ["--max_new_tokens", 6, "--num_workers", 0, "--dtype", "float32", *more]
    evaluate.main(evaluate.parse_arguments([str(one) for one in flags]))
    lines = (output / "answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((output / "results.json").read_text())


def answers(rows):
    return {(row["task"], row["id"]): row["answer"] for row in rows}


@of_families("checkpoint")
def test_a_batch_answers_as_one_question_does(checkpoint, data, tmp_path, capsys):
    one, results = run(checkpoint, data, tmp_path / "one", "--batch_size", 1)
    many, _ = run(checkpoint, data, tmp_path / "many", "--batch_size", 5, "--num_workers", 1)
    assert answers(one) == answers(many)
    assert len(set(answers(one).values())) > 1
    assert [row["id"] for row in many] == [row["id"] for row in one]  # in the order of the benchmark
    model, task = results["model"], results["tasks"]["mmstar"]
    assert model["checkpoint"] == str(checkpoint)
    assert (len(model["weights"]), model["dtype"]) == (64, "float32")
    assert task["prompt"]["style"] == "lmms-eval"
    assert task["decoding"] == {"greedy": True, "max_new_tokens": 6, "without_image": False}
    assert not (tmp_path / "one" / "progress").exists()
    assert str(checkpoint) in capsys.readouterr().out


@of_families("checkpoint")
def test_without_images_the_same_question_has_the_same_answer(checkpoint, data, tmp_path):
    blind, results = run(checkpoint, data, tmp_path / "blind", "--without_image")
    by_question = {}
    for row in blind:
        by_question.setdefault(row["question"], set()).add(row["answer"])
    assert all(len(given) == 1 for given in by_question.values())
    assert results["tasks"]["mmstar"]["decoding"]["without_image"] is True


def interrupted(monkeypatch, after):
    """Asker.answer fails once it has been called `after` times; returns the list of what was asked."""
    asked, answer = [], asking.Asker.answer

    def fails(self, questions, *rest, **more):
        if after is not None and len(asked) == after:
            raise KeyboardInterrupt
        asked.append([question.id for question in questions])
        return answer(self, questions, *rest, **more)

    monkeypatch.setattr(asking.Asker, "answer", fails)
    return asked


def test_a_killed_evaluation_goes_on(checkpoint, data, tmp_path, monkeypatch, capsys):
    whole, _ = run(checkpoint, data, tmp_path / "whole", "--batch_size", 2)
    with monkeypatch.context() as patch:
        first = interrupted(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, data, tmp_path / "out", "--batch_size", 2)
    [kept] = (tmp_path / "out" / "progress").iterdir()
    with kept.open("a") as file:
        file.write('{"id": "broken')  # as a kill leaves it
    with pytest.raises(ValueError, match="holds answers of another evaluation, whose max_new_tokens was 6"):
        run(checkpoint, data, tmp_path / "out", "--max_new_tokens", 3)
    second = interrupted(monkeypatch, None)
    again, _ = run(checkpoint, data, tmp_path / "out", "--batch_size", 3)
    assert "4 of 8 questions are answered already" in capsys.readouterr().out
    asked = [one for batch in first + second for one in batch]
    assert sorted(asked) == sorted(row["id"] for row in whole)  # each once
    assert answers(again) == answers(whole)


def test_answers_of_another_tokenizer_are_not_continued(checkpoint, data, tmp_path, monkeypatch):
    """Of as many words, which is all that the model can check."""
    tokenizer = easy_vqa.tokenizer()
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    words = written["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.save_pretrained(tmp_path / "other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "is it red?"}) + "\n")
    flags = ["--checkpoint", checkpoint, "--prompts", rows, "--output", tmp_path / "a.jsonl", "--num_workers", 0]
    flags = [str(one) for one in flags]
    generate.main(generate.parse_arguments(flags))
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, data, tmp_path / "out", "--batch_size", 2)
    other = ["--lm_tokenizer", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="holds answers of another evaluation, whose tokenizer was"):
        run(checkpoint, data, tmp_path / "out", *other)
    with pytest.raises(ValueError, match="holds answers of another evaluation, whose tokenizer was"):
        generate.main(generate.parse_arguments([*flags, *other]))
    run(checkpoint, data, tmp_path / "out", "--lm_tokenizer", easy_vqa.NAME)


def test_results_of_another_evaluation_are_not_overwritten(checkpoint, data, tmp_path, monkeypatch):
    whole, _ = run(checkpoint, data, tmp_path / "out", "--likelihood")
    asked = interrupted(monkeypatch, 0)
    elsewhere = save_answering_model(tmp_path / "elsewhere", mp_image_token_length=16)
    for model, more, words in (
        (checkpoint, ["--without_image", "--likelihood"], "whose decoding of mmstar was"),
        (checkpoint, [], "holds results of mmstar/likelihood, which would be lost"),
        (checkpoint, ["--likelihood", "--limit", 3], "whose data of mmstar was"),
        (elsewhere, ["--likelihood"], "whose checkpoint was"),
    ):
        with pytest.raises(ValueError, match=r"--output .*out: ") as error:
            run(model, data, tmp_path / "out", *more)
        assert words in str(error.value)
    assert asked == []
    monkeypatch.undo()
    assert run(checkpoint, data, tmp_path / "out", "--likelihood")[0] == whole


def test_an_evaluation_leaves_the_unfinished_answers_to_other_tasks(checkpoint, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, data, tmp_path / "out", "--batch_size", 2)
    [kept] = (tmp_path / "out" / "progress").iterdir()
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "is it red?", "answer": "yes"}) + "\n")
    run(checkpoint, data, tmp_path / "out", "--tasks", tmp_path / "own.jsonl")
    assert kept.exists()


def test_the_same_questions_about_other_pictures_are_not_continued(checkpoint, tmp_path, monkeypatch):
    for seed, name in enumerate(("clean", "noisy")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(picture(seed=seed)))
        row = {"image": "0.png", "question": "is it red?", "answer": "yes"}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    clean, noisy = (tmp_path / name / "rows.jsonl" for name in ("clean", "noisy"))
    prompts = [
        "--checkpoint",
        str(checkpoint),
        "--num_workers",
        "0",
        "--output",
        str(tmp_path / "a.jsonl"),
        "--prompts",
    ]
    generate.main(generate.parse_arguments([*prompts, str(clean)]))
    with pytest.raises(ValueError, match="whose source was"):
        generate.main(generate.parse_arguments([*prompts, str(noisy)]))
    with monkeypatch.context() as patch:
        interrupted(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path, tmp_path / "out", "--tasks", clean)
    with pytest.raises(ValueError, match="whose source was"):
        run(checkpoint, tmp_path, tmp_path / "out", "--tasks", noisy)
    run(checkpoint, tmp_path, tmp_path / "out", "--tasks", clean)
    with pytest.raises(ValueError, match="whose source of rows was"):
        run(checkpoint, tmp_path, tmp_path / "out", "--tasks", noisy)


def test_out_of_memory_halves_the_batch(checkpoint, data, tmp_path, monkeypatch):
    sizes, answer = [], asking.Asker.answer

    def small(self, questions, *rest, **more):
        sizes.append(len(questions))
        if len(questions) > 3:
            raise torch.OutOfMemoryError
        return answer(self, questions, *rest, **more)

    whole, _ = run(checkpoint, data, tmp_path / "whole")
    monkeypatch.setattr(asking.Asker, "answer", small)
    halved, _ = run(checkpoint, data, tmp_path / "halved")
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert answers(halved) == answers(whole)
    with pytest.raises(ValueError, match="--batch_size 8: out of memory"):
        run(checkpoint, data, tmp_path / "given", "--batch_size", 8)


@pytest.mark.parametrize(("missing", "answered"), [("skip", 1), ("wrong", 2)])
def test_a_question_that_cannot_be_asked_is_named_in_a_sentence(checkpoint, tmp_path, monkeypatch, missing, answered):
    rows = [{"question": "is it red?", "answer": "yes"}, {"question": "is <|im_end|> red?", "answer": "yes"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--checkpoint", checkpoint, "--tasks", tmp_path / "own.jsonl", "--output", tmp_path / "out"]
    flags = [*map(str, flags), "--num_workers", "1"]
    why = r"own: 1 of 2 questions could not be asked; the first, own.jsonl#1: .*<\|im_end\|> must not stand in it"
    with pytest.raises(ValueError, match=f"^{why}; the other answers are kept"):
        evaluate.main(evaluate.parse_arguments(flags))
    asked = interrupted(monkeypatch, 0)  # the one answer is kept, and not made again
    evaluate.main(evaluate.parse_arguments([*flags, "--missing", missing]))
    assert asked == []
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["own.jsonl#0", "own.jsonl#1"][:answered]
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["own"]
    assert (summary["rows"], list(summary["not_asked"])) == (answered, ["own.jsonl#1"])


def test_a_prompt_longer_than_the_model_has_positions_is_not_asked(checkpoint, data, tmp_path):
    with pytest.raises(
        ValueError, match=r"8 of 8 questions could not be asked; .* more than the model's \d+ positions"
    ):
        run(checkpoint, data, tmp_path / "out", "--max_new_tokens", 100_000)


def test_only_its_own_rank_cuts_a_file_that_breaks_off(tmp_path):
    path = tmp_path / "own-1.jsonl"
    written = '{"settings": {}}\n{"id": "1", "answer": "a\u2028b"}\n{"id": "2", "ans'
    path.write_text(written, encoding="utf-8")
    assert read_progress([path], {}) == ({"1": "a\u2028b"}, {}, {})
    assert path.read_text(encoding="utf-8") == written
    cut_broken_line(path)
    assert path.read_text(encoding="utf-8") == written[: written.rindex("\n") + 1]


@of_families("checkpoint")
def test_the_likeliest_letter_is_scored_too(checkpoint, data, tmp_path, capsys):
    rows, results = run(checkpoint, data, tmp_path / "out", "--likelihood")
    assert set(results["tasks"]) == {"mmstar", "mmstar/likelihood"}
    evaluate.main(evaluate.parse_arguments(["--compare", str(tmp_path / "out"), str(tmp_path / "out")]))
    assert "## mmstar/likelihood: 8 questions" in capsys.readouterr().out
    chosen = [row["answer"] for row in rows if row["task"] == "mmstar/likelihood"]
    assert len(chosen) == 8
    assert set(chosen) <= set("ABCD")
    assert {path.name.split("_", 2)[-1] for path in (tmp_path / "out" / "lmms_eval").glob("*.jsonl")} == {
        "samples_mmstar.jsonl", "samples_mmstar_likelihood.jsonl"
    }  # fmt: skip


def test_the_likeliest_letter_of_own_rows(checkpoint, tmp_path):
    rows = [
        {"question": "which?", "choices": {"label": ["1", "10"], "text": ["red", "blue"]}, "answer": "red"},
        {"question": "which?", "choices": {"label": ["", "B"], "text": ["red", "blue"]}, "answer": "blue"},
        {"question": "which?", "choices": ["red", "blue", "green"], "answer": "blue"},
        {"question": "who?", "answer": "I"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--checkpoint", checkpoint, "--tasks", tmp_path / "own.jsonl", "--output", tmp_path / "out"]
    evaluate.main(evaluate.parse_arguments([*map(str, flags), "--likelihood", "--num_workers", "0"]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    chosen = {row["id"]: row["answer"] for row in rows if row["task"] == "own/likelihood"}
    assert list(chosen) == ["own.jsonl#2"]
    assert chosen["own.jsonl#2"] in "ABC"


def test_rows_of_ones_own_are_asked_as_they_were_trained(checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    turns = [{"user": "what <image> color?", "assistant": "red"}, {"user": "is it red?", "assistant": "yes"}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"images": ["a.png"], "texts": turns}) + "\n")
    flags = ["--checkpoint", checkpoint, "--tasks", tmp_path / "own.jsonl", "--output", tmp_path / "out"]
    evaluate.main(evaluate.parse_arguments([*map(str, flags), "--max_new_tokens", "3", "--num_workers", "0"]))
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["truth"]["answers"] for row in rows] == [["red"], ["yes"]]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--checkpoint", "a", "--tasks", "mmstar"], "--output: is needed with --checkpoint"),
        (["--tasks", "mmstar"], "--checkpoint or --answers: one of them is needed"),
        (["--checkpoint", "a", "--answers", "b", "--tasks", "mmstar"], "--checkpoint or --answers: one of them"),
        (
            ["--answers", "b", "--tasks", "mmstar", "--likelihood"],
            "--likelihood: says how a model is asked, and must not",
        ),
        (["--answers", "b", "--tasks", "mmstar", "--without_image"], "--without_image: says how a model is asked"),
        (["--answers", "b", "--tasks", "mmstar", "--num_workers", "0"], "--num_workers 0: says how a model is asked"),
        (["--answers", "b", "--tasks", "mmstar", "--batch_size", "4"], "--batch_size 4: says how a model is asked"),
        (["--answers", "b", "--tasks", "mmstar", "--dtype", "float32"], "--dtype float32: says how a model is asked"),
        (["--checkpoint", "a", "--tasks", "mmstar", "--batch_size", "0"], "must be auto or a whole number >= 1"),
        (["--checkpoint", "a", "--tasks", "x", "--output", "o", "--max_new_tokens", "0"], "--max_new_tokens 0: must"),
    ],
)
def test_flags_that_cannot_be_meant(flags, problem, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(flags)
    assert problem in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--checkpoint .*nowhere"):
        run(tmp_path / "nowhere", data, tmp_path / "out")
