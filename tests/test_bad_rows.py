"""Rows that cannot be used: dropped.jsonl, --max_bad_rows, --strict."""

import json
from pathlib import Path

import pytest
from tiny.data import drawn, encoded, picture, row, tiny_train, tiny_vlm
from tiny.runs import arguments, before_steps
from tiny.together import run_together

import train
from data.bad_rows import BadRowLimit
from data.datasets import PreparedSample
from data.drops import MAX_RECORDS, DropCounter, DropRecord
from data.pipeline import Data, load_data
from data.readers import FRUITLESS, FruitlessCounter
from models.config import TrainConfig
from training import schedule
from training.arguments import parse_arguments
from training.logging import RunLog


def write(folder: Path, count: int, missing: set[int] = frozenset(), long: set[int] = frozenset()) -> Path:
    """Rows with one image each, of which those of `missing` do not exist and those of `long` have many words."""
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(picture()))
    lines = []
    for i in range(count):
        image = f"missing{i}.png" if i in missing else "a.png"
        question = "is there a red shape? " * (200 if i in long else 1)
        lines.append(json.dumps({"image": image, **{"question": question, "answer": "yes"}}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


def run(data: Path, tmp_path: Path, name: str = "run", **flags) -> tuple[int, dict, list[dict]]:
    """(exit code, summary, the lines of dropped.jsonl)."""
    given = {"test_dataset_path": "easy-vqa", "max_training_steps": 2, "gradient_accumulation_steps": 1}
    words = arguments(data, tmp_path, name, **(given | {"eval_interval": 2} | flags))
    words = [word for word in words if not word.startswith("--test_dataset_path")]
    code = train.main(parse_arguments(words))
    folder = tmp_path / "out" / name
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return code, json.loads((folder / "summary.json").read_text()), lines


def test_every_bad_row_has_a_record_with_file_and_line(tmp_path):
    data = write(tmp_path / "rows", 40, missing={5, 21}, long={9})
    code, summary, lines = run(data, tmp_path, max_training_steps=12, max_sample_length=100, eval_interval=6)
    assert (code, summary["stop_reason"]) == (0, "max_training_steps")
    found = {line["row"]: line for line in lines}
    assert len(lines) == len(found) == 3  # once each, although an epoch takes nine steps
    assert found["rows/rows.jsonl#5"]["where"] == "rows/rows.jsonl, line 6"
    assert found["rows/rows.jsonl#5"]["reason"] == "no such file"
    assert found["rows/rows.jsonl#5"]["found"].endswith("missing5.png")
    assert (found["rows/rows.jsonl#9"]["reason"], found["rows/rows.jsonl#9"]["where"]) == (
        "too long",
        "rows/rows.jsonl, line 10",
    )
    assert {line["split"] for line in lines} <= {"train", "val"}
    counted = [sum(counts.values()) for counts in summary["dropped"].values()]
    assert sum(counted) >= 3


def test_too_many_bad_rows_end_the_run_with_what_was_trained(tmp_path, capsys):
    data = write(tmp_path / "rows", 40, missing=set(range(0, 40, 4)))
    code, summary, lines = run(data, tmp_path, max_training_steps=20, eval_interval=20)
    said = capsys.readouterr()
    assert (code, summary["stop_reason"]) == (1, "bad_rows")
    assert 0 < summary["steps"] < 12
    assert (tmp_path / "out" / "run" / "checkpoints" / "last" / "model.safetensors").exists()
    (error,) = [line for line in said.err.splitlines() if "error" in line]
    assert "--max_bad_rows 0.1" in error
    assert "dropped.jsonl" in error
    assert "no such file" in said.out
    assert "missing" in said.out
    assert len(lines) > 3
    assert {line["reason"] for line in lines} == {"no such file"}
    flags = {"max_training_steps": 20, "eval_interval": 20, "resume": "auto"}
    assert run(data, tmp_path, **flags)[0] == 1  # and no further step
    code, summary, lines = run(data, tmp_path, **flags, max_bad_rows=0.5)
    assert (code, summary["steps"], len(lines)) == (0, 20, 10)


def test_what_the_users_own_flags_leave_out_is_not_bad(tmp_path):
    data = write(tmp_path / "rows", 40, long=set(range(0, 40, 2)))
    code, summary, lines = run(data, tmp_path, max_training_steps=10, max_sample_length=100)
    assert (code, summary["steps"]) == (0, 10)
    assert {line["reason"] for line in lines} == {"too long"}
    assert all(line["found"].endswith("tokens, max_sample_length 100") for line in lines)


def test_strict_ends_at_the_first_bad_row(tmp_path, capsys):
    data = write(tmp_path / "rows", 40, missing={7})
    code, summary, lines = run(data, tmp_path, max_training_steps=20, eval_interval=5, strict=True)
    assert (code, summary["stop_reason"]) == (1, "bad_rows")
    assert [line["row"] for line in lines] == ["rows/rows.jsonl#7"]
    assert "--strict" in capsys.readouterr().err
    fine = write(tmp_path / "fine", 12)
    assert run(fine, tmp_path, "fine", strict=True)[0] == 0


@pytest.mark.parametrize("packing", [False, True])
def test_a_resume_counts_a_bad_row_once(tmp_path, packing):
    data = write(tmp_path / "rows", 60, missing={3, 33, 52}, long={9, 40})
    flags = {
        "max_training_steps": 6, "eval_interval": 6, "checkpoint_interval": 1, "log_interval": 2, "packing": packing,
        "lm_max_length": 128, "max_sample_length": 100, "gradient_accumulation_steps": 2, "max_bad_rows": 0.5,
    }  # fmt: skip

    class Killed(Exception):
        pass

    def kill(step):
        if step == 4:  # after a checkpoint of step 3, whose drops are not in the file yet
            raise Killed

    _, whole, lines = run(data, tmp_path, "whole", **flags)
    try:
        before_steps(kill)
        with pytest.raises(Killed):
            run(data, tmp_path, "parts", **flags)
    finally:
        train.set_learning_rate = schedule.set_learning_rate
    _, parts, again = run(data, tmp_path, "parts", **flags, resume="auto")
    assert parts["dropped"] == whole["dropped"]
    assert whole["dropped"]
    assert again == lines
    assert lines


@pytest.mark.slow
def test_the_bad_rows_of_two_processes_are_each_recorded_once(tmp_path):
    data = write(tmp_path / "rows", 40, missing={3, 8, 17, 26, 31})
    flags = {"batch_size": 2, "max_training_steps": 12, "gradient_accumulation_steps": 2, "eval_interval": 12}
    flags |= {"test_dataset_path": data, "max_bad_rows": 0.5, "num_workers": 0, "split_by": "row"}

    two = arguments(data, tmp_path, "two", **flags)
    few = arguments(data, tmp_path, "few", **flags | {"max_bad_rows": 1})
    said = run_together(2, [two, few], tmp_path, last_fails=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "two" / "dropped.jsonl").read_text().splitlines()]
    rows = [line["row"] for line in lines if line["split"] != "test"]
    assert sorted(rows) == [f"rows/rows.jsonl#{i}" for i in (17, 26, 3, 31, 8)]
    assert said.count("--max_bad_rows 1:") == 1  # rank 0 says it
    summary = json.loads((tmp_path / "out" / "few" / "summary.json").read_text())
    assert summary["stop_reason"] == "bad_rows"
    assert (tmp_path / "out" / "few" / "checkpoints" / "last").exists()


def records(count: int, reason: str = "no such file") -> list[dict]:
    return [{"split": "train"} | DropRecord(f"a#{i}", f"a, line {i}", reason, "x.png")._asdict() for i in range(count)]


def test_the_file_holds_so_many_of_each_reason_and_none_twice(tmp_path):
    log = RunLog(tmp_path, 1)
    log.record_drops(records(MAX_RECORDS + 10))
    state = log.state_dict()
    log.record_drops(records(3) + records(3, "no text"))
    lines = (tmp_path / "dropped.jsonl").read_text().splitlines()
    assert len(lines) == MAX_RECORDS + 3
    log.load_state_dict(state)  # cuts off what came later, and knows what is there
    log.record_drops(records(3) + records(2, "no text"))
    log.close()
    assert len((tmp_path / "dropped.jsonl").read_text().splitlines()) == MAX_RECORDS + 2
    counter = DropCounter({"no such file": 5000})
    counter.note(DropRecord(f"a#{i}", "a", "no such file", "") for i in range(5000))
    assert (len(counter.records), counter["no such file"]) == (MAX_RECORDS, 5000)


def test_names_of_rows_may_hold_any_letters(tmp_path, capsys):
    """A byte that is no UTF-8, and what ends a line for Python but not for JSON."""
    names = ["caf\udce9.jpg", *(f"a{letter}b.jpg" for letter in "\x85\u2028\u2029\n\r")]
    rows = [{"split": "train"} | DropRecord(name, name, "no such file", name)._asdict() for name in names]
    log = RunLog(tmp_path, 1)
    log.record_drops(rows)
    log.say(f"first in {names[0]}")
    assert r"first in caf\udce9.jpg" in capsys.readouterr().out
    state = log.state_dict()
    log.close()
    with (tmp_path / "dropped.jsonl").open("ab") as file:  # half a line, as of a full disk
        file.write('{"split": "train", "row": "ä'.encode()[:-1])
    state["bytes"]["dropped.jsonl"] = (tmp_path / "dropped.jsonl").stat().st_size
    again = RunLog(tmp_path, 1, resumes=True)
    again.load_state_dict(state)
    again.record_drops([*rows, *records(1)])
    again.close()
    lines = (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [*rows, *records(1)]


def test_a_line_of_the_file_that_is_not_json_is_passed_over(tmp_path):
    log = RunLog(tmp_path, 1)
    (tmp_path / "dropped.jsonl").write_text("half a li\n", encoding="utf-8")
    log.load_state_dict({"bytes": {"dropped.jsonl": 10}, "tracker_id": None})
    log.close()
    assert log.known_drops == {}


def test_a_file_of_rows_whose_name_is_no_utf8_trains_and_resumes(tmp_path, capsys):
    data = write(tmp_path / "rows", 40, missing={5})
    try:
        (data / "rows.jsonl").rename(data / "caf\udce9.jsonl")
    except OSError:
        pytest.skip("this file system has no such names")
    flags = {"max_training_steps": 10, "eval_interval": 10}
    code, _, lines = run(data, tmp_path, **flags)
    assert (code, [line["row"] for line in lines]) == (0, ["rows/caf\udce9.jsonl#5"])
    assert r"first in rows/caf\udce9.jsonl, line 6" in capsys.readouterr().out
    assert run(data, tmp_path, **flags | {"max_training_steps": 12}, resume="auto", resume_override=True)[::2] == (
        0,
        lines,
    )


@pytest.mark.parametrize(
    ("limit", "num_rows", "seen", "ends"),
    [
        (0.1, 10**6, [(32, 20), (500, 100)], False),  # 100 of the first 1,000 are allowed
        (0.1, 10**6, [(32, 20), (500, 101)], True),
        (0.1, 10**6, [(1001, 90), (5000, 5000)], False),  # the first ones have been judged
        (0.1, 20, [(20, 4)], False),  # a few rows
        (0.1, 20, [(19, 5)], True),
        (0.1, 60, [(60, 6)], False),
        (0.1, 60, [(60, 7)], True),
        (5, 100, [(100, 5), (200, 10)], False),  # a count is of one epoch
        (5, 100, [(50, 6)], True),
        (0, 100, [(50, 1)], True),
        (5, float("inf"), [(10**6, 6)], True),
    ],
)
def test_the_limit_is_a_share_of_the_first_rows_or_a_count(limit, num_rows, seen, ends):
    found = BadRowLimit(TrainConfig(max_bad_rows=limit), num_rows)
    for rows, bad in seen:
        if not found.is_over:
            found.judge(rows, bad, 0)
    assert (found.exceeded is not None, found.reason) == (ends, "bad_rows" if ends else None)


def test_turns_and_filtered_rows_are_not_bad_rows():
    counts = DropCounter({"too long": 3, "rating": 2, "turn: no text": 4, "no such file": 1, "not JSON": 1})
    assert (counts.bad_rows(), counts.rows()) == (2, 7)


def bad_rows_run(ranks: int, states: list[dict] | None = None) -> list[Data]:
    """All ranks of a run on ten rows, three of them bad, of which five bad ones are allowed."""
    rows = [row([b""] if i < 3 else None, name=f"row{i}") for i in range(10)]
    cfg = tiny_train(val_size=0, max_bad_rows=5, batch_size=1)
    found = [load_data(rows, tiny_vlm(), cfg, None, rank, ranks) for rank in range(ranks)]
    for data in found:
        if states:
            data.load_rank_states(states)
        data.start_reading()
    return found


def exceeds(ranks: list[Data]) -> bool:
    """What the first rank says, with the counts of all."""
    rows, bad = sum(one.rows_seen for one in ranks), sum(one.dropped["train"].bad_rows() for one in ranks)
    return ranks[0].has_too_many_bad_rows(lambda *own: [rows, bad, 0])


@pytest.mark.parametrize(("ranks", "later_ranks"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_resume_does_not_judge_the_rows_of_later_epochs(ranks, later_ranks, is_old):
    whole = bad_rows_run(ranks)
    for _ in range(40 // ranks):
        for data in whole:
            drawn(data, 1)
        assert not exceeds(whole)
    states = [data.state_dict() for data in whole]
    if is_old:  # checkpoints did not say it once
        states = [{key: value for key, value in one.items() if key != "bad_rows_judged"} for one in states]
    assert not exceeds(bad_rows_run(later_ranks, states))


def test_a_resume_judges_again_where_the_limit_was_exceeded_or_not_yet_judged():
    for judge_first in (True, False):
        data = bad_rows_run(1)[0]
        data.limit.cfg = TrainConfig(max_bad_rows=2)
        drawn(data, 12)
        assert not judge_first or exceeds([data])
        again = bad_rows_run(1, [data.state_dict()])[0]
        again.limit.cfg = TrainConfig(max_bad_rows=2)
        assert exceeds([again])


def test_a_reader_gives_up_after_whole_epochs_without_a_usable_row():
    """Not where an epoch ends with bad rows: it had others before."""
    good, bad = PreparedSample([([1], [1])], "a", {}), PreparedSample([], "b", {"no text": 1})

    def last_epochs(counter, *epochs):
        for rows in epochs:
            counter.see(rows)
            counter.end_epoch()

    tail = [good, *[bad] * (FRUITLESS + 1)]
    last_epochs(FruitlessCounter(), tail, tail, [], tail)
    last_epochs(FruitlessCounter(is_whole=False), tail[1:], tail)  # resumed in that tail
    for epochs in ([tail, tail[1:]], [[bad] * 30] * 10, [[]] * (FRUITLESS + 1)):
        with pytest.raises(ValueError, match=r"no rows|no text"):
            last_epochs(FruitlessCounter(), *epochs)
    with pytest.raises(ValueError, match="no text"):
        last_epochs(FruitlessCounter(is_whole=False), tail[1:], tail[1:])
