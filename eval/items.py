"""Reading the benchmarks' records: the question, the prompt of lmms-eval's defaults, the truth.

Prompts are those of lmms-eval 0.7 (tasks/<name>), word for word, since a score belongs to its prompt.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.rules import Item

Record = Mapping[str, Any]
LETTER = "Answer with the option's letter from the given choices directly"
WORD = "Answer the question using a single word or phrase."
MMMU_IMAGE = re.compile(r"<image (\d+)>")


def texts(values: Any) -> list[str]:
    """A list of texts of a list, of one value, or of objects with an "answer"."""
    if isinstance(values, Mapping):  # a column of a list of objects, as some versions of datasets have it
        values = values["answer"]
    if not isinstance(values, list | tuple):
        values = [values]
    return [str(one["answer"] if isinstance(one, Mapping) else one) for one in values]


def categories(record: Record, *keys: str) -> dict[str, str]:
    return {key: str(record[key]) for key in keys if record.get(key) is not None}


def lettered(choices: Sequence[Any]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))


def mmstar(record: Record) -> Item:
    question = str(record["question"]).strip()
    truth = {"answer": str(record["answer"]).strip()}
    return Item(question, f"{question}\n{LETTER}", truth, categories(record, "category", "l2_category"), choices=4)


def short_answer(answers: str, *keys: str, before: str = "", capital: bool = False) -> Callable[[Record], Item]:
    """A question with a short answer in the column `answers`; keys: columns that are categories. before: the line
    before the instruction; capital: the question with a capital and else in lower case."""

    def read(record: Record) -> Item:
        question = str(record["question"])
        asked = question.capitalize() if capital else question
        return Item(
            question, f"{asked}\n{before}{WORD}", {"answers": texts(record[answers])}, categories(record, *keys)
        )

    return read


UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'.\n"


def coco(record: Record) -> Item:
    prompt = "Provide a one-sentence caption for the provided image."
    return Item("", prompt, {"answers": texts(record["answer"])})


def pope(record: Record) -> Item:
    question = str(record["question"]).strip()
    truth = {"answer": str(record["answer"]).lower().strip()}
    return Item(question, f"{question}\n{WORD}", truth, categories(record, "category"), choices=2)


def ocrbench(record: Record) -> Item:
    question = str(record["question"]).strip()
    truth = {"answers": texts(record["answer"]), "dataset": str(record["dataset"])}
    return Item(question, question, truth, categories(record, "question_type"))


def ai2d(record: Record) -> Item:
    question, choices = str(record["question"]), list(record["options"])
    prompt = f"{question}\n{lettered(choices)}\n{LETTER}."
    return Item(question, prompt, {"answer": string.ascii_uppercase[int(record["answer"])]}, choices=len(choices))


def scienceqa(record: Record) -> Item:
    question, choices = str(record["question"]), list(record["choices"])
    context = f"Context: {record['hint']}\n" if record["hint"] else ""
    prompt = f"{context}{question}\n{lettered(choices)}\n{LETTER}."
    truth = {"answer": string.ascii_uppercase[int(record["answer"])]}
    return Item(question, prompt, truth, categories(record, "subject", "grade"), len(choices))


MMMU_DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_DOMAIN_OF = {subject: domain for domain, names in MMMU_DOMAINS.items() for subject in names.split()}


def mmmu(record: Record) -> Item:
    question, choices = str(record["question"]), [str(one) for one in ast.literal_eval(str(record["options"]) or "[]")]
    is_choice = record["question_type"] == "multiple-choice"
    asked = f"{question}\n{lettered(choices)}\n\n" if is_choice else f"{question}\n\n"
    truth: dict[str, Any] = {"answer": str(record["answer"])}
    if is_choice:
        truth["choices"] = dict(zip(string.ascii_uppercase, choices, strict=False))
    else:
        truth["answers"] = _listed(truth.pop("answer"))
    subject = "_".join(str(record["id"]).split("_")[1:-1])
    named = sorted({f"image_{number}" for number in MMMU_IMAGE.findall(asked)})
    groups = {"domain": _DOMAIN_OF.get(subject, "other"), "subject": subject, "type": str(record["question_type"])}
    return Item(
        question, asked + (f"{LETTER}." if is_choice else WORD), truth, groups, len(choices) or None, tuple(named)
    )


def _listed(text: str) -> list[str]:
    """The texts of "['a', 'b']", as MMMU writes several answers, or the text itself."""
    if text.startswith("["):
        try:
            return [str(one) for one in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            pass
    return [text]


def chartqa(record: Record) -> Item:
    question, kind = str(record["question"]), {"human_test": "human"}.get(record["type"], "augmented")
    prompt = f"{question}\nAnswer the question with a single word."
    return Item(question, prompt, {"answer": str(record["answer"])}, {"split": kind})


def mmbench(record: Record) -> Item:
    given = {letter: record.get(letter, "nan") for letter in "ABCDE"}
    given = {letter: str(text) for letter, text in given.items() if text is not None}
    shown = {letter: text for letter, text in given.items() if text and text != "nan"}
    options = "\n".join(["There are several options:", *(f"{letter}. {text}" for letter, text in shown.items())])
    hint = record.get("hint")
    question = str(record["question"])
    asked = f"{question} {options}" if hint in (None, "nan") else f"{hint} {question} {options}"
    truth = {"answer": str(record["answer"]), "choices": {k: text for k, text in given.items() if k != "E"}}
    groups = categories(record, "category", "L2-category") | {"rotated": str(int(record["index"]) % 1_000_000)}
    return Item(question, f"{asked}\n\n{LETTER}.", truth, groups, len(shown))


def seedbench(record: Record) -> Item:
    question, choices = str(record["question"]), [record[f"choice_{letter}"] for letter in "abcd"]
    prompt = f"{question}\n{lettered(choices)}\n{LETTER}."
    return Item(question, prompt, {"answer": str(record["answer"])}, categories(record, "data_type"), 4)


def realworldqa(record: Record) -> Item:
    question = str(record["question"]).strip()
    choices = len(re.findall(r"^[A-Z]\.\s", question, re.MULTILINE)) or None
    return Item(question, question, {"answer": str(record["answer"]).strip()}, choices=choices)


def hallusion(record: Record) -> Item:
    question = str(record["question"])
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    groups = categories(record, *keys)
    groups["set"] = "_".join(groups[key] for key in keys[:3])  # no question or figure is in two of them
    return Item(question, question, {"answer": "yes" if str(record["gt_answer"]) == "1" else "no"}, groups, 2)
