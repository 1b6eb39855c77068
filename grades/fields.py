"""Settings dataclasses whose fields carry their help, bounds and choices, and the one check of them all.

Imports nothing heavy, so that a wrong setting is reported at once.
"""

import difflib
import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import Field, field, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

BOUNDS = {"gt": (">", operator.gt), "ge": (">=", operator.ge), "lt": ("<", operator.lt), "le": ("<=", operator.le)}
RULES = {*BOUNDS, "choices", "section", "alone"}
TYPE_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}
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

    prefix: ClassVar[str] = "--"  # before the name of a field in a problem: these settings are flags

    def relations(self) -> Iterable[Relation]:
        """What a field asks of the others."""
        return ()

    def problems(self, prefix: str | None = None) -> list[str]:
        """Every impossible value: field, value, what is allowed. Empty when all is well.

        prefix: before the names of the fields, instead of the class's own.
        """
        prefix = self.prefix if prefix is None else prefix
        found = field_problems(self, prefix)
        if all(has_type(getattr(self, item.name), kind) for item, kind in typed_fields(self)):
            broken = [(name, allowed) for holds, name, allowed in self.relations() if not holds]
            found += [problem(name, getattr(self, name), allowed, prefix) for name, allowed in broken]
        return found

    def check(self, prefix: str | None = None) -> None:
        """Raise ValueError that names every impossible value at once."""
        if problems := self.problems(prefix):
            raise ValueError("\n".join(problems))


def problem(name: str, value: Any, allowed: str, prefix: str = "--") -> str:
    """One impossible value in a line."""
    return f"{prefix}{name} {value}: must be {allowed}"


def field_problems(config: Any, prefix: str = "--") -> list[str]:
    """Every value of a settings dataclass that its own field does not allow."""
    found = []
    for item, kind in typed_fields(config):
        value, rules = getattr(config, item.name), item.metadata
        if value is None and item.default is None:
            continue
        if not has_type(value, kind) or (isinstance(value, str) and _bounds(rules) and not is_allowed(value, rules)):
            hint = f" (did you mean [{value!r}]?)" if isinstance(value, str) and get_origin(kind) is list else ""
            found.append(problem(item.name, repr(value), allowed_types(kind, rules), prefix) + hint)
        elif not is_allowed(value, rules):
            hint = suggestion(str(value), rules.get("choices", ()))
            each = " each" if isinstance(value, dict | list) else ""
            found.append(problem(item.name, value, allowed_values(rules) + each, prefix) + hint)
    return found


def typed_fields(config: Any) -> list[tuple[Field[Any], Any]]:
    """The fields of a settings dataclass with their types."""
    kind: Any = type(config)
    types = _types_of(kind)
    return [(item, types[item.name]) for item in fields(config)]


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def has_type(value: Any, kind: Any) -> bool:
    """Whether the value is of the type of a field. A whole number is a number, True is none; lists are looked into."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(has_type(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(has_type(one, inner[0]) for one in value)
    if origin is not None or kind is Any:
        return origin is None or not isinstance(origin, type) or isinstance(value, origin)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def allowed_types(kind: Any, rules: Mapping[str, Any]) -> str:
    """The type of a field in words, with its bounds and choices: "a whole number >= 1", "a list of text"."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    words = []
    for one in kinds:
        if one is not NoneType and not (one is str and "choices" in rules):  # which are named below
            of = f" of {TYPE_WORDS.get(get_args(one)[0], 'values')}" if get_origin(one) is list else ""
            words.append(TYPE_WORDS.get(get_origin(one) or one, "a mapping") + of)
    allowed = allowed_values(rules)
    none = " or None" if NoneType in kinds else ""
    return f"{' or '.join(words)} {allowed}".strip() + none


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
