"""evaluate.py: benchmarks from files, answers scored, results written and compared; errors are one sentence."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tiny.benchmarks import RECORDS, image, opened, records, right, run, saved, table, write_answers

from eval.answers import match, read_answers
from eval.own_rows import open_own_rows
from eval.prompts import styled
from eval.results import score
from eval.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("task", RECORDS)
def test_right_answers_score_all_and_wrong_ones_nothing(tmp_path, task):
    """Of every benchmark, from its own columns; but for the rule that takes every open answer of MMMU for wrong."""
    benchmark = opened(saved(tmp_path, task), task)
    assert len(benchmark.questions) == len({one.id for one in benchmark.questions}) == 8
    main = TASKS[task].main
    _, summary = score(benchmark, {one.id: right(one.item.truth) for one in benchmark.questions})
    for rule, found in summary["rules"].items():
        value = found["metrics"][main]["value"]
        expected = 7 / 8 if (task, rule) == ("mmmu_val", "lmms-eval") else 1.0
        assert value == pytest.approx(expected) if main != "CIDEr" else value > 4, rule
    wrong = {one.id: {"yes": "No", "no": "Yes"}.get(right(one.item.truth), "xyz") for one in benchmark.questions}
    _, summary = score(benchmark, wrong)
    for rule, found in summary["rules"].items():
        expected = 7 / 8 / 3 if (task, rule) == ("mmmu_val", "lmms-eval") else 0.0  # 1 / choices without a letter
        assert found["metrics"][main]["value"] == pytest.approx(expected), rule


def test_the_table_has_a_record_here_for_every_task():
    assert set(RECORDS) == set(TASKS)
    for task in TASKS.values():
        assert set(task.columns) <= {*RECORDS[task.name](0), *task.images}, task.name


@pytest.mark.parametrize(
    ("task", "clusters"),
    [("mmstar", 8), ("gqa", 4), ("vqav2_val", 4), ("ok_vqa_val2014", 4), ("ai2d", 4), ("mmbench_en_dev", 4),
     ("pope", 2), ("hallusion_bench_image", 2)],
)  # fmt: skip
def test_questions_that_share_an_image_are_known(tmp_path, task, clusters):
    """By a column, by the bytes of the image, or as parts of a set."""
    assert len({one.cluster for one in opened(saved(tmp_path, task), task).questions}) == clusters


def numbers_of(folder, task, answers):
    """Metric -> its numbers by the first rule, for answers in the order of the questions."""
    benchmark = opened(saved(folder, task, len(answers)), task)
    _, summary = score(benchmark, dict(zip([one.id for one in benchmark.questions], answers, strict=True)))
    return summary["rules"][TASKS[task].rules[0].name]["metrics"]


def test_a_question_of_mmbench_is_right_if_all_its_rotations_are(tmp_path):
    found = numbers_of(tmp_path, "mmbench_en_dev", ["A", "B", "A", "A", "B", "B", "A", "B"])
    assert [found[name]["value"] for name in ("accuracy", "accuracy_of_rows")] == [0.5, 0.75]
    assert [found[name]["chance"] for name in ("accuracy", "accuracy_of_rows")] == [0.25, 0.5]


def test_an_answer_to_pope_that_is_neither_is_in_accuracy_alone(tmp_path):
    """Truths of the rows: yes yes no no yes yes no no."""
    found = numbers_of(tmp_path, "pope", ["yes", "maybe", "yes", "no", "no", "yes", "no", "no."])
    expected = {"accuracy": 4 / 8, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_share": 3 / 8}
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
    assert found["neither_share"]["value"] == 2 / 8
    assert (found["accuracy"]["chance"], found["f1"]["chance"]) == (0.5, None)


def test_hallusion_counts_questions_and_figures_whole(tmp_path):
    """Four questions of a set: question 0 and 1 of figures 0 and 1, no and yes."""
    found = numbers_of(tmp_path, "hallusion_bench_image", ["no", "yes", "no", "no", "no", "yes", "no", "yes"])
    assert [found[name]["value"] for name in ("aAcc", "qAcc", "fAcc")] == [7 / 8, 3 / 4, 3 / 4]


@pytest.mark.parametrize(("task", "chance"), [("ai2d", 1 / 4), ("scienceqa", 1 / 2), ("mmmu_val", 7 / 8 / 3)])
def test_chance_is_one_over_the_choices(tmp_path, task, chance):
    assert numbers_of(tmp_path, task, ["A"] * 8)["accuracy"]["chance"] == pytest.approx(chance)


@pytest.mark.parametrize("task", ["mmstar", "mmmu_val", "seedbench", "scienceqa"])
def test_images_are_those_of_the_record(tmp_path, task):
    benchmark = opened(saved(tmp_path, task), task, with_images=True)
    first, second = (benchmark.images(one) for one in benchmark.questions[:2])
    expected = {"mmstar": [0], "mmmu_val": [0, 100], "seedbench": [0], "scienceqa": []}[task]
    assert [one["bytes"] for one in first] == [image(number)["bytes"] for number in expected]
    assert second[0]["bytes"] == image(1)["bytes"]


def test_images_of_gqa_stand_in_a_table_of_their_own(tmp_path):
    task = TASKS["gqa"]
    for config, rows in (
        (task.config, records("gqa")),
        (task.image_config, [{"id": f"n{i}", "image": image(i)} for i in range(4)]),
    ):
        made = datasets.Dataset.from_list(rows)
        if "image" in made.column_names:
            made = made.cast_column("image", datasets.Image())
        (tmp_path / "GQA" / config).mkdir(parents=True)
        made.to_parquet(tmp_path / "GQA" / config / "testdev-00000-of-00001.parquet")
    benchmark = opened(tmp_path, "gqa")
    assert benchmark.images(benchmark.questions[5])[0]["bytes"] == image(2)["bytes"]
    assert benchmark.questions[4].cluster == benchmark.questions[5].cluster == "n2"


def test_the_same_questions_from_every_kind_of_file(tmp_path, monkeypatch):
    """save_to_disk, parquet as on the hub, JSON Lines with images beside it, the hub: one fingerprint."""
    found = [opened(saved(tmp_path / "a", "mmstar"), "mmstar")]
    (tmp_path / "b/Lin-Chen/MMStar").mkdir(parents=True)
    table("mmstar").to_parquet(tmp_path / "b/Lin-Chen/MMStar/val-00000-of-00001.parquet")
    found.append(opened(tmp_path / "b", "mmstar"))
    (tmp_path / "c/images").mkdir(parents=True)
    with (tmp_path / "c/val.jsonl").open("w") as file:
        for number, record in enumerate(records("mmstar")):
            (tmp_path / f"c/images/{number}.png").write_bytes(record["image"]["bytes"])
            file.write(json.dumps(record | {"image": f"images/{number}.png"}) + "\n")
    found.append(opened(tmp_path / "c", "mmstar"))
    monkeypatch.setattr("eval.tables.require_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: table("mmstar"))
    found.append(opened(None, "mmstar"))
    assert len({one.fingerprint for one in found}) == len({one.image_fingerprint for one in found}) == 1
    assert found[3].table.source == "Lin-Chen/MMStar"
    assert all(one.questions[3].prompt.startswith("What is this (3)?") for one in found)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["no such folder"]),
        (lambda folder: folder.mkdir(), ["holds no .parquet"]),
        (lambda folder: write(folder / "val.jsonl", {"index": 1, "question": "?"}),
         ["mmstar needs the columns", "missing: answer, category, l2_category", "there are index, question"]),
        (lambda folder: write(folder / "train.parquet", None), ["no file of the split val; there are train, val-x"]),
        (lambda folder: write(folder / "val-00001-of-00003.parquet", None), ["1 of 3 parquet files; missing: 00000"]),
        (lambda folder: saved_as(folder, "test"), ["no split val; there are test"]),
        (lambda folder: write(folder / "val.jsonl", "{"), ["line 1", "not JSON"]),
        (lambda folder: write(folder / "val.jsonl"), ["mmstar needs the columns", "there are none"]),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_one_sentence(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened(tmp_path / "data", "mmstar")
    assert all(word in str(error.value) for word in words), error.value
    assert "data" in str(error.value)
    assert "\n" not in str(error.value)


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        table("mmstar", 2).to_parquet(path)
        if "-of-" not in path.name:
            table("mmstar", 2).to_parquet(path.with_name("val-x.parquet"))
    else:
        path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))


def saved_as(folder, split):
    datasets.DatasetDict({split: table("mmstar")}).save_to_disk(folder)


def test_a_record_that_is_none_of_the_benchmark_is_named(tmp_path):
    saved(tmp_path, "ai2d")
    rows = [record | {"answer": "first"} for record in records("ai2d")]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "bad")
    with pytest.raises(ValueError, match="row 0: is no row of ai2d"):
        opened(tmp_path / "bad", "ai2d")


def test_the_output_folder(tmp_path, capsys):
    data, ids = saved(tmp_path / "data", "mmstar"), range(8)
    answers = write_answers(tmp_path / "mine.jsonl", [(i, "ABCD"[i % 4] if i < 6 else "no idea") for i in ids])
    run("--tasks", "mmstar", "--data_root", data, "--answers", answers, "--output", tmp_path / "out",
        "--prompt_style", "lmms-eval")  # fmt: skip
    shown = capsys.readouterr().out
    assert "| lmms-eval since 2026-04 | average | 75.00 |" in shown
    assert "8 rows of 1500 published" in shown
    assert "decoding: not known" in shown
    results = json.loads((tmp_path / "out/results.json").read_text())
    found = results["tasks"]["mmstar"]
    assert found["prompt"]["style"] == "lmms-eval"
    assert len(found["data"]["fingerprint"]) == 64
    numbers = found["rules"]["lmms-eval until 2026-04"]["metrics"]
    assert numbers["average"]["chance"] == 0.246
    assert numbers["accuracy"]["stderr"] == pytest.approx((0.75 * 0.25 / 7) ** 0.5)
    assert found["rules"]["nanoVLM v0.1"]["constant"] == {"answer": "A", "value": 0.25}
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert rows[1]["answer"] == "B"
    assert rows[1]["truth"] == {"answer": "B"}
    assert rows[1]["prompt"].endswith("Answer with the option's letter from the given choices directly")
    assert rows[7]["rules"]["lmms-eval since 2026-04"] == {"parsed": None, "score": 0.0}
    assert (tmp_path / "out/results.md").read_text().count("SHA-256") == 1
    # As nanoVLM reads lmms-eval's file: what follows the comma is dropped.
    layout = json.loads(next((tmp_path / "out/lmms_eval").glob("*_results.json")).read_text())
    read = {key.split(",")[0]: value for key, value in layout["results"]["mmstar"].items()}
    assert read["average"] == read["math"] == 0.75
    assert len(read) == len(layout["results"]["mmstar"]) == 1 + 3 * 2 * 3  # alias; rules, value and error, 3 numbers
    assert read["average [lmms-eval until 2026-04]"] == 0.75
    samples = next((tmp_path / "out/lmms_eval").glob("*_samples_mmstar.jsonl")).read_text().splitlines()
    assert json.loads(samples[1])["filtered_resps"] == ["B"]


def test_answers_can_be_scored_again(tmp_path, capsys):
    """Of answers.jsonl, which knows its model and decoding, and of lmms-eval's samples: the same numbers."""
    data = saved(tmp_path / "data", "mmstar")
    answers = write_answers(tmp_path / "mine.jsonl", [(i, "A") for i in range(8)])
    run("--tasks", "mmstar", "--data_root", data, "--answers", answers, "--output", tmp_path / "one")
    results = json.loads((tmp_path / "one/results.json").read_text())
    results["model"], results["tasks"]["mmstar"]["decoding"] = "runs/x", {"greedy": True}
    assert results["tasks"]["mmstar"]["prompt"] == {"style": None, "first": None}
    results["tasks"]["mmstar"]["prompt"]["style"] = "nanovlm"
    (tmp_path / "one/results.json").write_text(json.dumps(results))
    samples = next((tmp_path / "one/lmms_eval").glob("*samples*"))
    for name, given in (("two", tmp_path / "one/answers.jsonl"), ("three", samples)):
        run("--tasks", "mmstar", "--data_root", data, "--answers", given, "--output", tmp_path / name)
    again = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "three")]
    assert [one["model"] for one in again] == ["runs/x", None]
    assert [one["tasks"]["mmstar"]["decoding"] for one in again] == [{"greedy": True}, None]
    assert [one["tasks"]["mmstar"]["prompt"]["style"] for one in again] == ["nanovlm", None]
    assert "Answer with the letter directly" in (tmp_path / "two/answers.jsonl").read_text()
    for one in again:
        assert one["tasks"]["mmstar"]["rules"] == results["tasks"]["mmstar"]["rules"]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(0, "A"), (1, "B")], ["2 of 4 questions have no answer: 2, 3", "--missing"]),
        ([(0, "A"), (0, "B"), (1, "A"), (2, "A"), (3, "A")], ["1 ids stand there twice: 0"]),
        ([(0, "A"), (1, "A"), (2, "A"), (3, "A"), ("x", "B")], ["1 ids are none of its 4 questions", ": x"]),
    ],
)
def test_ids_that_do_not_match_are_named(tmp_path, pairs, words):
    benchmark = opened(saved(tmp_path, "mmstar", 4), "mmstar")
    given = read_answers(write_answers(tmp_path / "a.jsonl", pairs), ["mmstar"])["mmstar"]
    with pytest.raises(ValueError, match="--answers for mmstar") as error:
        match(given, benchmark)
    assert all(word in str(error.value) for word in words), error.value


def test_a_limit_takes_the_answers_it_needs(tmp_path, capsys):
    folder = saved(tmp_path, "mmstar")
    answers = write_answers(tmp_path / "a.jsonl", [(f"#{number}", "A") for number in range(8)])
    run("--tasks", "mmstar", "--data_root", folder, "--answers", answers, "--limit", 3)
    assert "3 rows of 1500 published" in capsys.readouterr().out
    elsewhere = write_answers(tmp_path / "b.jsonl", [("x", "A"), ("y", "B")])
    with pytest.raises(ValueError, match="2 ids are none of its 3 questions"):
        run("--tasks", "mmstar", "--data_root", folder, "--answers", elsewhere, "--limit", 3)


def test_missing_answers_are_wrong_or_left_out(tmp_path):
    benchmark = opened(saved(tmp_path, "mmstar"), "mmstar")
    for missing, rows, value in (("wrong", 8, 0.25), ("skip", 2, 1.0)):
        found, summary = score(benchmark, match([("0", "A"), ("1", "B")], benchmark, missing))
        assert len(found) == summary["rows"] == rows
        assert summary["rules"]["nanoVLM v0.1"]["metrics"]["accuracy"]["value"] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1: is not JSON"), ("[1]", "line 1: must be an object"), ('{"id": 1}', "missing: answer"),
     ('{"id": 1, "answer": 3}', "must be a text, not 3"), ('{"id": 1, "answer": "x"}', 'must name its "task"')],
)  # fmt: skip
def test_a_bad_line_of_answers_is_named(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(f"{text}\n")
    with pytest.raises(ValueError, match="--answers") as error:
        read_answers(tmp_path / "a.jsonl", ["mmstar", "pope"] if "task" in words else ["mmstar"])
    assert words in str(error.value)


def test_own_rows_that_show_the_same_are_known(tmp_path):
    for name, data in {"a.png": b"one", "copy.png": b"one", "b.png": b"two"}.items():
        (tmp_path / name).write_bytes(data)
    shown = [{"image": "a.png"}, {"images": ["copy.png", "b.png"]}, {"image": "b.png"}, {"image": "gone.png"}]
    shown += [{"image": "a.png", "cluster": "c"}, {"video": "v.mp4"}, {"video": "v.mp4"}, {}, {}]
    rows = [one | {"question": "what?", "answer": "it"} for one in shown]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clusters = [one.cluster for one in open_own_rows(tmp_path / "my.jsonl", None).questions]
    groups = [clusters.index(one) for one in clusters]
    assert groups == [0, 0, 2, 3, 4, 5, 5, 7, 8]
    assert clusters[3:5] == ["my.jsonl#3", "c"]


def test_ones_own_rows(tmp_path, capsys):
    rows = [
        {"id": "x", "question": "what?", "answers": ["cat", "kitten"], "source": "one"},
        {"id": "y", "question": "how many?", "answer": 20, "source": "two", "cluster": 7},
        {"id": "z", "question": "which?", "choices": ["red", "blue"], "answer": "B", "source": "two", "cluster": 7},
        {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}]},
        {"nothing": 1},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    benchmark = open_own_rows(path, None)
    assert [one.id for one in benchmark.questions] == ["x", "y", "z", "my.jsonl#3/0", "my.jsonl#3/1"]
    assert [one.cluster for one in benchmark.questions] == ["x", "7", "7", "my.jsonl#3", "my.jsonl#3"]
    given = ["A kitten.", "It is 21", "(B)", "B.", "x"]
    _, summary = score(benchmark, dict(zip([one.id for one in benchmark.questions], given, strict=True)))
    values = {rule: found["metrics"]["accuracy"]["value"] for rule, found in summary["rules"].items()}
    assert values == pytest.approx(
        {"exact match": 0.2, "contains": 0.6, "number within 5 %": 0.4, "ANLS": values["ANLS"], "choice": 0.4}
    )
    assert summary["rules"]["contains"]["metrics"]["source/two"]["value"] == 0.5
    first = dict(list(zip([one.id for one in benchmark.questions], given, strict=True))[:1])
    _, open_only = score(replace(benchmark, questions=benchmark.questions[:1]), first)
    assert open_only["rules"]["contains"]["metrics"]["accuracy"]["chance"] is None  # nobody knows what guessing scores
    assert "no known format" in next(iter(summary["data"]["not_usable"]))
    write_answers(tmp_path / "a.jsonl", zip([one.id for one in benchmark.questions], given, strict=True))
    run("--tasks", path, "--answers", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert "| exact match | accuracy | 20.00 |" in capsys.readouterr().out


def test_prompt_styles(tmp_path):
    item = TASKS["mmstar"].read(records("mmstar")[0])
    prompt, start = styled("mmstar", item, "nanovlm")
    assert prompt == "What is this (0)?\nChoices: A: cat, B: dog, C: cow, D: hen\nAnswer with the letter directly"
    assert start == "Answer:"
    prompt, start = styled("mmstar", item, "nanovlm-v0.1")
    assert prompt.startswith("Question: What is this (0)?\nOptions:")
    assert prompt.endswith(" \nAnswer only with the letter! \nAnswer:")
    assert styled("ocrbench", TASKS["ocrbench"].read(records("ocrbench")[0]), "nanovlm")[0].endswith(
        "very brief answer."
    )
    chart = TASKS["chartqa"].read(records("chartqa")[0])
    assert styled("chartqa", chart, "nanovlm") == (chart.prompt, "")
    with pytest.raises(ValueError, match="mmstar alone"):
        styled("pope", item, "nanovlm-v0.1")
    assert TASKS["scienceqa"].read(records("scienceqa")[0]).prompt.startswith("Context: Look.\nwhich?\nA. a cat\nB. a")
    mmbench = TASKS["mmbench_en_dev"].read(records("mmbench_en_dev")[0])
    assert mmbench.prompt.startswith("what? There are several options:\nA. cat\nB. dog\n\nAnswer with")


def test_the_page_names_every_task():
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert [task for task in TASKS if f"`{task}`" not in page] == []


def test_the_list_is_quick_and_has_every_task():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "evaluate.py", "--list"], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - started < 10  # about one second; the machine may be busy
    assert done.returncode == 0
    assert all(f"{task}  " in done.stdout for task in TASKS)


def test_the_list_needs_no_heavy_package():
    code = "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'datasets', 'PIL', 'matplotlib']); "
    code += "import evaluate; evaluate.list_tasks()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--tasks"),
        (["--tasks", "mmstar"], "--answers"),
        (["--tasks", "mmstar", "--answers", "a.jsonl", "--limit", "0"], "--limit 0"),
        (["--tasks", "mmstarr", "--answers", "a.jsonl"], "no such task, file or folder; the tasks are mmstar"),
        (["--tasks", "mmstar", "--answers", "a.jsonl", "--data_root", "nowhere"], "--data_root nowhere"),
        (["--tasks", "mmstar,pope", "--answers", "a.jsonl", "--data_root", "docs"], "docs: holds no folder mmstar"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments, words):
    done = subprocess.run([sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
