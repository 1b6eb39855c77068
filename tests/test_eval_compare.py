"""evaluate.py --compare."""

import json

import pytest
from tiny.benchmarks import opened, right, run, saved, write_answers

from eval.compare import compare, read_evaluation, verdict


def test_two_evaluations_compared(tmp_path, capsys):
    data = tmp_path / "data"
    for task in ("mmstar", "pope"):
        saved(data, task, 60)
    for name, skill in (("a", 15), ("b", 45)):
        rows = []
        for task in ("mmstar", "pope"):
            for number, one in enumerate(opened(data, task).questions):
                answer = right(one.item.truth) if number < skill else "xyz"
                rows.append(json.dumps({"task": task, "id": one.id, "answer": answer}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        run(
            "--tasks",
            "mmstar,pope",
            "--data_root",
            data,
            "--answers",
            tmp_path / f"{name}.jsonl",
            "--output",
            tmp_path / name,
        )
    found = compare(read_evaluation(tmp_path / "a"), read_evaluation(tmp_path / "b"))
    one = found["mmstar"]["rules"]["nanoVLM v0.1"]["accuracy"]
    assert (one["difference"], one["test"]) == (0.5, "McNemar, exact")
    assert one["p"] == pytest.approx(2 / 2**30)
    assert verdict(one) == "B is better"
    assert found["pope"]["images"] == 15
    f1 = found["pope"]["rules"]["lmms-eval"]["f1"]
    assert f1["test"] == "paired bootstrap"
    capsys.readouterr()
    run("--compare", tmp_path / "a", tmp_path / "a")
    assert "no difference shown" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"holds no results.json"):
        read_evaluation(data)


def test_other_truths_cannot_be_compared(tmp_path):
    folders = []
    for name in ("a", "b"):
        rows = [{"question": "what?", "answer": f"cat {name}", "id": 1}]
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
        answers = write_answers(tmp_path / "answers.jsonl", [(1, "cat")])
        run("--tasks", tmp_path / "rows.jsonl", "--answers", answers, "--output", tmp_path / name)
        folders.append(read_evaluation(tmp_path / name))
    with pytest.raises(ValueError, match="1 questions have another truth, as 1"):
        compare(*folders)
