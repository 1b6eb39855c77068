"""The command line: flags, recipes, help, and errors that come all at once and early."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from grades.config import DEFAULT_TAUS, ROLLBACK_TAU
from grades.fields import allowed_values, is_allowed
from models.config import VLMConfig
from training import preflight
from training.arguments import fields, parse_arguments, read_recipe
from training.flag_help import SHOWN

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def recipe_of(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


def errors_of(capsys, *argv: str, of=parse_arguments) -> str:
    with pytest.raises(SystemExit) as end:
        of(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


def help_of(capsys, *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as end:
        parse_arguments(list(argv))
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


def flags_in(lines: list[str]) -> list[str]:
    """The flags that have a line of their own."""
    return [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]


def test_the_flags_people_know_work():
    words = (
        "--enable_grades --vision_tau 0.30 --language_tau auto --alpha 0.28 --compute_interval 20 --log_wandb "
        "--lr_mp 0.001 --lr_vision_backbone 1e-5 --vlm_checkpoint_path there --compile --resume_from_vlm_checkpoint "
        "--train_dataset_path easy-vqa --relevance_min_rating 2 --target_components fc1 q_proj --seed 3"
    )
    settings = parse_arguments(words.split())
    train, grades = settings.train, settings.grades
    assert (grades.vision_tau, grades.language_tau, grades.alpha, grades.compute_interval) == (0.3, "auto", 0.28, 20)
    assert (train.enable_grades, train.log_wandb, train.compile, train.resume_from_vlm_checkpoint) == (True,) * 4
    assert (train.lr_mp, train.lr_vision_backbone, train.relevance_min_rating, train.seed) == (0.001, 1e-5, 2, 3)
    assert (settings.vlm.vlm_checkpoint_path, grades.target_components) == ("there", ["fc1", "q_proj"])
    assert settings.given == {word.removeprefix("--") for word in words.split() if word.startswith("--")}


def test_a_named_recipe_says_how_long_rows_are_and_the_checkpoint_the_rest(tmp_path):
    """As of the stages of a recipe, the last of which has the longest rows."""
    texts = {"first": "{image_mean: 0.25, lm_max_length: 100, max_sample_length: 90}",
             "last": "{image_mean: 0.5, lm_max_length: 200, max_sample_length: 190}"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    first, last, flagged = (
        parse_arguments(["--config", str(tmp_path / words[0]), *words[1:]])
        for words in (["first"], ["last"], ["first", "--image_mean", "0.75"])
    )
    before = dataclasses.replace(first.vlm)
    last.use_model_config(before, "the checkpoint")
    assert (last.vlm.lm_max_length, last.vlm.image_mean) == (200, 0.25)
    flagged.use_model_config(before, "the checkpoint")
    assert (flagged.vlm.lm_max_length, flagged.vlm.image_mean) == (100, 0.75)
    assert parse_arguments([]).in_recipe == frozenset()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--compile", True), ("--compile False", False), ("--compile=true", True), ("--no_compile", False),
        ("--compile on", True), ("--compile Off", False), ("--compile --no-compile", False), ("", "auto"),
        ("--compile auto", "auto"),
    ],
)  # fmt: skip
def test_booleans_mean_what_they_say(words, value):
    assert parse_arguments(words.split()).train.compile == value


def test_other_spellings_of_flags():
    settings = parse_arguments(["--vision-tau=0.5", "--enable-grades", "--source-weights", '{"shape": 2}', "--profile"])
    assert (settings.grades.vision_tau, settings.train.enable_grades) == (0.5, True)
    assert (settings.train.source_weights, settings.train.profile) == ({"shape": 2.0}, 5)
    train = parse_arguments(["--lr-backbones=3e-5", "--lr_vision_backbone", "0"]).train
    assert (train.lr_vision_backbone, train.lr_language_backbone) == (0.0, 3e-5)


def test_help_shows_the_settings_in_use_most_and_help_all_every_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, "--help")
    shown = flags_in(lines)
    assert len(lines) <= 100
    assert sorted(shown) == sorted(name for names in SHOWN.values() for name in names)
    assert any(line.startswith("  --enable_grades") for line in lines[:12])
    lines = help_of(capsys, "--help_all")
    everything = flags_in(lines)
    assert sorted(everything) == sorted({*fields(), "config", "lr_backbones"})
    text = " ".join(" ".join(lines).split())
    assert "[0.94]" in text  # the recipe's image_mean, not the class's
    assert "in [0, 1)" in text
    assert all(len(field.metadata["help"]) > 10 for field in fields().values())


@pytest.mark.parametrize(
    ("rules", "allowed", "refused", "words"),
    [
        ({"gt": 0}, [1e-9, 3], [0, -1, float("nan"), "1"], "> 0"),
        ({"ge": 0, "lt": 1}, [0, 0.99], [1, -0.1], "in [0, 1)"),
        ({"gt": 0, "le": 1}, [1], [0, 1.1], "in (0, 1]"),
        ({"choices": ("ddp", "fsdp")}, ["ddp"], ["dp", None], "one of ddp, fsdp"),
        ({"gt": 0, "choices": ("auto",)}, [1, "auto"], [0, "car"], "> 0 or auto"),
        ({"gt": 0, "choices": ()}, [{}, {"a": 1}], [{"a": 1, "b": 0}], "> 0"),
        ({}, [None, "x", -1], [], ""),
    ],
)
def test_what_a_field_allows(rules, allowed, refused, words):
    assert all(is_allowed(value, rules) for value in allowed)
    assert not any(is_allowed(value, rules) for value in refused)
    assert allowed_values(rules) == words


def test_every_impossible_value_is_named_at_once(capsys):
    given = {
        "vision_tau": "-0.1", "alpha": "1.0", "max_frozen_ratio": "1.5", "compute_interval": "0", "lm_n_heads": "5",
        "vit_patch_size": "5", "batch_size": "0", "val_size": "0", "es_interval": "1.0", "es_delta": "-0.1",
        "es_patience": "0", "metric": "weight_chnge", "log_with": "tensorbord",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in given.items()]
    errors = errors_of(capsys, *words, "--early_stopping")
    for name, value in given.items():
        assert f"error: --{name} {value}: must be " in errors
    assert "weight_change?" in errors
    assert "tensorboard?" in errors
    assert "in [0, 1)" in errors
    assert parse_arguments(["--val_size", "0.05"]).train.val_size == 0.05
    assert isinstance(parse_arguments(["--val_size", "40"]).train.val_size, int)
    assert "--val_size 1.5" in errors_of(capsys, "--val_size", "1.5")
    assert "--log_with trackio" in errors_of(capsys, "--log_with", "trackio", "--log_wandb")
    longest = ["--lr_schedule", "wsd", "--warmup_ratio_mp", "0.9"]
    assert "--cooldown_ratio 0.3: must be at most" in errors_of(capsys, *longest, "--cooldown_ratio", "0.3")
    assert parse_arguments([*longest, "--cooldown_ratio", "0.1"]).train.cooldown_ratio == 0.1


def test_unknown_flags_and_values_of_another_kind_are_named_at_once(capsys):
    words = "--vision_tua 1 --batch_size many --compile maybe --alpha 2 --source_weights [1] --val_size some"
    lines = errors_of(capsys, *words.split()).splitlines()
    assert len(lines) == 6
    assert "--vision_tua (did you mean --vision_tau?)" in lines[0]
    named = {line.split("--")[1].split()[0] for line in lines[1:]}
    assert named == {"batch_size", "compile", "alpha", "source_weights", "val_size"}
    assert "--config" in errors_of(capsys, "configs/quickstart.yaml")


def test_recipes_that_cannot_be_read(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("batch_sise: 4\nvision_tau: 0.1\nnonsense: 1\n")
    errors = errors_of(capsys, "--config", str(recipe), "--vision_tua", "1")
    assert len(errors.splitlines()) == 3
    assert "batch_sise (did you mean batch_size?)" in errors
    assert "absent.yaml" in errors_of(capsys, "--config", str(tmp_path / "absent.yaml"))
    for text, named in (("batch_size: [", "YAML"), ("batch_size: many", "--batch_size many"), ("- 1", str(recipe))):
        recipe.write_text(text)
        assert named in errors_of(capsys, "--config", str(recipe))


def test_a_recipe_is_read_as_it_is_written_and_flags_override_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    lines = "lr_backbones: 1e-3\nrun_name: 007\nlr_mp: 1e-3\ncompile: yes\nlog_interval: 7\nmixture_weights: {on: 0.5}"
    recipe.write_text(f"{(ROOT / 'configs/quickstart.yaml').read_text()}\n{lines}\nresume: null\ntarget_components: []")
    settings = parse_arguments(["--config", str(recipe), "--log_interval", "9"])
    train = settings.train
    assert (train.lr_mp, train.run_name, train.compile, train.resume) == (1e-3, "007", True, None)
    assert (train.mixture_weights, settings.grades.target_components) == ({"on": 0.5}, [])
    assert (train.log_interval, train.max_grad_norm) == (9, 1.0)
    assert settings.given == {"log_interval"}


def test_settings_of_nanovlm_that_mean_nothing_here(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lm_use_tokens: false\nvit_cls_flag: False\n")
    assert read_recipe(recipe) == {}
    recipe.write_text("lm_use_tokens: true\n")
    assert "lm_use_tokens" in errors_of(capsys, "--config", str(recipe))
    assert "--lm_use_tokens" in errors_of(capsys, "--lm_use_tokens")
    VLMConfig.from_dict({"vit_cls_flag": False})
    with pytest.raises(ValueError, match="vit_cls_flag True"):
        VLMConfig.from_dict({"vit_cls_flag": True})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_parse_and_name_their_own_command(name):
    parse_arguments(["--config", recipe_of(name), "--enable_grades"])
    header = Path(recipe_of(name)).read_text().split("\n\n")[0]
    command = "--enable_grades" if name == "quickstart" else f"--config configs/{name}.yaml"
    assert f"python train.py {command}" in header


@pytest.mark.parametrize(
    ("name", "parameters", "components", "taus"),
    [
        ("nanovlm_222m", 222_082_176, 258, (0.30, 6.00)),
        ("nanovlm_450m", 460_114_016 - 32, 272, (0.30, 6.00)),
        ("table10_nanovlm", 460_114_016 - 32, 272, (0.30, 6.00)),
        ("table10_nanovlm_alt", 460_114_016 - 32, 272, (6.30, 3.90)),
        ("nanomolmo2_model", 900_604_928, 24 * 4 + 28 * 7, (0.30, 6.00)),
    ],
)
def test_recipes_build_with_the_right_counts(name, parameters, components, taus):
    import torch

    from grades import find_components
    from models.vision_language_model import VisionLanguageModel

    settings = parse_arguments(["--config", recipe_of(name)])
    with torch.device("meta"):
        model = VisionLanguageModel(settings.vlm)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(find_components(model)) == components
    grades = settings.grades
    assert (grades.vision_tau, grades.language_tau, grades.alpha, grades.compute_interval) == (*taus, 0.28, 20)


def test_a_recipes_taus_are_of_its_own_metric():
    """Weight change and nats have other units; what is given as a flag holds."""
    rollback = ["--metric", "rollback", "--average_weights", "0.99", "--lr_schedule", "constant"]
    paper = ["--config", recipe_of("nanovlm_222m")]
    assert parse_arguments(paper).grades.tau_of("language", "mlp") == 6.0
    assert parse_arguments([*paper, *rollback]).grades.tau_of("language", "mlp") == ROLLBACK_TAU
    assert parse_arguments([*paper, *rollback, "--language_tau", "0.01"]).grades.tau_of("language", "mlp") == 0.01
    assert parse_arguments([*paper, "--metric", "gradient_norm"]).grades.tau_of("language", "mlp") == 6.0
    ours = ["--config", recipe_of("nlvr"), "--metric", "weight_change"]
    assert parse_arguments(ours).grades.tau_of("language", "mlp") == DEFAULT_TAUS["language"]


def test_the_resolved_settings_are_a_recipe_again(tmp_path):
    path, words = tmp_path / "config.yaml", ["--vision_tau", "0.7", "--target_components", "fc1", "q_proj"]
    default = str(VLMConfig.max_video_frames)
    for more in (["--run_name", "007"], ["--max_video_frames", "3"], ["--max_video_frames", default]):
        settings = parse_arguments([*words, *more])
        path.write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
        again = parse_arguments(["--config", str(path)])
        assert (again.vlm, again.train, again.grades) == (settings.vlm, settings.train, settings.grades)
        assert again.shows_videos == settings.shows_videos == ("--max_video_frames" in more)


# What names and paths tell


def path_errors(capsys, words: str) -> str:
    return errors_of(capsys, *words.split(), of=lambda argv: preflight.check_paths(parse_arguments(argv)))


def test_a_recipe_says_how_long_rows_are_whatever_the_checkpoint_does(tmp_path):
    """Stages differ in it; all else that it says of the model is the checkpoint's unless a flag says otherwise."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lm_max_length: 8000\nmax_sample_length: 8000\nmax_video_frames: 5\nimage_mean: 0.25\n")
    settings = parse_arguments(["--config", str(recipe), "--lm_dropout", "0.5"])
    settings.use_model_config(VLMConfig(lm_max_length=4096, max_video_frames=3, image_mean=0.125), "a checkpoint")
    found = settings.vlm
    assert (found.lm_max_length, found.max_video_frames, found.image_mean, found.lm_dropout) == (8000, 5, 0.125, 0.5)
    recipe.write_text("image_mean: 0.25\n")
    settings = parse_arguments(["--config", str(recipe)])
    settings.use_model_config(VLMConfig(lm_max_length=6000, max_video_frames=3), "a checkpoint")
    assert (settings.vlm.lm_max_length, settings.vlm.max_video_frames) == (6000, 3)


def test_absent_files_and_folders_are_all_named(capsys, tmp_path, monkeypatch):
    words = f"--train_dataset_path nope.jsonl --test_dataset_path {tmp_path}/no --vlm_load_backbone_weights "
    words += "--vit_model_type ./siglip --lm_model_type scratch --lm_tokenizer ~/none/at/all"
    errors = path_errors(capsys, words)
    for flag in (
        "train_dataset_path nope.jsonl",
        "test_dataset_path",
        "vit_model_type ./siglip",
        "lm_tokenizer ~/none",
    ):
        assert f"error: --{flag}" in errors
    assert len(errors.splitlines()) == 4
    assert "--resume gone" in path_errors(capsys, "--resume gone")
    assert "--vlm_checkpoint_path checkpoints" in path_errors(capsys, "--resume_from_vlm_checkpoint")
    assert "--resume_weights stage1: no such" in path_errors(capsys, "--resume_weights stage1")
    assert f"--resume_weights {tmp_path}/stage1: no such" in path_errors(capsys, f"--resume_weights {tmp_path}/stage1")
    assert f"--resume_weights {tmp_path}: " in path_errors(capsys, f"--resume_weights {tmp_path}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--log_with trackio" in path_errors(capsys, "--log_with trackio")
    (tmp_path / "run").mkdir()
    taken = f"--output_dir {tmp_path} --run_name run"
    assert "--run_name run" in path_errors(capsys, taken)
    preflight.check_paths(parse_arguments([*taken.split(), "--resume", "auto"]))
    preflight.check_paths(parse_arguments(["--train_dataset_path", "nope.jsonl", "--dry_run"]))  # reads no data


def test_the_hub_is_asked_once_and_only_for_what_is_not_here(capsys, tmp_path, monkeypatch):
    asked = []

    def refuse(what, instead, timeout_s):
        asked.append(what)
        raise ConnectionError(f"{what}: no hub")

    monkeypatch.setattr(preflight, "require_hub", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = f"--config {recipe_of('nanovlm_222m')}"
    for kind in ("models--google--siglip-base-patch16-224", "datasets--HuggingFaceM4--the_cauldron"):
        (tmp_path / kind / "snapshots" / "0").mkdir(parents=True)
    assert "--lm_model_type HuggingFaceTB/SmolLM2-135M: no hub" in path_errors(capsys, config)
    assert len(asked) == 1
    assert "the_cauldron" not in asked[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in path_errors(capsys, config)
    for words in (config + " --dry_run", config + f" --lm_model_type {tmp_path} --lm_tokenizer easy-vqa", ""):
        preflight.check_paths(parse_arguments(words.split()))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--alpha", "2"], 2), (["--train_dataset_path", "nope.jsonl"], 2)]
)
def test_help_and_errors_come_before_heavy_imports(words, status):
    program = f"""
import runpy, sys
sys.argv = ["train.py", *{words}]
sys.modules |= dict.fromkeys(("torch", "transformers", "datasets", "numpy", "PIL"))
runpy.run_path("train.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize(("given", "expected"), [(["0.3"], 0.3), (["0.1", "0.2", "0.3"], [0.1, 0.2, 0.3])])
def test_a_flag_of_one_number_or_several(given, expected):
    assert parse_arguments(["--image_mean", *given]).vlm.image_mean == expected


def test_help_shows_lists_of_numbers(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--image_mean", "0.1", "0.2", "0.3", "--help_all"])
    assert "[0.1 0.2 0.3]" in " ".join(capsys.readouterr().out.split())  # however wide the terminal is


def test_help_says_auto_where_rollback_takes_a_tau_for_it(capsys):
    """GradESConfig.tau_of: the paper's defaults are not in nats."""
    for flags, tau in (
        ([], "[auto]"),
        (["--metric", "weight_change"], "[1e-05]"),
        (["--vision_tau", "0.01"], "[0.01]"),
    ):
        assert tau in " ".join(help_of(capsys, *flags, "--help")).split("--vision_tau X")[1].split("--language_tau")[0]
