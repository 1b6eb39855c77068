"""The texts of --help, the settings people use, and --help_all, all of them."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from grades.config import AUTO
from grades.fields import allowed_values, choice_word
from models.config import RETIRED

INTRODUCTION = """\
usage: train.py [--config RECIPE] [--enable_grades] [--FLAG VALUE ...]

Train a nanoVLM; --enable_grades freezes each weight matrix when it has converged. Brackets hold the value of the
recipe, which a flag overrides. --x and --x on switch on, --no_x and --x off switch off; --x-y means --x_y."""
SHOWN = {
    "What to train": (
        "enable_grades", "config", "vit_model_type", "lm_model_type", "resume_from_vlm_checkpoint",
        "vlm_checkpoint_path", "lora_rank",
    ),
    "On what": (
        "train_dataset_path", "train_dataset_name", "test_dataset_path", "val_size", "packing", "max_sample_length",
    ),
    "How long": (
        "max_training_steps", "batch_size", "gradient_accumulation_steps", "lr_mp", "lr_vision_backbone",
        "lr_language_backbone", "lr_schedule", "average_weights", "eval_interval", "seed",
    ),
    "GradES": ("metric", "vision_tau", "language_tau", "alpha", "compute_interval"),
    "Output": ("output_dir", "run_name", "resume", "log_with", "dry_run"),
    "Hardware": ("dtype", "compile", "activation_checkpointing", "num_workers", "parallel"),
}  # fmt: skip
# Flags that are no setting of their own, under the flag that they follow.
MORE_FLAGS = {
    "enable_grades": ("config FILE", "YAML recipe; configs/ holds them"),
    "lr_language_backbone": ("lr_backbones X", "peak learning rate of both towers"),
}
HELP_COLUMN = 34


def help_text(configs: Sequence[Any], everything: bool) -> str:
    """The help, with the values that the configs have; everything: of all flags."""
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 80), 120)
    sections: dict[str, list[str]] = {}
    entries: dict[str, str] = {}
    for section, flag, text in _flags(configs, everything):
        name = flag.split()[0]
        entries[name] = _entry(flag, text, width)
        sections.setdefault(section, []).append(name)
    groups: Mapping[str, Sequence[str]] = sections if everything else SHOWN
    blocks = [f"{title}:\n" + "\n".join(entries[name] for name in names) for title, names in groups.items()]
    end = [] if everything else [f"--help_all: all {len(entries)} flags"]
    return "\n\n".join([INTRODUCTION, *blocks, *end])


def _flags(configs: Sequence[Any], everything: bool) -> Iterator[tuple[str, str, str]]:
    """(section, flag with a word for its value, help) of every flag."""
    section = ""
    for config in configs:
        types = get_type_hints(type(config))
        for field in dataclasses.fields(config):
            name, rules = field.name, field.metadata
            section = rules.get("section", section)
            if name in RETIRED:
                continue
            text = rules["help"] if everything else rules["help"].split(". ")[0]
            untold = [choice for choice in rules.get("choices", ()) if choice_word(choice) not in text]
            if untold or (everything and {"lt", "le"} & rules.keys()):
                text += f"; {allowed_values(rules)}"
            yield section, name + _placeholder(types[name]), text + _in_brackets(_value(config, name))
            if name in MORE_FLAGS:
                yield section, *MORE_FLAGS[name]


def _value(config: Any, name: str) -> Any:
    """What the flag has in the recipe; auto for a tau that the metric rollback takes for it (GradESConfig.tau_of)."""
    value = getattr(config, name)
    return AUTO if name.endswith("_tau") and config.means_auto(value) else value


def _placeholder(kind: Any) -> str:
    """What stands for a value of this type behind the flag."""
    plain: Any = next(iter(get_args(kind)), kind) if isinstance(kind, UnionType) else get_origin(kind) or kind
    return {bool: "", int: " N", float: " X", list: " NAME ...", dict: " KEY=VALUE,..."}.get(plain, " NAME")


def _in_brackets(value: Any) -> str:
    """The value, shortened; nothing for None and what is empty."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        text = ", ".join(str(group["name"]) for group in value)
    elif isinstance(value, bool):
        text = "on" if value else "off"
    elif isinstance(value, dict):
        text = json.dumps(value) if value else ""
    else:
        text = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    return f" [{textwrap.shorten(text, 60, placeholder=' ...')}]" if text else ""


def _entry(flag: str, text: str, width: int) -> str:
    """The flag and beside it, in lines of this width, its help."""
    first, *more = textwrap.wrap(text, width - HELP_COLUMN, break_on_hyphens=False)
    head = f"  --{flag}"
    lines = [head.ljust(HELP_COLUMN) + first] if len(head) < HELP_COLUMN else [head, " " * HELP_COLUMN + first]
    return "\n".join([*lines, *(" " * HELP_COLUMN + line for line in more)])
