"""Tools in OpenAI's messages: what may be called, calls, and results. A chat template writes them its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data.values import BadRow, Number, dict_of, kind_of, shown, text_of


def tools_of(record: Mapping[str, Any]) -> list[dict]:
    """The tools of a record, a list or its JSON text; none of null. Raises BadRow."""
    given = _parsed(record.get("tools"), "tools")
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        raise BadRow(f"tools is {kind_of(given)}", shown(given))
    return [_checked(dict_of(tool, "a tool"), "a tool") for tool in given]


def calls_of(message: Mapping[str, Any]) -> list[dict]:
    """The tool calls of a message, their arguments as an object: a template makes JSON of them. Raises BadRow."""
    given = message.get("tool_calls")
    if given is not None and not isinstance(given, list | tuple):
        raise BadRow(f"tool_calls is {kind_of(given)}", shown(given))
    calls = []
    for call in given or []:
        call = _checked(dict_of(call, "a tool call"), "a tool call")
        function = dict_of(call.get("function") or call, "the function of a tool call")
        if not isinstance(function.get("name"), str):
            raise BadRow("a tool call has no name", shown(call))
        arguments = dict_of(_parsed(function.get("arguments"), "arguments") or {}, "arguments of a tool call")
        function = {"name": function["name"], "arguments": _kept(arguments)}
        calls.append({key: call[key] for key in ("id",) if call.get(key)} | {"type": "function", "function": function})
    return calls


def result_of(message: Mapping[str, Any], text: str | None) -> dict:
    """The message of a tool, with the text of its result."""
    named = {key: text_of(message.get(key), key) for key in ("name", "tool_call_id")}
    return {"role": "tool", "content": text or ""} | {key: value for key, value in named.items() if value}


def _parsed(value: Any, field: str) -> Any:
    """The value, or what its JSON text means."""
    if not isinstance(value, str) or isinstance(value, Number):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise BadRow(f"{field} is not JSON", shown(value)) from None


def _kept(arguments: dict) -> dict:
    """The arguments, which may have been JSON text."""
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except ValueError:
        raise BadRow("arguments of a tool call hold half of a surrogate pair", shown(arguments)) from None
    return arguments


def _checked(value: dict, field: str) -> dict:
    """The value as a template can make JSON of it. Raises BadRow."""
    try:
        value = _plain(value)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half of a surrogate pair, a number of 5,000 digits
        raise BadRow(f"{field} holds what is not JSON", shown(value)) from None
    return value


def _plain(value: Any) -> Any:
    """The value with numbers in place of their letters, and without the null that parquet adds for absent keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Number):
        return int(value) if value.lstrip("-").isdigit() else float(value)
    if isinstance(value, str | bool | int | float | None):
        return value
    raise ValueError
