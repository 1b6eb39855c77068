"""Data for the three stages of nanoMolmo2 at a tiny size, and training them one after the other."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import train
from data.layouts import FRAME
from data.mixture import sets_of
from data.points import find_points
from data.rows import load_rows
from data.text import image_string
from eval.own_rows import open_own_rows
from examples import train_with_stage_dataloaders as door
from scripts import make_shapes, train_stages
from training.arguments import parse_arguments
from training.preflight import check_paths
from training.schedule import set_learning_rate

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs/nanomolmo2_tiny")
SMALL = "--vit_n_blocks 1 --lm_n_blocks 1 --batch_size 2 --eval_batch_size 8 --max_training_steps 2 --eval_interval 2"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    output = tmp_path_factory.mktemp("shapes")
    assert make_shapes.main(["--output", str(output), "--scale", "0.01"]) == 0
    return output


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_read_and_every_text_comes_back(shapes):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(shapes / "tokenizer"))
    assert len(tokenizer) == make_shapes.VOCAB_SIZE
    seen = Counter()
    for path in shapes.glob("*.jsonl"):
        for row in load_rows(str(path), split="test"):
            assert "bad" not in row
            for turn in row["texts"]:
                seen[turn["source"]] += 1
                for text in (turn["user"] or "", turn["assistant"]):
                    ids = tokenizer(text, add_special_tokens=False).input_ids
                    assert tokenizer.unk_token_id not in ids
                    assert tokenizer.decode(ids) == text
    assert set(seen) == {*make_shapes.MAKERS, "video", "text"}
    assert tokenizer.tokenize("0.5 <points 125") == ["0", ".", "5", " <", "points", " 1", "2", "5"]
    assert all(f" {word}" in tokenizer.get_vocab() for word in make_shapes.WORDS)


def test_splits_share_no_picture(shapes):
    pictures = {}
    for split in ("train", "val", "test"):
        rows = [row for path in shapes.glob("*.jsonl") for row in records(path)]
        names = {row.get("image") or row.get("video", "") for row in rows}
        names = {name for name in names if f"/{split}_" in name}
        pictures[split] = {Image.open(shapes / name).tobytes() for name in names if name.endswith(".png")}
        assert all(len(list((shapes / name).iterdir())) == 4 for name in names if name.startswith("videos"))
    assert len(pictures["train"]) == 30
    assert not pictures["train"] & pictures["test"]
    assert not pictures["val"] & (pictures["test"] | pictures["train"])


def test_points_lie_on_the_shapes_and_counts_are_theirs(shapes):
    checked = 0
    for row in load_rows(str(shapes / "test.jsonl"), split="test"):
        (turn,) = row["texts"]
        if turn["source"] not in ("pointing", "counting"):
            continue
        picture = Image.open(row["images"][0])
        for point in find_points(turn["assistant"]).points:
            at = (round(point.x * make_shapes.SIDE / 1000), round(point.y * make_shapes.SIDE / 1000))
            assert picture.getpixel(at) in make_shapes.COLORS.values()
            checked += 1
    assert checked


def test_the_mover_crosses_the_picture_and_the_other_stays(shapes):
    import random

    for seed in range(50):
        video = make_shapes.make_video(random.Random(seed))
        frames = video.frames()
        cells = [(mover.row, mover.column) for mover, _ in frames]
        assert len(set(cells)) == 4
        assert all(0 <= place < 4 for cell in cells for place in cell)
        assert {other for _, other in frames} == {video.other}
        assert (video.other.row, video.other.column) not in cells
        assert video.other.name != video.mover.name


def test_the_same_seed_draws_the_same_and_a_bad_scale_is_one_sentence(shapes, tmp_path, capsys):
    make_shapes.make(tmp_path / "again", 0, 0.01)
    make_shapes.make(tmp_path / "other", 1, 0.01)
    for name in ("questions", "text"):
        text = (shapes / f"{name}.jsonl").read_text()
        assert (tmp_path / "again" / f"{name}.jsonl").read_text() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_text() != text
    assert make_shapes.main(["--output", str(tmp_path), "--scale", "0"]) == 2
    assert "--scale 0" in capsys.readouterr().err


def test_the_test_rows_are_scored_as_points(shapes):
    benchmark = open_own_rows(shapes / "test.jsonl", None)
    assert [rule.name for rule in benchmark.task.rules][:2] == ["points", "count"]
    assert benchmark.has_videos
    assert not benchmark.not_usable


def test_text_alone_asks_what_is_asked_of_pictures(shapes):
    turns = [turn for row in records(shapes / "text.jsonl") for turn in row["texts"]]
    assert not any({"image", "video"} & set(row) for row in records(shapes / "text.jsonl"))
    for start in ("What is there", "Point to the", "How many", "What color", "Is there", "Which way"):
        assert any(turn["user"].startswith(start) for turn in turns)
    answers = {row["answer"] for row in records(shapes / "test.jsonl") if row["source"] == "video"}
    assert {turn["assistant"] for turn in turns if turn["user"].startswith("Which way")} <= answers | {"up", "down"}


def test_a_training_row_has_several_annotations_each_once(shapes):
    rows = records(shapes / "points.jsonl")
    assert max(len(row["texts"]) for row in rows) == 4
    assert all(len({turn["user"] for turn in row["texts"]}) == len(row["texts"]) for row in rows)


# Stages


@pytest.fixture
def in_process(monkeypatch):
    """The runs of train.py are calls; what is in the list ends the stage of that number before it begins."""
    interrupted = []

    def call(command):
        if f"_stage{interrupted[0] if interrupted else 0}.yaml" in " ".join(command):
            return 130
        return train.main(parse_arguments(command[2:]))

    monkeypatch.setattr(train_stages, "run", call)
    return interrupted


def test_three_stages_continue_where_they_were_interrupted(shapes, tmp_path, in_process, capsys):
    import torch

    from models.vision_language_model import VisionLanguageModel

    words = ["--all-stages", "--data-root", str(shapes), "--output-dir", str(tmp_path), "--prefix", TINY]
    words += ["--", *SMALL.split()]
    in_process.append(2)
    assert door.main(list(words)) == 130
    assert not (tmp_path / "nanomolmo2_tiny_stage2").exists()
    in_process.clear()
    assert door.main(list(words)) == 0
    assert "nanomolmo2_tiny_stage1 has finished" in capsys.readouterr().out
    models = [
        VisionLanguageModel.from_pretrained(str(tmp_path / f"nanomolmo2_tiny_stage{number}" / "checkpoints" / "last"))
        for number in (1, 2, 3)
    ]
    states = [model.state_dict() for model in models]
    vision = [name for name in states[0] if name.startswith("vision_encoder.")]
    assert vision  # of stage 1 in all later ones, where it is frozen
    assert all(torch.equal(states[0][name], state[name]) for name in vision for state in states[1:])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])
    summary = json.loads((tmp_path / "nanomolmo2_tiny_stage3" / "summary.json").read_text())
    assert summary["steps"] == 2


def test_a_stage_alone_needs_the_one_before(shapes, tmp_path, in_process, capsys):
    assert door.main(["--stage", "2", "--prefix", TINY, "--output-dir", str(tmp_path)]) == 2
    assert "nanomolmo2_tiny_stage1: has not finished" in capsys.readouterr().err
    assert door.main(["--stage", "7", "--prefix", TINY]) == 2
    assert "--stage 7: must be one of 1, 2, 3" in capsys.readouterr().err


def test_the_batches_of_a_stage_are_shown(shapes, capsys):
    words = ["--stage", "3", "--inspect", "--batch-size", "2", "--prefix", TINY, "--data-root", str(shapes)]
    assert door.main(words) == 0
    shown = capsys.readouterr().out
    assert "batch size 2" in shown
    assert "input_ids" in shown
    assert "uint8" in shown


def test_the_commands_are_listed_and_bad_flags_are_one_sentence(tmp_path, capsys):
    assert train_stages.main([TINY, "--list", "--", "--enable_grades"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "--resume_weights grades_output/nanomolmo2_tiny_stage2 --enable_grades" in lines[2]
    assert "--resume_weights" not in lines[0]
    assert train_stages.main([TINY, "--", "--run_name=x"]) == 2
    assert "--run_name=x" in capsys.readouterr().err
    assert train_stages.main([str(tmp_path / "nothing")]) == 2
    assert "nothing_stage1.yaml: no such file" in capsys.readouterr().err


def test_a_data_root_that_is_not_there_is_named(tmp_path, capsys):
    assert door.main(["--stage", "1", "--inspect", "--prefix", TINY, "--data-root", str(tmp_path / "absent")]) == 2
    assert f"--data-root {tmp_path / 'absent'}: no such folder" in capsys.readouterr().err


def test_a_recipe_name_stands_for_its_stages(tmp_path):
    assert train_stages.find_stages(f"{TINY}.yaml", tmp_path) == train_stages.find_stages(TINY, tmp_path)


def test_missing_shapes_name_the_command_that_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        check_paths(parse_arguments(["--config", f"{TINY}_stage1.yaml"]))
    errors = capsys.readouterr().err
    for flag in ("mixture ./shapes_rows/captions.jsonl", "lm_tokenizer ./shapes_rows/tokenizer"):
        assert f"--{flag}" in errors
    assert "python scripts/make_shapes.py --output shapes_rows" in errors


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_molmo2_stages_hold_what_its_scripts_say(stage):
    settings = parse_arguments(["--config", str(ROOT / f"configs/molmo2_stage{stage}.yaml")])
    vlm, cfg = settings.vlm, settings.train
    assert (vlm.mp_type, vlm.image_layout, vlm.mp_merge, cfg.message_tree) == ("molmo", "molmo_crops", "add", True)
    assert cfg.batch_size * cfg.gradient_accumulation_steps == 128
    length, frames, steps, connector, towers = {
        1: (2536, 0, 31_000, 200, 2_000), 2: (16_384, 128, 30_000, 200, 200), 3: (36_864, 384, 2_000, 200, 200),
    }[stage]  # fmt: skip
    assert (cfg.max_sample_length, vlm.lm_max_length, cfg.max_training_steps) == (length, length, steps)
    assert stage == 1 or (vlm.max_video_frames, frames * 83 < length) == (frames, True)
    assert image_string([FRAME], vlm) == f"<frame_start>{'<im_patch>' * 81}<frame_end>"
    shares = {group["name"]: group["share"] for group in cfg.mixture}
    assert shares == (
        {"captions": 0.6, "points": 0.3, "text": 0.1}
        if stage == 1
        else {"demo": 0.15, "video_academic": 0.2, "image_academic": 0.25, "tracking": 0.15, "video_pointing": 0.15,
              "image_pointing": 0.1, "text": 0.0995}
    )  # fmt: skip
    weights = {one.path.rsplit("/", 1)[1]: one.loss_weight for one in sets_of(cfg)}
    assert stage == 1 or (weights["pixmo-points"], weights["molmo2-cap"], weights["chartqa"]) == (0.2, 0.1, None)
    for name, warm in (("projector", connector), ("vision", towers), ("language", towers)):
        optimizer = SimpleNamespace(param_groups=[{"name": name, "peak_lr": 1.0}])
        rates = []
        for step in (warm - 1, warm, warm + 1):
            set_learning_rate(optimizer, step, cfg)
            rates.append(optimizer.param_groups[0]["lr"])
        assert rates[0] < 1.0 == rates[1] > rates[2]
