"""Where the parts of a downloaded data set lie. What is no row is hidden: the folder itself is read as a data set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.molmo2_sets import PublicSet
from grades.files import write_json

STATUS = ".download_status.json"


@dataclass(frozen=True)
class Places:
    """The folders and files of one data set below the folder of all."""

    output: Path
    one: PublicSet

    @property
    def folder(self) -> Path:
        """Of the rows: what --train_dataset_path takes."""
        return self.output / self.one.name

    @property
    def own(self) -> Path:
        """What this project writes beside the rows."""
        return self.folder / ".fetch"

    @property
    def hub(self) -> Path:
        """Of the files as the hub has them. From rows with links those in `folder` are made."""
        return self.own / "hub" if self.one.kind == "url" else self.folder

    @property
    def lock(self) -> Path:
        """The revision and its files, written at the first download."""
        return self.own / "lock.json"

    @property
    def failures(self) -> Path:
        """One line for each picture that could not be fetched."""
        return self.own / "failures.jsonl"

    @property
    def pictures(self) -> Path:
        """Of all sets: several link to the same pictures."""
        return self.output / "fetched"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none. Raises ValueError where it is damaged."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and the download continues") from None


def put_json(path: Path, value: Any) -> None:
    """Write the value, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def set_status(output: Path, name: str, facts: dict[str, Any]) -> None:
    """Write what became of a data set into the state file; what was known of it besides stays."""
    status = read_json(output / STATUS)
    put_json(output / STATUS, status | {name: status.get(name, {}) | facts})
