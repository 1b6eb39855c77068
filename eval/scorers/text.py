"""Texts and numbers: ChartQA, DocVQA, InfoVQA, OCRBench, GQA's own rule, one's own rows."""

import re
from collections.abc import Sequence

from eval.scorers.choice import find_letter
from eval.scorers.judged import Judged, judged
from eval.scoring import normalise

TOLERANCE = 0.05  # of a number, relative to the truth


def same_text(answer: str, truths: Sequence[str]) -> Judged:
    """Exact match as during training (eval.scoring): case, space around and a final full stop do not count."""
    found = normalise(answer)
    return judged(any(found == normalise(truth) for truth in truths), found)


def identical(answer: str, truth: str) -> Judged:
    """GQA's own eval.py: the very same string."""
    return judged(answer == truth, answer)


def contains(answer: str, truths: Sequence[str]) -> Judged:
    """One of the truths stands in the answer as words, in normal form (see same_text); a number not within another:
    3 is neither in 13 nor in 3.5 nor in -3."""
    found = normalise(answer)
    wanted = [one for truth in truths if (one := normalise(truth))]
    return judged(any(re.search(_BEFORE + re.escape(one) + _AFTER, found) for one in wanted), found)


_BEFORE, _AFTER = r"(?<!\w)(?<!\d[.,])(?<!^-)(?<!\W-)", r"(?!\w)(?![.,]\d)"
_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_ONLY_NUMBER = re.compile(rf"\s*[$€£]?\s*({_NUMBER})\s*(?:%|[^\W\d]+)?\s*\.?\s*")


def first_number(text: str) -> float | None:
    """The first number of a text; commas between groups of three digits do not count."""
    match = re.search(_NUMBER, text)
    return float(match.group().replace(",", "")) if match else None


def number_within(answer: str, truths: Sequence[str], tolerance: float = TOLERANCE) -> Judged:
    """The first number of the answer is within 5 % of a truth that is one, with a currency, a unit or % at most; a
    truth of 0 must be met exactly. Where no truth is a number, exact match (same_text)."""
    numbers = [float(match[1].replace(",", "")) for truth in truths if (match := _ONLY_NUMBER.fullmatch(truth))]
    if not numbers:
        return same_text(answer, truths)
    found = first_number(answer)
    is_near = found is not None and any(abs(found - number) <= tolerance * abs(number) for number in numbers)
    return judged(is_near, None if found is None else f"{found:g}")


def relaxed(answer: str, truth: str) -> Judged:
    """ChartQA's relaxed accuracy (arXiv:2203.10244, section 5.1; lmms-eval, tasks/chartqa/utils.py): two numbers, of
    which a percentage counts as a fraction, within 5 % of the truth; else the same text in lower case."""
    found, right = _as_number(answer), _as_number(truth)
    if found is not None and right:  # a truth of 0 is compared as text
        return judged(abs(found - right) / abs(right) <= TOLERANCE, f"{found:g}")
    return judged(answer.lower() == truth.lower(), answer.lower())


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(answer: str, truths: Sequence[str]) -> Judged:
    """Average normalised Levenshtein similarity in lmms-eval (api/metrics.py): the best of 1 - distance / the longer
    length, 0 below 0.5. The distance ignores case and runs of space; the lengths are those of the texts as given."""
    return Judged(similarity if (similarity := _similarity(answer, truths)) >= 0.5 else 0.0, _plain(answer))


def anls_of_paper(answer: str, truths: Sequence[str]) -> Judged:
    """ANLS as its paper has it (arXiv:1907.00490, equation 1): a similarity of just 0.5 counts 0 too."""
    return Judged(similarity if (similarity := _similarity(answer, truths)) > 0.5 else 0.0, _plain(answer))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(answer: str, truths: Sequence[str]) -> float:
    shares = []
    for truth in truths:
        length = max(len(answer.upper()), len(truth.upper()))
        shares.append(edit_distance(_plain(answer), _plain(truth)) / length if length else 0.0)
    return 1 - min(shares, default=1.0)


def ocr_contains(answer: str, truths: Sequence[str], dataset: str, until_2026_04: bool = False) -> Judged:
    """OCRBench in lmms-eval (tasks/ocrbench/utils.py): a truth stands in the answer, in lower case; of HME100k, whose
    truths are formulas, in the case as given and without blanks.

    Since 2026-07-30 full-width ASCII letters and blanks count as the plain ones. until_2026_04: until 2026-04-10 the
    answer alone was in lower case for HME100k too, so that a formula with a capital could not be right.
    """
    answer = (answer.lower() if until_2026_04 else answer).strip()

    def form(text: str) -> str:
        if dataset == "HME100k":
            return text.strip().replace("\n", " ").replace(" ", "")
        text = text if until_2026_04 else text.translate(_FULL_WIDTH)
        return text.lower().strip().replace("\n", " ")

    found = form(answer)
    return judged(any(form(truth) in found for truth in truths), found)


_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def named_choice(answer: str, truths: Sequence[str], letters: Sequence[str]) -> Judged:
    """Choice among one's own rows: the answer is the letter or the text of the right choice, or the letter that
    find_letter reads is the right one. truths: the letter and the text. Without letters, exact match (same_text)."""
    if not letters:
        return same_text(answer, truths)
    if same_text(answer, truths).score:
        return judged(True, truths[0])
    found = find_letter(answer, letters)
    return judged(found == truths[0], found)
