"""Multiple choice: the letter that an answer names, by the rules of the benchmarks.

`letter` is the right one, upper case. Answers come stripped of surrounding space, as lmms-eval strips them, except in
nanoVLM's own rule. Dates are those of the commits of lmms-eval.
"""

import re
import string
from collections.abc import Mapping, Sequence

from eval.scorers.judged import Judged, judged
from eval.scorers.vqa import NUMBER_WORDS

_BEST = [f"{kind} is" for kind in ("answer", "correct answer", "best answer", "correct option", "best option")]
_BEST += ["choice is", "correct choice is"]
_PHRASES = [*_BEST, *(f"the {one}" for one in _BEST), "i choose", "i select", "i pick", "my answer is", "my choice is"]
_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
# How a letter may stand in a text, and how much each way counts against the others.
_FORMS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0


def find_letter(answer: str, letters: Sequence[str]) -> str | None:
    """The letter (upper case, of `letters`) that a text names, by rank: at its start, at its end, after a phrase such
    as "the answer is", as (A), A. A: A) or A before a space, else anywhere; within a rank the last one counts.

    lmms-eval since 2026-04-11 (commit 9ca4445d): tasks/_task_utils/mcq_extract.py. Lower-case letters are not seen.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found = [
        (rank, text.rfind(form.format(letter)), letter)
        for form, rank in _FORMS.items()
        for letter in letters
        if form.format(letter) in text
    ]
    for phrase in _PHRASES:
        if (at := text.lower().find(phrase)) >= 0:
            places = [(text.find(letter, at + len(phrase)), letter) for letter in letters]
            found += [(_PHRASE, place, letter) for place, letter in places if place >= 0]
    core = text.strip()
    for letter in letters:
        if core.startswith(letter) and not core[1:2].isalpha():
            found.append((_START, 0, letter))
        if core.endswith(letter) and not core[-2:-1].isalpha():
            found.append((_END, len(text), letter))
    if not found:
        found = [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else None


def letter_anywhere(answer: str, letter: str, letters: Sequence[str] = "ABCD") -> Judged:
    """MMStar and RealWorldQA in lmms-eval since 2026-04-11: the letter that find_letter reads is the right one."""
    found = find_letter(answer, letters)
    return judged(found == letter.strip().upper(), found)


def first_letter(answer: str, letter: str) -> Judged:
    """MMStar in lmms-eval until 2026-04-11, from MMStar's own script: of the lower-cased answer the first character, or
    the one after "(", "option " or "the answer is ", is the letter. So "apple" is A."""
    text = answer.lower().replace("\n", " ").strip()
    start = next((one for one in ("(", "option ", "the answer is ") if text.startswith(one)), "")
    found = text[len(start) : len(start) + 1]
    return judged(found == letter.lower().replace("\n", " ").strip(), found.upper() or None)


def letter_as_word(answer: str, letter: str) -> Judged:
    """MMStar in nanoVLM v0.1 (models/utils.py, tag v0.1): the right letter stands somewhere as a word, in upper case,
    or anywhere between two parentheses of a line. Others may stand there too."""
    right = re.escape(letter.upper())
    match = re.search(rf"\b{right}\b|\(.*{right}.*\)", answer)
    return judged(match is not None, letter.upper() if match else None)


def same_words(answer: str, truth: str) -> Judged:
    """lmms-eval's exact_match with ignore_case and ignore_punctuation (GQA): ASCII punctuation does not count."""
    found, right = (one.lower().translate(_NO_PUNCTUATION) for one in (answer, truth))
    return judged(found == right, found)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def letter_or_start(answer: str, letter: str) -> Judged:
    """AI2D in lmms-eval (tasks/ai2d/utils.py): the whole answer is the letter, or begins with the letter and a full
    stop; case and punctuation do not count."""
    match = re.match(r"\s*([A-Z])\.", answer)
    return same_words(match.group(1) if match else answer.strip(), letter)


def letter_with_stop(answer: str, letter: str) -> Judged:
    """ScienceQA in lmms-eval (tasks/scienceqa/utils.py), after LLaVA: the whole answer is the letter, in either case,
    or begins with the upper-case letter and a full stop."""
    text = answer.strip()
    if text.lower() == letter.lower():
        return judged(True, letter.upper())
    found = text[0] if text[1:2] == "." and text[0].isupper() else None
    return judged(found is not None and found.lower() == letter.lower(), found or (text if len(text) == 1 else None))


def first_character(answer: str, letter: str) -> Judged:
    """SEED-Bench in lmms-eval (tasks/seedbench/utils.py): the first character, in either case."""
    found = answer.strip()[:1]
    return judged(found.lower() == letter.lower().strip(), found.upper() or None)


def realworldqa_until_2026_04(answer: str, truth: str, question: str) -> Judged:
    """RealWorldQA in lmms-eval until 2026-04-11: number words become digits, the text of a choice (lines "A. text" of
    the question) found in the answer becomes its letter; then the whole answer counts, without case and punctuation."""
    digits = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
    text = re.sub(r"[^\w\s]", "", digits.get(answer.lower(), answer)).strip()
    choices = [choice.strip() for _, choice in re.findall(r"\b([A-Z])\.\s+([^\n]*)", question)]
    letters = {choice: string.ascii_uppercase[number] for number, choice in enumerate(choices)}
    match = re.search("|".join(map(re.escape, choices)), text)
    return same_words(letters.get(match.group(), text) if match else text, truth)


def realworldqa_since_2026_04(answer: str, truth: str) -> Judged:
    """RealWorldQA in lmms-eval since 2026-04-11: letter_anywhere where the truth is A to D, else the whole answer in
    lower case, without full stops at its end."""
    if truth.strip().upper() in ("A", "B", "C", "D"):
        return letter_anywhere(answer, truth)
    found = answer.lower().strip().rstrip(".")
    return judged(found == truth.strip().lower(), found)


# What may stand around a letter, in the order in which MMBench's rule tries them.
_AROUND = [("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")]
_AROUND += [(":", after) for after in ("", ",", ".", ")", ").")]


def mmbench_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that MMBench's rule reads: exactly one of A to E stands as a word, alone or with marks; else exactly
    one of the choices' texts stands in the answer; else find_letter's.

    lmms-eval, tasks/mmbench/mmbench_evals.py with eval_method "static". choices: A to D, as the data has them: where
    there is no third choice the data says "nan", and that text counts.
    """
    words = answer.split()
    for before, after in _AROUND:
        there = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(there) == 1 and (before or after or "A" not in words or len(words) <= 3):  # "A" may be an article
            return there[0]
    there = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return there[0] if len(there) == 1 else find_letter(answer, sorted(choices))


def mmbench(answer: str, letter: str, choices: Mapping[str, str]) -> Judged:
    """MMBench in lmms-eval, task mmbench_en_dev_static: see mmbench_letter."""
    found = mmbench_letter(answer.strip(), choices)
    return judged(found == letter, found)
