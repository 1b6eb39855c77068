"""Runs of train.py on a model of a few thousand weights, and what they leave behind."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train
from tiny.families import words_of
from training import schedule
from training.checkpoint_folder import STATE

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "vit_img_size": 16, "max_img_size": 16, "vit_patch_size": 4, "vit_hidden_dim": 16, "vit_inter_dim": 32,
    "vit_n_blocks": 1, "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "lm_hidden_dim": 16,
    "lm_inter_dim": 32, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 1, "dtype": "float32", "batch_size": 4,
    "max_training_steps": 8, "eval_interval": 4, "log_interval": 2, "val_size": 4, "compute_interval": 1,
    # What the default recipe sets otherwise.
    "lr_schedule": "cosine", "average_weights": 0, "lr_mp": 1.5e-3, "lr_vision_backbone": 1e-3,
    "lr_language_backbone": 1.5e-3, "metric": "weight_change", "vision_tau": 7.5, "language_tau": 24.0, "alpha": 0.5,
    "patience": 1, "freeze_order": "any", "monitor_grace": True, "feature_cache_gib": 0,
}  # fmt: skip
# Times differ, and what of the settings may.
UNEQUAL = {"settings", "log", "seconds", "reported_s", "resumed_at", "total_wait_time_s"}


def arguments(data: Path, tmp_path: Path, name: str, **flags) -> list[str]:
    given = {"train_dataset_path": data, "test_dataset_path": data, "output_dir": tmp_path / "out", "run_name": name}
    return words_of(TINY | given | flags)


def state(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / name / STATE, weights_only=True)


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unequal = ("_per_s", "time_s", "memory_gib")
    return [{k: v for k, v in line.items() if not k.endswith(unequal)} for line in lines]


def same(one, other) -> bool:
    """Equal to the last bit."""
    if isinstance(one, dict):
        keys = one.keys() - UNEQUAL
        return keys == other.keys() - UNEQUAL and all(same(one[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other or (one != one and other != other)


def assert_same(folder: Path, whole: Path) -> None:
    """Two runs with all that they have left."""
    ours, theirs = state(folder), state(whole)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - UNEQUAL:
        assert same(ours[key], theirs[key]), key
    for name in ("last", "best"):
        ours, theirs = (load_file(root / "checkpoints" / name / "model.safetensors") for root in (folder, whole))
        assert same(ours, theirs)
    assert numbers(folder) == numbers(whole)
    histories = [root / "grades_history.json" for root in (folder, whole)]
    assert [path.exists() for path in histories] in ([False] * 2, [True] * 2)
    if histories[0].exists():
        ours, theirs = (json.loads(path.read_text()) for path in histories)
        assert ours == theirs
    ours, theirs = (json.loads((root / "summary.json").read_text()) for root in (folder, whole))
    for key in ours:
        measured = key.endswith(("_time_s", "_per_s", "memory_gib"))
        assert measured or key == "resumed_at_steps" or ours[key] == theirs[key], key
    frozen = [line for line in (folder / "log.txt").read_text().splitlines() if ": froze " in line]
    assert frozen == [line for line in (whole / "log.txt").read_text().splitlines() if ": froze " in line]


def before_steps(hook) -> None:
    """Let train.py call hook(step), counted from 1, before it makes a step."""

    def set_learning_rate(optimizer, step, *args):
        hook(step)
        schedule.set_learning_rate(optimizer, step, *args)

    train.set_learning_rate = set_learning_rate
