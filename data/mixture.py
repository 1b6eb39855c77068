"""--mixture: groups of data sets, each group with a share of the training samples. How it is written, what it says.

Imports nothing heavy: the command line is checked with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.train_config import TrainConfig

GROUP_KEYS = ("name", "share", "sets")
NUMBERS = {"size": int, "rate": float, "loss_weight": float}  # of a set, all > 0
OWN_SETTINGS = ("columns", "row_function", "image_root")  # of a set, in place of the run's
SET_KEYS = ("path", "name", *NUMBERS, *OWN_SETTINGS)


class MixtureError(ValueError):
    """A mixture that cannot be, each line a sentence that says where and what is allowed."""


@dataclass(frozen=True)
class MixtureSet:
    """One data set of a mixture."""

    label: str  # unlike that of all others
    path: str
    names: tuple[str, ...]  # of subsets, as --train_dataset_name
    group: str
    group_share: float  # of all samples, in (0, 1]
    size: int | None = None  # counts in place of its rows; None: their number
    rate: float = 1.0
    loss_weight: float | None = None  # of each of its label tokens; None: as --loss_weighting says
    own_settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self, cfg: TrainConfig) -> TrainConfig:
        """The run's settings with those that the set has of its own."""
        return dataclasses.replace(cfg, **self.own_settings)


def mixture_of(value: Any) -> list[dict[str, Any]]:
    """The groups of a mixture, with numbers as numbers. value: what the file says, numbers may be text.

    Raises MixtureError that names each impossible value.
    """
    if not isinstance(value, list) or not value:
        raise MixtureError(f"--mixture: must be a list of groups {{{', '.join(GROUP_KEYS)}}}, not {value!r}")
    problems: list[str] = []
    groups = [_group(group, f"--mixture, group {number}", problems) for number, group in enumerate(value, start=1)]
    names = Counter(group.get("name") for group in groups)
    problems += [f"--mixture: {count} groups are called {name}" for name, count in names.items() if name and count > 1]
    if problems:
        raise MixtureError("\n".join(problems))
    return groups


def _group(group: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not _is_entry(group, GROUP_KEYS, GROUP_KEYS, where, problems):
        return {}
    where = f"{where} ({group['name']})"
    sets = group["sets"]
    if not isinstance(sets, list) or not sets:
        problems.append(f"{where}: sets must be a list of {{{', '.join(SET_KEYS)}}}")
        sets = []
    found = [_set(one, f"{where}, set {number}", problems) for number, one in enumerate(sets, start=1)]
    share = _number("share", group["share"], float, where, problems)
    return {"name": str(group["name"]), "share": share, "sets": found}


def _set(one: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not _is_entry(one, SET_KEYS, ("path",), where, problems):
        return {}
    found = dict(one)
    for name in NUMBERS.keys() & found.keys():
        found[name] = _number(name, found[name], NUMBERS[name], where, problems)
    if not isinstance(found.get("columns", {}), dict):
        problems.append(f"{where}: columns {found['columns']}: must be a mapping, as {{question: frage}}")
    return found


def _is_entry(value: Any, known: Sequence[str], needed: Sequence[str], where: str, problems: list[str]) -> bool:
    """Whether it is a mapping with the needed keys and no unknown ones."""
    if not isinstance(value, dict):
        problems.append(f"{where}: {value!r} must be a mapping with {', '.join(needed)}")
        return False
    wrong = [f"unknown {key}: must be one of {', '.join(known)}" for key in value if key not in known]
    wrong += [f"has no {key}" for key in needed if value.get(key) is None]
    problems += [f"{where}: {line}" for line in wrong]
    return not wrong


def _number(name: str, value: Any, kind: type, where: str, problems: list[str]) -> Any:
    try:
        number = kind(str(value))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        problems.append(f"{where}: {name} {value}: must be a {'whole ' if kind is int else ''}number > 0")
    return number


def sets_of(cfg: TrainConfig) -> list[MixtureSet]:
    """The data sets of the run's mixture, group by group; the shares of all groups make 1."""
    total = sum(group["share"] for group in cfg.mixture)
    seen: Counter[str] = Counter()
    found = []
    for group in cfg.mixture:
        for one in group["sets"]:
            names = one.get("name", "all")
            names = tuple(names) if isinstance(names, list) else (str(names),)
            label = one["path"] if names == ("all",) else f"{one['path']} {' '.join(names)}"
            seen[label] += 1
            if seen[label] > 1:
                label += f" ({seen[label]})"
            numbers = {name: one[name] for name in NUMBERS if name in one}
            own = {name: one[name] for name in OWN_SETTINGS if name in one}
            share = group["share"] / total
            found.append(MixtureSet(label, one["path"], names, group["name"], share, **numbers, own_settings=own))
    return found


def shares_of(sets: Sequence[MixtureSet], sizes: Sequence[int]) -> list[float]:
    """The share of each set in the samples: of its group's share in proportion to rate * sqrt(size).

    sizes: the rows of each, which count where it has no size of its own.
    """
    weights = [one.rate * math.sqrt(one.size or size) for one, size in zip(sets, sizes, strict=True)]
    totals: Counter[str] = Counter()
    for one, weight in zip(sets, weights, strict=True):
        totals[one.group] += weight  # type: ignore[assignment]
    return [one.group_share * weight / totals[one.group] for one, weight in zip(sets, weights, strict=True)]
