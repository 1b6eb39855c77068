"""Rows as lines of a file, with images beside them."""

import json
from pathlib import Path

from data.rows import load_rows
from tiny.data import encoded, picture

PNG = encoded(picture())
Q = {"question": "what is the shape?", "answer": "red"}


def read_lines(folder: Path, *lines: str | bytes | dict, name: str = "rows.jsonl") -> list[dict]:
    """What these lines of a file are as rows, with a.png, b.png and cat.jpg beside it; a str or bytes is a line as it
    is, all else is written as JSON."""
    for image in ("a.png", "b.png", "cat.jpg"):
        (folder / image).write_bytes(PNG)
    whole = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
             for line in lines]  # fmt: skip
    (folder / name).write_bytes(b"\n".join(whole))
    rows = load_rows(str(folder / name))
    return [rows[i] for i in range(len(rows))]


def turns(row: dict) -> list[tuple]:
    return [(one["user"], one["assistant"]) for one in row["texts"]]


def bad(row: dict) -> tuple[str, str]:
    return str(row["bad"]), row["bad"].first
