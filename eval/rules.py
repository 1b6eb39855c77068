"""What a task is made of: an item read from a record, a question, a rule, and the task itself. No data, no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.metrics import Metrics
from eval.scorers.judged import Judged


@dataclass(frozen=True)
class Item:
    """What a task reads from a record of its benchmark.

    question: as the data has it; prompt: as lmms-eval asks by default; truth: what the rules need, as JSON; choices:
    how many there are; images: columns of this record, None for those of the task; system: a text before the question.
    """

    question: str
    prompt: str
    truth: dict[str, Any]
    categories: dict[str, str] = field(default_factory=dict)
    choices: int | None = None
    images: tuple[str, ...] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Question:
    """One row of a benchmark.

    cluster: rows with the same one share an image, or are said to belong together; answer_prefix: what the prompt
    style puts at the start of the answer; number: the row in its table, from 0; turn: of one's own rows, as
    data.formats says.
    """

    id: str
    number: int
    item: Item
    prompt: str
    answer_prefix: str
    cluster: str
    turn: dict[str, Any] | None = None


Judge = Callable[[str, Mapping[str, Any], str], Judged]  # answer, truth, question


@dataclass(frozen=True)
class Rule:
    """A public rule by which answers are scored. source: where it is from, in words."""

    name: str
    source: str
    judge: Callable[[Sequence[str], Sequence[Item]], list[Judged]]


def each(judge: Judge, strip: bool = True) -> Callable[[Sequence[str], Sequence[Item]], list[Judged]]:
    """A rule that looks at one answer at a time. strip: without surrounding space, as lmms-eval hands it over."""

    def judge_all(answers: Sequence[str], items: Sequence[Item]) -> list[Judged]:
        return [
            judge(answer.strip() if strip else answer, item.truth, item.question)
            for answer, item in zip(answers, items, strict=True)
        ]

    return judge_all


@dataclass(frozen=True)
class Task:
    """A benchmark: one line of the table in eval.tasks.

    name: lmms-eval's. hub_id, config, split: where its data is. id_columns: their values, joined by "/", are a row's
    id; the row's number without any. cluster: the category or column that says which rows share an image; None: rows
    with the same image. image_config, image_key: the images are rows of another configuration, found by their id.
    chance: what guessing scores; "choices": one over the number of choices; None: about nothing.
    stop: texts at which an answer ends. published_rows: how many rows the split has. lmms_metrics: our name of a number
    -> lmms-eval's; lmms_filter: under which of its filters; lmms_scale: its number over ours.
    """

    name: str
    hub_id: str
    split: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Item]
    rules: tuple[Rule, ...]
    metrics: Metrics
    main: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    config: str | None = None
    id_columns: tuple[str, ...] = ()
    cluster: str | None = None
    images: tuple[str, ...] = ("image",)
    image_config: str | None = None
    image_key: str | None = None
    chance: float | Literal["choices"] | None = None
    published_rows: int | None = None
    lmms_metrics: Mapping[str, str] = field(default_factory=dict)
    lmms_filter: str = "none"
    lmms_scale: float = 1.0
