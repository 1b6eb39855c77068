"""One's own rows as a benchmark: a file or folder in any format of docs/data.md."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.formats import Part, Row, Rows
from data.options import AS_THEY_ARE, RowOptions
from data.rows import TableRows, load_rows
from data.values import Reason
from eval import metrics
from eval.benchmarks import Benchmark, digest_of, drawn
from eval.rules import Item, Question, Rule, Task, each
from eval.scorers import points, text
from eval.scorers.judged import Judged
from eval.tables import Table
from models.config import VLMConfig


def _rule(name: str, source: str, judge: Callable[[str, Sequence[str]], Judged]) -> Rule:
    return Rule(name, source, each(lambda answer, truth, _: judge(answer, truth["answers"])))


RULES = (
    _rule("exact match", "without case, space around and a final full stop", text.same_text),
    _rule("contains", "a truth stands in the answer as words", text.contains),
    _rule("number within 5 %", "exact match where the truth is no number", text.number_within),
    _rule("ANLS", "0 below 0.5, as lmms-eval's for DocVQA", text.anls),
    Rule(
        "choice",
        "ranked search for a letter, or the choice's text; exact match without choices",
        each(lambda answer, truth, _: text.named_choice(answer, truth["answers"], truth.get("letters", ()))),
    ),
)
# Of rows with points or counts, before the others.
POINT_RULES = (
    _rule("points", f"F1 of points, matched one to one, within {points.NEAR:g} of 1,000", points.pointed),
    _rule("count", "the same number", points.counted_as),
    _rule("count within 1", "the number, or one more or less", partial(points.counted_as, within=1)),
)
POINT_FORMATS = (
    "points", "pixmo-points", "pixmo-count", "CoSyn-point", "multi-image points", "video points", "video tracks"
)  # fmt: skip
MAX_NEW_TOKENS = 50
POINT_TOKENS = 400  # about 40 points, where each digit is a token
ASKED = ("user", "images_before", "image_places")  # of a turn
SHOWN = ("images", "videos", "video_numbers", "subtitles", "clip_start", "clip_end")  # of a row
ID_KEYS, CLUSTER_KEYS = ("id", "question_id"), ("cluster",)


@dataclass
class OwnRows(Benchmark):
    """The turns of rows; each is asked on its own, with the row's images, as during training."""

    rows: Rows = field(default_factory=list)
    not_usable: dict[str, str] = field(default_factory=dict)  # reason -> how many, and the first
    max_video_frames: int = VLMConfig.max_video_frames  # see show_frames
    has_videos: bool = False

    def images(self, question: Question) -> list[Any]:
        return self.rows[question.number]["images"]

    def turn(self, question: Question) -> dict[str, Any]:
        return question.turn or super().turn(question)

    def asked(self, question: Question) -> tuple[dict[str, Any], list[Any]]:
        row = self.rows[question.number]
        if not row.get("videos"):
            return super().asked(question)
        from data.frames import with_frames  # torch, which scoring does without

        place = row["texts"].index(question.turn)
        row = with_frames(row, self.max_video_frames)
        return row["texts"][place], row["images"]

    @property
    def fingerprint(self) -> str:
        return super().fingerprint + (f", {self.max_video_frames} frames of a video" if self.has_videos else "")

    def digest(self, question: Question) -> str:
        """Of what is asked: the texts and which pictures and videos, by path where they have one. Not of the truth."""
        turn, row = self.turn(question), self.rows[question.number]
        asked = [question.item.system, [turn.get(key) for key in ASKED], [row.get(key) for key in SHOWN]]
        return hashlib.sha256(json.dumps(asked, default=digest_of).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        shown = {"max_video_frames": self.max_video_frames} if self.has_videos else {}
        return super().describe() | shown | {"not_usable": self.not_usable}


def show_frames(benchmarks: Sequence[Benchmark], max_video_frames: int) -> None:
    """Of each video in rows of one's own show at most this many frames."""
    for one in benchmarks:
        if isinstance(one, OwnRows):
            one.max_video_frames = max_video_frames


def open_own_rows(
    path: Path,
    limit: int | None,
    flag: str = "tasks",
    options: RowOptions = AS_THEY_ARE,
    answered: bool = True,
    count: int | None = None,
) -> OwnRows:
    """The questions of a file or folder, of its first `limit` rows. Raises ValueError that names `flag`.

    answered: only those with an answer, the truth. options: how a record becomes a row. count: so many rows of all,
    drawn as eval.benchmarks.drawn says.
    """
    rows = load_rows(str(path), split="test", flag=flag, options=options)
    assert isinstance(rows, TableRows)
    found = OwnRows(
        own_task(re.sub(r"\W+", "_", path.stem) or "rows"),
        [],
        Table(str(path), ()),
        "",
        "as written",
        rows=rows,
        is_part=limit is not None or count is not None,
    )
    bad: Counter[str] = Counter()
    first: dict[str, str] = {}
    seen: Counter[str] = Counter()
    has_points = False
    for number in drawn(len(rows) if limit is None else min(limit, len(rows)), count):
        row = rows[number]
        if reason := row.get("bad"):
            bad[str(reason)] += 1
            first.setdefault(str(reason), reason.first if isinstance(reason, Reason) else "")
            continue
        found.has_videos |= bool(row.get("videos"))
        row_id = _own_value(rows, number, ID_KEYS) or row["id"]
        seen[row_id] += 1
        row_id = row_id if seen[row_id] == 1 else f"{row_id}#{seen[row_id]}"
        # No answer is scored without a truth: no need to read the images.
        cluster = _own_value(rows, number, CLUSTER_KEYS) or (_first_shown(row) if answered else None)
        for one in _questions(row, row_id, number, cluster or row_id):
            if answered and (one.turn or {})["assistant"] is None:
                found.without_truth.add(one.id)
            else:
                found.questions.append(one)
        has_points = has_points or row.get("format") in POINT_FORMATS
    if has_points:
        found.task = replace(found.task, rules=(*POINT_RULES, *RULES), max_new_tokens=POINT_TOKENS)
    found.not_usable = {reason: f"{count}, the first: {first[reason]}" for reason, count in bad.items()}
    if not found.questions:
        why = (
            "; ".join(f"{reason}: {what}" for reason, what in found.not_usable.items())
            or f"no row has {'an answer' if answered else 'a question'}"
        )
        raise ValueError(f"--{flag} {path}: no question can be asked: {why}")
    return found


def own_task(name: str) -> Task:
    """The task of one's own rows, by this name in results."""
    return Task(
        name=name,
        hub_id="",
        split="",
        columns=(),
        read=_no_records,
        rules=RULES,
        metrics=metrics.means("source"),
        main="accuracy",
        max_new_tokens=MAX_NEW_TOKENS,
        chance="choices",
    )


def _no_records(record: Any) -> Item:
    raise AssertionError("rows are read by data.rows")


def _own_value(rows: TableRows, number: int, keys: Sequence[str]) -> str | None:
    """What the row's file says under the first of the keys that it has."""
    start = 0
    for part, end in zip(rows.parts, rows.ends, strict=True):
        if number < end:
            return _value_in(part, number - start, keys)
        start = end
    return None


def _value_in(part: Part, number: int, keys: Sequence[str]) -> str | None:
    for key in keys:
        if hasattr(part.table, "record"):
            value = part.table.record(number).get(key)
        elif key in part.table.column_names:
            value = part.table[number : number + 1][key].to_pylist()[0]
        else:
            continue
        if isinstance(value, str | int) and str(value):
            return str(value)
    return None


def _first_shown(row: Row) -> str | None:
    """What rows share that show the same: their first image, as in benchmarks, or the path of their first video."""
    if row["images"]:
        return digest_of(row["images"][0])
    video = next(iter(row.get("videos", ())), None)
    video = video.get("path") if isinstance(video, Mapping) else video
    return video if isinstance(video, str) else None


def _questions(row: Row, row_id: str, number: int, cluster: str) -> list[Question]:
    """All questions of a row, so that their ids are the same whether or not those without a truth are asked."""
    turns = [turn for turn in row["texts"] if turn["user"] is not None]
    found = []
    for place, turn in enumerate(turns):
        truth: dict[str, Any] = {"answers": list(turn.get("answers") or [turn["assistant"]])}
        if "letters" in turn:
            truth["letters"] = turn["letters"]
        groups = {"source": str(turn["source"])} if turn.get("source") else {}
        item = Item(
            turn["user"], turn["user"], truth, groups, len(truth.get("letters", ())) or None, system=row.get("system")
        )
        one = row_id if len(turns) == 1 else f"{row_id}/{place}"
        found.append(Question(one, number, item, turn["user"], "", cluster, turn))
    return found
