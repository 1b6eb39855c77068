"""The command line: every field of the three configs is a flag, a YAML recipe lies under the flags."""

import dataclasses
import difflib
import json
import sys
from argparse import SUPPRESS, Action
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

from grades.config import AUTO, GradESConfig
from models.config import TrainConfig, VLMConfig, validate
from training.trackers import check_tracker

DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
CONFIG_CLASSES = (VLMConfig, TrainConfig, GradESConfig)
# Fields of VLMConfig that do not shape the weights: a flag may change them for a checkpoint.
FREE_FIELDS = {
    "vit_dropout", "vit_model_type", "lm_dropout", "lm_max_length", "lm_model_type", "lm_tokenizer", "lm_chat_template",
    "lm_eos_token_id", "max_img_size", "resize_to_max_side_len", "image_mean", "image_std", "vlm_checkpoint_path",
    "vlm_load_backbone_weights", "hf_repo_name",
}  # fmt: skip


@dataclass
class Settings:
    """All that a run is told."""

    vlm: VLMConfig
    train: TrainConfig
    grades: GradESConfig
    recipe: Path
    given: frozenset[str]  # names of the flags on the command line

    def take_over(self, vlm: VLMConfig, origin: str) -> None:
        """Make vlm, the config of a checkpoint or of backbones, the run's; flags that were given go over it.

        Raises ValueError where a flag asks for another shape than the weights have, and where the whole is impossible.
        """
        ours = self.vlm
        wanted = {name: getattr(ours, name) for name in self.given | {"vlm_checkpoint_path"} if hasattr(ours, name)}
        problems = [
            f"--{name} {value}: must be {getattr(vlm, name)}, as {origin} has it"
            for name, value in sorted(wanted.items())
            if name not in FREE_FIELDS and value != getattr(vlm, name)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        self.vlm = dataclasses.replace(vlm, **wanted)
        validate(self.vlm, self.train, self.grades)

    def as_dict(self) -> dict:
        """The resolved settings, flat as in a recipe, so that they are a recipe again."""
        return {
            name: value
            for config in (self.vlm, self.train, self.grades)
            for name, value in dataclasses.asdict(config).items()
            if value is not None and name not in ("resume", "resume_override")
        }


class BothTowers(Action):
    """--lr_backbones: sets the learning rate of both towers; what comes after it goes over it."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.lr_vision_backbone = namespace.lr_language_backbone = value


class Parser(HfArgumentParser):
    """HfArgumentParser, with --no_x for every boolean, JSON for mappings, and errors of one line each."""

    def __init__(self, **kwargs):
        super().__init__(CONFIG_CLASSES, allow_abbrev=False, **kwargs)
        self.add_argument("--config", type=Path, default=DEFAULT_RECIPE, help="YAML recipe; flags go over it")
        both = "peak learning rate of both towers: --lr_vision_backbone and --lr_language_backbone"
        self.add_argument(
            "--lr_backbones", "--lr-backbones", type=float, action=BothTowers, default=SUPPRESS, help=both
        )
        for field in fields().values():
            if field.type is bool and field.default is False:  # the others have it from HfArgumentParser
                names = f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"
                self.add_argument(*names, dest=field.name, action="store_false", default=False, help=SUPPRESS)
        for action in self._actions:
            if action.type in (dict[str, str], dict[str, float]):
                action.type = json_mapping
            if action.type is string_to_bool:
                action.type = on_or_off
            if action.dest in ("vision_tau", "language_tau"):
                action.type = number_or_auto
            if action.dest == "profile":
                action.nargs, action.const = "?", 5

    def error(self, message: str):
        """End with the message alone: a usage text of a hundred flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def on_or_off(text: str) -> bool:
    return string_to_bool({"on": "true", "off": "false"}.get(text.lower(), text))


def number_or_auto(text: str) -> float | str:
    return text if text == AUTO else float(text)


def json_mapping(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text} is not a JSON mapping")
    return value


def fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for config in CONFIG_CLASSES for field in dataclasses.fields(config)}


def recipe_as_flags(path: Path) -> list[str]:
    """The recipe as command-line flags, so that its values are read and checked as those are.

    Raises ValueError that names the file and every unknown key.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: is not valid YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: must be a mapping of settings to values")
    known = {*fields(), "lr_backbones"}
    if unknown := [str(key) for key in recipe if key not in known]:
        lines = [f"--config {path}: unknown setting {key}{_suggestion(key, known)}" for key in unknown]
        raise ValueError("\n".join(lines))
    flags: list[str] = []
    for key, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _suggestion(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """Read flags and recipe, check all of it; ends the program with every error at once, before any work."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="train.py",
        description="Train a nanoVLM; --enable_grades freezes each weight matrix when it has converged. Booleans are "
        "switched by --x, --x off (or false) and --no_x; dashes do as well as _. The defaults are the recipe's.",
        usage="train.py [--config RECIPE] [--enable_grades] [--FLAG VALUE ...]",
    )
    try:
        recipe = _recipe_of(argv)
        if {"-h", "--help"} & set(argv):
            parser.set_defaults(**vars(parser.parse_known_args(recipe_as_flags(recipe))[0]))
            parser.print_help()
            parser.exit()
        *configs, _, unknown = parser.parse_args_into_dataclasses(
            [*recipe_as_flags(recipe), *argv], return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            known = [f"--{name}" for name in (*fields(), "lr_backbones")]
            raise ValueError("\n".join(f"unknown argument {word}{_suggestion(word, known)}" for word in unknown))
        validate(*configs)
        check_tracker(configs[1])
    except ValueError as error:
        parser.error(str(error).replace("\n", f"\n{parser.prog}: error: "))
    words = (word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--"))
    return Settings(*configs, recipe=recipe, given=frozenset(word.removeprefix("no_") for word in words))


def _recipe_of(argv: list[str]) -> Path:
    """The recipe that argv names, looked for before all else is read."""
    from argparse import ArgumentParser

    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path, default=DEFAULT_RECIPE)
    return finder.parse_known_args(argv)[0].config
