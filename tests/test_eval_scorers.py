"""Rules for single answers, each against a table of cases.

The expected values were computed by the public scripts themselves, run on these very answers: lmms-eval of 2026-08-06
and of the commits before 9ca4445d and f54dd288, nanoVLM's tag v0.1, POPE's evaluate.py.
"""

import pytest

from eval.scorers import choice, mmmu, text, vqa, yes_no

# Answer, and by each rule the letters of A to D that it makes right: MMStar since 2026-04, until 2026-04, nanoVLM v0.1,
# AI2D, ScienceQA, SEED-Bench.
LETTERS = [
    ("A", "A", "A", "A", "A", "A", "A"),
    ("a", "", "A", "", "A", "A", "A"),
    ("A.", "A", "A", "A", "A", "A", "A"),
    ("(B)", "B", "B", "B", "B", "", ""),
    ("b: green", "", "B", "", "", "", "B"),
    ("B: green", "B", "B", "B", "", "", "B"),
    ("A dog sits", "A", "A", "A", "", "", "A"),
    ("Blue", "B", "B", "", "", "", "B"),
    ("apple", "", "A", "", "", "", "A"),
    ("cat", "", "C", "", "", "", "C"),
    ("The image shows CATS", "A", "", "", "", "", ""),
    ("Answer: B", "B", "A", "B", "", "", "A"),
    ("the answer is c", "", "C", "", "", "", ""),
    ("The answer is C", "C", "C", "C", "", "", ""),
    ("option d", "", "D", "", "", "", ""),
    ("Because A: red is wrong, D", "D", "B", "AD", "", "", "B"),
    ("I think both B and C", "C", "", "BC", "", "", ""),
    ("(a", "", "A", "", "A", "", ""),
    ("", "", "", "", "", "", ""),
    ("D)", "D", "D", "D", "D", "", "D"),
    ("AB", "B", "A", "", "", "", "A"),
    ("答案是 C", "C", "", "C", "", "", ""),
    ("Not A but (D) or B.", "B", "", "ABD", "", "", ""),
    ("C. a cat", "C", "C", "C", "C", "C", "C"),
]
RULES = [
    choice.letter_anywhere,
    choice.first_letter,
    choice.letter_as_word,
    choice.letter_or_start,
    choice.letter_with_stop,
    choice.first_character,
]


@pytest.mark.parametrize("case", LETTERS, ids=lambda case: case[0])
def test_letters(case):
    answer, *expected = case
    found = ["".join(letter for letter in "ABCD" if rule(answer, letter).score) for rule in RULES]
    assert found == expected


def test_what_was_parsed_is_said():
    assert choice.letter_anywhere("I think both B and C", "B") == (0.0, "C")
    assert choice.first_letter("apple", "A") == (1.0, "A")
    assert choice.letter_anywhere("no idea", "A") == (0.0, None)
    assert choice.letter_with_stop("B. red", "A") == (0.0, "B")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("B.", "B"), ("A man on a bike", "A"), ("(C)", "C"), ("the cat", "A"), ("The dog and the cat", None),
     ("banana", "C"), ("D or B", "D"), (": B", "B"), ("E", "E"), ("red", "D"), ("answer: (D)", "D"), ("", None)],
)  # fmt: skip
def test_mmbench(answer, letter):
    """A choice that is not there is the text "nan", which stands in "banana"."""
    assert choice.mmbench_letter(answer, {"A": "cat", "B": "dog", "C": "nan", "D": "red"}) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "since", "until"),
    [("A", "A", 1, 1), ("a", "A", 0, 1), ("left lane", "A", 0, 1), ("The right lane.", "B", 0, 1), ("two", "2", 0, 1),
     ("B. right lane", "B", 1, 1), ("Two.", "2", 0, 0), ("Downhill.", "Downhill", 1, 1), ("It is (B)", "B", 1, 0),
     ("", "A", 0, 0)],
)  # fmt: skip
def test_realworldqa(answer, truth, since, until):
    question = "Which way?\nA. left lane\nB. right lane\nPlease answer directly"
    assert choice.realworldqa_since_2026_04(answer, truth).score == since
    assert choice.realworldqa_until_2026_04(answer, truth, question).score == until


@pytest.mark.parametrize(
    ("text", "of_vqav2", "of_textvqa"),
    [("Two dogs.", "2 dogs", "2 dogs"), ("the Red bus", "red bus", "red bus"), ("isnt", "isn't", "isn't"),
     ("10:30", "10:30", "10:30"), ("$5.00", "$5.00", "$5.00"), ("3,000", "3000", "3000"), ("a/b", "b", "b"),
     ("couldnt've", "couldn't've", "couldn't've"), ("yall'd've", "y'all'd've", "y'all'd've"), ("Im", "im", "im"),
     ("none", "0", "0"), ("somebody'd", "somebodyd", "somebodyd"), ("dog's", "dog's", "dog 's"),
     ("x - y", "x y", "x y"), ("A. B. C", "b c", "b c"),
     ("T-Shirt", "t shirt", "t shirt"), ("2.5.", "2.5", "2.5"), ('"stop"', "stop", "stop"),
     ("." * 34, "..", "..")],
)  # fmt: skip
def test_vqa_normal_form(text, of_vqav2, of_textvqa):
    assert (vqa.vqa_form(text), vqa.evalai_form(text)) == (of_vqav2, of_textvqa)


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy(count, score):
    truths = ["yes"] * count + ["no"] * (10 - count)
    assert vqa.soft_accuracy("Yes.", truths, vqa.vqa_form).score == pytest.approx(score)
    assert vqa.soft_accuracy_of_all("Yes.", truths, vqa.vqa_form).score == pytest.approx(min(1, count / 3))


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [("hello", ["hello"], 1), ("Hello  World", ["hello world"], 1), ("helo", ["hello", "x"], 0.8), ("abc", ["xyz"], 0),
     ("abcd", ["abxy"], 0.5), ("", [""], 1), ("", ["a"], 0), ("12 March", ["12 march 1999"], 0.6153846153846154),
     ("straße", ["strasse"], 0.7142857142857143)],
)  # fmt: skip
def test_anls(answer, truths, score):
    assert text.anls(answer, truths).score == pytest.approx(score, abs=1e-12)
    assert text.anls_of_paper(answer, truths).score == pytest.approx(score if score > 0.5 else 0, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("5", "5.2", 1), ("5", "5.3", 0), ("10%", "0.1", 1), ("10", "10%", 0), ("0", "0", 1), ("0.0", "0", 0),
     ("Yes", "yes", 1), ("3,000", "3000", 0), ("-5", "-5.1", 1), ("nan", "nan", 0), ("1e3", "1000", 1), ("", "", 1),
     ("5 %", "5%", 1)],
)  # fmt: skip
def test_chartqa(answer, truth, score):
    assert text.relaxed(answer, truth).score == score


@pytest.mark.parametrize(
    ("answer", "truths", "dataset", "now", "before"),
    [("The word is STOP.", ["stop"], "IIIT5K", 1, 1), ("st op", ["stop"], "IIIT5K", 0, 0),
     ("x ^ 2", ["x^2"], "HME100k", 1, 1), ("X ^ 2", ["X^2"], "HME100k", 1, 0), ("X^2", ["x^2"], "HME100k", 0, 1),
     ("ＡＢＣ", ["abc"], "IIIT5K", 1, 0), ("a\nb", ["a b"], "IIIT5K", 1, 1), ("", ["a", ""], "IIIT5K", 1, 1)],
)  # fmt: skip
def test_ocrbench(answer, truths, dataset, now, before):
    assert text.ocr_contains(answer, truths, dataset).score == now
    assert text.ocr_contains(answer, truths, dataset, until_2026_04=True).score == before


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "official"),
    [("Yes", "yes", 1, 1), ("yes.", "yes", 0, 1), ("Yes, there is", "yes", 0, 1), ("No", "no", 1, 1),
     ("No, there is not", "no", 0, 1), ("There is not", "no", 0, 1), ("maybe", "yes", 0, 1), ("", "yes", 0, 1),
     ("Yes. No.", "no", 0, 0), ("NO", "no", 1, 0)],
)  # fmt: skip
def test_pope(answer, truth, exact, official):
    assert yes_no.pope_exact(answer, truth).score == exact
    assert yes_no.pope_official(answer, truth).score == official


def test_hallusion():
    assert yes_no.hallusion_yes("Eyes are closed", "yes").score == 1  # as lmms-eval's
    assert yes_no.hallusion_word("Eyes are closed", "yes") == (0.0, None)
    assert yes_no.hallusion_word("No, not yes.", "no") == (1.0, "no")
    assert yes_no.hallusion_yes("", "no").score == 1
    assert yes_no.hallusion_word("", "no").score == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("B.", "B"), ("(C)", "C"), ("(A) or (C)", "C"), ("C and B are wrong", "B"), ("x", None), ("b", None),
     ("it is certainly shown as two dogs", "D"), ("I see a red car and blue there", "B"), ("The answer is D.", "D"),
     ("", None), ("A.B", "B"), ("The Answer: B.", "B")],
)  # fmt: skip
def test_mmmu_letter(answer, letter):
    choices = dict(zip("ABCD", ["a red car", "blue", "10%", "two dogs"], strict=True))
    assert mmmu.read_letter(answer, choices) == letter
    assert mmmu.choose(answer, "A", choices, chance=True).score == (0.25 if letter is None else letter == "A")
    assert mmmu.choose(answer, "A", choices, chance=False).score == (letter == "A")


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [("5", ["5"], 1), ("The answer is 5.", ["5"], 1), ("x = 1,000", ["1000"], 1), ("a cat sits", ["cat"], 1),
     ("So it is about 3.14159", ["3.14"], 1), ("option b", ["b"], 1), ("1e3", ["1000"], 1), ("is so ", ["x"], 0),
     ("the result is = \n7", ["7"], 0), ("", ["5"], 0), ("4/5", ["4/5", "0.8"], 1)],
)  # fmt: skip
def test_mmmu_open_questions(answer, truths, score):
    assert mmmu.open_question(answer, truths).score == score
    assert mmmu.open_question_as_lmms_eval(answer, truths).score == 0


def test_gqa():
    assert choice.same_words("Yes.", "yes").score == 1
    assert choice.same_words("yes it is", "yes").score == 0
    assert text.identical("Yes", "yes").score == 0


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "contains", "number"),
    [("Cat.", ["cat"], 1, 1, 1), ("a cat sits", ["cat", "dog"], 0, 1, 0), ("concatenate", ["cat"], 0, 0, 0),
     ("It is 1,050 m", ["1000"], 0, 0, 1), ("1051", ["$1000"], 0, 0, 0), ("0.01", ["0"], 0, 0, 0),
     ("-3", ["3"], 0, 0, 0), ("five", ["5"], 0, 0, 0), ("3.5", ["3"], 0, 0, 0), ("It is 3.", ["3"], 0, 1, 1),
     ("about 98 %", ["100%"], 0, 0, 1), ("", [""], 1, 0, 1)],
)  # fmt: skip
def test_own_rows(answer, truths, exact, contains, number):
    assert text.same_text(answer, truths).score == exact
    assert text.contains(answer, truths).score == contains
    assert text.number_within(answer, truths).score == number


@pytest.mark.parametrize(
    ("answer", "score"), [("B", 1), ("b", 1), ("(B)", 1), ("a cat", 1), ("The answer is B.", 1), ("A", 0), ("dog", 0)]
)
def test_own_choices(answer, score):
    assert text.named_choice(answer, ["B", "a cat"], ["A", "B"]).score == score
    assert text.named_choice("a cat", ["a cat"], []).score == 1
