"""The command line: flags, recipes, and errors that come all at once and early."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.arguments import fields, parse_arguments, recipe_as_flags

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def errors_of(capsys, *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as end:
        parse_arguments(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_the_flags_people_know_work():
    words = (
        "--enable_grades --vision_tau 0.30 --language_tau 6.00 --alpha 0.28 --compute_interval 20 --log_wandb "
        "--lr_mp 0.001 --lr_vision_backbone 1e-5 --lr_language_backbone 2e-5 --vlm_checkpoint_path there --compile "
        "--resume_from_vlm_checkpoint --train_dataset_path easy-vqa --relevance_min_rating 2 "
        "--image_correspondence_min_rating 3 --visual_dependency_min_rating 4 --formatting_min_rating 5"
    )
    settings = parse_arguments(words.split())
    train, grades = settings.train, settings.grades
    assert (grades.vision_tau, grades.language_tau, grades.alpha, grades.compute_interval) == (0.3, 6.0, 0.28, 20)
    assert (train.enable_grades, train.log_wandb, train.compile, train.resume_from_vlm_checkpoint) == (True,) * 4
    assert (train.lr_mp, train.lr_vision_backbone, train.lr_language_backbone) == (0.001, 1e-5, 2e-5)
    assert settings.vlm.vlm_checkpoint_path == "there"
    assert (train.relevance_min_rating, train.formatting_min_rating) == (2, 5)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--compile", True), ("--compile False", False), ("--compile=true", True), ("--no_compile", False),
        ("--compile on", True), ("--compile Off", False),
        ("--compile --no-compile", False), ("", False),
    ],
)  # fmt: skip
def test_booleans_mean_what_they_say(words, value):
    assert parse_arguments(words.split()).train.compile is value


def test_every_field_is_a_flag_with_dashes_too_and_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name, field in fields().items():
        assert f"--{name}" in text
        assert f"--{name.replace('_', '-')}" in text
        assert len(field.metadata["help"]) > 10
    assert "(default: 0.94)" in text  # the recipe's image_mean, not the class's
    assert parse_arguments(["--vision-tau", "0.5", "--enable-grades"]).grades.vision_tau == 0.5


def test_lr_backbones_sets_both_towers():
    train = parse_arguments(["--lr_backbones", "3e-5"]).train
    assert (train.lr_vision_backbone, train.lr_language_backbone) == (3e-5, 3e-5)
    train = parse_arguments(["--lr-backbones=3e-5", "--lr_vision_backbone", "0"]).train
    assert (train.lr_vision_backbone, train.lr_language_backbone) == (0.0, 3e-5)


def test_every_impossible_value_is_named_at_once(capsys):
    errors = errors_of(
        capsys, "--vision_tau", "-0.1", "--alpha", "1", "--max_frozen_ratio", "1.5", "--compute_interval", "0",
        "--lm_n_heads", "5", "--vit_img_size", "50", "--batch_size", "0", "--max_training_steps", "-1",
    )  # fmt: skip
    named = {line.split("--")[1].split()[0] for line in errors}
    expected = {"vision_tau", "alpha", "max_frozen_ratio", "compute_interval", "lm_n_heads", "vit_patch_size"}
    assert named >= expected | {"batch_size", "max_training_steps"}
    assert "--alpha 1.0: must be in [0, 1)" in "\n".join(errors)


def test_impossible_early_stopping_is_refused(capsys):
    words = "--early_stopping --val_size 0 --es_interval 1 --es_delta -0.1 --es_patience 0"
    errors = "\n".join(errors_of(capsys, *words.split()))
    for flag in ("val_size 0: must be > 0 with early_stopping", "es_interval 1.0", "es_delta -0.1", "es_patience 0"):
        assert f"--{flag}" in errors
    assert parse_arguments(["--val_size", "0"]).train.val_size == 0


def test_unknown_flags_and_keys_are_refused_with_a_suggestion(capsys, tmp_path):
    assert "did you mean --vision_tau?" in errors_of(capsys, "--vision_tua", "1")[0]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch_sise: 4\nvision_tau: 0.1\nnonsense: 1\n")
    errors = errors_of(capsys, "--config", str(recipe))
    assert len(errors) == 2
    assert "batch_sise (did you mean batch_size?)" in errors[0]
    assert errors_of(capsys, "--config", str(tmp_path / "absent.yaml"))[0].endswith(
        "cannot be read (No such file or directory)"
    )
    recipe.write_text("batch_size: [")
    assert "not valid YAML" in errors_of(capsys, "--config", str(recipe))[0]
    recipe.write_text("batch_size: many")
    assert "batch_size" in errors_of(capsys, "--config", str(recipe))[0]


def test_flags_go_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((ROOT / "configs/quickstart.yaml").read_text() + "\nseed: 5\nlog_interval: 7\ncompile: true\n")
    train = parse_arguments(["--config", str(recipe), "--log_interval", "9"]).train
    assert (train.seed, train.log_interval, train.compile, train.max_grad_norm) == (5, 9, True, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_parse_and_name_their_own_command(name):
    path = ROOT / "configs" / f"{name}.yaml"
    parse_arguments(["--config", str(path), "--enable_grades"])
    header = path.read_text().split("\n\n")[0]
    command = (
        "python train.py --enable_grades" if name == "quickstart" else f"python train.py --config configs/{name}.yaml"
    )
    assert command in header


@pytest.mark.parametrize(
    ("name", "parameters", "components", "taus"),
    [
        ("nanovlm_222m", 222_082_176, 258, (0.30, 6.00)),
        ("nanovlm_450m", 460_114_016 - 32, 272, (0.30, 6.00)),
        ("table10_nanovlm", 460_114_016 - 32, 272, (0.30, 6.00)),
        ("table10_nanovlm_alt", 460_114_016 - 32, 272, (6.30, 3.90)),
    ],
)
def test_recipes_build_with_the_right_counts(name, parameters, components, taus):
    import torch

    from grades import find_components
    from models.vision_language_model import VisionLanguageModel

    settings = parse_arguments(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        model = VisionLanguageModel(settings.vlm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(find_components(model)) == components
    grades = settings.grades
    assert (grades.vision_tau, grades.language_tau, grades.alpha, grades.compute_interval) == (*taus, 0.28, 20)


def test_the_resolved_settings_are_a_recipe_again(tmp_path):
    import yaml

    settings = parse_arguments(["--vision_tau", "0.7", "--target_components", "fc1", "q_proj"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
    assert recipe_as_flags(path)
    again = parse_arguments(["--config", str(path)])
    assert (again.vlm, again.train, again.grades) == (settings.vlm, settings.train, settings.grades)


def test_help_and_errors_come_before_torch_is_imported():
    for flags, status in (("'--help'", 0), ("'--alpha', '2'", 2)):
        program = f"import sys; sys.modules['torch'] = None; sys.argv = ['train.py', {flags}]; __name__ = '__main__'\n"
        program += "exec(open('train.py').read().split('import contextlib')[0])"  # what stands above the heavy imports
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
