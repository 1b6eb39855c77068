"""What is drawn of a row at a visit: some of its turns, by weights."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any


def answer_rarity(rows: Any) -> dict[tuple[str, str], float]:
    """1 / P(answer | question) over the texts of all rows: drawn by it, a question's answers come equally often.

    Then nothing can be learned from the question alone, which is what a model learns first and may stay with.
    Raises ValueError for a stream.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError("--balance_answers True: must be off for a streamed data set, whose answers are not known yet")
    turns = (turn for row in rows for turn in row["texts"])
    pairs = Counter(map(_texts, turns))
    questions: Counter = Counter()
    for (question, _), count in pairs.items():
        questions[question] += count
    return {(question, answer): questions[question] / count for (question, answer), count in pairs.items()}


def _texts(turn: dict) -> tuple[str, str]:
    """The question and the answer of a turn, by which it is told from others."""
    return (turn["user"] or "").strip(), (turn["assistant"] or "").strip()


def turn_weights(
    turns: list[dict], source_weights: dict[str, float], rarity: dict[tuple[str, str], float] | None
) -> list[float]:
    """How often to draw each turn of a row: the weight of its source (1 where not named), shared among its turns.

    rarity: what a turn's share of its source's weight is proportional to; None: equal shares.
    """
    shares = [rarity[_texts(turn)] if rarity else 1.0 for turn in turns]
    totals: dict[str | None, float] = defaultdict(float)
    for turn, share in zip(turns, shares, strict=True):
        totals[turn.get("source")] += share
    return [
        source_weights.get(str(turn.get("source")), 1.0) * share / totals[turn.get("source")]
        for turn, share in zip(turns, shares, strict=True)
    ]


def draw_turns(weights: list[float], count: int, rng: random.Random) -> list[int]:
    """`count` indices of `weights`, drawn by them; none is drawn again before all were drawn."""
    drawn: list[int] = []
    while len(drawn) < count:
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted draw without replacement.
        keys = [rng.random() ** (1.0 / weight) for weight in weights]
        drawn += sorted(range(len(weights)), key=keys.__getitem__, reverse=True)
    return drawn[:count]
