"""Exact match: the share of questions whose generated answer is the expected one."""

from collections import Counter, defaultdict
from collections.abc import Iterable


def normalise(answer: str) -> str:
    """Case, surrounding space and a final full stop do not count."""
    return " ".join(answer.lower().split()).removesuffix(".")


def score(pairs: Iterable[tuple[str, str, str | None]]) -> dict[str, float | None]:
    """Exact match over (answer, expected, source): "all" and one entry a source; None where there was no question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, expected, source in pairs:
        for key in {"all", source or "all"}:
            right[key].append(normalise(answer) == normalise(expected))
    means = {key: sum(values) / len(values) for key, values in sorted(right.items())}
    return {"all": None} | means


def question_only(train_rows: Iterable[dict], test_rows: Iterable[dict]) -> float | None:
    """Exact match of answering each question with its most frequent answer in training, the image unseen.

    What a model must beat to have looked at the image. A question that training does not hold gets the most frequent
    answer of all.
    """
    by_question: dict[str, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for row in train_rows:
        for turn in row["texts"]:
            by_question[turn["user"]][turn["assistant"]] += 1
            overall[turn["assistant"]] += 1
    if not overall:
        return None
    default = overall.most_common(1)[0][0]
    right = []
    for row in test_rows:
        for turn in row["texts"]:
            answers = by_question.get(turn["user"])
            right.append((answers.most_common(1)[0][0] if answers else default) == turn["assistant"])
    return sum(right) / len(right) if right else None
