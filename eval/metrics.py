"""The numbers of a benchmark, from its rows as answers.jsonl has them.

`rule` names whose scores count. The first metric of a list is the one that the benchmark is known by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from eval.scorers.captions import MAX_N, bleu, bleu_counts, rouge_l
from eval.scorers.ptb import tokens
from eval.statistics import Metric, mean_metric, mean_of_means, ratio_metric

Rows = Sequence[dict]
Metrics = Callable[[Rows, str], list[Metric]]


def scores_of(rows: Rows, rule: str) -> np.ndarray:
    """float [N]"""
    return np.array([row["rules"][rule]["score"] for row in rows], dtype=float)


def _labels(rows: Rows, key: str) -> list[str]:
    return [row["categories"].get(key, "") for row in rows]


def _by(rows: Rows, scores: np.ndarray, keys: Sequence[str]) -> list[Metric]:
    """The mean for each value of each category, named "key/value"."""
    found = []
    for key in keys:
        labels = np.array(_labels(rows, key))
        found += [mean_metric(f"{key}/{one}", scores, labels == one) for one in sorted(set(labels)) if one]
    return found


def _means(keys: Sequence[str], name: str, rows: Rows, rule: str) -> list[Metric]:
    scores = scores_of(rows, rule)
    return [mean_metric(name, scores), *_by(rows, scores, keys)]


def means(*keys: str, name: str = "accuracy") -> Metrics:
    """The mean score, and that of each value of the categories `keys`."""
    return partial(_means, keys, name)


def mmstar(rows: Rows, rule: str) -> list[Metric]:
    """average: the mean over the 18 sub-categories, as lmms-eval has it; accuracy: the plain mean, as VLMEvalKit and
    nanoVLM v0.1 have it; each category is the mean of its three sub-categories."""
    scores, categories, parts = scores_of(rows, rule), _labels(rows, "category"), _labels(rows, "l2_category")
    found = [mean_of_means("average", scores, parts), mean_metric("accuracy", scores)]
    for name in sorted(set(categories)):
        within = [part if category == name else None for part, category in zip(parts, categories, strict=True)]
        found.append(mean_of_means(f"category/{name}", scores, within))
    return [*found, *_by(rows, scores, ["l2_category"])]


def _yes_no(rows: Rows, rule: str, suffix: str, among: np.ndarray) -> list[Metric]:
    """POPE's numbers over the rows `among`. An answer that is neither yes nor no is in no column but accuracy's, so
    that it is missing from recall, as in lmms-eval."""
    said = np.array([row["rules"][rule]["parsed"] for row in rows], dtype=object)
    truth = np.array([row["truth"]["answer"].lower().strip() for row in rows], dtype=object)
    hit, false = (said == "yes") & (truth == "yes") & among, (said == "yes") & (truth == "no") & among
    missed = (said == "no") & (truth == "yes") & among
    return [
        mean_metric(f"accuracy{suffix}", scores_of(rows, rule), among),
        ratio_metric(f"f1{suffix}", 2 * hit, 2 * hit + false + missed),
        ratio_metric(f"precision{suffix}", hit, hit + false.astype(int)),
        ratio_metric(f"recall{suffix}", hit, hit + missed.astype(int)),
        ratio_metric(f"yes_share{suffix}", (said == "yes") & among, among),
        ratio_metric(f"neither_share{suffix}", np.array([one not in ("yes", "no") for one in said]) & among, among),
    ]


def pope(rows: Rows, rule: str) -> list[Metric]:
    """accuracy, f1, precision and recall of yes, the share of yes and of neither among the answers; of each category
    too. lmms-eval's pope_yes_ratio is the share of yes among the truths."""
    categories = np.array(_labels(rows, "category"))
    found = _yes_no(rows, rule, "", np.ones(len(rows), dtype=bool))
    for name in sorted(set(categories) - {""}):
        found += _yes_no(rows, rule, f"/{name}", categories == name)[:2]
    return found


def captions(rows: Rows, rule: str) -> list[Metric]:
    """CIDEr-D (the rows' own score), BLEU-1 to BLEU-4 of the whole set, ROUGE-L."""
    said = [(row["rules"][rule]["parsed"] or "").split() for row in rows]
    references = [[tokens(one) for one in row["truth"]["answers"]] for row in rows]
    counts = np.array([bleu_counts(one, of) for one, of in zip(said, references, strict=True)], dtype=float)

    def nth(n: int, sums: np.ndarray) -> np.ndarray:
        return np.array([bleu(one)[n] for one in sums])

    found = [mean_metric("CIDEr", scores_of(rows, rule))]
    found += [Metric(f"BLEU-{n + 1}", counts, partial(nth, n)) for n in reversed(range(MAX_N))]
    rouge = [rouge_l(one, of) for one, of in zip(said, references, strict=True)]
    return [*found, mean_metric("ROUGE-L", rouge)]


def _all_right(name: str, rows: Rows, scores: np.ndarray, keys: Sequence[str]) -> Metric:
    """The share of groups, rows with the same values of the categories `keys`, of which every row is right. A group's
    score, the product of its rows', stands at its first row."""
    groups: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row["categories"][key] for key in keys), []).append(number)
    product, is_first = np.zeros(len(rows)), np.zeros(len(rows), dtype=bool)
    for numbers in groups.values():
        product[numbers[0]], is_first[numbers[0]] = scores[numbers].prod(), True
    return mean_metric(name, product, is_first)


def hallusion(rows: Rows, rule: str) -> list[Metric]:
    """aAcc: of questions; qAcc: of a question's variants over figures, all right; fAcc: of a figure's questions."""
    scores, base = scores_of(rows, rule), ("category", "subcategory", "set_id")
    return [
        mean_metric("aAcc", scores),
        _all_right("qAcc", rows, scores, (*base, "question_id")),
        _all_right("fAcc", rows, scores, (*base, "figure_id")),
        *_by(rows, scores, ["category"]),
    ]


def mmbench(rows: Rows, rule: str) -> list[Metric]:
    """accuracy: of questions, each right if all its rotations in the data are; accuracy_of_rows: of rows."""
    scores = scores_of(rows, rule)
    found = [_all_right("accuracy", rows, scores, ("rotated",)), mean_metric("accuracy_of_rows", scores)]
    return [*found, *_by(rows, scores, ["category", "L2-category"])]
