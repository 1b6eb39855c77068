"""A stand-in for train.py that only writes what a run leaves, for the scripts that make many runs."""

import json
from pathlib import Path
from types import SimpleNamespace

from scripts import reproduce

ROOT = Path(__file__).resolve().parents[2]


def summary(steps: int = 1600, **given) -> dict:
    """A summary.json: 0.1 s per step, 2 s per validation, 4 s for the test, 1 s per checkpoint, 8 s for the rest."""
    stops = -(-steps // 400)
    found = {
        "steps": steps, "train_time_s": 0.1 * steps, "eval_time_s": 2.0 * stops + 4, "test_time_s": 4.0,
        "save_time_s": 1.0 * stops, "stop_reason": "max_training_steps", "train_flops": steps * 10**9, "val_loss": 0.5,
        "val_exact_match": 0.8, "test_exact_match": 0.9, "frozen_share": None, "train_tokens": steps * 96 * 40,
    } | given  # fmt: skip
    return found | {"total_time_s": found["train_time_s"] + found["eval_time_s"] + found["save_time_s"] + 8}


def value_of(command: list[str], flag: str) -> str | None:
    """The last value of the flag."""
    places = [i for i, word in enumerate(command) if word == flag]
    return command[places[-1] + 1] if places else None


def ended(code: int) -> SimpleNamespace:
    """A process that has ended."""
    return SimpleNamespace(poll=lambda: code, wait=lambda: code, terminate=lambda: None)


class Trainer:
    """Stands in for train.py. fails_at: the number of the run that fails after writing half of its folder.

    A run in which matrices may freeze ends after 1,200 of 1,600 steps. history(frozen): its grades_history.json.
    more_s: seconds that the steps of each run take besides.
    """

    def __init__(self, fails_at: int = 0, history=lambda frozen: {}, more_s: float = 0.0):
        self.commands: dict[str, list[str]] = {}  # by the run's name
        self.fails_at, self.history, self.more_s = fails_at, history, more_s

    def __call__(self, command: list[str], log: Path) -> SimpleNamespace:
        name = value_of(command, "--run_name")
        self.commands[name] = command
        folder = Path(value_of(command, "--output_dir"), name)
        for step in (320, 640):
            checkpoint = folder / "checkpoints" / f"step_{step}"
            checkpoint.mkdir(parents=True, exist_ok=value_of(command, "--resume") == "auto")
            (checkpoint / "manifest.json").write_text(json.dumps({"step": step}), encoding="utf-8")
        log.write_text("\n".join(f"line {i}" for i in range(50)), encoding="utf-8")
        if len(self.commands) == self.fails_at:
            return ended(1)
        frozen = "--enable_grades" in command and "--freeze_vision" not in command
        steps = 1200 if frozen else int(value_of(command, "--max_training_steps") or 1600)
        accuracy, train_s = 0.9 + 0.02 * int(value_of(command, "--seed")), 0.1 * steps + self.more_s
        found = summary(steps, test_exact_match=accuracy, train_time_s=train_s)
        for file, content in (("summary", found), ("grades_history", self.history(frozen))):
            (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        return ended(0)


def start_in(tmp_path: Path, script, *words, trainer=None, config=None) -> tuple[int, dict[str, list[str]], Path]:
    """(exit code, the commands of the runs made by name, the output folder) of a script on these flags."""
    trainer = trainer or Trainer()
    config = config or ("quickstart" if script is reproduce else "table10_quickstart")
    argv = ["--config", str(ROOT / f"configs/{config}.yaml"), "--output", str(tmp_path / "out"), *words]
    return script.main(argv, trainer), trainer.commands, tmp_path / "out"
