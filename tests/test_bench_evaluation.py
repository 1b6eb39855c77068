"""bench_evaluation.py: made-up data in MMStar's columns, random weights, and what a kill may change."""

import json
from types import SimpleNamespace

import pytest
from tiny.grades import TINY

from eval.benchmarks import open_benchmark
from eval.results import score
from eval.tasks import TASKS
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from scripts import bench_evaluation
from training.arguments import parse_arguments


def test_the_made_up_data_are_in_mmstars_columns_and_always_the_same(tmp_path):
    bench_evaluation.write_data(tmp_path, 12)
    benchmark = open_benchmark(TASKS["mmstar"], tmp_path, None, "lmms-eval", True)
    assert len(benchmark.questions) == 12
    assert all("\nOptions: A: " in one.prompt for one in benchmark.questions)
    assert len({bench_evaluation.record(number)["image"]["bytes"] for number in range(12)}) == 12
    assert bench_evaluation.record(5) == bench_evaluation.record(5)
    _, summary = score(benchmark, {one.id: one.item.truth["answer"] for one in benchmark.questions})
    assert summary["rules"]["lmms-eval since 2026-04"]["metrics"]["average"]["value"] == 1
    assert "not MMStar" in (tmp_path / "MADE_UP.md").read_text()


def test_the_checkpoint_knows_the_words_of_the_questions(tmp_path):
    from transformers import PreTrainedTokenizerFast

    cfg = VLMConfig(**TINY | {"lm_base_vocab_size": 90})
    bench_evaluation.write_checkpoint(tmp_path, cfg)
    VisionLanguageModel.from_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert len(tokenizer.get_vocab()) == 91
    ids = tokenizer(bench_evaluation.record(77)["question"])["input_ids"]
    assert tokenizer.unk_token_id not in ids


@pytest.fixture
def evaluation(tmp_path):
    return bench_evaluation.Evaluation(tmp_path, parse_arguments(["--dtype", "float32"]), 4)


def test_a_process_is_killed_once_it_has_given_so_many_answers(evaluation):
    script = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[-1], 'progress'); folder.mkdir(parents=True)\n"
        "with (folder / 'mmstar-0.jsonl').open('w', buffering=1) as file:\n"
        "    for number in range(1000): print(number, file=file); time.sleep(0.02)\n"
    )
    evaluation.command = [evaluation.command[0], "-c", script]
    seconds, status = evaluation.run("killed", kill_after=3)
    assert status == -9
    assert 3 <= bench_evaluation.answered(evaluation.folder / "killed") < 900
    assert seconds < 15


def test_a_call_reuses_nothing_of_an_earlier_one(tmp_path, monkeypatch):
    made = []

    def run(self, name):
        assert not list((self.folder / name).glob("*"))
        rows = open_benchmark(TASKS["mmstar"], self.folder / "data", None, "lmms-eval", True)
        made.append((len(rows.questions), self.limit, VLMConfig.load(self.folder / "checkpoint").lm_hidden_dim))
        (self.folder / name).mkdir()
        results = {"model": {"parameters": 1, "dtype": "float32"}}
        (self.folder / name / "results.json").write_text(json.dumps(results))
        return 1.0, 0

    monkeypatch.setattr(bench_evaluation.Evaluation, "run", run)
    (tmp_path / "bench_evaluation" / "data" / "mmstar").mkdir(parents=True)  # of a call that was killed
    for words in (["--rows=4", "--limit=9"], ["--rows=3", "--lm_hidden_dim=64"]):
        assert bench_evaluation.main([f"--output={tmp_path}", *words]) == 0
    assert made == [(4, 4, 128), (3, 3, 64)]


def test_only_time_and_command_may_differ(tmp_path):
    for name, created, value in (("a", 1, 5), ("b", 2, 5), ("c", 3, 6)):
        (tmp_path / name).mkdir()
        results = {"created": created, "command": name, "tasks": value}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        (tmp_path / name / "answers.jsonl").write_text(f"{value}\n")
    assert bench_evaluation.differences(tmp_path / "a", tmp_path / "b") == []
    assert bench_evaluation.differences(tmp_path / "a", tmp_path / "c") == ["tasks", "answers.jsonl"]


def test_both_models_answer_the_same_rows(tmp_path, monkeypatch):
    cfg = VLMConfig(**TINY | {"lm_base_vocab_size": 90})
    bench_evaluation.write_data(tmp_path / "data", 8)
    bench_evaluation.write_checkpoint(tmp_path / "checkpoint", cfg)
    asked = []

    class Theirs:
        def eval(self):
            return self

        def generate(self, ids, images, max_new_tokens, greedy):
            asked.append((len(ids), len(images), max_new_tokens, greedy))
            return ids[:, :max_new_tokens]

    monkeypatch.setattr(bench_evaluation, "their_model", lambda folder, cfg: Theirs())
    train = SimpleNamespace(dtype="float32", eval_batch_size=3)
    rivals = bench_evaluation.Rivals(tmp_path, tmp_path, SimpleNamespace(train=train), 8)
    found = rivals.measure(2)
    assert {name: len(rates) for name, rates in found.items()} == {"this": 2, "nanoVLM": 2}
    assert sum(rows for rows, *_ in asked) == 8 + 2  # and two to warm up
    assert all(rows == images <= 3 for rows, images, *_ in asked)
    assert {one[2:] for one in asked} == {(bench_evaluation.NEW_TOKENS, True)}
