"""Settings dataclasses whose fields carry their help, bounds and choices, and the one check of them all.

Imports nothing heavy, so that a wrong setting is reported at once.
"""

import difflib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from numbers import Real
from typing import Any

BOUNDS = {"gt": (">", operator.gt), "ge": (">=", operator.ge), "lt": ("<", operator.lt), "le": ("<=", operator.le)}
RULES = {*BOUNDS, "choices", "section", "alone"}
Relation = tuple[bool, str, str]  # whether it holds, the field to blame, what is allowed for it


def doc(help: str, default: Any, **rules: Any) -> Any:
    """A dataclass field whose help text is its documentation, on the command line too.

    rules: gt, ge, lt, le, the bounds of a number, or of each number of a mapping or list; choices, all values that are
    allowed (with bounds: those that are allowed besides the numbers); section, the title of the fields from this one
    on; alone, the value of a flag that is given without one. None is allowed where it is the default.
    """
    assert rules.keys() <= RULES, rules
    metadata = {"help": help} | rules
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """A settings dataclass with fields of `doc`."""

    def relations(self) -> Iterable[Relation]:
        """What a field asks of the others."""
        return ()

    def problems(self) -> list[str]:
        """Every impossible value: flag, value, what is allowed. Empty when all is well."""
        broken = [(name, allowed) for holds, name, allowed in self.relations() if not holds]
        return field_problems(self) + [problem(name, getattr(self, name), allowed) for name, allowed in broken]

    def check(self) -> None:
        """Raise ValueError that names every impossible value at once."""
        if problems := self.problems():
            raise ValueError("\n".join(problems))


def problem(name: str, value: Any, allowed: str) -> str:
    """One impossible value in a line."""
    return f"--{name} {value}: must be {allowed}"


def field_problems(config: Any) -> list[str]:
    """Every value of a settings dataclass that its own field does not allow."""
    found = []
    for item in fields(config):
        value, rules = getattr(config, item.name), item.metadata
        if not (is_allowed(value, rules) or (value is None and item.default is None)):
            hint = suggestion(str(value), rules.get("choices", ()))
            each = " each" if isinstance(value, dict | list) else ""
            found.append(problem(item.name, value, allowed_values(rules) + each) + hint)
    return found


def is_allowed(value: Any, rules: Mapping[str, Any]) -> bool:
    """Whether a field with these rules may have the value; nan is within no bounds."""
    bounds, choices = _bounds(rules), rules.get("choices", ())
    if value in choices or not (bounds or choices):
        return True
    numbers = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return bool(bounds) and all(
        number in choices or (isinstance(number, Real) and BOUNDS[name][1](number, limit))
        for number in numbers
        for name, limit in bounds.items()
    )


def allowed_values(rules: Mapping[str, Any]) -> str:
    """The bounds and choices of a field in words: "> 0", "in [0, 1)", "one of ddp, fsdp"; empty without any."""
    bounds, choices = _bounds(rules), ", ".join(map(choice_word, rules.get("choices", ())))
    interval = " and ".join(f"{BOUNDS[name][0]} {limit:g}" for name, limit in bounds.items())
    if len(bounds) == 2:
        low, high = bounds.values()
        interval = f"in {'[' if 'ge' in bounds else '('}{low:g}, {high:g}{']' if 'le' in bounds else ')'}"
    return f"{interval} or {choices}" if interval and choices else interval or (choices and f"one of {choices}")


def choice_word(choice: Any) -> str:
    """A choice as it is written on the command line."""
    return {True: "on", False: "off"}.get(choice, str(choice)) if isinstance(choice, bool) else str(choice)


def _bounds(rules: Mapping[str, Any]) -> dict[str, float]:
    return {name: rules[name] for name in BOUNDS if name in rules}


def suggestion(word: str, known: Iterable[Any]) -> str:
    """ " (did you mean NAME?)" where a known name is close to the word, else nothing."""
    close = difflib.get_close_matches(word, [str(name) for name in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
