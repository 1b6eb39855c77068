"""MMMU: the letter or the open answer that a text names, after MMMU's own eval_utils.py, as lmms-eval has it."""

import re
from collections.abc import Mapping, Sequence

from eval.scorers.judged import Judged, judged

_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_BEFORE_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def read_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names: as (A), else as A before a space, else as A before a full stop, else, in an
    answer of more than five words, by the text of its choice; the last one where there are several. None: no letter."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    in_brackets = [letter for letter in choices if f"({letter})" in text]
    if found := in_brackets:
        places = [text.rfind(f"({letter})") for letter in found]
    elif found := [letter for letter in choices if f"{letter} " in text] or [
        letter for letter in choices if f"{letter}." in text
    ]:
        places = [text.rfind(f" {letter} ") for letter in found]
    elif len(text.split()) > 5 and (found := [a for a, choice in choices.items() if choice.lower() in text.lower()]):
        places = [text.lower().rfind(choices[letter].lower()) for letter in found]
    else:
        return None
    return found[places.index(max(places))]


def choose(answer: str, letter: str, choices: Mapping[str, str], chance: bool) -> Judged:
    """A multiple choice question. chance: an answer without a letter scores 1 / choices, which is what the letter drawn
    at random by MMMU's script and lmms-eval scores on average; else it is wrong."""
    found = read_letter(answer, choices)
    return Judged(1 / len(choices) if chance and found is None else float(found == letter), found)


def open_answers(answer: str) -> list[str | float]:
    """What an answer to an open question may mean: the ends of its lines after such words as "is", and their numbers,
    in normal form."""
    lines = answer.strip().strip(".").lower().split("\n")
    ends = []
    for number, line in enumerate(lines):
        words = (*_BEFORE_ANSWER, "=") if number == len(lines) - 1 else _BEFORE_ANSWER
        shortest = ""
        for end in (line.split(word)[-1].strip() for word in words if word in line):
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in _TRIVIAL:
            ends.append(shortest)
    ends = ends or ["\n".join(lines)]
    numbers = [one for end in ends for kind in (_GROUPED, _SCIENTIFIC, _SIMPLE) for one in kind.findall(end)]
    return [form for one in (*ends, *numbers) for form in _forms(one)]


def _forms(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, else the text in lower case; a single letter needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_question(answer: str, truths: Sequence[str]) -> Judged:
    """MMMU's script (eval_open): one of the texts that the answer may mean contains a truth, or is the same number."""
    found = open_answers(answer)
    wanted = [form for truth in truths for form in _forms(truth)]
    is_right = any(
        any(isinstance(want, str) and want in one for want in wanted) if isinstance(one, str) else one in wanted
        for one in found
    )
    return judged(is_right, " | ".join(str(one) for one in found))


def open_question_as_lmms_eval(answer: str, truths: Sequence[str]) -> Judged:
    """lmms-eval (tasks/mmmu/utils.py, seen 2026-08-06) hands one text, in place of the list of texts, to eval_open,
    which then looks for the truth in each single character: no answer to an open question is right."""
    return judged(False, None)
