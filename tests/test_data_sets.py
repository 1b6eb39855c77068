"""Every public data set has a reader: three rows in its columns each, written for this test."""

import contextlib
import json
import random
from collections import Counter

import pytest
from tiny.anything import changed
from tiny.data import dataset, encoded, picture

from data.conversations import read_record
from data.molmo2_sets import BY_NAME, SETS
from data.options import RowOptions
from data.rows import load_rows
from data.values import BadRow, image_of

PNG = encoded(picture())
SHA = "ab" * 32
URL = "https://example.org/{}.jpg"


def linked(**more) -> list[dict]:
    return [{"image_url": URL.format(i)} | {key: value(i) for key, value in more.items()} for i in range(3)]


def inside(**more) -> list[dict]:
    return [{"image": {"bytes": PNG, "path": None}} | {key: value(i) for key, value in more.items()} for i in range(3)]


def youtube(**more) -> list[dict]:
    return [{"video_id": f"id{i}"} | {key: value(i) for key, value in more.items()} for i in range(3)]


def made(**more) -> list[dict]:
    return [{key: value(i) for key, value in more.items()} for i in range(3)]


def asks(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def llava(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def question(i: int) -> str:
    return f"What is {i}?"


def answer(i: int) -> str:
    return f"It is {i}."


PAIRS = {"question": ["a?", "b?"], "explanation": ["x", "y"], "answer": ["1", "2"]}
SUBTITLES = [{"start": 0, "end": 2.5, "text": "hello"}, {"start": 2.5, "end": 4, "text": "you"}]
COCO = made(
    image=lambda i: f"train2014/COCO_train2014_{i:012d}.jpg",
    message_list=lambda i: [{"question": "a?", "answers": ["1", "2", "2"]}, {"question": "b?", "answers": ["yes"]}],
)
TULU = made(
    id=lambda i: f"t{i}", messages=lambda i: asks(question(i), answer(i)), source=lambda i: "ai2/tulu",
    category=lambda i: "chat", first_message_qwen3_tokens=lambda i: 4, empty_messages=lambda i: False,
    has_special_token=lambda i: False,
)  # fmt: skip
TRAJECTORIES = [
    {"frame": 0, "time": 0.0, "points": [{"id": 4, "point": [100.0, 25.0], "occluded": False},
                                         {"id": 5, "point": [1.0, 1.0], "occluded": False}]},
    {"frame": 1, "time": 1 / 6, "points": [{"id": 4, "point": [110.0, 25.0], "occluded": False}]},
    {"frame": 3, "time": 0.5, "points": [{"id": 4, "point": [115.0, 25.0], "occluded": True}]},
    {"frame": 6, "time": 1.0, "points": [{"id": 4, "point": [120.0, 101.0], "occluded": False}]},
]  # fmt: skip
QA = {"question": question, "answer": answer}
VIDEO_CHOICE = {"Question": question, "Answer": answer, "NegativeAnswers": lambda i: ["x", "y"],
                "Category": lambda i: "action"}  # fmt: skip
# By set: its rows, and what the first of them is: (turns, how many pictures and videos).
ROWS = {
    "pixmo-cap": (
        linked(caption=lambda i: f"A red {i}.", transcripts=lambda i: ["so red", " ", "um it is red"]),
        [("", "A red 0."), ("transcript:", "so red")], (1, 0),
    ),
    "pixmo-ask-model-anything": (linked(image_sha256=lambda i: SHA, **QA), [("What is 0?", "It is 0.")], (1, 0)),
    "pixmo-cap-qa": (
        linked(question=lambda i: "[USER] a? [ASSISTANT] 1 [USER] b? [ASSISTANT]", answer=lambda i: "2"),
        [("a?", "1"), ("b?", "2")], (1, 0),
    ),
    "pixmo-point-explanations": (
        linked(question=question, parsed_response=lambda i: "Turn <|POINT|>, then press <|POINT|>.",
               alt_text=lambda i: ["a knob", "a key"], inline_text=lambda i: ["this knob", None],
               points=lambda i: [[{"x": 1.5, "y": 2.5}]]),
        [("What is 0?", "Turn this knob, then press a key.")], (1, 0),
    ),
    "pixmo-docs": (inside(questions=lambda i: {"question": ["a?", "b?"], "answer": ["1", "2"]}),
                   [("a?", "1"), ("b?", "2")], (1, 0)),
    "cosyn-400k": (inside(id=lambda i: f"c{i}", qa_pairs=lambda i: PAIRS), [("a?", "1"), ("b?", "2")], (1, 0)),
    "molmo2-cap": (
        youtube(video_start=lambda i: 1.0, video_end=lambda i: 9.5, video_caption=lambda i: "short",
                merged_caption=lambda i: "longer", video_frame_merged_caption=lambda i: "longest",
                annotation_score=lambda i: 0.9, clip_captions=lambda i: ["x"], frame_captions=lambda i: ["y"]),
        [("", "longest")], (0, 1),
    ),
    "molmo2-askmodelanything": (youtube(**QA), [("What is 0?", "It is 0.")], (0, 1)),
    "molmo2-videocapqa": (youtube(**VIDEO_CHOICE), [("What is 0?\nA. x\nB. y\nC. It is 0.", "C")], (0, 1)),
    "molmo2-videosubtitleqa": (
        youtube(subtitle=lambda i: SUBTITLES, AlignmentType=lambda i: "z", **VIDEO_CHOICE),
        [("What is 0?\nA. x\nB. y\nC. It is 0.", "C")], (0, 1),
    ),
    "molmo2-multiimageqa": (
        made(image_urls=lambda i: [URL.format(i), URL.format(9)], qa_pairs=lambda i: PAIRS),
        [("a?", "1"), ("b?", "2")], (2, 0),
    ),
    "molmo2-synmultiimageqa": (
        made(images=lambda i: [{"bytes": PNG, "path": None}] * 2, num_images=lambda i: 2,
             qa_pairs=lambda i: [{"question": "a?", "explanation": "x", "answer": "1"}]),
        [("a?", "1")], (2, 0),
    ),
    **dict.fromkeys(("molmo2-text-vqa", "molmo2-okvqa", "molmo2-vqa2-2014", "molmo2-tally-qa", "molmo2-a-ok-vqa"),
                    (COCO, [("a?", "2"), ("b?", "yes")], (1, 0))),
    "chartqa": (inside(query=question, label=lambda i: [f"{i}"], human_or_machine=lambda i: 0),
                [("What is 0?", "0")], (1, 0)),
    "docvqa": (
        inside(questionId=lambda i: f"{i}", question=question, question_types=lambda i: ["form"], docId=lambda i: i,
               answers=lambda i: ["1", "one"]),
        [("What is 0?", "1")], (1, 0),
    ),
    "llava-video-178k": (
        made(id=lambda i: f"v{i}", video=lambda i: f"academic/{i}.mp4", data_source=lambda i: "0_30_s",
             conversations=lambda i: llava("<image>\na?", "1", "b?", "2")),
        [("a?", "1"), ("b?", "2")], (0, 1),
    ),
    "molmo2-tulu4-classified": (TULU, [("What is 0?", "It is 0.")], (0, 0)),
    "tulu-3-sft-mixture": ([{key: row[key] for key in ("id", "messages", "source")} for row in TULU],
                           [("What is 0?", "It is 0.")], (0, 0)),
    "llava-instruct-150k": (
        made(id=lambda i: f"{i:012d}", image=lambda i: f"{i:012d}.jpg",
             conversations=lambda i: llava("<image>\na?", "1", "b?", "2")),
        [("a?", "1"), ("b?", "2")], (1, 0),
    ),
    "llava-instruct-mix-vsft": (
        made(images=lambda i: [{"bytes": PNG, "path": None}],
             messages=lambda i: [
                 {"role": "user", "content": [{"type": "text", "text": "a?", "index": None},
                                              {"type": "image", "text": None, "index": 0}]},
                 {"role": "assistant", "content": [{"type": "text", "text": "1", "index": None}]}]),
        [("a?", "1")], (1, 0),
    ),
    "pixmo-cap-images": (inside(caption=lambda i: "A red one."), [("", "A red one.")], (1, 0)),
    "pixmo-points": (
        linked(image_sha256=lambda i: SHA, points=lambda i: [{"x": 50.0, "y": 25.0}], count=lambda i: 1,
               label=lambda i: "cats", collection_method=lambda i: "pointing"),
        [("Point to cats.", '<points coords="1 1 500 250">cats</points>')], (1, 0),
    ),
    "pixmo-count": (linked(image_sha256=lambda i: SHA, count=lambda i: 3, label=lambda i: "cats"),
                    [("How many cats are there?", "3")], (1, 0)),
    "cosyn-point": (
        inside(questions=lambda i: ["a?"], answer_points=lambda i: [{"x": [50.0], "y": [25.0]}], names=lambda i: ["b"]),
        [("a?", '<points coords="1 1 500 250">b</points>')], (1, 0),
    ),
    "molmo2-videopoint": (
        youtube(video_source=lambda i: "youtube", question=lambda i: "How many?", label=lambda i: "cats",
                count=lambda i: 2, two_fps_timestamps=lambda i: [2.0, 3.5], raw_timestamps=lambda i: [2.1, 3.4],
                points=lambda i: [[{"x": 50.0, "y": 25.0}], [{"x": 0.0, "y": 100.0}]], clip_start=lambda i: 1.0,
                clip_end=lambda i: 9.0, annotator_unsure=lambda i: False, category=lambda i: "animal"),
        [("How many?", 'Counting the <points coords="1.0 1 500 250;2.5 2 000 1000">cats</points> shows a total of 2.')],
        (0, 1),
    ),
    "molmo2-track-instruction": (
        made(id=lambda i: f"t{i}", video=lambda i: "long", clip=lambda i: f"long_{i}", video_dataset=lambda i: "mose",
             expression=lambda i: "the cat", fps=lambda i: 6, sampling_fps=lambda i: 2, width=lambda i: 200,
             height=lambda i: 100, n_frames=lambda i: 9, start_frame=lambda i: 3, end_frame=lambda i: 11,
             mask_id=lambda i: ["4"], obj_id=lambda i: ["9"], frame_trajectories=lambda i: TRAJECTORIES),
        [("Track the cat.", '<tracks coords="0.0 1 500 250;1.0 1 600 1000">the cat</tracks>')], (0, 1),
    ),
    "molmo2-multiimagepoint": (
        made(image_urls=lambda i: [URL.format(n) for n in range(3)], image_sha256s=lambda i: [SHA] * 3,
             points=lambda i: [[{"x": 50.0, "y": 25.0}], [{"x": -0.5, "y": 7.0}, {"x": 9.0, "y": 8.0}], []],
             counts=lambda i: [1, 2, 0], labels=lambda i: ["cats", "Dogs", "Cats"],
             collection_method=lambda i: ["pointing", "counting", "pointing"]),
        [("Point to cats.", '<points coords="1 1 500 250">cats</points>'),
         ("How many Dogs are there?",
          'Counting the <points coords="2 1 000 070 2 090 080">Dogs</points> shows a total of 2.')], (3, 0),
    ),
    "molmo2-pixmo-multi-points": (
        made(images=lambda i: ["pixmo_images/a", "pixmo_images/b"], labels=lambda i: ["cats", "a cat"],
             normalized_labels=lambda i: ["cat", "cat"], points=lambda i: [[{"x": 1.0, "y": 2.0}]] * 2),
        [("How many cats are there?",
          'Counting the <points coords="1 1 010 020;2 2 010 020">cats</points> shows a total of 2.')], (2, 0),
    ),
    # The seed's own files.
    "local video pointing": (
        made(video_path=lambda i: f"{i}.mp4", query=lambda i: "cats",
             points=lambda i: [{"x": 0.5, "y": 0.25, "timestamp": 1.5, "object_id": 0}]),
        [("cats", '<points coords="1.5 1 500 250">cats</points>')], (0, 1),
    ),
    "local tracking": (
        made(video_path=lambda i: f"{i}.mp4", query=lambda i: "cats",
             tracks=lambda i: [{"x": 0.5, "y": 0.25, "timestamp": 1, "object_id": 7},
                               {"x": 0.6, "y": 0.25, "timestamp": 2, "object_id": 7}]),
        [("cats", '<tracks coords="1.0 1 500 250;2.0 1 600 250">cats</tracks>')], (0, 1),
    ),
    "local pointing": (made(image_path=lambda i: f"{i}.jpg", query=lambda i: "cats",
                            points=lambda i: [{"x": 0.5, "y": 0.25, "object_id": 0}]),
                       [("cats", '<points coords="1 1 500 250">cats</points>')], (1, 0)),
    "local counting": (made(image_path=lambda i: f"{i}.jpg", query=lambda i: "How many cats?", count=lambda i: 2),
                       [("How many cats?", "2")], (1, 0)),
    "local caption": (made(image_path=lambda i: f"{i}.jpg", caption=lambda i: "red"), [("", "red")], (1, 0)),
    "local VQA": (made(image_path=lambda i: f"{i}.jpg", **QA), [("What is 0?", "It is 0.")], (1, 0)),
    "local video caption": (
        made(video_path=lambda i: f"{i}.mp4", caption=lambda i: "red", subtitles=lambda i: SUBTITLES),
        [("", "red")], (0, 1),
    ),
    "local video QA": (made(video_path=lambda i: f"{i}.mp4", **QA), [("What is 0?", "It is 0.")], (0, 1)),
}  # fmt: skip
FORMATS = {"local caption": "captions", "local VQA": "questions and answers", "local video caption": "captions",
           "local video QA": "questions and answers", "local video pointing": "video points",
           "local tracking": "video tracks", "local pointing": "points", "local counting": "points"}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_rows_of_a_set_are_read(tmp_path, monkeypatch, name, kind):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records, turns, shown = ROWS[name]
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif "bytes" in str(records):
        pytest.skip("its pictures are in the rows, which are parquet")
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    rows = load_rows(str(path), options=RowOptions(fetch_images=True))  # it fetches when a picture is decoded
    read = [rows[i] | {"id": i} for i in range(len(rows))]
    assert [row.get("bad") for row in read] == [None] * 3
    expected = BY_NAME[name].format if name in BY_NAME else FORMATS[name]
    assert {row["format"] for row in read} == {expected}
    assert [(turn["user"], turn["assistant"]) for turn in read[0]["texts"]] == turns
    assert {(len(row["images"]), len(row.get("videos", []))) for row in read} == {shown}
    if shown[1]:
        assert read[1]["videos"][0].startswith(f"{tmp_path}/")


def test_every_set_of_the_table_has_such_rows():
    assert {one.name for one in SETS} - set(ROWS) == {"pixmo-cap-tiny"}
    assert BY_NAME["pixmo-cap-tiny"].format == BY_NAME["pixmo-cap"].format


@pytest.fixture
def read(tmp_path):
    def one(record: dict) -> dict:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "!"}) + "\n" + json.dumps(record))
        return load_rows(str(tmp_path / "rows.jsonl"))[1]

    return one


def test_a_video_row_says_which_seconds_and_what_is_spoken(read, tmp_path):
    row = read({"video_id": "a b", "Question": "q", "Answer": "a", "clip_start": 3, "video_end": 4.5,
                "subtitle": {"start": [0, 1], "end": [1, 2.5], "text": ["so", None]}})  # fmt: skip
    assert row["videos"] == [str(tmp_path / "a b.mp4")]
    assert (row["clip_start"], row["clip_end"]) == (3.0, 4.5)
    assert row["subtitles"] == [{"start": 0.0, "end": 1.0, "text": "so"}, {"start": 1.0, "end": 2.5, "text": ""}]
    found = read({"video_id": "x", "qa_list": [{"Question": "a?", "Answer": 1}, {"Question": "b?", "Answer": "2"}]})
    assert [(turn["user"], turn["assistant"]) for turn in found["texts"]] == [("a?", "1"), ("b?", "2")]
    assert (found["videos"], found["format"]) == ([str(tmp_path / "x.mp4")], "video question pairs")


def test_the_right_choice_stands_at_any_place_and_always_at_the_same(read):
    record = {"video_id": "x", "Answer": "a", "NegativeAnswers": ["b", "a", "c", "d"]}
    places = [read(record | {"Question": f"q{i}"})["texts"][0]["assistant"] for i in range(40)]
    assert set(places) == set("ABCD")
    assert places[:5] == [read(record | {"Question": f"q{i}"})["texts"][0]["assistant"] for i in range(5)]


def test_answers_of_a_turn_are_all_kept(read):
    row = read({"image": "a.png", "message_list": [{"question": "a?", "answers": ["1", "2", "2"], "style": "vqa2"}]})
    assert row["texts"] == [{"user": "a?", "assistant": "2", "source": "vqa2", "answers": ["2", "1"]}]


TRACKED = {"video": "a", "video_dataset": "mose", "expression": "the cat", "width": 200, "height": 100,
           "frame_trajectories": TRAJECTORIES}  # fmt: skip


def test_a_track_is_what_its_task_asks(read, tmp_path):
    row = read(TRACKED | {"task": "ground", "sampling_fps": 1})
    assert row["videos"] == [str(tmp_path / "mose/a.mp4")]
    assert [(turn["user"], turn["assistant"]) for turn in row["texts"]] == [
        ("Point to where the cat first and last appears.",
         '<tracks coords="0.0 1 005 010 2 500 250;1.0 2 600 1000">the cat</tracks>')
    ]  # fmt: skip
    [turn] = read(TRACKED | {"task": "single_point_track", "sampling_fps": 1})["texts"]
    assert turn["user"] == 'Track this point: <points coords="0.0 1 500 250">the cat</points> at 1 FPS.'
    assert turn["assistant"] == '<tracks coords="0.0 1 500 250;1.0 1 600 1000">the cat</tracks>'
    [turn] = read(TRACKED | {"frame_trajectories": []})["texts"]
    assert turn["assistant"] == "There are none."


def test_a_label_without_a_method_is_pointed_to_or_counted_always_in_the_same_way(read):
    record = {"images": ["a.png", "b.png"], "points": [[], [{"x": 1, "y": 2}]]}
    labels = [{"labels": [f"l{n}"] * 2, "normalized_labels": [f"l{n}"] * 2} for n in range(12)]
    asked = [read(record | one)["texts"][0]["user"].split()[0] for one in labels]
    assert set(asked) == {"How", "Point"}
    assert asked == [read(record | one)["texts"][0]["user"].split()[0] for one in labels]
    assert {one["format"] for one in [read(record | labels[0])]} == {"multi-image points"}


SEVERAL = {"images": ["a.png", "b.png"], "labels": ["x", "x"], "points": [[{"x": 1, "y": 2}], []], "counts": [1, 0]}
POINTED = {"video_id": "x", "label": "cats", "question": "How many?", "count": 3, "two_fps_timestamps": [1.0, 2.5],
           "points": [[{"x": 50, "y": 20}, {"x": 10, "y": 5}], [{"x": 0, "y": 100}]]}  # fmt: skip
TIMED = {"video_path": "a.mp4", "query": "the cat"}
CLIP = TIMED | {"clip_start": 60, "clip_end": 75.5}
SPOT = {"x": 0.5, "y": 0.25, "timestamp": 61, "object_id": 7}
CHAIN = {"image_url": URL.format(1), "answer": "2"}
EXPLAINED = {"image_url": URL.format(1), "question": "?", "inline_text": ["x"]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (CHAIN | {"question": "[USER] a? [USER] b?"}, "a chain in which somebody speaks twice"),
        (CHAIN | {"question": "[ASSISTANT] 1"}, "a chain in which somebody speaks twice"),
        (EXPLAINED | {"parsed_response": "no mark"}, "another number of <|POINT|> than of names"),
        ({"image": "a.png", "qa_pairs": {"question": ["a"], "answer": []}}, "qa_pairs has lists of several lengths"),
        ({"image": "a.png", "message_list": [3]}, "an element of message_list is a number"),
        ({"video_id": "../x", "question": "a", "answer": "b"}, "video_id is no name"),
        ({"video_id": 3, "question": "a", "answer": "b", "clip_start": "1"}, "clip_start is no number of seconds"),
        ({"video": "a.mp4", "caption": "b", "clip_start": 2, "clip_end": 2}, "clip_end is not after clip_start"),
        ({"video": "a.mp4", "caption": "b", "subtitles": "so"}, "subtitles is a string"),
        ({"video": "https://x.y/a.mp4", "caption": "b"}, "video is a URL, which is not fetched"),
        (POINTED | {"clip_start": 3}, "a point before the clip begins"),
        (POINTED | {"count": 4}, "count is not the number of points"),
        (POINTED | {"two_fps_timestamps": [1]}, "another number of times than of lists of points"),
        (TRACKED | {"clip": "../b"}, "clip is no name"),
        (TRACKED | {"task": "guess"}, "task is not known"),
        (TRACKED | {"width": None}, "width is no number above 0"),
        (TRACKED | {"task": "single_point_track", "mask_id": ["7"]}, "a point to track that is never seen"),
        (SEVERAL | {"counts": [2, 0]}, "count is not the number of points"),
        (SEVERAL | {"labels": ["x"]}, "another number of labels than of lists of points"),
        (SEVERAL | {"images": ["a.png"], "points": [[], [{"x": 1, "y": 2}]], "counts": [0, 1]},
         "a point in a picture that is not there"),
        (TIMED | {"points": [{"x": 0.5, "y": 0.5}]}, "a point of a video without a timestamp"),
        (TIMED | {"points": [{"x": 5, "y": 0.5, "timestamp": 1}]}, "a point lies outside 0-1"),
        (TIMED | {"tracks": [], "points_unit": "pixels"}, "points_unit is not known"),
        (CLIP | {"points": [SPOT | {"timestamp": 59.5}]}, "a point before the clip begins"),
        (CLIP | {"tracks": [SPOT | {"timestamp": 76}]}, "a point after the clip ends"),
        (CLIP | {"points": [SPOT], "count": 2}, "count is not the number of points"),
        (CLIP | {"points": [SPOT], "count": "one"}, "count is not the number of points"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_row_is_its_reason(read, record, reason):
    assert str(read(record)["bad"]) == reason


def test_own_points_of_a_clip_have_its_clock_and_may_be_counted(read):
    def answer(**more) -> str:
        return read(CLIP | more)["texts"][0]["assistant"]

    pointed = '<points coords="1.0 1 500 250">the cat</points>'
    assert answer(points=[SPOT]) == pointed
    assert answer(points=[SPOT], clip_start=None) == pointed.replace("1.0 1", "61.0 1")
    for count in (1, 1.0, "1"):  # as JSON, a column with gaps and CSV have it
        assert answer(points=[SPOT], count=count) == f"Counting the {pointed} shows a total of 1."
    assert answer(points=[], count=0) == "There are none."
    later = SPOT | {"timestamp": 75.5}
    assert answer(tracks=[SPOT, later]) == '<tracks coords="1.0 1 500 250;15.5 1 500 250">the cat</tracks>'


def test_any_value_at_any_place_is_read_or_counted(tmp_path):
    rng = random.Random(0)
    plain = [record for records, _, _ in ROWS.values() for record in records if "bytes" not in str(record)]
    records = [changed(rng.choice(plain), rng) for _ in range(4000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{"question": "?", "answer": "!"}, *records])))
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    kinds = Counter(str(rows[i].get("bad")) for i in range(len(rows)))
    assert len(rows) == 4001
    assert kinds["None"] > 1000
    assert 30 < len(kinds) < 200
    for record in filter(lambda one: isinstance(one, dict), records):  # numbers as parquet has them
        with contextlib.suppress(BadRow):
            assert read_record(record, None)["format"]


def test_a_row_with_a_video_is_not_trained_as_text(read):
    sample = dataset([read({"video": "a.mp4", "question": "what is the shape?", "answer": "red"})])[0, 0]
    assert list(sample.dropped) == ["no such file"]


def test_a_picture_under_another_key_is_one(read, tmp_path):
    for key in ("image_path", "image_url"):
        assert read({key: "a.png", "question": "?", "answer": "!"})["images"] == [image_of("a.png", tmp_path)]
