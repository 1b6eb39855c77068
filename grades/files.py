"""Writing files that are whole at every moment: beside their name first, then renamed."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Within this context write to the path it gives, a file or a folder with the same ending in the same folder.

    At the end it takes the place of `path` at once. After an exception `path` is as it was before.
    """
    beside = path.with_name(f"{path.stem}.tmp{path.suffix}")
    if beside.is_dir():  # of a process that was killed; what is left of a file is overwritten
        shutil.rmtree(beside)
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write the text as UTF-8."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON with a final line break."""
    write_text(path, json.dumps(value, indent=2) + "\n")
