"""The answers of a model to a benchmark: in batches, on several processes, and from where it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.datasets import Questions
from data.loader import init_worker
from data.readers import as_it_is
from eval.answers import match
from eval.asking import Asker, ModelAsker, Reader
from eval.batches import Batches
from eval.benchmarks import Benchmark
from eval.output import check_same_settings, settings_of
from eval.results import score
from eval.rules import Question, Task
from grades.files import write_text

LIKELIHOOD = "likelihood"


@dataclass
class Answering:
    """How a model is asked. batch_size: as Batches takes it. rank, world_size: whose questions of all."""

    asker: ModelAsker
    progress: Path | None  # folder of what `answer` has done so far
    batch_size: int | None = None
    workers: int = 0
    without_image: bool = False
    max_new_tokens: int | None = None  # None: the task's
    likelihood: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.batches = Batches(self.batch_size, self.asker.device)

    def tokens(self, benchmark: Benchmark) -> int:
        """Of the longest answer."""
        return self.max_new_tokens or benchmark.task.max_new_tokens

    def decoding(self, benchmark: Benchmark, kind: str = "") -> dict[str, Any]:
        """How the answers are decoded, or with LIKELIHOOD as kind chosen, for the results."""
        tokens = self.tokens(benchmark)
        stop = {"stop": list(benchmark.task.stop)} if benchmark.task.stop else {}
        chosen = {"greedy": False, LIKELIHOOD: "first token of a letter"} if kind else {}
        return {"greedy": True, "max_new_tokens": tokens, **stop, "without_image": self.without_image, **chosen}

    def planned(self, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
        """By name the tasks of results.json that the answers make, as eval.output.check_output takes them."""
        kinds = ("", LIKELIHOOD) if self.likelihood else ("",)
        return {named(benchmark, kind): settings_of(benchmark, self.decoding(benchmark, kind)) for kind in kinds}

    def settings(self, benchmark: Benchmark, model: Mapping[str, Any]) -> dict[str, Any]:
        """All that the answers depend on."""
        data = {"data": benchmark.fingerprint, "prompt style": benchmark.prompt_style}
        data["source"] = benchmark.table.source  # the same questions elsewhere may be about other pictures
        return {**model, **self.decoding(benchmark), **data, LIKELIHOOD: self.likelihood}

    def answer(self, benchmark: Benchmark, model: Mapping[str, Any]) -> None:
        """Ask this rank's part of the questions that have no answer yet; each is on disk as soon as it is there.

        model: as `describe_model` says. Raises ValueError where --output has answers of other settings; OSError.
        """
        path, settings = self._path(benchmark, self.rank), self.settings(benchmark, model)
        known = read_progress(self.paths(benchmark), settings).answers
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_broken_line(path)
        if not path.exists():
            write_text(path, json.dumps({"settings": settings}) + "\n")
        mine = self.mine(benchmark)
        left = [question for question in mine if question.id not in known]
        if self.rank == 0 and len(left) < len(mine):
            print(f"{benchmark.task.name}: {len(mine) - len(left)} of {len(mine)} questions are answered already")
        bar = tqdm(total=len(left), desc=benchmark.task.name, unit="question", disable=self.rank > 0, smoothing=0.05)
        with path.open("a", encoding="utf-8") as file, bar:
            for answers in self.answers_to(benchmark, left):
                file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in answers)
                file.flush()
                bar.update(len(answers))

    def mine(self, benchmark: Benchmark) -> list[Question]:
        """This rank's part of the questions."""
        return benchmark.questions[self.rank :: self.world_size]

    def answers_to(self, benchmark: Benchmark, questions: Sequence[Question]) -> Iterator[list[dict]]:
        """{"id", "answer"} of each of the questions, {"id", "error"} of one that cannot be asked, batch by batch."""
        for group in self.batches.sorted_by_length(self._read(benchmark, questions)):
            for _, answers in self.batches.run(group, partial(self._ask, benchmark)):
                yield answers

    def forget(self, benchmarks: Sequence[Benchmark]) -> None:
        """Remove what was kept of these for an evaluation that ends early; their results are written."""
        assert self.progress is not None
        for path in [path for one in benchmarks for path in self.paths(one)]:
            path.unlink()
        with contextlib.suppress(OSError):  # answers to other tasks may be there
            self.progress.rmdir()

    def _path(self, benchmark: Benchmark, rank: int) -> Path:
        assert self.progress is not None
        return self.progress / f"{benchmark.task.name}-{rank}.jsonl"

    def paths(self, benchmark: Benchmark) -> list[Path]:
        """Of all ranks, also of an earlier run with another number of them."""
        return sorted(self._path(benchmark, 0).parent.glob(f"{benchmark.task.name}-[0-9]*.jsonl"))

    def _read(self, benchmark: Benchmark, left: Sequence[Question]) -> Iterator[tuple[Question, Questions | str]]:
        """The questions with their images decoded, by worker processes while the model answers."""
        prompts = self.prompts(benchmark, left)
        options: dict[str, Any] = {"batch_size": None, "collate_fn": as_it_is, "num_workers": self.workers}
        options |= {"worker_init_fn": init_worker, "generator": torch.Generator()}  # see data.loader.train_batches
        if self.workers:
            torch.multiprocessing.set_sharing_strategy("file_system")
        yield from zip(left, DataLoader(prompts, **options), strict=True)

    def prompts(self, benchmark: Benchmark, questions: Sequence[Question]) -> Prompts:
        """The questions as the model gets them."""
        return Prompts(self.asker.reader, benchmark, questions, self.without_image, self.tokens(benchmark))

    def _ask(self, benchmark: Benchmark, batch: list[tuple[Question, Questions | str]]) -> list[dict]:
        """What answers_to gives of each."""
        found = [{"id": question.id, "error": why} for question, why in batch if isinstance(why, str)]
        asked = [(question, one) for question, one in batch if isinstance(one, Questions)]
        if not asked:
            return found
        texts = self.asker.answer([one for _, one in asked], self.tokens(benchmark), benchmark.task.stop)
        chosen = self._likeliest(asked) if self.likelihood else {}
        answers = zip(asked, texts, strict=True)
        return [*({"id": one.id, "answer": text} | chosen.get(one.id, {}) for (one, _), text in answers), *found]

    def _likeliest(self, batch: list[tuple[Question, Questions]]) -> dict[str, dict[str, str]]:
        """Of those with lettered choices."""
        lettered = [(question, asked) for question, asked in batch if letters_of(question)]
        if not lettered:
            return {}
        found = self.asker.likeliest([asked for _, asked in lettered], [letters_of(one) for one, _ in lettered])
        return {question.id: {LIKELIHOOD: one} for (question, _), one in zip(lettered, found, strict=True)}


def describe_model(asker: Asker, name: str) -> dict[str, Any]:
    """Whose answers they are: {"checkpoint", "weights", "tokenizer", "parameters", "dtype"}.

    weights: SHA-256 of model.safetensors. tokenizer: SHA-256 of the tokenizer and its chat template.
    """
    with (asker.folder / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    text = f"{asker.tokenizer.backend_tokenizer.to_str()}\n{asker.tokenizer.chat_template}"
    tokenizer = hashlib.sha256(text.encode()).hexdigest()
    computed = str(asker.compute_dtype()).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in asker.model.parameters())
    return {
        "checkpoint": name, "weights": weights, "tokenizer": tokenizer, "parameters": parameters, "dtype": computed,
    }  # fmt: skip


def scored_answers(
    asking: Answering, benchmark: Benchmark, model: Mapping[str, Any], missing: str = "error"
) -> list[tuple[Task, list[dict], dict[str, Any]]]:
    """(task, rows of answers.jsonl, its part of results.json) of the answers, and of the likeliest choices.

    missing: as eval.answers.match takes it, of questions that could not be asked. Raises ValueError with "error" where
    there are any.
    """
    answers, likeliest, errors = read_progress(asking.paths(benchmark), asking.settings(benchmark, model))
    if errors:
        first, why = next(iter(errors.items()))
        number = f"{len(errors)} of {len(benchmark.questions)} questions"
        problem = f"{benchmark.task.name}: {number} could not be asked; the first, {first}: {why}"
        if missing == "error":
            raise ValueError(
                f"{problem}; the other answers are kept: the same command with --missing wrong counts these as wrong, "
                "with --missing skip it leaves them out"
            )
        print(problem, file=sys.stderr)
    if missing == "wrong":
        likeliest |= {one.id: "" for one in benchmark.questions if one.id in errors and likeliest and letters_of(one)}
    found = []
    for kind, given in (("", match(answers.items(), benchmark, missing)), (LIKELIHOOD, likeliest)):
        if not given:
            continue
        one = replace(benchmark, task=replace(benchmark.task, name=named(benchmark, kind)))
        rows, summary = score(one, given)
        summary |= {"decoding": asking.decoding(benchmark, kind)} | ({"not_asked": errors} if errors else {})
        found.append((one.task, rows, summary))
    return found


def named(benchmark: Benchmark, kind: str) -> str:
    """The task in results.json. kind: empty, or LIKELIHOOD."""
    return f"{benchmark.task.name}/{kind}".rstrip("/")


def letters_of(question: Question) -> Sequence[str]:
    """The letters of its choices; empty where it has none, and of own rows where two begin alike, as 1 and 10."""
    if "letters" in question.item.truth:
        own = question.item.truth["letters"]
        return own if len({letter[:1] for letter in own} - {""}) == len(own) else ""
    letters = string.ascii_uppercase[: question.item.choices or 0]
    return letters if question.item.truth.get("answer") in list(letters) else ""


class Prompts(Dataset):
    """What the model gets for each of some questions of a benchmark, or in words why it cannot be asked."""

    def __init__(
        self,
        reader: Reader,
        benchmark: Benchmark,
        questions: Sequence[Question],
        without_image: bool,
        max_new_tokens: int,
    ):
        self.reader, self.benchmark, self.questions = reader, benchmark, questions
        self.without_image, self.max_new_tokens = without_image, max_new_tokens

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Questions | str:
        return self.reader.question(partial(self._read, self.questions[index]), self.max_new_tokens)

    def _read(self, question: Question) -> Questions:
        turn: dict[str, Any] = {"user": question.prompt}
        images: list[Any] = []
        self.reader.check(f"{question.item.system or ''}\n{question.prompt}")
        if not self.without_image:
            turn, images = self.benchmark.asked(question)
        return self.reader.read(turn, images, question.item.system or "", question.answer_prefix, question.id)


class Progress(NamedTuple):
    """What is known of an evaluation's questions, by their ids: the answer, the likeliest choice, and why a question
    could not be asked."""

    answers: dict[str, str]
    likeliest: dict[str, str]
    errors: dict[str, str]


def read_progress(paths: Sequence[Path], settings: Mapping[str, Any]) -> Progress:
    """Of an evaluation that was ended.

    A last line that breaks off counts as not written: another rank may be writing it. Raises ValueError where the
    settings are others.
    """
    found = Progress({}, {}, {})
    for path in paths:
        lines = _whole_lines(path)
        if not lines:
            continue
        before = json.loads(lines[0])["settings"]
        check_same_settings(path, before, settings)
        for line in lines[1:]:
            row = json.loads(line)
            for known, key in zip(found, ("answer", LIKELIHOOD, "error"), strict=True):
                if key in row:
                    known[row["id"]] = row[key]
    for one in found.errors.keys() & found.answers.keys():  # asked again, when it could be
        del found.errors[one]
    return found


def _whole_lines(path: Path) -> list[str]:
    # Not splitlines: a JSON text may hold other separators as they are.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def cut_broken_line(path: Path) -> None:
    """Cut off a last line that a kill has left unfinished; only the rank whose file it is may."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        if lines := _whole_lines(path):
            write_text(path, "".join(line + "\n" for line in lines))
        else:
            path.unlink()
