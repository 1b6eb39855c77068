"""Questions of a file to answers in a file: each is there as soon as it is made, and a killed run goes on.

Some batches of questions at a time are sorted by length, so that little is padded; once all of them are answered, their
answers are brought into the order of the questions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import Questions
from data.options import RowOptions
from data.readers import as_it_is
from eval.asking import Asker, Reader
from eval.batches import WINDOW, sorted_by_length
from eval.output import check_same_settings
from eval.own_rows import OwnRows, open_own_rows
from eval.rules import Question
from grades.files import write_json, write_text


def as_question(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with a prompt (a text, or messages), or with a question and no answer, as a row that has no answer; any
    other, and one that holds a conversation, as it is."""
    if any(record.get(key) is not None for key in ("texts", "conversations", "messages")):
        return record
    prompt = record.get("prompt")
    if isinstance(prompt, list | tuple):
        return {**record, "messages": prompt, "texts": None}
    if prompt is None and not {"answer", "answers", "choices", "options"} & set(record):
        prompt = record.get("question")
    return record if prompt is None else {**record, "texts": [{"user": prompt}]}


def open_prompts(path: Path, limit: int | None = None) -> OwnRows:
    """The questions of a file or folder, in any format of docs/data.md or {"image", "prompt"}. Raises ValueError."""
    return open_own_rows(path, limit, "prompts", RowOptions(function=as_question), False)


@dataclass
class PromptsFile:
    """How questions are asked and where the answers go. sampling: as Asker.answer takes it; greedy without any."""

    asker: Asker
    rows: OwnRows
    output: Path
    batch_size: int = 8
    workers: int = 0
    generations: int = 1
    max_new_tokens: int = 50
    stop: Sequence[str] = ()
    seed: int = 0
    sampling: Mapping[str, Any] | None = None

    @property
    def settings_path(self) -> Path:
        """Of the file beside the answers that says how they were made."""
        return self.output.with_suffix(".settings.json")

    def answer(self, model: Mapping[str, Any]) -> int:
        """Ask what has no answer yet; returns how many questions could not be asked, which have an "error".

        model: as eval.answering.describe_model says. Raises ValueError where the output has answers of other settings.
        """
        done, known = self._done(self._settings(model))
        left = self.rows.questions[done:]
        if done or known:
            print(f"{done + len(known)} of {len(self.rows.questions)} questions are answered already", file=sys.stderr)
        bar = tqdm(total=len(left), desc=self.output.name, unit="question", smoothing=0.05)
        with self.output.open("r+b") as file, bar:
            start = sum(len(file.readline()) for _ in range(done))
            for group in sorted_by_length(self._read(left), self.window):
                ids = [one.id for one in left[: len(group)]]
                left = left[len(group) :]
                file.seek(0, os.SEEK_END)
                for batch in (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)):
                    if not all(question.id in known for question, _ in batch):
                        torch.manual_seed(self.seed + done)  # whatever was answered before in this process
                        rows = self._ask(batch)
                        known |= {row["id"]: row for row in rows}
                        file.write(_lines(rows))
                        file.flush()
                    done += len(batch)
                    bar.update(len(batch))
                file.seek(start)  # they are there in the order in which they were asked
                file.write(_lines(known.pop(one) for one in ids))
                file.truncate()
                file.flush()
                start = file.tell()
        return sum("error" in row for row in _whole_rows(self.output))

    @property
    def window(self) -> int:
        """How many questions are sorted by length, and their answers into the order of the questions again."""
        return WINDOW * self.batch_size

    def _settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """All that the answers depend on."""
        settings = {
            **model,
            "data": self.rows.fingerprint,
            "source": self.rows.table.source,  # whose pictures may be others
            "questions": len(self.rows.questions),
            "max_new_tokens": self.max_new_tokens,
            "generations": self.generations,
            "stop": list(self.stop),
            "greedy": not self.sampling,
        }
        if self.sampling:  # random numbers are drawn by batch
            settings |= {**self.sampling, "seed": self.seed, "batch_size": self.batch_size}
        return settings

    def _done(self, settings: dict[str, Any]) -> tuple[int, dict[str, dict[str, Any]]]:
        """(how many questions the output answers in their order, id -> row of those that it answers after them).

        The former are whole windows, so that a resumed run is the same.
        """
        if not self.output.exists():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings_path, settings)
            self.output.touch()
            return 0, {}
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise ValueError(
                f"--output {self.output}: exists, and no {self.settings_path.name} beside it says how its answers were "
                "made; take another --output, or remove the file"
            ) from None
        check_same_settings(f"--output {self.output}", before, settings)
        rows = _whole_rows(self.output)
        ids = [one.id for one in self.rows.questions]
        same = next((i for i, row in enumerate(rows) if i == len(ids) or row["id"] != ids[i]), len(rows))
        done = same if same == len(ids) else same // self.window * self.window
        group = set(ids[done : done + self.window])
        known: dict[str, dict[str, Any]] = {}
        for row in rows[done:]:
            if row["id"] in group:
                known.setdefault(row["id"], row)
        write_text(self.output, _lines([*rows[:done], *known.values()]).decode())  # without what a kill broke off
        return done, known

    def _read(self, left: Sequence[Question]) -> Iterator[tuple[Question, Questions | str]]:
        """The questions with their images decoded, by worker processes while the model answers."""
        prompts = ReadPrompts(self.asker.reader, self.rows, left, self.max_new_tokens)
        options: dict[str, Any] = {"batch_size": None, "collate_fn": as_it_is, "num_workers": self.workers}
        if self.workers:
            torch.multiprocessing.set_sharing_strategy("file_system")
        yield from zip(left, DataLoader(prompts, **options), strict=True)

    def _ask(self, batch: Sequence[tuple[Question, Questions | str]]) -> list[dict[str, Any]]:
        """The line of each question."""
        n = self.generations
        asked = [replace(one, prompts=one.prompts * n) for _, one in batch if isinstance(one, Questions)]
        try:
            answers = iter(
                self.asker.answer(asked, self.max_new_tokens, self.stop, **(self.sampling or {})) if asked else []
            )
        except torch.OutOfMemoryError:
            raise ValueError(f"--batch_size {self.batch_size}: out of memory; take fewer") from None
        rows = []
        for question, one in batch:
            row: dict[str, Any] = {"id": question.id, "prompt": question.prompt}
            if isinstance(one, str):
                row["error"] = one
            elif n == 1:
                row["answer"] = next(answers)
            else:
                row["answers"] = [next(answers) for _ in range(n)]
            rows.append(row)
        return rows


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an output; a line that breaks off ends them."""
    rows: list[dict[str, Any]] = []
    # Not splitlines: a JSON text may hold other separators as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class ReadPrompts(Dataset):
    """What the model gets for each of some questions, or in words why it cannot be asked."""

    def __init__(self, reader: Reader, rows: OwnRows, questions: Sequence[Question], max_new_tokens: int):
        self.reader, self.rows, self.questions = reader, rows, questions
        self.max_new_tokens = max_new_tokens

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Questions | str:
        return self.reader.question(partial(self._read, self.questions[index]), self.max_new_tokens)

    def _read(self, question: Question) -> Questions:
        system = question.item.system or ""
        self.reader.check("\n".join([system, question.prompt]))
        return self.reader.read(*self.rows.asked(question), system, id=question.id)
