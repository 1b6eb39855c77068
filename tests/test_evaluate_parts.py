"""evaluate.py: parts of a benchmark, whose data it takes, and texts that hold other ends of lines."""

import json

import pytest
from PIL import Image
from tiny.benchmarks import opened, run, saved, table, write_answers

from data.web_images import WebImage
from eval.benchmarks import digest_of
from eval.own_rows import open_own_rows
from eval.tables import files_of_split

SEPARATORS = "\u2028 \u2029 \x85"


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def samples_of(output):
    [path] = (output / "lmms_eval").glob("*_samples_*.jsonl")
    return path


def test_answers_to_all_questions_serve_for_a_part_of_them(tmp_path):
    """Of their own file as well as of the samples, whose doc_id is the row of the data."""
    saved(tmp_path, "mmstar", 12)
    flags = ("--data_root", tmp_path, "--tasks")
    answers = write_answers(tmp_path / "a.jsonl", [(str(i), "ABCD"[i % 4]) for i in range(12)])
    run(*flags, "mmstar:5", "--answers", answers, "--output", tmp_path / "part")
    rows = read(tmp_path / "part" / "answers.jsonl")
    numbers = [int(row["id"]) for row in rows]
    assert numbers == [one.number for one in opened(tmp_path, "mmstar", count=5).questions] != list(range(5))
    assert [row["answer"] for row in rows] == ["ABCD"[i % 4] for i in numbers]
    samples = samples_of(tmp_path / "part")
    assert [row["doc_id"] for row in read(samples)] == [row["number"] for row in rows] == numbers
    run(*flags, "mmstar", "--answers", samples, "--missing", "skip", "--output", tmp_path / "again")
    assert [(row["id"], row["answer"]) for row in read(tmp_path / "again" / "answers.jsonl")] == [
        (row["id"], row["answer"]) for row in rows
    ]


def test_a_text_may_hold_other_ends_of_lines(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": 1, "question": f"what {SEPARATORS}?", "answer": "cat"}, ensure_ascii=False))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"id": "1", "answer": f"a {SEPARATORS} cat"}, ensure_ascii=False) + "\r\n")
    for name in ("a", "b"):
        run("--tasks", rows, "--answers", answers, "--output", tmp_path / name)
        answers = tmp_path / name / "answers.jsonl"
    assert read(answers)[0]["answer"] == f"a {SEPARATORS} cat"
    run("--compare", tmp_path / "a", tmp_path / "b")


def test_the_data_of_another_configuration_is_not_taken(tmp_path):
    """DocVQA and InfographicVQA have the same columns in one repository."""
    files = {}
    for config in ("DocVQA", "data"):
        (tmp_path / "DocVQA" / config).mkdir(parents=True)
        files[config] = tmp_path / "DocVQA" / config / "validation-00000-of-00001.parquet"
    table("docvqa_val").to_parquet(files["DocVQA"])
    with pytest.raises(FileNotFoundError, match="no folder InfographicVQA; there are DocVQA"):
        files_of_split(tmp_path / "DocVQA", "InfographicVQA", "validation")
    (tmp_path / "DocVQA" / "dataset_infos.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no folder InfographicVQA"):
        files_of_split(tmp_path / "DocVQA", "InfographicVQA", "validation")
    table("docvqa_val").to_parquet(files["data"])
    assert files_of_split(tmp_path / "DocVQA", "DocVQA", "validation") == [files["DocVQA"]]
    assert files_of_split(tmp_path / "DocVQA", "InfographicVQA", "validation") == [files["data"]]


def test_the_letters_of_own_rows_are_those_of_the_choices(tmp_path):
    row = {"question": "Who lives here?\nMr. Smith says so.", "choices": ["a cat", "a dog"], "answer": "a dog"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    [question] = open_own_rows(tmp_path / "own.jsonl", None).questions
    assert (question.item.choices, question.item.truth["letters"]) == (2, ["A", "B"])


def test_results_of_other_tasks_or_answers_are_not_overwritten(tmp_path):
    """The same command may be given again, with further tasks too, and answers be scored again where they are."""
    for task in ("mmstar", "pope"):
        saved(tmp_path, task)
    rows = [{"task": task, "id": f"#{i}", "answer": "A"} for task in ("mmstar", "pope") for i in range(8)]
    (answers := tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    flags = ("--data_root", tmp_path, "--output", tmp_path / "out", "--answers")
    run(*flags, answers, "--tasks", "mmstar")
    run(*flags, answers, "--tasks", "mmstar,pope")
    run(*flags, tmp_path / "out" / "answers.jsonl", "--tasks", "mmstar,pope")
    kept = (tmp_path / "out" / "results.json").read_bytes()
    other = write_answers(tmp_path / "b.jsonl", [(f"#{i}", "B") for i in range(8)])
    for more, words in (
        ((answers, "--tasks", "pope"), "holds results of mmstar, which would be lost"),
        ((tmp_path / "out" / "answers.jsonl", "--tasks", "mmstar,pope", "--limit", 3), "whose data of mmstar was"),
        ((other, "--tasks", "mmstar", "--missing", "skip"), "holds results of pope"),
        ((answers, "--tasks", "mmstar,pope", "--prompt_style", "nanovlm"), "whose answers was"),
    ):
        with pytest.raises(ValueError, match=r"--output .*out: ") as error:
            run(*flags, *more)
        assert words in str(error.value)
    run(*flags[:-2], tmp_path / "two", "--answers", answers, "--tasks", "mmstar")
    with pytest.raises(ValueError, match="whose answers was"):
        run(*flags[:-2], tmp_path / "two", "--answers", other, "--tasks", "mmstar")
    assert (tmp_path / "out" / "results.json").read_bytes() == kept
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"--output .*out: its results\.json cannot be read"):
        run(*flags, answers, "--tasks", "mmstar")


def test_whatever_an_image_comes_as_has_a_digest_by_what_it_shows(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    assert digest_of(b"a") == digest_of({"bytes": b"a", "path": "b.png"}) == digest_of(str(tmp_path / "a.bin"))
    assert digest_of(WebImage("https://host/a")) == digest_of(WebImage("https://host/a"))
    red, blue = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))
    assert digest_of(red) == digest_of(red.copy())
    assert len({digest_of(one) for one in (b"a", b"b", WebImage("https://host/a"), red, blue)}) == 5
    assert digest_of(str(tmp_path / "none.png")) is None
