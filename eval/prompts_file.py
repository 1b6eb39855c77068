"""Questions of a file to answers in a file: each is there as soon as it is made, and a killed run goes on.

Some batches of questions at a time are sorted by length, so that little is padded; once all questions are answered, the
answers are brought into their order.
"""

from __future__ import annotations

import json
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

        model: as eval.answering.describe_model says. Raises ValueError where the output has answers of other settings,
        or to questions that are no longer there.
        """
        questions, known = self.rows.questions, self._known(self._settings(model))
        if known:
            print(f"{len(known)} of {len(questions)} questions are answered already", file=sys.stderr)
        starts = [
            start
            for start in range(0, len(questions), self.window)
            if any(one.id not in known for one in questions[start : start + self.window])
        ]
        left = [one for start in starts for one in questions[start : start + self.window]]
        rows = dict(known)
        bar = tqdm(total=len(left), desc=self.output.name, unit="question", smoothing=0.05)
        with self.output.open("ab") as file, bar:
            for done, group in zip(starts, sorted_by_length(self._read(left), self.window), strict=False):
                for i in range(0, len(group), self.batch_size):
                    batch = group[i : i + self.batch_size]
                    torch.manual_seed(self.seed + done + i)  # whatever was answered before in this process
                    made = self._ask(self._open(batch, known))
                    made = [row for row in made if "error" not in row or row["id"] not in known]
                    rows |= {row["id"]: row for row in made}
                    file.write(_lines(made))
                    file.flush()
                    bar.update(len(batch))
        ordered = [rows[one.id] for one in questions]
        write_text(self.output, _lines(ordered).decode())
        return sum("error" in row for row in ordered)

    @property
    def window(self) -> int:
        """How many questions are sorted by length."""
        return WINDOW * self.batch_size

    def _open(
        self, batch: list[tuple[Question, Questions | str]], known: Mapping[str, Any]
    ) -> list[tuple[Question, Questions | str]]:
        """What of the batch is to be asked: with sampling all of it, as random numbers are drawn by batch."""
        left = [(question, one) for question, one in batch if question.id not in known]
        return batch if self.sampling and any(isinstance(one, Questions) for _, one in left) else left

    def _settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """All that the answers depend on."""
        settings = {
            **model,
            "source": self.rows.table.source,  # whose pictures may be others
            "max_video_frames": self.rows.max_video_frames,
            "max_new_tokens": self.max_new_tokens,
            "generations": self.generations,
            "stop": list(self.stop),
            "greedy": not self.sampling,
        }
        if self.sampling:  # random numbers are drawn by batch
            settings |= {**self.sampling, "seed": self.seed, "batch_size": self.batch_size}
        return settings

    def _known(self, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """id -> row of the output, of each question that has an answer and is asked as it was then; the output is left
        with these alone. One with an "error" is asked again: what was wrong may have been mended."""
        if not self.output.exists():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings_path, settings)
            self.output.touch()
            return {}
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            raise ValueError(
                f"--output {self.output}: exists, and no {self.settings_path.name} beside it says how its answers were "
                "made; take another --output, or remove the file"
            ) from None
        check_same_settings(f"--output {self.output}", before, settings)
        rows = {row["id"]: row for row in _whole_rows(self.output)}  # the last one of an id is the newest
        if gone := list(rows.keys() - {question.id for question in self.rows.questions}):
            raise ValueError(
                f"--output {self.output}: answers questions that are no longer in --prompts {self.rows.table.source} "
                f"({len(gone)}, as {min(gone)}), and would lose them; take another --output, or remove the file"
            )
        known = {}
        for question in self.rows.questions:
            row = rows.get(question.id, {"error": ""})
            if "error" not in row and row.get("asked") == self.rows.digest(question):
                known[question.id] = row
        write_text(self.output, _lines(known.values()).decode())  # without what a kill broke off
        return known

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
            row: dict[str, Any] = {"id": question.id, "prompt": question.prompt, "asked": self.rows.digest(question)}
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
