"""Captions against several references: CIDEr-D, BLEU and ROUGE-L as pycocoevalcap 1.2 counts them, over tokens."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

Tokens = Sequence[str]
MAX_N, SIGMA, BETA = 4, 6.0, 1.2
_SMALL, _TINY = 1e-9, 1e-15  # against division by zero, as BLEU's script has them


def n_grams(words: Tokens) -> Counter:
    """How often each n-gram of 1 to MAX_N words occurs."""
    return Counter(tuple(words[start : start + n]) for n in range(1, MAX_N + 1) for start in range(len(words) - n + 1))


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each caption, in [0, 10] (arXiv:1411.5726, section 4): the references of the whole set, an image each,
    say how rare an n-gram is. The score of a set is the mean."""
    counted = [[n_grams(one) for one in of_image] for of_image in references]
    frequency = Counter(chain.from_iterable({gram for one in of_image for gram in one} for of_image in counted))
    log_images = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        """(n-gram -> weight for each n, the norms, the number of pairs of words)."""
        weights: list[dict] = [{} for _ in range(MAX_N)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (log_images - math.log(max(1, frequency[gram])))
        norms = [math.sqrt(sum(weight**2 for weight in one.values())) for one in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for caption, of_image in zip(captions, counted, strict=True):
        mine = weigh(n_grams(caption))
        total = sum(_similarity(mine, weigh(one)) for one in of_image)
        scores.append(10.0 * total / len(of_image))
    return scores


def _similarity(mine: tuple, other: tuple) -> float:
    """Clipped cosine of the n-gram weights, less for another length; the mean over n."""
    (weights, norms, length), (weights_2, norms_2, length_2) = mine, other
    total = 0.0
    for n in range(MAX_N):
        dot = sum(
            min(weight, weights_2[n].get(gram, 0.0)) * weights_2[n].get(gram, 0.0)
            for gram, weight in weights[n].items()
        )
        total += dot / (norms[n] * norms_2[n]) if norms[n] and norms_2[n] else dot
    return total / MAX_N * math.exp(-((length - length_2) ** 2) / (2 * SIGMA**2))


def bleu_counts(caption: Tokens, references: Sequence[Tokens]) -> list[int]:
    """[right n-grams for n = 1 to MAX_N, n-grams for n = 1 to MAX_N, length, length of the closest reference]: sums of
    these over a set give its BLEU."""
    counts = n_grams(caption)
    most: Counter = Counter()
    for reference in references:
        most |= n_grams(reference)
    right, length = [0] * MAX_N, len(caption)
    for gram, count in counts.items():
        right[len(gram) - 1] += min(count, most[gram])
    closest = min((abs(len(one) - length), len(one)) for one in references)[1]
    return [*right, *(max(0, length - n) for n in range(MAX_N)), length, closest]


def bleu(counts: Iterable[float]) -> list[float]:
    """BLEU-1 to BLEU-MAX_N of summed bleu_counts."""
    numbers = list(counts)
    right, guessed, (length, closest) = numbers[:MAX_N], numbers[MAX_N : 2 * MAX_N], numbers[2 * MAX_N :]
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(MAX_N):
        product *= (right[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(penalty * product ** (1 / (n + 1)))
    return scores


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L: F of the longest common subsequence, its best precision and best recall over the references, with
    beta 1.2. An empty caption counts as one empty word."""
    words = list(caption) or [""]
    common = [(_common(words, list(one) or [""]), len(one) or 1) for one in references]
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / of for length, of in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for left in first:
        diagonal = 0
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]
