"""Questions of a file to answers in a file: each is there as soon as it is made, and a killed run goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import Questions
from data.images import ImageDecodeError
from data.options import RowOptions
from data.readers import as_it_is
from eval.answering import check_same_settings
from eval.asking import Asker, Reader
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
    return open_own_rows(path, limit, "prompts", RowOptions(function=as_question), answered=False)


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
        done = self._done(self._settings(model))
        left = self.rows.questions[done:]
        if done:
            print(f"{done} of {len(self.rows.questions)} questions are answered already", file=sys.stderr)
        bar = tqdm(total=len(left), desc=self.output.name, unit="question", smoothing=0.05)
        with self.output.open("a", encoding="utf-8") as file, bar:
            for batch in self._batches(left):
                torch.manual_seed(self.seed + done)  # whatever was answered before in this process
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._ask(batch)))
                file.flush()
                done += len(batch)
                bar.update(len(batch))
        return sum("error" in json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines())

    def _settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """All that the answers depend on."""
        settings = {
            **model,
            "data": self.rows.fingerprint,
            "questions": len(self.rows.questions),
            "max_new_tokens": self.max_new_tokens,
            "generations": self.generations,
            "stop": list(self.stop),
            "greedy": not self.sampling,
        }
        if self.sampling:  # random numbers are drawn by batch
            settings |= {**self.sampling, "seed": self.seed, "batch_size": self.batch_size}
        return settings

    def _done(self, settings: dict[str, Any]) -> int:
        """How many questions the output has an answer to: whole batches of them, so that a resumed run is the same."""
        if not self.output.exists():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings_path, settings)
            return 0
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise ValueError(
                f"--output {self.output}: exists, and no {self.settings_path.name} beside it says how its answers were "
                "made; take another --output, or remove the file"
            ) from None
        check_same_settings(f"--output {self.output}", before, settings)
        whole = self.output.read_text(encoding="utf-8")
        lines = [line for line in whole.splitlines(keepends=True) if line.endswith("\n")]  # the last may break off
        keep = len(lines) if len(lines) == len(self.rows.questions) else len(lines) // self.batch_size * self.batch_size
        if (kept := "".join(lines[:keep])) != whole:
            write_text(self.output, kept)
        return keep

    def _batches(self, left: Sequence[Question]) -> Iterator[list[tuple[Question, Questions | str]]]:
        options: dict[str, Any] = {"batch_size": None, "collate_fn": as_it_is, "num_workers": self.workers}
        if self.workers:
            torch.multiprocessing.set_sharing_strategy("file_system")
        batch: list[tuple[Question, Questions | str]] = []
        for pair in zip(left, DataLoader(ReadPrompts(self.asker.reader, self.rows, left), **options), strict=True):
            batch.append(pair)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

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


class ReadPrompts(Dataset):
    """What the model gets for each of some questions, or in words why it cannot be asked."""

    def __init__(self, reader: Reader, rows: OwnRows, questions: Sequence[Question]):
        self.reader, self.rows, self.questions = reader, rows, questions

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Questions | str:
        question = self.questions[index]
        system = question.item.system or ""
        try:
            self.reader.check("\n".join([system, question.prompt]))
            return self.reader.read(self.rows.turn(question), self.rows.images(question), system, id=question.id)
        except ImageDecodeError as error:
            return f"{error.kind}: {error}"
        except ValueError as error:
            return str(error)
