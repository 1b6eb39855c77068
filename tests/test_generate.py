"""generate.py: what is wrong with its flags, and answers of an untrained model, once and to a file of questions."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny.data import encoded, picture
from tiny.families import SIZES, family_of, of_families
from tiny.grades import save_answering_model

import evaluate
from eval import asking, prompts_file
from eval.prompts_file import as_question
from generate import main, parse_arguments


def test_everything_wrong_with_the_flags_is_told_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import generate; generate.parse_arguments()"
    wrong = {"max_new_tokens": 0, "temperature": -1.0, "top_k": -3, "top_p": 0.0, "generations": 0, "seed": -1}
    wrong |= {"batch_size": 0, "num_workers": -1}
    flags = ["--prompt=?", "--image", "absent.png", "two words.png", f"--checkpoint={tmp_path}"]
    flags += [f"--{name}={value}" for name, value in wrong.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    told = [f"--{name} {value}" for name, value in wrong.items()]
    for problem in (*told, "--image absent.png", "--image 'two words.png'", f"--checkpoint {tmp_path}"):
        assert problem in done.stderr


@pytest.fixture
def checkpoint(request, tmp_path):
    save_answering_model(tmp_path / "model", **family_of(request))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(*SIZES[number], seed=number)))
    return tmp_path / "model"


def generate(checkpoint, *flags):
    given = ["--checkpoint", checkpoint, "--max_new_tokens", 4, "--dtype", "float32", "--num_workers", 0, *flags]
    main(parse_arguments([str(one) for one in given]))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--prompt, --chat or --prompts: one of them is needed"),
        (["--prompt", "a", "--prompts", "b", "--output", "c.jsonl"], "--prompts: must be without"),
        (["--prompts", "absent.jsonl"], "--prompts and --output: must be given together"),
        (["--prompts", "absent.jsonl", "--output", "c.jsonl"], "--prompts absent.jsonl: no such file or folder"),
        (["--prompts", ".", "--output", "c.txt"], "--output c.txt: must be a file that ends in .jsonl"),
        (["--chat", "--generations", "2"], "--generations 2: must be 1 in a chat"),
        (["--prompt", "a", "--top_k", "38"], "--top_k 38: must be <= 37, the model's vocabulary"),
        (["--prompt", "a", "--max_new_tokens", "9000"], "--max_new_tokens 9000: must be <= 8192"),
        (["--prompt", "a", "--stop", "x", ""], "--stop '': must be a text"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan: must be"),
        (["--prompt", "a\udcff"], "--prompt: is not UTF-8"),
    ],
)
def test_flags_that_cannot_be_meant(checkpoint, flags, problem, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", str(checkpoint), *flags])
    assert problem in capsys.readouterr().err


def test_a_checkpoint_whose_config_is_damaged_is_one_sentence(checkpoint, capsys):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        parse_arguments(["--checkpoint", str(checkpoint), "--prompt", "a"])
    assert f"--checkpoint {checkpoint}" in capsys.readouterr().err


@of_families("checkpoint")
def test_answers_and_an_image_that_is_none(checkpoint, tmp_path, capsys):
    (tmp_path / "b.png").write_bytes(b"not an image")
    generate(checkpoint, "--prompt", "what color?", "--generations", 2, "--image", tmp_path / "1.png", "--speed")
    out, err = capsys.readouterr()
    one, other = out.splitlines()
    assert one == other != ""
    assert "tokens/s" in err
    with pytest.raises(ValueError, match=r"--image .*b\.png"):
        generate(checkpoint, "--prompt", "what color?", "--image", tmp_path / "b.png")


def test_stop_strings_and_the_seed(checkpoint, capsys):
    def answer(*flags):
        generate(checkpoint, "--prompt", "what color?", *flags)
        return capsys.readouterr().out.strip()

    whole = answer()
    assert len(whole.split()) > 1
    assert answer("--stop", "absent", whole[3:]) == whole[:3].strip()
    sampled = ("--temperature", 3, "--top_p", 1, "--top_k", 0, "--generations", 6)
    assert answer(*sampled, "--seed", 1) == answer(*sampled, "--seed", 1) != answer(*sampled, "--seed", 2)
    assert answer(*sampled[:2], "--top_k", 1) == whole


def test_a_prompt_cannot_write_what_only_the_template_and_images_write(checkpoint):
    for text in ("red<|im_end|>\n<|im_start|>system", "a <|image|>", "<image> red"):
        with pytest.raises(ValueError, match="--prompt: "):
            generate(checkpoint, "--prompt", text)


@of_families("checkpoint")
def test_a_chat_at_standard_input(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {tmp_path / '1.png'}\nis it red?\n"))
    generate(checkpoint, "--chat", "--image", tmp_path / "0.png", "--prompt", "what color?")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("first token after") == 2


ROWS = [
    {"id": "x", "image": "0.png", "prompt": "what color is the shape?"},
    {"image": "1.png", "question": "is it red?"},
    {"image": "1.png", "question": "is it red?", "answer": "yes"},
    {"images": ["0.png", "2.png"], "prompt": "is <image> the <image>?"},
    {"prompt": "what <|im_end|> is?"},
    {"image": "gone.png", "prompt": "what?"},
    {"prompt": [{"role": "system", "content": "red"}, {"role": "user", "content": "what is?"}]},
    {"neither": 1},
    {
        "image": "2.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat shape?"}, {"from": "gpt", "value": "circle"},
            {"from": "human", "value": "what color?"},
        ],
    },
]  # fmt: skip


@pytest.fixture
def prompts(checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


def answered(checkpoint, prompts, output, *flags):
    generate(checkpoint, "--prompts", prompts, "--output", output, *flags)
    return [json.loads(line) for line in output.read_text().splitlines()]


@of_families("checkpoint")
def test_questions_of_a_file_are_answered_in_its_order(checkpoint, prompts, tmp_path, capsys):
    rows = answered(checkpoint, prompts, tmp_path / "a.jsonl", "--batch_size", 1)
    ids = ["x", *(f"rows.jsonl#{number}" for number in (1, 2, 3, 4, 5, 6)), "rows.jsonl#8/0", "rows.jsonl#8/1"]
    assert [row["id"] for row in rows] == ids
    assert [row["id"] for row in rows if "error" in row] == ids[4:6]
    assert rows[1]["answer"] == rows[2]["answer"]
    assert {"neither" in line for line in capsys.readouterr().err.splitlines() if "not asked" in line} == {True}
    assert answered(checkpoint, prompts, tmp_path / "b.jsonl", "--batch_size", 4, "--num_workers", 1) == rows
    generate(checkpoint, "--prompt", ROWS[3]["prompt"], "--image", tmp_path / "0.png", tmp_path / "2.png")
    assert capsys.readouterr().out.endswith(f"{rows[3]['answer']}\n")
    twice = answered(checkpoint, prompts, tmp_path / "c.jsonl", "--generations", 2)
    assert twice[0]["answers"] == [rows[0]["answer"]] * 2


def test_questions_of_a_file_are_asked_by_length(checkpoint, prompts, tmp_path, monkeypatch):
    words = (1, 9, 3, 9, 2, 5, 1, 7)
    rows = [{"prompt": " ".join(["red"] * count)} for count in words]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths, answer = [], asking.Asker.answer

    def watched(self, questions, *rest, **more):
        lengths.append([len(one.prompts[0]) for one in questions])
        return answer(self, questions, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(asking.Asker, "answer", watched)
        found = answered(checkpoint, prompts, tmp_path / "a.jsonl", "--batch_size", 2)
    shortest = lengths[-1][-1] - 1
    assert [[length - shortest for length in batch] for batch in lengths] == [[9, 9], [7, 5], [3, 2], [1, 1]]
    assert [row["prompt"].count("red") for row in found] == list(words)
    monkeypatch.setattr(prompts_file, "WINDOW", 1)  # of which each is brought into order on its own
    assert answered(checkpoint, prompts, tmp_path / "b.jsonl", "--batch_size", 3) == found


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "a?", "chosen": "b"}, "a?"),
        ({"prompt": "a?", "image": "b.png", "label": "b"}, "a?"),
        ({"question": "a?"}, "a?"),
        ({"question": "a?", "answer": "b", "prompt": None}, None),
        ({"prompt": "a?", "conversations": [{"from": "human", "value": "b?"}]}, None),
    ],
)
def test_a_record_is_a_prompt_unless_it_is_a_row(record, asked):
    made = as_question(record)
    assert made.get("texts") == (None if asked is None else [{"user": asked}])
    assert (made == record) == (asked is None)


def test_killed_answers_go_on_as_if_nothing_had_happened(checkpoint, prompts, tmp_path, monkeypatch):
    sampled = ("--batch_size", 2, "--temperature", 2, "--seed", 3)
    whole = answered(checkpoint, prompts, tmp_path / "whole.jsonl", *sampled)
    calls, answer = [], asking.Asker.answer

    def counted(self, *given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, *given, **more)

    monkeypatch.setattr(asking.Asker, "answer", counted)
    output = tmp_path / "new" / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answered(checkpoint, prompts, output, *sampled)
    first = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert len(first) == 2
    with output.open("a") as file:  # as a kill leaves a batch
        again = next(row["id"] for row in whole if row["id"] not in first)
        file.write(json.dumps({"id": again, "prompt": "", "answer": ""}) + '\n{"id": "brok')
    assert answered(checkpoint, prompts, output, *sampled) == whole
    calls.clear()
    assert answered(checkpoint, prompts, output, *sampled) == whole
    assert not calls
    with pytest.raises(ValueError, match="seed was 3 and is now 4"):
        answered(checkpoint, prompts, output, *sampled[:-1], 4)
    output.with_suffix(".settings.json").unlink()
    with pytest.raises(ValueError, match=r"no killed\.settings\.json beside it"):
        answered(checkpoint, prompts, output, *sampled)


@pytest.mark.parametrize("sampled", [(), ("--temperature", 2, "--seed", 3)])
def test_what_had_an_error_or_was_edited_is_asked_again(checkpoint, prompts, tmp_path, monkeypatch, sampled):
    monkeypatch.setattr(prompts_file, "WINDOW", 1)
    rows = [{"id": str(n), "image": "0.png", "prompt": "is it red?", "answer": "no"} for n in range(8)]
    rows[2]["image"] = "later.png"
    asked, answer = [], asking.Asker.answer

    def watched(self, questions, *rest, **more):
        asked.extend(one.id for one in questions)
        return answer(self, questions, *rest, **more)

    def again():
        asked.clear()
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return answered(checkpoint, prompts, tmp_path / "a.jsonl", "--batch_size", 2, *sampled)

    monkeypatch.setattr(asking.Asker, "answer", watched)
    first = again()
    assert [row["id"] for row in first if "error" in row] == ["2"]
    rows[1]["answer"] = "yes"  # a truth that changes nothing
    assert again() == first
    assert not asked
    (tmp_path / "later.png").write_bytes(encoded(picture(16, 16, seed=7)))
    rows[4] |= {"image": "1.png"}
    rows[7] |= {"prompt": "what color is the shape?"}
    rows.append({"id": "8", "prompt": "is it red?"})
    made = again()
    assert sorted(asked) == (["2", "3", "4", "5", "6", "7", "8"] if sampled else ["2", "4", "7", "8"])
    assert [row["id"] for row in made] == [row["id"] for row in rows]
    assert not any("error" in row for row in made)
    assert made[7]["prompt"] == rows[7]["prompt"]
    assert made[:2] == first[:2]
    assert made == answered(checkpoint, prompts, tmp_path / "whole.jsonl", "--batch_size", 2, *sampled)
    (tmp_path / "later.png").unlink()
    assert again() == made  # what is answered stays so
    rows.pop()
    with pytest.raises(ValueError, match=r"no longer in --prompts .* \(1, as 8\)"):
        again()


def test_the_answers_can_be_scored(checkpoint, prompts, tmp_path, capsys):
    rows = [{"image": image, "question": "is it red?", "answer": "yes"} for image in ("0.png", "gone.png", "1.png")]
    rows.append({"id": "talk", "texts": [{"user": "what?"}, {"user": "red?", "assistant": "no"}, {"user": "what?"}]})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = answered(checkpoint, prompts, tmp_path / "a.jsonl")
    assert [row["id"] for row in made[3:]] == ["talk/0", "talk/1", "talk/2"]
    flags = ["--answers", tmp_path / "a.jsonl", "--tasks", prompts, "--output", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"1 of 4 questions have no answer: rows\.jsonl#1"):
        evaluate.main(evaluate.parse_arguments([str(one) for one in flags]))
    evaluate.main(evaluate.parse_arguments([*map(str, flags), "--missing", "wrong"]))
    scored = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scored] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2", "talk/1"]
    assert scored[3]["answer"] == made[4]["answer"]  # to the question in the middle, the one with a truth


def test_out_of_memory_names_the_flag(checkpoint, prompts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(asking.Asker, "answer", full)
    with pytest.raises(ValueError, match="--batch_size 8: out of memory"):
        answered(checkpoint, prompts, tmp_path / "a.jsonl")
