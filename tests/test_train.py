"""The training loop from the command line to the summary, on a model of a few thousand weights."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny.data import picture
from tiny.runs import ROOT, TINY, arguments, same

import train
from data.images import ImageProcessor
from data.text import encode_prompt, get_tokenizer, image_string
from eval.evaluation import Evaluator
from models.vision_language_model import VisionLanguageModel
from training import checkpoint, setup
from training.arguments import parse_arguments
from training.checkpoint_folder import CheckpointError, begin, damage, find_checkpoint, finishing, step_folder
from training.evaluation import EvaluationSchedule
from training.setup import freeze_untrained, make_optimizer
from training.step import forward_backward


@pytest.fixture
def start(data, tmp_path):
    """start(flag=value, ...) -> (exit code, run folder, summary)."""

    def run(name: str = "run", **flags) -> tuple[int, Path, dict]:
        code = train.main(parse_arguments(arguments(data, tmp_path, name, **flags)))
        folder = tmp_path / "out" / name
        summary = folder / "summary.json"
        return code, folder, json.loads(summary.read_text()) if summary.exists() else {}

    return run


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return VisionLanguageModel.from_pretrained(folder / "checkpoints" / name).state_dict()


def test_a_run_leaves_everything_it_promises(start):
    code, folder, summary = start(enable_grades=True, vision_tau=1e9, language_tau=1e-9, alpha=0.5)
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "log.txt", "metrics.jsonl", "summary.json", "grades_history.json", "convergence.png",
        "freezing.png", "checkpoints",
    }  # fmt: skip
    assert summary["stop_reason"] == "max_training_steps"
    assert (summary["steps"], summary["frozen_share_vision"], summary["frozen_share_language"]) == (8, 1.0, 0.0)
    assert summary["total_time_s"] > summary["eval_time_s"] > 0
    assert 0 <= summary["test_exact_match"] <= 1
    assert summary["question_only_exact_match"] is None  # measured on easy-VQA alone
    assert summary["parameters"] == sum(
        p.numel() for p in VisionLanguageModel.from_pretrained(find_checkpoint(folder)).parameters()
    )
    assert "image does not decode" in json.dumps(summary["dropped"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8]
    assert lines[-1]["val/loss"] == summary["val_loss"]
    log = (folder / "log.txt").read_text()
    assert log.count("froze vision_encoder.blocks.0.") == 4
    assert "step 5: froze 4 of 4 vision matrices (4 frozen): tau 1e+09" in log


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ImportError("No module named 'matplotlib'"), "no pictures without matplotlib; install it, then: "),
        (ValueError("Key backend: 'no' is not a valid value"), "no pictures (ValueError: Key backend: 'no' is not a "),
    ],
)
def test_pictures_that_cannot_be_drawn_cost_nothing_else(start, monkeypatch, error, line):
    def draw(history):
        assert (history.parent / "summary.json").exists()
        raise error

    monkeypatch.setattr("grades.plots.draw", draw)
    code, folder, summary = start(enable_grades=True)
    assert (code, summary["stop_reason"]) == (0, "frozen")
    log = (folder / "log.txt").read_text()
    assert f"\n{line}" in log
    assert f"python -m grades report {folder}\n" in log
    assert f"written               {folder / 'summary.json'}\n" in log
    assert ".png" not in log.partition("written ")[2].partition("ask it")[0]


@pytest.mark.parametrize("refused", ["point", "prune"])
def test_a_disk_that_fills_during_an_evaluation_does_not_end_the_run(start, monkeypatch, refused):
    def fails(*args):
        calls.append(1)
        if len(calls) == 2:  # the first is of the saving before the evaluation
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        works(*args)

    calls, works, losses = [], getattr(checkpoint, refused), iter([1.0, 2.0])
    monkeypatch.setattr(checkpoint, refused, fails)
    monkeypatch.setattr("eval.evaluation.summed_loss", lambda *_: (torch.tensor(next(losses)), 1))
    code, folder, summary = start(keep_checkpoints=1)
    assert (code, summary["best_step"]) == (0, 4)
    said = "checkpoints/best could not be brought up to date ([Errno 28] No space left on device)"
    assert (folder / "log.txt").read_text().count(said) == 1
    assert find_checkpoint(folder).resolve().name == "step_00000004"


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_forty_rows_of_ones_own_train_with_every_recipe(recipe, data, tmp_path):
    rows = (data / "rows.jsonl").read_text().splitlines()
    (data / "rows.jsonl").write_text("\n".join(rows[i % len(rows)] for i in range(40)))
    given = {"max_training_steps": 2, "gradient_accumulation_steps": 2, "num_workers": 0, "lora_rank": 0,
             "lora_vision": True, "lm_max_length": 128, "max_sample_length": 128, "stream_dataset": False,
             "vit_n_heads": 1, "vit_model_type": "scratch", "lm_model_type": "scratch", "mp_type": "pixel_shuffle",
             "vlm_load_backbone_weights": False, "tau_mode": "absolute", "mixture": "none",
             "lm_tokenizer": "easy-vqa", "lm_base_vocab_size": 36}  # fmt: skip
    if recipe.stem == "nlvr" or "tiny" in recipe.stem:
        given["val_dataset_path"] = data  # in place of the recipe's own
    if recipe.stem.startswith("molmo2"):
        del given["mp_type"]
        given |= {"vit_feature_layers": -1, "vit_img_size": 32, "vit_patch_size": 8, "mp_image_token_length": 4,
                  "overlap_margin": 1, "max_crops": 1, "lm_max_length": 256, "parallel": "ddp"}  # fmt: skip
    words = [word for word in arguments(data, tmp_path, "run", **given) if not word.startswith("--val_size")]
    assert train.main(parse_arguments(["--config", str(recipe), *words])) == 0
    assert json.loads((tmp_path / "out" / "run" / "summary.json").read_text())["val_loss"] > 0


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ({"enable_grades": True, "vision_tau": 1e-12, "language_tau": 1e-12, "alpha": 0}, 0),
        ({"early_stopping": True, "es_delta": 0, "es_patience": 100}, None),
    ],
)
def test_what_freezes_nothing_or_never_stops_changes_nothing(start, flags, frozen):
    _, plain, _ = start("plain")
    _, watched, summary = start("watched", **flags)
    assert summary["frozen_share"] == frozen
    assert (summary["stop_reason"], summary["stop_step"]) == ("max_training_steps", None)
    ours, theirs = weights(watched), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_early_stopping_ends_a_run_that_no_longer_improves(start):
    code, folder, summary = start(early_stopping=True, es_interval=0.25, es_delta=1e9, es_patience=2, eval_interval=8)
    assert (code, summary["stop_reason"], summary["steps"], summary["stop_step"]) == (0, "early_stopping", 6, 6)
    assert summary["test_exact_match"] is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], "val/exact_match" in line) for line in lines if "val/loss" in line]
    assert losses == [(2, False), (4, False), (6, True)]  # the exact match only at the end
    assert lines[-1]["val/loss"] == summary["val_loss"]
    state = torch.load(folder / "checkpoints" / "last" / "training_state.pt", weights_only=True)
    assert state["states"]["evaluation"] == {"best": pytest.approx(lines[1]["val/loss"]), "bad": 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_changes_neither_weights_nor_random_numbers(start, monkeypatch, num_workers):
    def everything(evaluation):
        weights = {name: value.clone() for name, value in evaluation.evaluator.model.state_dict().items()}
        mode = [module.training for module in evaluation.evaluator.model.modules()]
        return weights, mode, setup.RandomState(torch.device("cpu")).state_dict()

    def watched(evaluation, state):
        before = everything(evaluation)
        run(evaluation, state)
        found.append(same(everything(evaluation), before) and state.evaluated_step == state.step)

    run, found = EvaluationSchedule.run, []
    monkeypatch.setattr(EvaluationSchedule, "run", watched)
    assert start(num_workers=num_workers, lm_dropout=0.1, early_stopping=True, es_interval=0.25)[0] == 0
    assert found == [True] * 4


def test_the_summary_says_where_time_and_flops_went(start):
    _, _, summary = start(enable_grades=True, vision_tau=1e9, language_tau=1e-9, alpha=0.5, compute_interval=4)
    parts = [summary[f"{part}_time_s"] for part in ("startup", "train", "eval", "save")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(summary["total_time_s"])
    assert 0 < summary["test_time_s"] < summary["eval_time_s"]
    unfrozen = summary["train_flops_unfrozen_per_step"] * summary["steps"]
    assert 0.5 * unfrozen < summary["train_flops"] <= unfrozen
    _, _, plain = start("plain")
    assert plain["train_flops"] == plain["train_flops_unfrozen_per_step"] * 8 == unfrozen


def test_the_summary_names_each_source_in_full(start, monkeypatch, capsys):
    found = {"": 0.5, "/a": 1.0, "/a/b": 0.25, "/c/b": 0.125}
    scores = {f"test/exact_match{source}": value for source, value in found.items()}
    monkeypatch.setattr(Evaluator, "answers", lambda self, split: scores)
    _, _, summary = start(max_training_steps=1)
    assert summary["test_exact_match"] == 0.5
    assert summary["test_exact_match_by_source"] == {"a": 1.0, "a/b": 0.25, "c/b": 0.125}
    assert "50.0 % (a 100.0 %, a/b 25.0 %, c/b 12.5 %)" in capsys.readouterr().out


def test_a_non_finite_loss_ends_the_run_and_names_the_culprits(start, monkeypatch):
    real, calls = VisionLanguageModel.forward, []

    def forward(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        calls.append(self.training)
        return result * torch.nan if self.training and sum(calls) == 6 else result

    monkeypatch.setattr(VisionLanguageModel, "forward", forward)
    code, folder, summary = start(gradient_accumulation_steps=1)
    assert (code, summary["stop_reason"]) == (1, "non_finite_loss")
    log = (folder / "log.txt").read_text()
    assert "loss nan at step 6" in log
    assert f"last good checkpoint is {folder / 'checkpoints' / 'last'}" in log
    assert log.count("rows.jsonl#") >= 3
    assert all(value.isfinite().all() for value in weights(folder).values())


def test_data_of_which_nothing_can_be_used_is_an_error_that_says_why(start, data, tmp_path, capsys):
    code, folder, _ = start(max_sample_length=5)
    assert code == 2
    error = capsys.readouterr().err
    assert "too long" in error
    assert not folder.exists()


@pytest.mark.slow
def test_generate_answers_from_a_run_folder(start, data):
    _, folder, _ = start(max_training_steps=2)
    command = [sys.executable, "generate.py", "--checkpoint", str(folder), "--image", str(data / "1.png")]
    command += ["--prompt", "is there a red shape?", "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = VisionLanguageModel.from_pretrained(find_checkpoint(folder)).eval()
    tokenizer = get_tokenizer(loaded.cfg, find_checkpoint(folder))
    pixels, grid = ImageProcessor(loaded.cfg)(picture(seed=1))
    ids = encode_prompt(tokenizer, "is there a red shape?", image_string([grid], loaded.cfg))
    expected = loaded.generate(torch.tensor([ids]), pixels, max_new_tokens=4, greedy=True)[0]
    assert done.stdout.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_training_goes_on_from_a_checkpoint(start):
    _, folder, first = start("first")
    code, _, summary = start(
        "second", resume_from_vlm_checkpoint=True, vlm_checkpoint_path=folder, lr_mp=1e-9, lr_backbones=0
    )
    assert code == 0
    assert summary["val_loss"] == pytest.approx(first["val_loss"], abs=1e-4)


def test_weights_of_a_run_folder_are_its_last(start, capsys):
    _, folder, _ = start("first", max_training_steps=2, eval_interval=1)
    best, last = folder / "checkpoints" / "best", folder / "checkpoints" / "last"
    best.unlink()
    best.symlink_to("step_00000001")
    assert find_checkpoint(folder).resolve() != find_checkpoint(folder, newest=True).resolve() == last.resolve()
    still = {"max_training_steps": 1, "lr_mp": 1e-12, "lr_backbones": 0}
    for name, given in (("of_run", folder), ("of_checkpoint", best)):
        assert start(name, resume_weights=given, **still)[0] == 0
    assert not same(weights(folder, "best"), weights(folder, "last"))
    for name, source in (("of_run", "last"), ("of_checkpoint", "best")):
        ours = weights(folder.parent / name)["decoder.token_embedding.weight"]
        assert torch.equal(ours, weights(folder, source)["decoder.token_embedding.weight"])
    capsys.readouterr()
    assert start("other_shape", resume_weights=folder, lm_n_blocks=2, **still)[0] == 2
    assert f"as --resume_weights {last} has it" in capsys.readouterr().err


def test_flags_go_over_a_checkpoint_but_do_not_change_its_shape(start, capsys):
    _, folder, _ = start("first", max_training_steps=1)
    given = {"resume_from_vlm_checkpoint": True, "vlm_checkpoint_path": folder, "max_training_steps": 1}
    code, second, _ = start("second", lm_dropout=0.25, **given)
    assert code == 0
    kept = parse_arguments(["--config", str(second / "config.yaml")])
    assert (kept.vlm.lm_dropout, kept.vlm.vlm_checkpoint_path) == (0.25, str(folder))
    code, third, _ = start("third", **(given | {"lm_n_blocks": 2}))
    assert code == 2
    assert "--lm_n_blocks 2: must be 1" in capsys.readouterr().err
    assert not third.exists()


def test_every_label_token_weighs_the_same_over_micro_batches():
    torch.manual_seed(0)
    settings = parse_arguments([f"--{k}={v}" for k, v in TINY.items()])
    model = VisionLanguageModel(settings.vlm)

    def micro(rows: int, labels: int) -> dict:
        targets = torch.full((rows, 8), -100)
        targets[:, -labels:] = torch.randint(0, 30, (rows, labels))
        positions = (targets.flatten() != -100).nonzero().squeeze(1)
        return {"input_ids": torch.randint(0, 30, (rows, 8)), "targets": targets, "label_positions": positions,
                "num_labels": rows * labels}  # fmt: skip

    parts = [micro(2, 1), micro(3, 4)]
    total = forward_backward(model, parts, torch.device("cpu"), contextlib.nullcontext())
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ids, targets = (torch.cat([part[name] for part in parts]) for name in ("input_ids", "targets"))
    _, loss = model(ids, targets=targets)
    loss.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(accumulated[name], p.grad, rtol=1e-4, atol=1e-6)


def test_each_part_has_its_own_peak_learning_rate():
    settings = parse_arguments([f"--{k}={v}" for k, v in TINY.items()] + ["--lr_mp=0.3", "--lr_vision_backbone=0"])
    model = VisionLanguageModel(settings.vlm)
    freeze_untrained(model, settings.train)
    optimizer = make_optimizer(model, settings.train)
    assert {group["name"]: group["peak_lr"] for group in optimizer.param_groups} == {
        "projector": 0.3,
        "language": 0.0015,
    }
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    grouped = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert grouped == sum(p.numel() for p in model.parameters() if p.requires_grad)


def write(folder: Path, text: str, fails: bool = False) -> None:
    """A checkpoint of one file."""
    with finishing(folder, 3) as beside:
        begin(folder)
        (beside / "model.safetensors").write_text(text)
        if fails:
            raise OSError("No space left on device")


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path):
    place = step_folder(tmp_path, 3)
    write(place, "first")
    with pytest.raises(CheckpointError, match="No space"):
        write(place, "second", fails=True)
    assert (place / "model.safetensors").read_text() == "first"
    write(place, "third")
    assert (place / "model.safetensors").read_text() == "third"
    assert damage(place) is None
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_of_a_run_folder_the_best_counts_then_the_newest_then_what_a_crash_left(tmp_path):
    for name in ("crash", "step_00000002", "step_00000004", "best"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
        assert find_checkpoint(tmp_path) == folder


def test_a_run_without_matplotlib_has_a_summary_and_no_pictures(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", enable_grades=True))) == 0
    folder = tmp_path / "out" / "run"
    assert (folder / "summary.json").exists()
    assert list(folder.glob("*.png")) == []
    assert "python -m grades report" in (folder / "log.txt").read_text()
