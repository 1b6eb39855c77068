"""The public rules by which the answers of each benchmark are scored.

The first rule of a task is that of the harness as it stands; published numbers may be by another: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.rules import Item, Rule, each
from eval.scorers import choice, mmmu, text, vqa, yes_no
from eval.scorers.captions import cider_d
from eval.scorers.judged import Judged
from eval.scorers.ptb import tokens

LMMS = "lmms-eval"  # as seen on 2026-08-06; its scores have not changed since they were added, unless a date is named


def _captions(answers: Sequence[str], of: Sequence[Item]) -> list[Judged]:
    said = [tokens(answer) for answer in answers]
    scores = cider_d(said, [[tokens(one) for one in item.truth["answers"]] for item in of])
    return [Judged(score, " ".join(words)) for score, words in zip(scores, said, strict=True)]


def _mmmu(as_lmms_eval: bool) -> Rule:
    def judge(answer: str, truth: Mapping[str, Any], _: str) -> Judged:
        if "choices" in truth:
            return mmmu.choose(answer, truth["answer"], truth["choices"], chance=as_lmms_eval)
        return (mmmu.open_question_as_lmms_eval if as_lmms_eval else mmmu.open_question)(answer, truth["answers"])

    if as_lmms_eval:
        return Rule(LMMS, "no letter: 1 / choices, the mean of its random draw; no open answer is right", each(judge))
    return Rule("open answers counted", "no letter: wrong; open answers by MMMU's eval_utils.py", each(judge))


def _mmbench(answer: str, truth: Mapping[str, Any], _: str) -> Judged:
    return choice.mmbench(answer, truth["answer"], truth["choices"])


def _realworldqa_before(answer: str, truth: Mapping[str, Any], question: str) -> Judged:
    return choice.realworldqa_until_2026_04(answer, truth["answer"], question)


def _one(name: str, source: str, judge: Any, strip: bool = True, key: str = "answer") -> Rule:
    """A rule of the answer and one value of the truth."""
    return Rule(name, source, each(lambda answer, truth, _: judge(answer, truth[key]), strip))


def _ocr(name: str, source: str, until_2026_04: bool) -> Rule:
    return Rule(name, source, each(lambda a, t, _: text.ocr_contains(a, t["answers"], t["dataset"], until_2026_04)))


def _soft(form: vqa.Form) -> tuple[Rule, ...]:
    others, paper = "min(1, matches among the other nine / 3), mean over ten", "min(1, matches among ten / 3)"
    return (
        Rule(LMMS, others, each(lambda a, t, _: vqa.soft_accuracy(a, t["answers"], form))),
        Rule("VQA paper", paper, each(lambda a, t, _: vqa.soft_accuracy_of_all(a, t["answers"], form))),
    )


SINCE, UNTIL = f"{LMMS} since 2026-04", f"{LMMS} until 2026-04"
MMSTAR = (
    _one(SINCE, "ranked search for an upper-case letter (0.7.2)", choice.letter_anywhere),
    _one(UNTIL, "first letter of the answer, in any case: the rule behind the GradES paper's numbers",
         choice.first_letter),
    _one("nanoVLM v0.1", "the letter stands anywhere as a word; made for 5 sampled tokens", choice.letter_as_word,
         strip=False),
)  # fmt: skip
REALWORLDQA = (
    _one(SINCE, "A to D: ranked search; else the whole answer", choice.realworldqa_since_2026_04),
    Rule(UNTIL, "the text of a choice becomes its letter, then the whole answer", each(_realworldqa_before)),
)
ANLS = (
    _one(LMMS, "ANLS, 0 below 0.5", text.anls, key="answers"),
    _one("ANLS paper", "arXiv:1907.00490: 0 at 0.5 and below", text.anls_of_paper, key="answers"),
)
GQA = (
    _one(LMMS, "equal without case and punctuation", lambda a, t: choice.same_words(a, t[0]), key="answers"),
    _one("GQA", "its own eval.py: the same string", lambda a, t: text.identical(a, t[0]), key="answers"),
)
POPE = (
    _one(LMMS, 'the whole answer is yes or no; "yes." is neither', yes_no.pope_exact),
    _one("POPE", "its own evaluate.py: no, No or not in the first sentence is no, else yes", yes_no.pope_official),
)
OCRBENCH = (
    _ocr(f"{LMMS} since 2026-07-30", "contains; full-width letters count as plain ones", False),
    _ocr(UNTIL, "contains; formulas with a capital cannot be right", True),
)
HALLUSION = (
    _one(LMMS, "yes stands anywhere, else no; its other rule asks GPT", yes_no.hallusion_yes),
    _one("first yes or no", "a rule of this project: neither is wrong", yes_no.hallusion_word),
)
AI2D = (_one(LMMS, 'the letter alone, or "A." at the start', choice.letter_or_start),)
SCIENCEQA = (_one(LMMS, 'the letter alone, or "A." at the start, after LLaVA', choice.letter_with_stop),)
CHARTQA = (_one(LMMS, "relaxed accuracy: numbers within 5 %, else equal in lower case", text.relaxed),)
SEEDBENCH = (_one(LMMS, "the first character", choice.first_character),)
MMBENCH = (Rule(f"{LMMS} static", "one letter as a word, else a choice's text, else ranked search", each(_mmbench)),)
CAPTIONS = (Rule("pycocoevalcap 1.2", "its formulas; a tokenizer in Python in place of Java's", _captions),)
VQAV2, TEXTVQA = _soft(vqa.vqa_form), _soft(vqa.evalai_form)  # OK-VQA: as TextVQA
MMMU = (_mmmu(as_lmms_eval=True), _mmmu(as_lmms_eval=False))
