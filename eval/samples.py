"""Sample questions of a run (--sample_questions): a few validation questions, and what the model answers over time."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data.datasets import Questions, VQADataset
from data.frames import small_frames, with_frames
from data.images import small
from data.streams import RowStream
from data.video_frames import Frame
from eval.asking import ModelAsker
from eval.evaluation import Evaluator, evaluating
from eval.samples_page import SIDE, Freeze, make_page
from eval.scoring import is_right

ROWS_PER_QUESTION = 8  # rows that are looked at, for questions of different sources
NOT_DECODED = torch.empty(0)  # in place of the tiles of rows whose text alone is wanted


@dataclass
class SampleQuestion:
    """One question. images: as the row has them, and the frames of its videos; asked: what the model gets."""

    id: str
    text: str
    expected: str | tuple[str, ...]
    source: str
    images: list[Any]
    asked: Questions

    @cached_property
    def picture(self) -> np.ndarray | None:
        """Its first image or frame, small: uint8 [H, W, 3]; None where there is none that decodes."""
        if not self.images:
            return None
        first = self.images[0]
        try:
            pixels = small_frames([first], SIDE)[0] if isinstance(first, Frame) else small(first, SIDE)
        except (ValueError, OSError):
            return None
        return pixels.permute(1, 2, 0).numpy()

    @property
    def truth(self) -> str:
        return self.expected if isinstance(self.expected, str) else " | ".join(dict.fromkeys(self.expected))


@dataclass
class SampleQuestions:
    """The questions with their answers so far, which a checkpoint holds. The same ones in every run with one seed."""

    questions: list[SampleQuestion]
    asker: ModelAsker
    max_new_tokens: int
    batch_size: int
    answers: dict[str, dict[int, str]] = field(default_factory=dict)  # question id -> step -> answer

    @classmethod
    def of(cls, evaluator: Evaluator) -> SampleQuestions | None:
        """Those of a run; None where it has no validation rows, or wants none."""
        cfg = evaluator.cfg
        if not cfg.sample_questions or not cfg.validates:
            return None
        questions = choose(evaluator.data.val_dataset, cfg.sample_questions, cfg.seed)
        asker = ModelAsker(evaluator.model, evaluator.data.tokenizer, evaluator.device, evaluator.autocast)
        return cls(questions, asker, cfg.max_new_tokens, cfg.eval_batch_size) if questions else None

    def ask(self) -> list[str]:
        """What the model answers now."""
        found: list[str] = []
        with evaluating(self.asker.model):
            for start in range(0, len(self.questions), self.batch_size):
                batch = self.questions[start : start + self.batch_size]
                found += self.asker.answer([one.asked for one in batch], self.max_new_tokens)
        return found

    def add(self, step: int, answers: Sequence[str]) -> None:
        """Keep the answers after this step."""
        for one, answer in zip(self.questions, answers, strict=True):
            self.answers.setdefault(one.id, {})[step] = answer

    @property
    def steps(self) -> list[int]:
        """After which the questions were asked."""
        return sorted({step for one in self.questions for step in self.answers.get(one.id, {})})

    def answer(self, question: SampleQuestion, step: int) -> tuple[str, bool] | None:
        """(answer, whether it is right); None where the question was not asked."""
        answer = self.answers.get(question.id, {}).get(step)
        return None if answer is None else (answer, is_right(answer, question.expected))

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) for a tracker: a row for each question, a column for each time. Pictures are uint8 [H, W, 3],
        or None."""
        columns = ["picture", "question", "source", "expected", *(f"step {step}" for step in self.steps)]
        rows = []
        for one in self.questions:
            given = self.answers.get(one.id, {})
            rows.append([one.picture, one.text, one.source, one.truth, *(given.get(step) for step in self.steps)])
        return columns, rows

    def page(self, title: str, freezes: Sequence[Freeze]) -> str:
        """samples.html."""
        return make_page(title, self.questions, self.steps, self.answer, freezes)

    def state_dict(self) -> dict[str, Any]:
        return {"answers": {one: dict(given) for one, given in self.answers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Answers to questions that are no longer among the sample stay, unseen."""
        self.answers = {one: dict(given) for one, given in state["answers"].items()}


def choose(dataset: VQADataset, count: int, seed: int) -> list[SampleQuestion]:
    """At most `count` questions of the rows, of all sources in turn and of as many rows as there are."""
    groups: dict[str, list[tuple[dict, int]]] = defaultdict(list)  # (row, which of its questions)
    for row in _some_rows(dataset.rows, count * ROWS_PER_QUESTION, seed):
        for number, source in enumerate(dataset.questions_of(row, NOT_DECODED).sources):
            groups[source or row["id"].rpartition("#")[0]].append((row, number))
    found: list[SampleQuestion] = []
    while len(found) < count and any(groups.values()):
        for source in sorted(groups):
            if not groups[source] or len(found) == count:
                continue
            used = {one.id.rpartition("/")[0] for one in found}
            row, number = chosen = next((one for one in groups[source] if one[0]["id"] not in used), groups[source][0])
            groups[source].remove(chosen)
            asked = dataset.questions_of(row)
            if number < len(asked.prompts):  # the images decode
                found.append(_question(with_frames(row, dataset.vlm_cfg.max_video_frames, True), asked, number))
    return sorted(found, key=lambda one: one.source)


def _some_rows(rows: Any, count: int, seed: int) -> Iterator[dict]:
    """Of a stream the first ones, else some drawn by the seed."""
    if isinstance(rows, RowStream):
        return itertools.islice(iter(rows), count)
    return (rows[index] for index in random.Random(seed).sample(range(len(rows)), min(count, len(rows))))


def _question(row: dict, asked: Questions, number: int) -> SampleQuestion:
    one = {name: getattr(asked, name)[number : number + 1] for name in ("prompts", "answers", "sources", "texts")}
    alone = replace(asked, dropped={}, **one)
    text, expected, source = asked.texts[number], asked.answers[number], asked.sources[number] or ""
    return SampleQuestion(f"{row['id']}/{number}", text, expected, source, list(row["images"]), alone)
