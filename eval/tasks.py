"""The table of tasks: where a benchmark's data is, how it is asked, and by which rules its answers are scored.

Names and prompts are lmms-eval's. The ids on the hub are those since July 2026; before, lmms-lab-encoder was lmms-lab.
The first rule of a task is that of the harness as it stands; published numbers may be by another: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval import items, metrics
from eval.rules import Item, Rule, Task, each
from eval.scorers import choice, mmmu, text, vqa, yes_no
from eval.scorers.captions import cider_d
from eval.scorers.judged import Judged
from eval.scorers.ptb import tokens

HUB = "lmms-lab-encoder"
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

_VQA = ("question_id", "image", "question", "answers")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mmstar", "Lin-Chen/MMStar", None, "val", ("index", "question", "image", "answer", "category",
             "l2_category"), items.mmstar, MMSTAR, metrics.mmstar, "average", 50, ("index",), chance=0.246,
             published_rows=1500, lmms_metrics={"average": "average"}),
        Task("gqa", f"{HUB}/GQA", "testdev_balanced_instructions", "testdev", ("id", "imageId", "question", "answer"),
             items.short_answer("answer"), GQA, metrics.means(), "accuracy", 16, ("id",), "imageId",
             image_config="testdev_balanced_images", image_key="imageId", published_rows=12578,
             lmms_metrics={"accuracy": "exact_match"}),
        Task("vqav2_val", f"{HUB}/VQAv2", None, "validation", (*_VQA, "image_id"), items.short_answer("answers",
             "answer_type"), _soft(vqa.vqa_form), metrics.means("answer_type"), "accuracy", 16, ("question_id",),
             "image_id", published_rows=214354, lmms_metrics={"accuracy": "exact_match"}),
        Task("textvqa_val", f"{HUB}/textvqa", None, "validation", (*_VQA, "image_id"), items.short_answer("answers",
             capital=True), _soft(vqa.evalai_form), metrics.means(), "accuracy", 50, ("question_id",), "image_id",
             published_rows=5000, lmms_metrics={"accuracy": "exact_match"}),
        Task("ok_vqa_val2014", f"{HUB}/OK-VQA", None, "val2014", _VQA, items.short_answer("answers",
             before=items.UNANSWERABLE), _soft(vqa.evalai_form), metrics.means(), "accuracy", 50, ("question_id",),
             published_rows=5046, lmms_metrics={"accuracy": "exact_match"}),
        Task("coco2017_cap_val", f"{HUB}/COCO-Caption2017", None, "val", ("question_id", "image", "answer"),
             items.coco, CAPTIONS, metrics.captions, "CIDEr", 64, ("question_id",), published_rows=5000,
             lmms_metrics={"CIDEr": "coco_CIDEr", "ROUGE-L": "coco_ROUGE_L"}
             | {f"BLEU-{n}": f"coco_Bleu_{n}" for n in range(1, 5)}),
        Task("pope", f"{HUB}/POPE", None, "test", ("question_id", "question", "answer", "image", "category"),
             items.pope, POPE, metrics.pope, "accuracy", 128, ("category", "question_id"), "image_source", chance=0.5,
             published_rows=9000, lmms_metrics={"accuracy": "pope_accuracy", "f1": "pope_f1_score",
             "precision": "pope_precision", "recall": "pope_recall"}),
        Task("ocrbench", "echo840/OCRBench", None, "test", ("dataset", "question", "question_type", "answer", "image"),
             items.ocrbench, OCRBENCH, metrics.means("question_type"), "accuracy", 128, published_rows=1000,
             lmms_metrics={"accuracy": "ocrbench_accuracy"}),
        Task("ai2d", f"{HUB}/ai2d", None, "test", ("question", "options", "answer", "image"), items.ai2d, AI2D,
             metrics.means(), "accuracy", 16, chance="choices", published_rows=3088,
             lmms_metrics={"accuracy": "exact_match"}, lmms_filter="flexible-extract"),
        *(Task(name, f"{HUB}/ScienceQA", config, "test", ("image", "question", "choices", "answer", "hint"),
               items.scienceqa, SCIENCEQA, metrics.means("subject"), "accuracy", 16, chance="choices",
               published_rows=rows, lmms_metrics={"accuracy": "exact_match"})
          for name, config, rows in (("scienceqa", "ScienceQA-FULL", 4241), ("scienceqa_img", "ScienceQA-IMG", 2017))),
        Task("mmmu_val", f"{HUB}/MMMU", None, "validation", ("id", "question", "options", "answer", "question_type",
             "image_1"), items.mmmu, (_mmmu(True), _mmmu(False)), metrics.means("domain", "subject", "type"),
             "accuracy", 128, ("id",), images=tuple(f"image_{n}" for n in range(1, 8)), chance="choices",
             published_rows=900, lmms_metrics={"accuracy": "mmmu_acc"}),
        Task("chartqa", f"{HUB}/ChartQA", None, "test", ("type", "question", "answer", "image"), items.chartqa,
             CHARTQA, metrics.means("split", name="accuracy"), "accuracy", 16, published_rows=2500,
             lmms_metrics={"accuracy": "relaxed_overall", "split/human": "relaxed_human_split",
             "split/augmented": "relaxed_augmented_split"}),
        Task("docvqa_val", f"{HUB}/DocVQA", "DocVQA", "validation", ("questionId", "question", "answers", "image"),
             items.short_answer("answers"), ANLS, metrics.means(name="anls"), "anls", 32, ("questionId",),
             published_rows=5349, lmms_metrics={"anls": "anls"}),
        Task("infovqa_val", f"{HUB}/DocVQA", "InfographicVQA", "validation", ("questionId", "question", "answers",
             "image"), items.short_answer("answers"), ANLS, metrics.means(name="anls"), "anls", 32, ("questionId",),
             published_rows=2801, lmms_metrics={"anls": "anls"}),
        Task("mmbench_en_dev", f"{HUB}/MMBench", "en", "dev", ("index", "question", "hint", "answer", "A", "B", "C",
             "D", "category", "L2-category", "image"), items.mmbench, MMBENCH, metrics.mmbench, "accuracy", 1024,
             ("index",), "rotated", chance="choices", lmms_metrics={"accuracy": "gpt_eval_score"}, lmms_scale=100.0),
        Task("seedbench", f"{HUB}/SEED-Bench", None, "test", ("question_id", "question", "choice_a", "choice_b",
             "choice_c", "choice_d", "answer", "data_type", "image"), items.seedbench, SEEDBENCH,
             metrics.means("data_type"), "accuracy", 50, chance="choices", published_rows=17990,
             lmms_metrics={"accuracy": "seed_all", "data_type/image": "seed_image", "data_type/video": "seed_video"}),
        Task("realworldqa", f"{HUB}/RealWorldQA", None, "test", ("question", "answer", "image"), items.realworldqa,
             REALWORLDQA, metrics.means(), "accuracy", 16, published_rows=765,
             lmms_metrics={"accuracy": "exact_match"}),
        Task("hallusion_bench_image", f"{HUB}/HallusionBench", None, "image", ("category", "subcategory", "set_id",
             "figure_id", "question_id", "question", "gt_answer", "image"), items.hallusion, HALLUSION,
             metrics.hallusion, "aAcc", 128, ("category", "subcategory", "set_id", "figure_id", "question_id"),
             "set", chance=0.5, published_rows=951, lmms_metrics={"aAcc": "aAcc", "qAcc": "qAcc", "fAcc": "fAcc"}),
    )
}  # fmt: skip
