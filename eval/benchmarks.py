"""A benchmark that is there: its questions, in order, and where their images are."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.values import BadRow, image_of
from data.web_images import WebImage
from eval.prompts import STYLES, styled
from eval.rules import Item, Question, Task
from eval.tables import Table, open_table


@dataclass
class Benchmark:
    """The questions of a task. table: its rows; image_table: the rows that images are in, by id, where that is another.

    prompt_style: None where the answers were made elsewhere, so that the prompt is not known.
    fingerprint: SHA-256 of the ids, questions and truths of all questions; image_fingerprint: of the images' bytes,
    None where they were not read, because a column says which rows share one.
    """

    task: Task
    questions: list[Question]
    table: Table
    split: str
    prompt_style: str | None
    image_fingerprint: str | None = None
    image_table: Table | None = None
    image_numbers: dict[str, int] = field(default_factory=dict)
    is_part: bool = False  # the first of the questions, or some that were drawn
    without_truth: set[str] = field(default_factory=set)  # ids that may have answers, which cannot be scored

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for one in self.questions:
            digest.update(json.dumps([one.id, one.item.question, one.item.truth], sort_keys=True).encode())
        return digest.hexdigest()

    def images(self, question: Question) -> list[Any]:
        """The images of a question, not decoded: paths, bytes, {"bytes", "path"}. Raises ValueError for a bad one."""
        record, table, columns = self.table.record(question.number), self.table, self.task.images
        if self.task.image_key and "image" not in record:
            if self.image_table is None:
                raise ValueError(
                    f"{self.table.source}: {self.task.name} needs the column image, or {self.task.image_config} beside "
                    f"{self.task.config}"
                )
            key = str(record[self.task.image_key])
            if key not in self.image_numbers:
                raise ValueError(f"{self.image_table.source}: no image {key}, which question {question.id} is about")
            record, table = self.image_table.record(self.image_numbers[key]), self.image_table
        chosen = columns if question.item.images is None else question.item.images
        return [image for column in chosen for image in _images(record.get(column), table.folder)]

    def turn(self, question: Question) -> dict[str, Any]:
        """The question with the places of its images: see data.places."""
        return {"user": question.prompt}

    def asked(self, question: Question) -> tuple[dict[str, Any], list[Any]]:
        """(turn, images) of a question, with the frames of its videos among these. Raises ImageDecodeError as well."""
        return self.turn(question), self.images(question)

    def describe(self) -> dict[str, Any]:
        """Where the data is from, for the results."""
        return {
            "source": self.table.source,
            "split": self.split,
            "rows": len(self.questions),
            "published_rows": self.task.published_rows,
            "fingerprint": self.fingerprint,
            "image_fingerprint": self.image_fingerprint,
        }


def _images(value: Any, folder: Path | None) -> list[Any]:
    try:
        return [image_of(one, folder) for one in (value if isinstance(value, list) else [value]) if one is not None]
    except BadRow as bad:
        raise ValueError(f"{bad.kind}: {bad.found}") from None


def open_benchmark(
    task: Task,
    data_root: Path | None,
    limit: int | None,
    style: str | None,
    with_images: bool = False,
    alone: bool = True,
    count: int | None = None,
) -> Benchmark:
    """The task's questions, in a prompt style of eval.prompts; None: it is not known.

    limit: the first ones alone. count: so many of all, drawn as `drawn` says.

    data_root: a folder that holds the data or a subfolder with it, named after the task or its id on the hub; None: the
    hub. with_images: a model is to answer. alone: there is no other task, so that data_root may hold the data itself.
    Raises ValueError, FileNotFoundError or ConnectionError in one sentence.
    """
    if data_root and not data_root.exists():
        raise FileNotFoundError(f"--data_root {data_root}: no such folder")
    names = (task.name, task.hub_id, task.hub_id.split("/")[1])
    if data_root and not alone and not any((data_root / name).is_dir() for name in names):
        raise FileNotFoundError(f"--data_root {data_root}: holds no folder {names[0]}, nor {' or '.join(names[1:])}")
    table = open_table(data_root, names, task.hub_id, task.config, task.split)
    columns, there = _needed(task, with_images), table.columns
    if missing := [column for column in columns if column not in there]:
        raise ValueError(
            f"{table.source}: {task.name} needs the columns {', '.join(columns)}; missing: {', '.join(missing)}; there "
            f"are {', '.join(there) or 'none'}"
        )
    benchmark = Benchmark(task, [], table, task.split, style, is_part=limit is not None or count is not None)
    digests = hashlib.sha256()
    hashes, has_images = not (task.cluster and task.cluster in there), False
    wanted = {*there} - (set() if hashes else set(task.images))
    rows = len(table) if limit is None else min(limit, len(table))
    ids, numbers = _row_ids(task, table, rows), drawn(rows, count)
    for number, record in zip(numbers, table.records(sorted(wanted), numbers), strict=True):
        item = _read(task, record, f"{table.source}, row {number}")
        digest = _digest(record, task, table.folder) if hashes else None
        has_images = has_images or digest is not None
        digests.update((digest or "").encode())
        named = item.categories.get(task.cluster or "") or record.get(task.cluster or "")
        cluster = (digest or ids[number]) if named is None else named  # an id may be 0
        prompt, prefix = styled(task.name, item, style or STYLES[0])
        benchmark.questions.append(Question(ids[number], number, item, prompt, prefix, str(cluster)))
    if not benchmark.questions:
        raise ValueError(f"{table.source}: holds no rows")
    benchmark.image_fingerprint = digests.hexdigest() if has_images else None
    _find_images(benchmark, data_root, names, there)
    return benchmark


def _row_ids(task: Task, table: Table, rows: int) -> list[str]:
    """An id for each of the first rows; some benchmarks repeat one."""
    if not task.id_columns:
        return [str(number) for number in range(rows)]
    found: list[str] = []
    seen: Counter[str] = Counter()
    for record in table.records(task.id_columns, range(rows)):
        row_id = "/".join(str(record[column]) for column in task.id_columns)
        seen[row_id] += 1
        found.append(row_id if seen[row_id] == 1 else f"{row_id}#{seen[row_id]}")
    return found


def drawn(rows: int, count: int | None) -> Sequence[int]:
    """Which of so many rows are asked: `count` of them in order, the same ones each time; all without a count.

    Not the first ones: benchmarks are sorted by category.
    """
    if count is None or count >= rows:
        return range(rows)
    return sorted(random.Random(0).sample(range(rows), count))


def _needed(task: Task, with_images: bool) -> list[str]:
    """The columns without which answers cannot be scored, and those of images where a model answers."""
    return [column for column in task.columns if with_images or column not in (*task.images, task.image_key)]


def _read(task: Task, record: Mapping[str, Any], where: str) -> Item:
    try:
        return task.read(record)
    except (ValueError, TypeError, KeyError, IndexError, SyntaxError) as error:
        raise ValueError(f"{where}: is no row of {task.name}: {type(error).__name__}: {error}") from error


def _digest(record: Mapping[str, Any], task: Task, folder: Path | None) -> str | None:
    """SHA-256 of the bytes of a record's first image; None where there is none to read."""
    return next((digest_of(image) for column in task.images for image in _images(record.get(column), folder)), None)


def digest_of(image: Any) -> str | None:
    """SHA-256 of an image's bytes (of a PIL image, of its pixels), or of its URL; None where there is none to read.

    image: see data.values.image_of.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image["path"]
    if isinstance(image, WebImage):
        image = image.url.encode()
    if hasattr(image, "tobytes"):
        image = image.tobytes()
    if isinstance(image, str):
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError):  # it is absent, or no path at all
            return None
    return hashlib.sha256(image).hexdigest() if image else None


def _find_images(benchmark: Benchmark, root: Path | None, names: tuple[str, ...], columns: list[str]) -> None:
    """Find the table of images, where they stand in one of their own; answers can be scored without."""
    task = benchmark.task
    if task.image_config is None or "image" in columns:
        return
    try:
        benchmark.image_table = open_table(root, names, task.hub_id, task.image_config, task.split)
    except (ValueError, FileNotFoundError):
        return
    if {"id", "image"} <= set(benchmark.image_table.columns):
        ids = benchmark.image_table.records(["id"])
        benchmark.image_numbers = {str(record["id"]): number for number, record in enumerate(ids)}
    else:
        benchmark.image_table = None
