"""Annotation files of VQAv2, OK-VQA and COCO captions beside a folder of images, as tables.

Each is one JSON object that holds arrays: questions and, in another file, their annotations; or images and captions. A
file is read once to find where the elements of its arrays start: 16 to 32 bytes of memory per element.

Sources of the layout: visualqa.org/download (questions, annotations, COCO_train2014_000000000009.jpg) and
cocodataset.org/#format-data (images, annotations).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.formats import NOT_UTF8
from data.json_places import member_places
from data.packed_files import file_type, is_packed, unpacked
from data.text_files import json_object
from data.values import BadRow, shortened, shown

CHUNK_BYTES = 8 * 2**20
TRIED_IMAGES = 100  # to find the folder that holds them


@dataclass
class AnnotationFile:
    """A file whose one object holds arrays."""

    path: Path  # as it was given
    read_path: Path  # unpacked
    members: dict[str, Any]  # see member_places

    @classmethod
    def of(cls, path: Path) -> AnnotationFile | None:
        """None where the file is none of those that this module knows."""
        if file_type(path) != ".json":
            return None
        try:
            read_path = unpacked(path) if is_packed(path) else path
        except ValueError:  # who reads it as rows says what is wrong
            return None
        with read_path.open("rb") as file:
            file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)
            members = member_places(file)
        found = cls(path, read_path, members)
        return found if found.kind else None

    @cached_property
    def kind(self) -> str:
        """questions, annotations (of questions), captions, others (boxes, key points); "" for anything else."""
        if self._first("questions").get("question_id") is not None:
            return "questions"
        first = self._first("annotations")
        if first.get("question_id") is not None:
            return "annotations"
        if first.get("image_id") is None or not self.count("images"):
            return ""
        return "captions" if "caption" in first else "others"

    def count(self, member: str) -> int:
        """The elements of an array; 0 without it."""
        starts = self.members.get(member)
        return len(starts) - 1 if isinstance(starts, np.ndarray) else 0

    def _first(self, member: str) -> dict:
        try:
            return self.element(member, 0) if self.count(member) else {}
        except BadRow:
            return {}

    def element(self, member: str, number: int) -> dict[str, Any]:
        """An element of an array. Raises BadRow."""
        start, end = self.members[member][number : number + 2].tolist()
        with self.read_path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            return json_object(data.decode("utf-8"), alone=False)
        except UnicodeDecodeError as error:
            raise BadRow(NOT_UTF8, f"{error.reason}: {shortened(data.decode('utf-8', 'backslashreplace'))}") from None

    def whole_numbers(self, member: str, key: str, first: int | None = None) -> np.ndarray:
        """int64 [elements]: what stands under a key of each; -1 where that is no whole number. first: of so many."""
        found = np.full(min(self.count(member), first or self.count(member)), -1, dtype=np.int64)
        for number, text in enumerate(islice(self._texts(member), len(found))):
            try:
                value = json.loads(text.rstrip(b", \t\r\n"))[key]
            except (ValueError, TypeError, KeyError):
                continue
            if type(value) is int and 0 <= value < 2**63:
                found[number] = value
        return found

    def _texts(self, member: str) -> Iterator[bytes]:
        starts = self.members[member].tolist()
        with self.read_path.open("rb", buffering=CHUNK_BYTES) as file:
            file.seek(starts[0])
            for start, end in pairwise(starts):
                yield file.read(end - start)


class Questions:
    """One record per question of VQAv2 or OK-VQA, with all its answers; its source is the kind of answer."""

    format_name = "VQAv2 questions"

    def __init__(self, questions: AnnotationFile, annotations: AnnotationFile, image_root: Path | None):
        self.questions, self.annotations = questions, annotations
        ids = annotations.whole_numbers("annotations", "question_id")
        self.order = np.argsort(ids, kind="stable")
        self.ids = ids[self.order]
        subset = str(questions.members.get("data_subtype") or "")
        subset = re.sub(r"^test-dev", "test", subset)
        image_ids = questions.whole_numbers("questions", "image_id", TRIED_IMAGES).tolist()
        folders = _folders(questions.path.parent, image_root, subset)
        names = (f"COCO_{subset}_{{:012d}}.jpg", "{:012d}.jpg")
        self.folder, self.name = _found(folders, names, image_ids)

    def __len__(self) -> int:
        return self.questions.count("questions")

    def record(self, number: int) -> dict[str, Any]:
        """Raises BadRow."""
        asked = self.questions.element("questions", number)
        try:
            question_id, image_id = int(asked["question_id"]), int(asked["image_id"])
        except (KeyError, ValueError, TypeError):
            raise BadRow("a question without question_id and image_id", shown(asked)) from None
        at = int(np.searchsorted(self.ids, question_id))
        if at == len(self.ids) or self.ids[at] != question_id:
            raise BadRow("a question without an annotation", f"question_id {question_id}, {self.annotations.path.name}")
        said = self.annotations.element("annotations", int(self.order[at]))
        image = str(self.folder / self.name.format(image_id))
        answers = said.get("answers") or said.get("multiple_choice_answer")
        return {
            "image": image,
            "question": asked.get("question"),
            "answers": answers,
            "source": said.get("answer_type"),
        }

    def place(self, number: int) -> str:
        return f"question {number + 1}"


class Captions:
    """One record per caption of a COCO file, whose image's other captions count as well."""

    format_name = "COCO captions"

    def __init__(self, file: AnnotationFile, image_root: Path | None):
        self.file = file
        ids = file.whole_numbers("images", "id")
        self.images = np.argsort(ids, kind="stable")
        self.ids = ids[self.images]
        self.of_captions = file.whole_numbers("annotations", "image_id")
        self.captions = np.argsort(self.of_captions, kind="stable")
        self.of_ordered = self.of_captions[self.captions]
        tried = [self._file_name(number) for number in self.of_captions[:TRIED_IMAGES].tolist()]
        subset = re.search(r"(train|val|test)20\d\d", file.path.name)
        folders = _folders(file.path.parent, image_root, subset[0] if subset else "")
        self.folder, _ = _found(folders, ["{}"], [name for name in tried if name])

    def __len__(self) -> int:
        return len(self.of_captions)

    def _file_name(self, image_id: int) -> str | None:
        at = int(np.searchsorted(self.ids, image_id))
        if at == len(self.ids) or self.ids[at] != image_id:
            return None
        name = self.file.element("images", int(self.images[at])).get("file_name")
        return name if type(name) is str else None

    def record(self, number: int) -> dict[str, Any]:
        """Raises BadRow."""
        image_id = int(self.of_captions[number])
        name = self._file_name(image_id)
        own = self.file.element("annotations", number)
        if name is None:
            raise BadRow("a caption without an image in the file", shown(own))
        first, last = np.searchsorted(self.of_ordered, [image_id, image_id + 1])
        others = [other for other in self.captions[first:last].tolist() if other != number]
        said = [own, *(self.file.element("annotations", other) for other in others)]
        return {"image": str(self.folder / name), "captions": [one.get("caption") for one in said]}

    def place(self, number: int) -> str:
        return f"caption {number + 1}"


def annotation_tables(files: Sequence[Path], image_root: Path | None) -> dict[Path, Questions | Captions | None]:
    """Of the files that hold annotations the table of each; None for one that has no rows of its own.

    Raises ValueError for questions without annotations, and the other way round.
    """
    found = {path: one for path in files if (one := AnnotationFile.of(path))}
    tables: dict[Path, Questions | Captions | None] = dict.fromkeys(found)
    for path, one in found.items():
        if one.kind == "captions":
            tables[path] = Captions(one, image_root)
        elif one.kind in ("questions", "annotations"):
            other = _partner(one, list(found.values()))
            pair = (one, other) if one.kind == "questions" else (other, one)
            if pair[0].path not in tables or tables[pair[0].path] is None:
                tables[pair[0].path] = Questions(*pair, image_root)
    return tables


def _partner(one: AnnotationFile, found: list[AnnotationFile]) -> AnnotationFile:
    """The annotations of questions, or the questions of annotations: by name, else the only ones beside."""
    wanted = "annotations" if one.kind == "questions" else "questions"
    same_name = [other for other in found if other.kind == wanted and _bare(other.path) == _bare(one.path)]
    if not same_name:  # the file was given alone
        beside = [
            path for path in sorted(one.path.parent.iterdir()) if path != one.path and _bare(path) == _bare(one.path)
        ]
        same_name = [other for path in beside if (other := AnnotationFile.of(path)) and other.kind == wanted]
    if not same_name and sum(other.kind == one.kind for other in found) == 1:
        same_name = [other for other in found if other.kind == wanted]
    if len(same_name) != 1:
        raise ValueError(
            f"{one.path.name} holds {one.kind} of a visual question answering data set and needs the file of their "
            f"{wanted} beside it, as v2_OpenEnded_mscoco_train2014_questions.json and "
            "v2_mscoco_train2014_annotations.json"
        )
    return same_name[0]


def _bare(path: Path) -> str:
    """The name without what tells questions from annotations."""
    return re.sub(r"openended_|multiplechoice_|_?questions|_?annotations|\.(json|gz|zst)", "", path.name.lower())


def _folders(beside: Path, image_root: Path | None, subset: str) -> list[Path]:
    """Where the images may be: in image_root, else beside the file, one folder up, and in folders of these."""
    roots = [image_root] if image_root else [beside, beside / "images", beside.parent, beside.parent / "images"]
    return [root / inner for root in roots for inner in dict.fromkeys(("", subset))]


def _found(folders: Sequence[Path], patterns: Sequence[str], values: Sequence[Any]) -> tuple[Path, str]:
    """The folder and the pattern by which one of the values names a file there; the first ones where none does."""
    for value in values:
        for folder in folders:
            for pattern in patterns:
                if (folder / pattern.format(value)).is_file():
                    return folder, pattern
    return folders[0], patterns[0]
