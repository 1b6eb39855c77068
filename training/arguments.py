"""The command line: every field of the three configs is a flag, and a YAML recipe holds what flags do not give."""

import contextlib
import dataclasses
import json
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from data.mixture import MixtureError, mixture_of
from grades.config import ROLLBACK, GradESConfig
from grades.fields import field_problems, problem, suggestion
from models.config import RETIRED, TrainConfig, VLMConfig, check_settings, retired_problems
from training.flag_help import help_text

DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
CONFIG_CLASSES = (VLMConfig, TrainConfig, GradESConfig)
# Fields of VLMConfig that do not shape the weights: a flag may change them for a checkpoint.
FREE_FIELDS = {
    "vit_dropout", "vit_model_type", "lm_dropout", "lm_max_length", "lm_model_type", "lm_tokenizer", "lm_chat_template",
    "lm_eos_token_id", "image_layout", "max_crops", "overlap_margin", "keep_aspect", "max_img_size",
    "resize_to_max_side_len", "mp_video_pool_size", "image_mean", "image_std", "max_video_frames",
    "vlm_checkpoint_path", "vlm_load_backbone_weights", "hf_repo_name",
}  # fmt: skip
# Of these, what a recipe named by --config changes too: stages differ in the lengths of rows, crops and frames.
RECIPE_FIELDS = {"lm_max_length", "max_crops", "max_video_frames"}
BOTH_TOWERS = "lr_backbones"  # a flag for lr_vision_backbone and lr_language_backbone
SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
KINDS = {
    bool: "on or off", int: "a whole number", float: "a number", str: "text", list: "a list",
    dict: "a mapping, as a=b,c=d or JSON",
}  # fmt: skip


@dataclasses.dataclass
class Settings:
    """All settings of a run."""

    vlm: VLMConfig
    train: TrainConfig
    grades: GradESConfig
    recipe: Path
    given: frozenset[str]  # names of the flags on the command line
    in_recipe: frozenset[str] = frozenset()  # of RECIPE_FIELDS those in a recipe that --config names

    def use_model_config(self, vlm: VLMConfig, origin: str) -> None:
        """Make vlm, the config of a checkpoint or of pretrained backbones, the run's.

        Flags, and of a recipe that --config names RECIPE_FIELDS, override it.

        origin: what an error calls it. Raises ValueError where a flag asks for another shape than the weights have, and
        where the settings as a whole are impossible.
        """
        ours = self.vlm
        names = self.given | self.in_recipe | {"vlm_checkpoint_path"}
        wanted = {name: getattr(ours, name) for name in names if hasattr(ours, name)}
        problems = [
            f"--{name} {value}: must be {getattr(vlm, name)}, as {origin} has it"
            for name, value in sorted(wanted.items())
            if name not in FREE_FIELDS and value != getattr(vlm, name)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        self.vlm = dataclasses.replace(vlm, **wanted)
        check_settings(self.vlm, self.train, self.grades)

    @property
    def shows_videos(self) -> bool:
        """Whether the rows may hold videos, as far as the settings tell: where they say how many frames."""
        return "max_video_frames" in self.given | self.in_recipe

    @property
    def weights(self) -> tuple[str, str] | None:
        """(flag, its value): the checkpoint that a new run starts from; None where it is none."""
        if self.train.resume_weights is not None:
            return "resume_weights", self.train.resume_weights
        if self.train.resume_from_vlm_checkpoint:
            return "vlm_checkpoint_path", self.vlm.vlm_checkpoint_path
        return None

    def as_dict(self) -> dict[str, Any]:
        """All settings, flat as in a recipe, so that they are a recipe again."""
        left_out = {"resume", "resume_override"}
        if not self.shows_videos and self.vlm.max_video_frames == VLMConfig.max_video_frames:
            left_out.add("max_video_frames")  # in a recipe it would say that there are videos
        return {
            name: value
            for config in (self.vlm, self.train, self.grades)
            for name, value in dataclasses.asdict(config).items()
            if value is not None and name not in left_out
        }


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Every setting that is a flag, by name."""
    return {field.name: field for config in CONFIG_CLASSES for field in dataclasses.fields(config)}


def field_types() -> dict[str, Any]:
    """The type of every setting, by name."""
    return {name: kind for config in CONFIG_CLASSES for name, kind in get_type_hints(config).items()}


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """Read flags and recipe, and check all of it; ends the program with every error at once, before any work."""
    flags, problems = read_flags(sys.argv[1:] if argv is None else argv)
    shown = {"help", "help_all"} & flags.keys()
    is_named, recipe = "config" in flags, Path(flags.pop("config", DEFAULT_RECIPE))
    try:
        texts = read_recipe(recipe)
    except ValueError as error:
        end(problems + str(error).splitlines())
    texts = without_other_taus(texts, flags.get("metric"))
    values, unreadable = read_values(texts | {name: flags[name] for name in flags if name not in shown})
    vlm, train, grades = configs = [_make(config, values) for config in CONFIG_CLASSES]
    if shown:
        with contextlib.suppress(BrokenPipeError):  # as of a pager that was closed
            print(help_text(configs, everything="help_all" in shown), flush=True)
        sys.exit(0)
    problems += unreadable
    if unreadable:  # the fields alone: what they ask of each other is not known
        problems += [line for config in configs for line in field_problems(config)]
    else:
        try:
            check_settings(vlm, train, grades)
        except ValueError as error:
            problems += str(error).splitlines()
    for name in ("train_dataset_path", "train_dataset_name"):
        if train.mixture and name in flags:
            allowed = "left out with a mixture, which --mixture none leaves out"
            problems.append(problem(name, getattr(train, name), allowed))
    if problems:
        end(problems)
    in_recipe = RECIPE_FIELDS & texts.keys() if is_named else ()
    return Settings(vlm, train, grades, recipe, frozenset(flags), frozenset(in_recipe))


def without_other_taus(recipe: dict[str, Any], metric: str | None) -> dict[str, Any]:
    """The recipe without its taus where the flag --metric has another unit: nats are no weight change."""
    if metric is None or (metric == ROLLBACK) == (recipe.get("metric") == ROLLBACK):
        return recipe
    return {name: value for name, value in recipe.items() if name != "taus" and not name.endswith("_tau")}


def as_flags(message: str) -> str:
    """The message of a library, which names settings, with -- before the one that each line begins with."""
    begins = re.compile(rf"({'|'.join(fields())}) [^:\n]*: ")
    return "\n".join(f"--{line}" if begins.match(line) else line for line in message.splitlines())


def end(problems: Iterable[str]) -> NoReturn:
    """End the program with a line for each problem; a usage text of a hundred flags would hide them."""
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        name = Path(sys.argv[0]).name
        program = name if name in ("inspect_data.py", "verify_model_setup.py") else "train.py"
        print("\n".join(f"{program}: error: {problem}" for problem in problems), file=sys.stderr)
    sys.exit(2)


def _make(config: type, values: dict[str, Any]) -> Any:
    return config(**{field.name: values[field.name] for field in dataclasses.fields(config) if field.name in values})


class Parser(ArgumentParser):
    """Divides a command line into flags and their values, which stay text."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("--help_all", action="store_true")
        self.add_argument("--config")
        self.add_argument(f"--{BOTH_TOWERS}", action=BothTowers)
        types = field_types()
        for name, field in fields().items():
            if bool in (types[name], *get_args(types[name])):
                self.add_argument(f"--{name}", nargs="?", const="on")
                self.add_argument(f"--no_{name}", dest=name, action="store_const", const="off")
            elif "alone" in field.metadata:
                self.add_argument(f"--{name}", nargs="?", const=str(field.metadata["alone"]))
            else:
                lists = any(get_origin(kind) is list for kind in (types[name], *get_args(types[name])))
                several = lists and name != "mixture"  # which is a file
                self.add_argument(f"--{name}", nargs="+" if several else None)

    def error(self, message: str) -> NoReturn:
        end([message])


class BothTowers(Action):
    """--lr_backbones: sets the learning rate of both towers; a flag after it overrides it."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        namespace.lr_vision_backbone = namespace.lr_language_backbone = value


def read_flags(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(text of each flag given, problems): x-y means x_y; unknown flags are named with what they may have meant."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    given, unknown = Parser().parse_known_args(words)
    known = [f"--{name}" for name in (*fields(), BOTH_TOWERS, "config", "help_all")]
    problems = [
        f"unknown flag {word}{suggestion(word.split('=')[0], known)}" for word in unknown if word.startswith("-")
    ]
    if unknown and not problems:  # else it may be the value of an unknown flag
        recipe = " (a recipe is given as --config FILE)" if unknown[0].endswith((".yaml", ".yml")) else ""
        problems = [f"unexpected {' '.join(unknown)}: must follow a flag{recipe}"]
    return vars(given), problems


class RecipeLoader(yaml.SafeLoader):
    """Reads each value as the text in the file, which no rule of YAML's changes; null alone is not text."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe by name: text, a list or a mapping of texts.

    Raises ValueError that names the file and every unknown name.
    """
    recipe = _read_yaml(path, "config") or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {path}: must be a mapping of settings to values")
    known = {*fields(), *RETIRED, BOTH_TOWERS}
    problems = [f"unknown setting {key}{suggestion(str(key), known)}" for key in recipe if key not in known]
    retired = {name: SWITCH.get(str(recipe.pop(name)).lower()) for name in RETIRED if name in recipe}
    if problems := problems + retired_problems(retired):
        raise ValueError("\n".join(f"--config {path}: {problem}" for problem in problems))
    if BOTH_TOWERS in recipe:
        both = recipe.pop(BOTH_TOWERS)
        recipe = {"lr_vision_backbone": both, "lr_language_backbone": both} | recipe
    return {name: value for name, value in recipe.items() if value is not None}


def _read_yaml(path: Path, flag: str) -> Any:
    """What a YAML file holds, each value as text. Raises ValueError that names the flag."""
    try:
        return yaml.load(path.expanduser().read_text(encoding="utf-8"), RecipeLoader)
    except OSError as error:
        raise ValueError(f"--{flag} {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--{flag} {path}: is not valid YAML: {error}") from None


def read_mixture(value: Any) -> list[dict[str, Any]]:
    """The groups of a mixture: of a file, or as a recipe has them; "none", or an empty list, is none.

    Raises MixtureError that names each impossible value.
    """
    if value in ("none", []):
        return []
    if isinstance(value, str):
        try:
            value = _read_yaml(Path(value), "mixture")
        except ValueError as error:
            raise MixtureError(f"{error}") from None
    return mixture_of(value["mixture"] if isinstance(value, dict) and [*value] == ["mixture"] else value)


def read_values(texts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(settings, problems) of their texts; a setting that cannot be read is left out of the first."""
    types, values, problems = field_types(), {}, []
    for name, text in texts.items():
        try:
            values[name] = read_mixture(text) if name == "mixture" else read_value(types[name], text)
        except MixtureError as error:
            problems += str(error).splitlines()
        except ValueError:
            kinds = get_args(types[name]) if isinstance(types[name], UnionType) else (types[name],)
            allowed = " or ".join(KINDS[get_origin(kind) or kind] for kind in kinds if kind is not NoneType)
            problems.append(problem(name, text, allowed))
    return values, problems


def read_value(kind: Any, value: Any) -> Any:
    """The value of a setting of type `kind` from its text. Raises ValueError where it is no such value."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value  # of a flag that takes several
        for option in inner:
            with contextlib.suppress(ValueError):
                return read_value(option, alone)
        raise ValueError(value)
    if origin is list:
        return [read_value(inner[0], item) for item in (value if isinstance(value, list) else [value])]
    if origin is dict:
        mapping = _mapping(value) if isinstance(value, str) else value
        if not isinstance(mapping, dict):
            raise ValueError(value)
        return {str(key): read_value(inner[1], item) for key, item in mapping.items()}
    if kind is NoneType or isinstance(value, list | dict):
        raise ValueError(value)
    if kind is bool:
        if str(value).lower() not in SWITCH:
            raise ValueError(value)
        return SWITCH[str(value).lower()]
    return kind(str(value))


def _mapping(text: str) -> Any:
    """What JSON says, or a=b,c=d. Raises ValueError."""
    if text.lstrip()[:1] in ("{", "[") or "=" not in text:
        return json.loads(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    found = {key.strip(): value.strip() for key, _, value in pairs}
    if not all(equals and key.strip() and value.strip() for key, equals, value in pairs) or len(found) < len(pairs):
        raise ValueError(text)
    return found
