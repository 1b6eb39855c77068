"""Values of Arrow tables (parquet, save_to_disk, streams) that Python shows otherwise than they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.values import Number


def exact_floats(record: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The record with the shortest text, as a Number, of each number that has fewer than 64 bits.

    A float32 of 0.1 is 0.10000000149011612 as the 64-bit number that Python makes of it. schema: of the record's table.
    """
    short = {field.name: field.type for field in schema if "float" in str(field.type)}  # 64 bits are called double
    return record | {name: _exact(record[name], kind) for name, kind in short.items()} if short else record


def _exact(value: Any, kind: Any) -> Any:
    if isinstance(value, float):
        import numpy as np

        dtype = {"float": np.float32, "halffloat": np.float16}.get(str(kind))
        return Number(dtype(value)) if dtype and np.isfinite(value) else value
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_exact(one, kind.value_type) for one in value]
    if isinstance(value, Mapping) and hasattr(kind, "num_fields"):
        return {field.name: _exact(value.get(field.name), field.type) for field in kind}
    return value
