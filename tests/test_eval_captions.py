"""Captions: CIDEr-D, BLEU, ROUGE-L and the tokens, against pycocoevalcap 1.2 and Java's PTBTokenizer.

All expected values were computed by these two on the captions below (pycocoevalcap's Cider, Bleu(4) and Rouge on the
tokens of its PTBTokenizer).
"""

import math
import random

import pytest

from eval.scorers import captions
from eval.scorers.ptb import tokens

REFERENCES = [
    ["A man rides a horse on the beach.", "A person riding a brown horse near the sea."],
    ["Two dogs play with a ball in the grass.", "Dogs playing outside."],
    ["A red bus is parked on a street.", "A bus on the street, with people.", "The red bus stands still."],
    ["A plate of food on a table."],
]
CAPTIONS = ["A man riding a horse on a beach.", "two dogs play with a red ball", "A bus.", ""]


@pytest.fixture
def tokenized():
    return [tokens(one) for one in CAPTIONS], [[tokens(one) for one in of_image] for of_image in REFERENCES]


def test_cider_d(tokenized):
    assert captions.cider_d(*tokenized) == pytest.approx([2.4173269, 2.89154073, 1.17022667, 0.0], abs=1e-7)
    assert sum(captions.cider_d(*tokenized)) / 4 == pytest.approx(1.619773575172187, abs=1e-12)


def test_bleu(tokenized):
    counts = [sum(one) for one in zip(*map(captions.bleu_counts, *tokenized), strict=True)]
    expected = [0.4355936367626923, 0.37180702820671424, 0.29168486507072344, 0.22842418820010707]
    assert captions.bleu(counts) == pytest.approx(expected, abs=1e-12)


def test_rouge_l(tokenized):
    found = list(map(captions.rouge_l, *tokenized))
    assert found == pytest.approx([0.75, 0.73346693, 0.40397351, 0.0], abs=1e-7)


def test_a_copy_of_the_only_reference_scores_ten():
    references = [[["a", "b", "c", "d", str(i)]] for i in range(20)]
    assert captions.cider_d([one[0] for one in references], references) == pytest.approx([10.0] * 20)


def test_one_image_says_nothing_of_rarity():
    """Of one image every n-gram is in all images, and weighs nothing."""
    assert captions.cider_d([["a", "cat"]], [[["a", "cat"]]]) == [0.0]


def test_the_common_subsequence_is_that_of_a_search_by_hand():
    rng = random.Random(0)
    for _ in range(50):
        first, second = ([rng.choice("abc") for _ in range(rng.randint(1, 6))] for _ in range(2))
        longest = max(
            len(kept)
            for bits in range(2 ** len(first))
            if is_within(kept := [one for i, one in enumerate(first) if bits >> i & 1], second)
        )
        precision, recall = longest / len(first), longest / len(second)
        score = 2.44 * precision * recall / (recall + 1.44 * precision) if longest else 0.0
        assert captions.rouge_l(first, [second]) == pytest.approx(score)


def is_within(some, sequence):
    rest = iter(sequence)
    return all(one in rest for one in some)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dogs don't bark.", "a man 's dogs do n't bark"),
        ("(Two) t-shirts, red/blue!", "-lrb- two -rrb- t-shirts red/blue"),
        ("It's 10:30 a.m. on St. Mark's Square", "it 's 10:30 a.m. on st. mark 's square"),
        ('A "stop" sign -- 50% off; $5', "a stop sign 50 % off $ 5"),
        ("I can't, they're gonna go; cannot", "i ca n't they 're gon na go can not"),
        ("3,000 people... and 1/2 a pizza?!", "3,000 people and 1/2 a pizza ?!"),
        ("7-eleven & #1 wi-fi", "7-eleven & # 1 wi-fi"),
        ("rock'n'roll o'clock [sic] {x}", "rock 'n' roll o'clock -lsb- sic -rsb- -lcb- x -rcb-"),
        ("the elephants' harnesses", "the elephants harnesses"),
        ("Mr. Smith's U.S. trip cost 3.5", "mr. smith 's u.s. trip cost 3.5"),
        ("“hi” café’s it’s", "hi café 's it 's"),
        ("see http://x.com/a or a@b.com", "see http://x.com/a or a@b.com"),
        ("90-degrees no. 5 no.", "90-degrees no. 5 no"),
        ("", ""),
    ],
)
def test_tokens_are_those_of_java(caption, expected):
    assert tokens(caption) == expected.split()


def test_bleu_is_short_for_short_captions():
    """Twice as short as its reference: the penalty is e to the power of -1."""
    counts = captions.bleu_counts(["a", "b"], [["a", "b", "c", "d"]])
    assert captions.bleu(counts)[0] == pytest.approx(math.exp(-1), rel=1e-6)
