"""Rows with videos: where the frames and their times stand, in training, at evaluation and in generate.py."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny.data import byte_level_tokenizer, dataset, encoded, picture, tiny_train, tiny_vlm
from tiny.families import family_of, of_families
from tiny.grades import save_answering_model
from tiny.video import write_clip

import evaluate
from data import frames, video
from data.collators import TrainCollator
from data.formats import Part
from data.frames import subtitle_text
from data.video_frames import BROKEN, OUTSIDE
from eval.asking import Asker
from generate import main, parse_arguments

IMAGE = "<|image|>"
SLOTS = IMAGE * 4


class Table:
    """Records as a file has them."""

    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def record(self, number):
        return self.records[number]

    def place(self, number):
        return f"line {number + 1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", 11)
    write_clip(folder / "b.mp4", 1)
    data = write_clip(folder / "cut.mkv", 28).read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) * 55 // 100])
    (folder / "p.png").write_bytes(encoded(picture()))
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """With a tokenizer that knows every letter, so that a prompt can be read back."""
    where = tmp_path_factory.mktemp("tokenizer")
    size = byte_level_tokenizer(where)
    return tiny_vlm(
        lm_tokenizer=str(where), lm_base_vocab_size=size, max_img_size=16, vlm_extra_tokens={"image_token": IMAGE}
    )


def sample_of(record, folder, vlm, **settings):
    data = dataset([], vlm, tiny_train(**settings))
    read = Part("rows", Table(record), folder=folder)[0]
    return data, read, data.sample(read)


def asked(data, sample, conversation: int = 0) -> str:
    """What the user says in a conversation, as text with image tokens."""
    text = data.tokenizer.decode(sample.conversations[conversation][0])
    return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


FRAMES = f"0.0 {SLOTS} 0.5 {SLOTS} 1.0 {SLOTS}"


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("what?", f"{FRAMES}what?"),
        ("<video>\nwhat?", f"{FRAMES}what?"),
        ("what?<video>", f"{FRAMES}what?"),
        ("is <video> it?", f"is {FRAMES} it?"),
        ("the \\<video>?", f"{FRAMES}the <video>?"),
    ],
)
def test_a_video_becomes_frames_with_their_times(folder, vlm, question, text):
    data, _, sample = sample_of({"video": "a.mp4", "question": question, "answer": "red"}, folder, vlm)
    assert not sample.dropped
    assert asked(data, sample) == text
    assert sample.images.shape == (3, 3, 16, 16)
    assert torch.equal(sample.images, video.decoded(video.sampled(folder / "a.mp4", 16), 16)[0])
    batch = TrainCollator(0, vlm)([sample])
    assert len(batch["image_slots"]) == 3 * vlm.mp_image_token_length


def test_subtitles_and_a_clip_of_the_video(folder, vlm):
    said = [{"start": 0, "end": 0.5, "text": "no"}, {"start": 0.6, "end": 3, "text": "the shape"}]
    record = {"video": "a.mp4", "question": "what?", "answer": "red", "subtitles": said, "clip_start": 0.6}
    data, _, sample = sample_of(record, folder, vlm)
    assert asked(data, sample) == f"0.0 {SLOTS} 0.4 {SLOTS}subtitle\n0.0 - 2.4 the shape\nwhat?"
    assert subtitle_text([{"start": 0, "end": 2.5, "text": "words"}]) == "subtitle\n0.0 - 2.5 words\n"
    assert subtitle_text(said, 5, 6) == ""
    record["subtitles"] = [{"start": 0.6, "end": 3, "text": f"the {IMAGE}"}]
    assert list(sample_of(record, folder, vlm)[2].dropped) == ["image token in text"]


def test_images_and_videos_stand_where_the_text_says(folder, vlm):
    shown = {"images": ["p.png"], "videos": ["b.mp4", "a.mp4"]}
    texts = [{"user": "a <video> b <image>", "assistant": "c"}, {"user": "d <video>", "assistant": "e"}]
    data, read, sample = sample_of(shown | {"texts": texts}, folder, vlm, turns_per_image=2)
    assert read["video_numbers"] == [0, 2]
    first = f"a 0.0 {SLOTS} b {SLOTS}"
    assert asked(data, sample, 0) in (first, f"0.0 {SLOTS}{SLOTS}{FRAMES}d")
    one = dataset([read], vlm, tiny_train(), train=False).questions(0)
    prompts = [data.tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0] for ids in one.prompts]
    assert prompts == [first, f"0.0 {SLOTS}{SLOTS}{FRAMES}d"]
    assert torch.equal(one.images, sample.images)
    assert torch.equal(one.images[1], dataset([], vlm).image_processor(folder / "p.png")[0][0])
    data, _, sample = sample_of(shown | {"question": "x <image>", "answer": "y"}, folder, vlm)
    assert asked(data, sample) == f"0.0 {SLOTS}{FRAMES}{SLOTS}x"
    data, _, sample = sample_of(shown | {"question": "x", "answer": "y"}, folder, vlm)
    assert asked(data, sample) == f"{SLOTS}0.0 {SLOTS}{FRAMES}x"


def test_parts_of_a_message_may_be_videos(folder, vlm):
    answer = {"role": "assistant", "content": "red"}
    parts = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "is "}, {"type": "video", "video": "b.mp4"}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": " it?"}]}, answer]
    data, _, sample = sample_of({"messages": messages}, folder, vlm)
    assert asked(data, sample) == f"{SLOTS}is 0.0 {SLOTS} it?"
    messages[0]["content"][2] = {"type": "video"}
    data, _, sample = sample_of({"messages": messages, "videos": ["b.mp4"]}, folder, vlm)
    assert asked(data, sample) == f"{SLOTS}is 0.0 {SLOTS} it?"
    _, read, _ = sample_of({"messages": messages}, folder, vlm)
    assert str(read["bad"]) == "another number of <video> than of videos"


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        ({"question": "<video> and <video>"}, {}, "another number of <video> than of videos"),
        ({"answer": "a <video>"}, {}, "<video> elsewhere than in a question"),
        ({"video": None, "question": "<video> what?"}, {}, "another number of <video> than of videos"),
        ({"video": "absent.mp4"}, {}, "no such file"),
        ({"video": "p.txt"}, {}, "no such file"),
        ({"video": b"no video"}, {}, "video does not decode"),
        ({"video": "cut.mkv"}, {}, BROKEN),
        ({"clip_start": 7}, {}, OUTSIDE),
        ({"video": ["a.mp4"] * 2, "clip_start": 0}, {}, "subtitles or a clip of several videos"),
        ({"video": ["a.mp4"] * 5}, {}, "too many images"),
        ({}, {"batch_size": 1, "max_tiles_per_batch": 2}, "too many tiles"),
        ({}, {"max_sample_length": 12}, "too long"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_by_its_reason(folder, vlm, change, settings, reason):
    record = {"video": "a.mp4", "question": "what?", "answer": "red"} | change
    _, _, sample = sample_of(record, folder, vlm, **settings)
    assert list(sample.dropped) == [reason]
    assert not sample.conversations


def test_without_videos_the_word_is_text(folder, vlm):
    data, _, sample = sample_of({"question": "the <video>?", "answer": "red"}, folder, vlm)
    assert asked(data, sample) == "the <video>?"


def test_what_breaks_off_is_used_and_counted(folder, vlm):
    data, read, _ = sample_of({"video": "cut.mkv", "question": "what?", "answer": "red"}, folder, vlm)
    data.image_processor.use_truncated = True
    sample = data.sample(read)
    assert sample.dropped == {"used: truncated video": 1}
    assert asked(data, sample).startswith(f"0.0 {SLOTS} 0.5 {SLOTS}")


def test_frames_go_the_way_of_images(folder, vlm, monkeypatch):
    """Mirrored like them, decoded once, at most max_video_frames of them; a folder of frames as well."""
    _, read, sample = sample_of({"video": "a.mp4", "question": "what?", "answer": "red"}, folder, vlm)
    rows = [read | {"videos": [{"bytes": (folder / "a.mp4").read_bytes(), "path": None}]}]
    data = dataset(rows, replace(vlm, max_video_frames=2), tiny_train(flip_images=True), cache=True)
    calls = []
    real = frames.decoded
    monkeypatch.setattr(frames, "decoded", lambda *given: calls.append(given) or real(*given))
    seen = {bool(one.mirrored): one.images for one in (data[epoch, 0] for epoch in range(12))}
    assert torch.equal(seen[False], sample.images[[0, 2]])
    assert torch.equal(seen[True], seen[False].flip(-1))
    assert len(calls) == 1
    many = folder / "frames"
    many.mkdir()
    for number in range(3):
        (many / f"{number}.png").write_bytes(encoded(picture(20, 16, seed=number)))
    data, _, sample = sample_of({"video": "frames", "question": "what?", "answer": "red"}, folder, vlm)
    assert asked(data, sample) == f"{FRAMES}what?"
    assert sample.images.shape == (3, 3, 16, 16)


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    return save_answering_model(tmp_path_factory.mktemp("checkpoint") / "model", **family_of(request))


@pytest.fixture(scope="module")
def two_frames(checkpoint):
    """The same, trained with two frames of a video."""
    folder = checkpoint.with_name("two_frames")
    shutil.copytree(checkpoint, folder)
    config = folder / "config.json"
    assert json.loads(config.read_text())["max_video_frames"] == 16
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_video_frames": 2}))
    return folder


@of_families("checkpoint")
def test_generate_takes_videos(folder, checkpoint, two_frames, tmp_path, monkeypatch, capsys):
    given = []
    real = Asker.answer
    monkeypatch.setattr(Asker, "answer", lambda self, asked, *a, **k: given.extend(asked) or real(self, asked, *a, **k))
    common = ["--checkpoint", str(checkpoint), "--max_new_tokens", "3", "--dtype", "float32", "--num_workers", "0"]
    clip = str(folder / "a.mp4")
    main(parse_arguments([*common, "--video", clip, "--prompt", "is there a red shape?"]))
    main(parse_arguments([*common, "--video", clip, "--max_video_frames", "2", "--prompt", "is <video> red?"]))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"video": clip, "prompt": "is there a red shape?"}) + "\n")
    main(parse_arguments([*common, "--prompts", str(rows), "--output", str(tmp_path / "out.jsonl")]))
    assert "answer" in json.loads((tmp_path / "out.jsonl").read_text())
    assert [len(one.images) for one in given] == [3, 2, 3]
    assert given[0].prompts == given[2].prompts
    del given[:]
    common[1] = str(two_frames)
    main(parse_arguments([*common, "--video", clip, "--prompt", "is there a red shape?"]))
    main(parse_arguments([*common, "--video", clip, "--max_video_frames", "3", "--prompt", "is there a red shape?"]))
    main(parse_arguments([*common, "--prompts", str(rows), "--output", str(tmp_path / "two.jsonl")]))
    assert [len(one.images) for one in given] == [2, 3, 2]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/video {clip}\nis there a red shape?\n/video {tmp_path}/b\n/quit\n"))
    main(parse_arguments([*common, "--chat"]))
    assert "no such file" in capsys.readouterr().err
    (folder / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=f"--video {folder}/text.mp4: Invalid data"):
        main(parse_arguments([*common, "--video", str(folder / "text.mp4"), "--prompt", "a"]))
    with pytest.raises(ValueError, match="2 <video> in the text, 1 video"):
        main(parse_arguments([*common, "--video", clip, "--prompt", "<video> or <video>"]))


@of_families("checkpoint")
def test_evaluate_asks_about_videos(folder, checkpoint, two_frames, tmp_path):
    rows = [{"video": str(folder / "a.mp4"), "question": "is there a red shape?", "answer": "yes"}]
    rows += [{"image": str(folder / "p.png"), "question": "is there a red shape?", "answer": "no"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--checkpoint", checkpoint, "--tasks", tmp_path / "own.jsonl", "--output", tmp_path / "out"]
    flags += ["--num_workers", 0, "--dtype", "float32", "--max_new_tokens", 3]
    evaluate.main(evaluate.parse_arguments([str(flag) for flag in flags]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2
    assert "16 frames" in results["tasks"]["own"]["data"]["fingerprint"]
    flags[1], flags[5] = two_frames, tmp_path / "two"
    evaluate.main(evaluate.parse_arguments([str(flag) for flag in flags]))
    again = [*flags[2:4], "--answers", tmp_path / "two" / "answers.jsonl", "--output", tmp_path / "again"]
    evaluate.main(evaluate.parse_arguments([str(flag) for flag in again]))
    for name in ("two", "again"):
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert "2 frames" in found["tasks"]["own"]["data"]["fingerprint"]
