"""Write tasks of lmms-eval whose data is in a local folder, and print their names: <task>_local.

    ENV/bin/python scripts/lmms_eval_local.py --tasks mmstar,pope --data_root DATA --folder FOLDER
    ENV/bin/lmms-eval --include_path FOLDER --tasks mmstar_local,pope_local ...

In all else a task is lmms-eval's own. scripts/run_lmms_eval.sh calls this with the Python of lmms-eval's environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.tables import files_of_split, find_folder, is_saved
from models.hub import checkpoint_folder
from training.checkpoint_folder import find_checkpoint


class TaskLoader(yaml.SafeLoader):
    """Reads a task's functions by their names."""


TaskLoader.add_constructor("!function", lambda loader, node: node.value)


def tasks_folder() -> Path:
    """Where the installed lmms-eval has its tasks. Raises ValueError."""
    spec = importlib.util.find_spec("lmms_eval")  # without importing it, which takes half a minute
    if spec is None or spec.origin is None:
        raise ValueError(f"{sys.executable}: has no lmms-eval; take the Python of its environment: docs/evaluation.md")
    return Path(spec.origin).parent / "tasks"


def find_task(tasks: Path, name: str) -> Path:
    """The file of a task. Raises ValueError."""
    line = re.compile(rf"^task:[ ]*([\"']?){re.escape(name)}\1[ ]*$", re.MULTILINE)
    for path in sorted(tasks.rglob("*.yaml")):
        if line.search(path.read_text(encoding="utf-8")):
            return path
    raise ValueError(f"--tasks {name}: is no single task of {tasks}; lmms-eval tasks subtasks lists them")


def settings_of(path: Path) -> dict[str, Any]:
    """A task's settings with those of the files that it includes."""
    given = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    included = given.pop("include", [])
    found: dict[str, Any] = {}
    for other in reversed([included] if isinstance(included, str) else included):
        found |= settings_of(path.parent / other)
    return found | given


def local_task(tasks: Path, name: str, root: Path) -> dict[str, Any]:
    """The settings of <name>_local. root: as evaluate.py's --data_root, but for JSON, which lmms-eval cannot read with
    images. Raises ValueError, FileNotFoundError."""
    path = find_task(tasks, name)
    task = settings_of(path)
    hub_id, config = str(task["dataset_path"]), task.get("dataset_name")
    split = str(task.get("test_split") or task.get("validation_split"))
    if not root.is_dir():
        raise FileNotFoundError(f"--data_root {root}: no such folder")
    folder = find_folder(root, (name, hub_id, hub_id.split("/")[-1]), config).resolve()
    made: dict[str, Any] = {"include": str(path), "task": f"{name}_local", "dataset_name": None}
    if is_saved(folder):
        if not (folder / "dataset_dict.json").exists():
            raise ValueError(f"--data_root {folder}: must be a saved DatasetDict with the split {split}, for lmms-eval")
        return made | {"dataset_path": str(folder), "dataset_kwargs": {"load_from_disk": True}}
    files = files_of_split(folder, config, split)
    if files[0].suffix != ".parquet":
        raise ValueError(f"--data_root {folder}: must hold .parquet files or what save_to_disk wrote, for lmms-eval")
    of_split = {split: [str(file) for file in files]}
    return made | {"dataset_path": "parquet", "dataset_kwargs": {"data_files": of_split}}


def look_for(checkpoint: str) -> None:
    """Raise OSError where there is no such checkpoint."""
    try:
        checkpoint_folder(find_checkpoint(checkpoint), flag="checkpoint")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--checkpoint {error}") from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", required=True, help="lmms-eval's names, as mmstar,pope")
    parser.add_argument("--data_root", type=Path, required=True, help="folder with their data")
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, for --include_path")
    parser.add_argument("--checkpoint", help="to be looked for first, as lmms-eval takes half a minute to say so")
    given = parser.parse_args(argv)
    try:
        if given.checkpoint:
            look_for(given.checkpoint)
        made = [local_task(tasks_folder(), name.strip(), given.data_root) for name in given.tasks.split(",")]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    given.folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        (given.folder / f"{one['task']}.yaml").write_text(yaml.safe_dump(one), encoding="utf-8")
    print(",".join(one["task"] for one in made))


if __name__ == "__main__":
    main()
