"""What a run's data is like, measured on some of its rows: inspect_data.py and --dry_run print it.

The rows go the way that they go in training: VQADataset's samples, from load_data.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

import numpy as np

from data.datasets import Sample
from data.drops import REASONS_TO_SHOW, TURN, DropCounter
from data.formats import Row, count_formats
from data.images import ImageDecodeError, image_size
from data.mixture_rows import mixture_lines
from data.pipeline import Data
from data.splits import keys_of, shown_by
from data.text import unknown_words

BINS, BAR = 8, 40  # of a histogram: lines, letters of the longest bar
COMPARED_ROWS = 20_000  # of each split, for what is in training and in validation or test as well
WORDS_TO_SHOW = 8
WORD = re.compile(r"\w+")


@dataclass
class Overlap:
    """What rows of a split have in common with the training rows."""

    split: str
    rows: int  # that were compared
    questions: int = 0  # of them
    same_image: int = 0  # rows of which an image is in a training row
    same_question: int = 0  # questions that are asked of the same images in a training row


@dataclass
class Facts:
    """Measured on the sampled training rows; all that is per token or tile is of those that can be used."""

    rows: dict[str, int | None]  # of each split; None for a stream
    split: str
    sampled: int = 0
    seconds: float = 0.0  # to read and prepare them, in this process
    workers: int = 0
    longest: int = 0  # max_sample_length
    formats: Counter = field(default_factory=Counter)
    images: list[int] = field(default_factory=list)  # of each row
    videos: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)  # of each row with images
    sizes: Counter = field(default_factory=Counter)  # (width, height) of the pictures
    tokens: list[int] = field(default_factory=list)  # of each conversation
    labels: int = 0
    dropped: DropCounter = field(default_factory=DropCounter)
    duplicates: int = 0  # training questions that another row asks of the same images
    overlaps: list[Overlap] = field(default_factory=list)
    compared_rows: int = 0  # of training
    words: Counter = field(default_factory=Counter)
    pieces: dict[str, int] = field(default_factory=dict)  # tokens of a word
    unknown: dict[str, str] = field(default_factory=dict)  # word -> the first row that has it
    mixture: list[str] = field(default_factory=list)  # the shares, in words


def measure(data: Data, rows: int | None = None, workers: int = 0) -> Facts:
    """The facts of up to `rows` training rows, spread over all of them, or of a stream the first; None: of all.

    workers: processes that will read them in training, for the time of an epoch.
    """
    splits = {"training": data.train_rows, "validation": data.val_rows, "test": data.test_rows}
    counts = {name: len(of) if hasattr(of, "__len__") else None for name, of in splits.items() if of is not None}
    facts = Facts(counts, data.split, workers=workers, longest=data.cfg.max_sample_length)
    facts.mixture = mixture_lines(data.train_rows, data.cfg)
    for key, row, sample, seconds in _samples(data, rows):
        facts.sampled, facts.seconds = facts.sampled + 1, facts.seconds + seconds
        _add(facts, data.tokenizer, key, row, sample)
    _find_overlaps(facts, {name: of for name, of in splits.items() if hasattr(of, "__len__")})
    _split_words(facts, data.tokenizer)
    return facts


def _samples(data: Data, count: int | None) -> Iterator[tuple[str, Row, Sample, float]]:
    """(key, row, sample, seconds) of each."""
    dataset, rows = data.train_dataset, data.train_rows
    numbered: Iterable[tuple[Any, Any]]
    if hasattr(rows, "__len__"):
        indices = np.arange(len(rows)) if count is None else _spread(len(rows), count)
        numbered = ((index, None) for index in indices.tolist())
    else:
        numbered = enumerate(islice(rows, count))
    for index, row in numbered:
        began = time.perf_counter()
        row = rows[index] if row is None else row
        sample = dataset.sample(row, f"0/{index}")
        yield f"{index}", row, sample, time.perf_counter() - began


def _spread(length: int, count: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, count)).astype(int)


def _add(facts: Facts, tokenizer: Any, key: str, row: Row, sample: Sample) -> None:
    facts.formats.update(count_formats([row]))
    facts.dropped.update(sample.dropped)
    facts.images.append(len(row["images"]))
    facts.videos.append(len(row.get("videos", [])))
    for turn in row["texts"]:
        for text in (turn["user"] or "", turn["assistant"] or ""):
            facts.words.update(word for word in WORD.findall(text))
            if tokenizer.unk_token_id is not None:
                for word in unknown_words(tokenizer, text):
                    facts.unknown.setdefault(word, row["id"])
    if not sample.conversations:
        return
    for image in row["images"]:
        try:
            facts.sizes[image_size(image)] += 1
        except ImageDecodeError:  # the file has gone since
            continue
    if sample.images is not None:
        facts.tiles.append(len(sample.images))
    for ids, labels in sample.conversations:
        facts.tokens.append(len(ids))
        facts.labels += int((labels != -100).sum())


def _find_overlaps(facts: Facts, splits: dict[str, Any]) -> None:
    """Which questions stand twice, and which are in validation or test and in training too."""
    if "training" not in splits:
        return
    seen: Counter[tuple] = Counter()
    images: set[int] = set()
    training = splits.pop("training")
    indices = _spread(len(training), COMPARED_ROWS)
    facts.compared_rows = len(indices)
    for index in indices.tolist():
        of_row, asked = _identity(training[index])
        images |= of_row
        seen.update(asked)
    facts.duplicates = sum(count - 1 for count in seen.values())
    for name, rows in splits.items():
        chosen = _spread(len(rows), COMPARED_ROWS)
        found = Overlap(name, len(chosen))
        for index in chosen.tolist():
            of_row, asked = _identity(rows[index])
            found.questions += len(asked)
            found.same_image += bool(of_row & images)
            found.same_question += sum(one in seen for one in asked)
        if found.rows:
            facts.overlaps.append(found)


def _identity(row: Row) -> tuple[set[int], set[tuple]]:
    """(keys of its images, a key of each of its questions)."""
    images = frozenset(keys_of(shown_by(row), None))
    return set(images), {(images, " ".join((turn["user"] or "").lower().split())) for turn in row["texts"]}


def _split_words(facts: Facts, tokenizer: Any) -> None:
    """How many tokens the most frequent words become, within a sentence."""
    words = [word for word, _ in facts.words.most_common(5000)]
    encoded = tokenizer.backend_tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    facts.pieces = {word: len(one.ids) for word, one in zip(words, encoded, strict=True)}


def fact_lines(facts: Facts) -> list[str]:
    """The facts in words."""
    counts = ", ".join(f"{'a stream of' if n is None else f'{n:,}'} {name}" for name, n in facts.rows.items())
    lines = [f"rows        {counts} rows" + (facts.split and f"; split {facts.split}")]
    lines += facts.mixture
    if not facts.sampled:
        return lines
    formats = ", ".join(f"{name} {count:,}" for name, count in facts.formats.most_common()) or "made in memory"
    lines.append(f"looked at   {facts.sampled:,} training rows: {formats}")
    lines.append(f"time        {_time(facts)}")
    if facts.tokens:
        lines += [*_image_lines(facts), *_token_lines(facts)]
    return [*lines, *_drop_lines(facts), *_overlap_lines(facts), *_word_lines(facts)]


def _time(facts: Facts) -> str:
    each = facts.seconds / facts.sampled
    said = f"{1000 * each:.2f} ms to read and prepare a row, in one process"
    rows = facts.rows["training"]
    if rows:
        processes = max(1, facts.workers)
        said += f"; an epoch of {rows:,} rows: {_duration(each * rows / processes)}"
        said += f" with --num_workers {facts.workers}" if facts.workers else ""
    return said


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _image_lines(facts: Facts) -> list[str]:
    lines = [f"images      of a row: {_per_row(facts.images)}"]
    if any(facts.videos):
        lines.append(f"videos      of a row: {_per_row(facts.videos)}; each frame is a tile")
    if facts.sizes:
        common = ", ".join(f"{w} x {h} ({count:,})" for (w, h), count in facts.sizes.most_common(3))
        pixels = sorted(facts.sizes, key=lambda size: size[0] * size[1])
        ends = f"; smallest {pixels[0][0]} x {pixels[0][1]}, largest {pixels[-1][0]} x {pixels[-1][1]}"
        lines.append(f"sizes       {len(facts.sizes):,} kinds, most often {common}{ends}")
    if facts.tiles:
        lines.append(f"tiles       of a row with images or videos: {_range(facts.tiles)}")
    return lines


def _per_row(counts: list[int]) -> str:
    return ", ".join(f"{n} in {rows:,}" for n, rows in sorted(Counter(counts).items())[:BINS])


def _range(values: list[int]) -> str:
    return f"{min(values):,} to {max(values):,}, median {median(values):,.0f}, in all {sum(values):,}"


def _token_lines(facts: Facts) -> list[str]:
    lines = [f"tokens      of a conversation: {_range(facts.tokens)}; --max_sample_length {facts.longest:,}"]
    low, high = min(facts.tokens), max(facts.tokens)
    width = max(1, math.ceil((high - low + 1) / BINS))
    bins = Counter((length - low) // width for length in facts.tokens)
    for number in range(max(bins) + 1):
        start = low + number * width
        bar = "#" * math.ceil(BAR * bins[number] / max(bins.values()))
        lines.append(f"{'':<12}{start:>7,} - {start + width - 1:>7,}  {bins[number]:>7,}  {bar}".rstrip())
    lines.append(f"labels      {100 * facts.labels / sum(facts.tokens):.1f} % of the tokens are learned")
    return lines


def _drop_lines(facts: Facts) -> list[str]:
    dropped = facts.dropped
    bad, rows = dropped.bad_rows(), dropped.rows()
    lines = [f"bad rows    {bad:,} of {facts.sampled:,} rows cannot be used"]
    if rows > bad:
        lines.append(f"left out    {rows - bad:,} rows, as the flags say")
    examples = dropped.examples()
    for reason, count in dropped.most_common():
        unit = "turns of rows that are kept" if reason.startswith(TURN) else "rows"
        first = f", first in {examples[reason]}" if reason in examples else ""
        lines.append(f"{'':<12}{count:,} {unit}: {reason.removeprefix(TURN)}{first}")
    return lines


def _overlap_lines(facts: Facts) -> list[str]:
    if not facts.compared_rows:
        return []
    whole = "" if facts.compared_rows == facts.rows["training"] else f" (of {facts.compared_rows:,} rows)"
    lines = [f"twice       {facts.duplicates:,} training questions are asked again of the same image{whole}"]
    for found in facts.overlaps:
        leak = "LEAK        " if found.same_question else "overlap     "
        lines.append(
            f"{leak}{found.same_question:,} of {found.questions:,} {found.split} questions are asked of the same image "
            f"in training{whole}; {found.same_image:,} of {found.rows:,} rows share an image"
        )
    return lines


def _word_lines(facts: Facts) -> list[str]:
    if not facts.pieces:
        return []
    total = sum(facts.words[word] for word in facts.pieces)
    mean = sum(facts.words[word] * pieces for word, pieces in facts.pieces.items()) / total
    worst = sorted(facts.pieces, key=lambda word: (-facts.pieces[word], -facts.words[word], word))
    named = ", ".join(f"{word} {facts.pieces[word]}" for word in worst[:WORDS_TO_SHOW] if facts.pieces[word] > 1)
    lines = [f"words       {mean:.2f} tokens per word" + (f"; most: {named}" if named else "")]
    if facts.unknown:
        shown = [f"{word!r} ({row})" for word, row in list(facts.unknown.items())[:REASONS_TO_SHOW]]
        lines.append(f"unknown     {len(facts.unknown):,} words that the tokenizer does not know: {', '.join(shown)}")
    return lines
