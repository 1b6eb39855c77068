"""Sample questions: which ones, their answers over time, and the page."""

import json

import pytest
import torch
from tiny.data import dataset, encoded, picture, row, stream, tiny_vlm, turn
from tiny.pages import Page
from tiny.runs import arguments, state
from tiny.video import write_clip

import train
from eval.samples import SampleQuestions, choose
from training.arguments import parse_arguments
from training.logging import RunLog

ROWS = [
    row([encoded(picture(seed=i))], [turn("what?", "red", "color"), turn("is it red?", "yes", "yes_no")], f"rows#{i}")
    for i in range(30)
]


def chosen(rows, count: int, seed: int = 0):
    return choose(dataset(rows, tiny_vlm(), train=False), count, seed)


def test_questions_are_spread_over_sources_and_rows():
    found = chosen(ROWS, 6)
    assert [one.source for one in found] == ["color"] * 3 + ["yes_no"] * 3
    assert len({one.id.split("/")[0] for one in found}) == 6
    assert {one.text for one in found} == {"what?", "is it red?"}
    assert [one.id for one in found] == [one.id for one in chosen(ROWS, 6)] != [one.id for one in chosen(ROWS, 6, 1)]
    for one in found:
        assert one.truth == {"what?": "red", "is it red?": "yes"}[one.text]
        assert len(one.asked.prompts) == len(one.asked.answers) == 1
        assert one.picture.shape == (16, 16, 3)


def test_rows_that_cannot_be_asked_are_none_of_them_and_a_stream_gives_its_first():
    bad = [row([b"no image"], name=f"rows#{i}") for i in range(5)]
    assert [one.id for one in chosen([*bad, ROWS[0]], 4)] == ["rows#0/0", "rows#0/1"]
    assert chosen(bad, 4) == []
    assert len(chosen(stream(5), 2)) == 2


@pytest.fixture
def samples():
    questions = chosen(ROWS, 2)
    found = SampleQuestions(questions, None, 4, 8)
    found.add(10, ["red", "<b>no</b>"])
    found.add(20, ["blue", "yes."])
    return found


def test_the_page_holds_answers_verdicts_and_what_froze(samples):
    freezes = [(12, "vision", False), (15, "vision", False), (15, "language", False), (18, "vision", True)]
    page = samples.page("a run", freezes)
    assert page.count('class="answer right') == 2
    assert page.count('class="answer wrong') == 2
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert not any(word in page for word in ("<script", "http://", "https://"))
    for words in (
        "2 vision matrices froze, steps 12 to 15", "1 language matrix froze, step 15",
        "1 vision matrix trains again, step 18", "step 10: 1 of 2 right; step 20: 1 of 2 right",
    ):  # fmt: skip
        assert words in page
    assert page.count(' class="froze"') == 1  # the head of step 20
    assert "not asked yet" in SampleQuestions(samples.questions, None, 4, 8).page("a run", [])


def test_videos_and_the_points_of_the_last_answer_are_on_the_page(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 31)
    video = {"videos": [str(path)], "video_numbers": [0], "images": []}
    texts = [turn("what?", "red")]
    pointed = row([encoded(picture())], [turn("what?", '<points coords="1 1 500 500">red</points>')], "rows#1")
    found = SampleQuestions(chosen([row([], texts) | video, pointed], 2), None, 4, 8)
    found.add(10, ["red", '<points coords="1 1 100 100">red</points>'])
    found.add(20, ["red", '<points coords="1 1 100 100;2 2 500 500">red</points>'])
    page = Page(found.page("a run", []))
    assert page.of("figcaption") == [f"{second / 2:.1f} s" for second in range(7)]
    assert len(page.references) == 8
    assert {" expected: 1", " answer: 1", ", 1 elsewhere"} <= {text for _, text in page.texts}
    assert [one.picture.shape for one in found.questions] == [(48, 64, 3), (16, 16, 3)]


def test_answers_are_kept_by_question(samples):
    again = SampleQuestions(samples.questions[:1] + chosen(ROWS, 2, 1), None, 4, 8)
    again.load_state_dict(json.loads(json.dumps(samples.state_dict()), object_hook=with_steps))
    assert again.answer(again.questions[0], 10) == ("red", True)
    columns, rows = again.table()
    assert columns == ["picture", "question", "source", "expected", "step 10", "step 20"]
    assert rows[0][1:] == ["what?", "color", "red", "red", "blue"]
    if again.questions[1].id not in samples.answers:
        assert rows[1][-2:] == [None, None]
        assert ">–</td>" in again.page("a run", [])


def with_steps(known: dict) -> dict:
    return {int(key) if key.isdecimal() else key: value for key, value in known.items()}


def test_a_run_writes_the_page_and_a_resumed_one_continues_it(data, tmp_path, monkeypatch):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    flags = {"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e-9, "alpha": 0.3, "keep_checkpoints": 9}
    flags["sample_questions"] = 3
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    folder = tmp_path / "out" / "run"
    page = (folder / "samples.html").read_text(encoding="utf-8")
    assert ("step 4</th>" in page, "step 8</th>" in page, page.count("<tr>")) == (True, True, 4)
    assert "froze" in page
    before = folder / "checkpoints" / "step_00000004"  # which is saved before its evaluation
    assert state(folder, before.name)["states"]["samples"] == {"answers": {}}
    other = tmp_path / "out" / "other"
    assert train.main(parse_arguments(arguments(data, tmp_path, "other", **flags, resume=before))) == 0
    assert (other / "samples.html").read_text(encoding="utf-8") == page.replace("of run", "of other")
    assert train.main(parse_arguments(arguments(data, tmp_path, "none", sample_questions=0))) == 0
    assert not (tmp_path / "out" / "none" / "samples.html").exists()


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, 1)
    (tmp_path / "samples.html").mkdir()
    log.write_page("samples.html", "")
    assert "samples.html could not be written" in capsys.readouterr().out


def test_answers_come_in_batches_and_leave_the_random_numbers():
    class Asker:
        model = torch.nn.Linear(1, 1)
        sizes: tuple[int, ...] = ()

        def answer(self, questions, max_new_tokens):
            self.sizes += (len(questions),)
            return ["red"] * len(questions)

    asker = Asker()
    asked = SampleQuestions(chosen(ROWS, 5), asker, 4, 2)
    before = torch.get_rng_state()
    assert asked.ask() == ["red"] * 5
    assert asker.sizes == (2, 2, 1)
    assert torch.equal(torch.get_rng_state(), before)
