"""README.md of a checkpoint: what was measured of its weights, metadata that the hub's classes take, edits kept."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny.data import write_rows
from tiny.families import SIZES, family_of, of_families
from tiny.runs import arguments

import train
from data.layouts import image_tokens_in_words
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from training.arguments import parse_arguments
from training.checkpoint import Checkpointer
from training.checkpoint_folder import CARD, MANIFEST, damage, follow
from training.model_card import is_edited

# The vision tower alone.
FREEZING = {"enable_grades": True, "vision_tau": 1e9, "language_tau": 1e-9, "alpha": 0.3}


def run(data, tmp_path, name, **flags):
    assert train.main(parse_arguments(arguments(data, tmp_path, name, **flags))) == 0
    return tmp_path / "out" / name / "checkpoints"


def results(card: ModelCard) -> dict[tuple[str, str], float]:
    """(split, metric type) -> value, by the hub's own reading of the model index."""
    _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    return {(one.dataset_split, one.metric_type): one.metric_value for one in found}


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows", 16, sizes=SIZES)


@pytest.fixture
def trained(request, data, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    folder = run(data, tmp_path, "run", **FREEZING, **family_of(request))
    assert no_network == []
    return folder


@of_families("trained")
def test_a_card_holds_what_was_measured_and_how_it_was_made(trained, data):
    text = (trained / "last" / CARD).read_text(encoding="utf-8")
    card = ModelCard(text)  # as the hub's classes parse it
    assert card.data.eval_results
    assert card.data.model_name == "run"
    assert (card.data.library_name, card.data.pipeline_tag) == ("nanovlm", "image-text-to-text")
    assert card.data.base_model is card.data.datasets is None  # random weights, own rows
    summary = json.loads((trained.parent / "summary.json").read_text())
    expected = {("validation", "loss"): summary["val_loss"],
                ("validation", "exact_match"): summary["val_exact_match"],
                ("test", "exact_match"): summary["test_exact_match"]}  # fmt: skip
    assert results(card) == pytest.approx(expected, abs=1e-6)
    (start,) = json.loads((trained.parent / "environment.json").read_text())
    for words in (
        f"{summary['parameters']:,} parameters, after step {summary['steps']} of a run of at most 8",
        "12 training rows, 4 validation rows, 16 test rows",
        f"`{' '.join(start['command'])}`",
        start["commit"]["id"],
        start["time"],
        f"{summary['train_flops']:.4g} in matrix products",
        "python generate.py --checkpoint",
        "| weights at first | random |",
        "- the code that trained it: MIT",
        image_tokens_in_words(VLMConfig.load(trained / "last")),
    ):
        assert words in text, words
    assert not is_edited(trained / "last" / CARD)


def test_a_card_counts_the_merged_weights_that_the_checkpoint_holds(data, tmp_path):
    folder = run(data, tmp_path, "run", lora_rank=4)
    model = VisionLanguageModel.from_pretrained(folder / "last")
    text = (folder / "last" / CARD).read_text(encoding="utf-8")
    assert f"with {sum(p.numel() for p in model.parameters()):,} parameters" in text
    parts = {"vision tower": model.vision_encoder, "projector": model.MP, "language model": model.decoder}
    for name, part in parts.items():
        assert f"| {name} | {sum(p.numel() for p in part.parameters()):,} |" in text


def test_the_curve_is_that_of_the_validations_so_far(data, tmp_path):
    folder = run(data, tmp_path, "run", eval_interval=2, keep_checkpoints=9)
    points = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    points = [one for one in points if "val/loss" in one]
    text = (folder / "last" / CARD).read_text(encoding="utf-8")
    rows = text.split("Validation over the run:\n\n")[1].splitlines()
    assert rows[0].startswith("| step | loss |")
    assert [row.split(" | ")[:2] for row in rows[2 : 2 + len(points)]] == [
        [f"| {one['step']}", f"{one['val/loss']:.4f}"] for one in points
    ]
    assert len(points) == 4
    earlier = (folder / "step_00000004" / CARD).read_text(encoding="utf-8")
    assert "\n| 4 | " in earlier
    assert "\n| 6 | " not in earlier


def test_the_table_says_at_which_step_each_matrix_froze(trained):
    history = json.loads((trained.parent / "grades_history.json").read_text())
    steps = {event["name"]: event["step"] for event in history["events"]}
    lines = (trained / "last" / CARD).read_text(encoding="utf-8").splitlines()
    own = [one for one in history["components"] if one["tower"] == "vision"]
    froze = [steps[one["name"]] for one in own]
    words = f"vision: {len(own)} of {len(own)} matrices froze, between step {min(froze)} and {max(froze)}."
    row = lines[lines.index(words) + 4]
    assert row == f"| 0 | {' | '.join(map(str, froze))} |"
    assert any(line.startswith("language: 0 of ") for line in lines)


def test_a_step_that_was_not_evaluated_has_no_numbers(data, tmp_path):
    checkpoints = run(data, tmp_path, "run", checkpoint_interval=3, keep_checkpoints=5, average_weights=4)
    evaluated = ModelCard((checkpoints / "step_00000004" / CARD).read_text(encoding="utf-8"))
    assert set(results(evaluated)) == {("validation", "loss"), ("validation", "exact_match")}
    lines = (checkpoints.parent / "metrics.jsonl").read_text().splitlines()
    (val,) = [one for one in map(json.loads, lines) if one["step"] == 4 and "val/loss" in one]
    loss = min(val["val/loss"], val["val/loss_averaged"])
    assert results(evaluated)["validation", "loss"] == pytest.approx(loss, abs=1e-6)
    text = (checkpoints / "step_00000006" / CARD).read_text(encoding="utf-8")
    assert "model-index" not in text
    assert "Nothing was measured with the weights of this step." in text
    assert "Trained without GradES: nothing froze." in text


@pytest.mark.parametrize("saves_again", [False, True])
def test_what_a_user_has_edited_stays_and_damages_nothing(trained, data, tmp_path, monkeypatch, saves_again):
    """Also where the resumed run writes the checkpoint of that step once more."""
    last = follow(trained / "last")
    edited = (last / CARD).read_bytes() + b"my own words \xff\n"
    (last / CARD).write_bytes(edited)
    assert is_edited(last / CARD)
    assert damage(last) is None
    assert CARD not in json.loads((last / MANIFEST).read_text())["files"]
    (trained.parent / "summary.json").unlink()  # so that the end of the run is made again
    os.utime(last / MANIFEST, ns=(0, 0))  # file systems with coarse times would show no later one
    load = Checkpointer.load

    def load_as_averaged(checkpoints):
        load(checkpoints)
        checkpoints.saved_averages = saves_again  # as if the other weights had been saved

    monkeypatch.setattr(Checkpointer, "load", load_as_averaged)
    run(data, tmp_path, "run", resume="auto", **FREEZING)
    assert ((last / MANIFEST).stat().st_mtime_ns != 0) == saves_again
    assert (follow(trained / "last") / CARD).read_bytes() == edited


def test_a_resumed_run_completes_the_card(trained, data, tmp_path):
    before = (trained / "last" / CARD).read_text(encoding="utf-8")
    (trained.parent / "summary.json").unlink()
    run(data, tmp_path, "run", resume="auto", **FREEZING)
    after = (trained / "last" / CARD).read_text(encoding="utf-8")
    assert results(ModelCard(after)) == results(ModelCard(before))
    (line,) = [line for line in before.splitlines() if line.startswith("| FLOPs |")]
    assert line in after.splitlines()
    assert "| resumed | 1 times;" in after


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_of_another_system_is_not_an_edited_one(trained, tmp_path, ending):
    text = (trained / "last" / CARD).read_text(encoding="utf-8")
    (tmp_path / CARD).write_text(text, encoding="utf-8", newline=ending)
    assert not is_edited(tmp_path / CARD)
    (tmp_path / CARD).write_text(text.replace("Answers may be wrong.", "It is perfect."), encoding="utf-8")
    assert is_edited(tmp_path / CARD)
    assert not is_edited(tmp_path / "absent.md")


@of_families("trained")
def test_push_to_hub_sends_the_card_of_the_weights_and_no_other(trained, monkeypatch):
    sent: dict[str, bytes] = {}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        sent.clear()
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    created = RepoUrl("https://huggingface.co/someone/tiny")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, *, private, exist_ok: created)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = VisionLanguageModel.from_pretrained(trained / "last")
    model.push_to_hub("someone/tiny")
    assert sent[CARD] == (trained / "last" / CARD).read_bytes()
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sent.keys()
    assert "training_state.pt" not in sent
    next(model.MP.parameters()).data += 1  # its numbers hold no more
    model.push_to_hub("someone/tiny")
    assert b"someone/tiny" in sent[CARD]
    assert b"What was measured" not in sent[CARD]
    for card in (sent[CARD], (trained / "last" / CARD).read_bytes()):
        assert model.cfg.in_words.encode() in card
