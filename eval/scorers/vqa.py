"""VQAv2, TextVQA, OK-VQA: soft accuracy over ten people's answers, after normalising as the VQA challenge does.

The normal form is EvalAI's, by way of pythia and lmms-eval (tasks/_task_utils/vqa_eval_metric.py), with its slips: a
full stop goes unless a digit follows it, but only the first 32; "somebody'd" loses its apostrophe.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from eval.scorers.judged import Judged

Form = Callable[[str], str]

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER, _STOP = re.compile(r"(?<=\d),+(?=\d)"), re.compile(r"\.(?!\d)")
_MAX_STOPS = 32
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(NUMBER_WORDS)}
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
# Any one of a word's apostrophes may be missing.
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
""".split()  # noqa: SIM905
_WHOLE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def without_punctuation(text: str) -> str:
    """Marks go where a space stands beside one of the kind or a comma in a number, else they become a space."""
    result = text
    has_comma = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_comma else " ")
    return _STOP.sub("", result, count=_MAX_STOPS)


def with_digits(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes where they belong, single spaces."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 16)
def vqa_form(text: str) -> str:
    """The normal form of VQAv2 in lmms-eval (tasks/vqav2/utils.py)."""
    return with_digits(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


@lru_cache(maxsize=1 << 16)
def evalai_form(text: str) -> str:
    """The normal form of TextVQA and OK-VQA: commas and question marks go first, "'s" is a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_form(text)


def soft_accuracy(answer: str, truths: Sequence[str], form: Form) -> Judged:
    """Mean over the people asked of min(1, how many of the others gave this answer / 3): lmms-eval's rule for VQAv2,
    TextVQA and OK-VQA, and that of the challenge's own script. 0 without truths."""
    found = form(answer)
    right = [form(truth) == found for truth in truths]
    total = sum(right)
    return Judged(sum(min(1.0, (total - one) / 3) for one in right) / len(right) if right else 0.0, found)


def soft_accuracy_of_all(answer: str, truths: Sequence[str], form: Form) -> Judged:
    """min(1, how many people gave this answer / 3): the formula of the VQA paper (arXiv:1505.00468, section 3)."""
    found = form(answer)
    return Judged(min(1.0, sum(form(truth) == found for truth in truths) / 3), found)
