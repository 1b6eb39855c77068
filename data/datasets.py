"""Rows to samples: images as tiles, turns as token ids and labels. A row or a turn that cannot be used is counted.

Shapes: T tokens of a conversation, n images that the vision tower sees (see data.images), S vit_img_size.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.drops import (
    CONTROL_TOKEN_IN_TEXT,
    IMAGE_TOKEN_IN_TEXT,
    LOW_RATING,
    NO_LABEL,
    NO_TEXT,
    TOO_LONG,
    TOO_MANY_IMAGES,
    TOO_MANY_TILES,
    UNKNOWN_WORD,
    RowDropped,
    count_drops,
    drops_of,
    image_reason,
    where_of,
)
from data.formats import filter_turns
from data.images import ImageDecodeError, ImageProcessor
from data.text import Tokenizer, encode_conversation, encode_prompt, image_string, knows_every_word, unknown_words
from data.values import Reason
from models.config import TrainConfig, VLMConfig

WORDS_TO_NAME = 5  # of those that the tokenizer does not know, in a message


@dataclass
class Sample:
    """What one row gives to a batch; without conversations it is a dropped row."""

    images: torch.Tensor | None  # uint8 [n, 3, S, S], shared by the conversations
    conversations: list[tuple[torch.Tensor, torch.Tensor]]  # (ids, labels), int64 [T]; ids hold the image tokens
    id: str
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows, "turn: " + reason -> turns
    mirrored: bool = False  # the images, left to right


@dataclass
class Questions:
    """The questions of one row, for generation; each prompt ends where the answer begins."""

    images: torch.Tensor | None  # uint8 [n, 3, S, S], shared by the questions
    prompts: list[list[int]]  # token ids, with the image tokens
    answers: list[str | tuple[str, ...]]  # a tuple where several count as right
    sources: list[str | None]
    id: str
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass
class PreparedSample:
    """A sample of which the texts are tokenized and the images not decoded yet: its lengths are known."""

    conversations: list[tuple[torch.Tensor, torch.Tensor]]  # (ids, labels), int64 [T]
    id: str
    dropped: dict[str, int]
    images: list = field(default_factory=list)  # as the row has them
    grids: list[tuple[int, int]] = field(default_factory=list)  # rows and columns of each image's tiles
    weights: list[float] = field(default_factory=list)  # of each conversation, for the draws of turns_per_image
    tiles: torch.Tensor | None = None  # uint8 [n, 3, S, S]: the images, once they are decoded
    mirrored: bool = False  # left to right


class VQADataset:
    """Samples of rows. dataset[epoch, index] depends on (seed, epoch, index) alone, whichever process asks.

    Without turns_per_image a row is one conversation. With it each turn is one, of which training draws that number
    at each visit of the row, and evaluation takes all.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        vlm_cfg: VLMConfig,
        train_cfg: TrainConfig,
        train: bool,
        cache: bool = False,
    ):
        """rows: with len and an index each; or a RowStream, of which only the methods that take a row can be used.

        cache: keep every row in memory once it is prepared, its tiles too. Raises ValueError where
        --balance_answers is on for a stream.
        """
        self.rows = rows
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.vlm_cfg = vlm_cfg
        self.cfg = train_cfg
        self.train = train
        self.extra_tokens = _any_of(vlm_cfg.vlm_extra_tokens.values())
        self.control_tokens = _any_of(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.prepared: dict[int, PreparedSample] | None = {} if cache else None  # by index, with tiles
        self.asked: dict[int, Questions] = {}
        self.rarity = answer_rarity(rows) if train and train_cfg.balance_answers else None
        self.encoded: dict[tuple, Any] = {}  # with cache: by text, as a small data set repeats its texts in many rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.decode(self.prepare(key))

    def prepare(self, key: tuple[int, int]) -> PreparedSample:
        """What dataset[key] decodes to: all that packing needs to know of the row."""
        epoch, index = key
        if self.prepared is None:
            prepared = self._encode_row(self.rows[index])
        else:
            if index not in self.prepared:
                self.prepared[index] = self._with_tiles(self._encode_row(self.rows[index]))
            prepared = self.prepared[index]
        return self._drawn(prepared, f"{self.cfg.seed}/{epoch}/{index}")

    def prepare_row(self, row: dict, key: str = "") -> PreparedSample:
        """The same of a row that has no index; `key` seeds what is random in it."""
        return self._drawn(self._encode_row(row), f"{self.cfg.seed}/{key}")

    def sample(self, row: dict, key: str = "") -> Sample:
        """The sample of a row that has no index; `key` seeds what is random in it."""
        return self.decode(self.prepare_row(row, key))

    def decode(self, prepared: PreparedSample) -> Sample:
        """The sample with its images; without conversations where one of them does not decode."""
        prepared = self._with_tiles(prepared)
        images = prepared.tiles
        if prepared.mirrored and images is not None:
            images = self._mirror(images, prepared.grids)
        return Sample(images, prepared.conversations, prepared.id, prepared.dropped, prepared.mirrored)

    def _with_tiles(self, prepared: PreparedSample) -> PreparedSample:
        """With the tiles in place of the images."""
        if not prepared.images:
            return prepared
        try:
            return replace(prepared, images=[], tiles=self._tiles(prepared.images, prepared.id))
        except RowDropped as dropped:
            return PreparedSample([], prepared.id, {dropped.reason: 1})

    def _drawn(self, prepared: PreparedSample, key: str) -> PreparedSample:
        """With what is drawn at each visit of a row: its turns, and whether it is mirrored."""
        cfg = self.cfg
        if not self.train or not prepared.conversations or not (cfg.turns_per_image or cfg.flip_images):
            return prepared
        rng = random.Random(key)
        conversations = prepared.conversations
        if cfg.turns_per_image:
            drawn = draw_turns(prepared.weights, cfg.turns_per_image, rng)
            conversations = [conversations[i] for i in drawn]
        mirrored = cfg.flip_images and bool(prepared.grids) and rng.random() < 0.5
        return replace(prepared, conversations=conversations, mirrored=mirrored)

    def questions(self, index: int, tiles: torch.Tensor | None = None) -> Questions:
        """Every usable turn of a row as a question of its own, with its answer. tiles: of its images, if decoded."""
        if index in self.asked:
            return self.asked[index]
        if self.prepared and index in self.prepared:
            tiles = self.prepared[index].tiles
        questions = self.questions_of(self.rows[index], tiles)
        if self.prepared is not None:
            self.asked[index] = questions
        return questions

    def questions_of(self, row: dict, tiles: torch.Tensor | None = None) -> Questions:
        """The same of a row that has no index."""
        try:
            turns, dropped = self._usable_turns(row)
            grids = self._grids(row)
            images = self._tiles(row["images"], where_of(row)) if tiles is None else tiles
        except RowDropped as bad:
            return Questions(None, [], [], [], row["id"], {bad.reason: 1})
        text, system = image_string(grids, self.vlm_cfg), row.get("system") or ""
        prompts = [self._remembered(encode_prompt, turn["user"], text, system) for turn in turns]
        answers = [tuple(turn["answers"]) if turn.get("answers") else turn["assistant"] for turn in turns]
        sources = [turn.get("source") for turn in turns]
        return Questions(images, prompts, answers, sources, row["id"], drops_of(dropped, bool(turns), row))

    def both(self, index: int) -> tuple[Sample, Questions]:
        """dataset[0, index] and questions(index), made with train=False, of images that are decoded once."""
        sample = self[0, index]
        return sample, self.questions(index, sample.images)

    def both_of(self, row: dict) -> tuple[Sample, Questions]:
        """The same of a row that has no index."""
        sample = self.sample(row)
        return sample, self.questions_of(row, sample.images)

    def _encode_row(self, row: dict) -> PreparedSample:
        """All that is the same at each visit of a row."""
        try:
            turns, dropped = self._usable_turns(row)
            if not turns:
                raise RowDropped(*drops_of(dropped, False, row))
            grids = self._grids(row)
        except RowDropped as bad:
            return PreparedSample([], row["id"], {bad.reason: 1})
        conversations, kept_turns = [], []
        text, system = image_string(grids, self.vlm_cfg), row.get("system") or ""
        for group in [[turn] for turn in turns] if self.cfg.turns_per_image else [turns]:
            spoken = tuple((turn["user"], turn["assistant"]) for turn in group)
            ids, labels = self._remembered(_conversation_tensors, spoken, text, system)
            if len(ids) > self.cfg.max_sample_length:
                dropped[TOO_LONG] += len(group)
            elif self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
                dropped[UNKNOWN_WORD] += len(group)
            elif bool((labels == -100).all()):
                dropped[NO_LABEL] += len(group)
            else:
                conversations.append((ids, labels))
                kept_turns.append(group[0])
        if not conversations:
            return PreparedSample([], row["id"], drops_of(dropped, False, row))
        weights = turn_weights(kept_turns, self.cfg.source_weights, self.rarity)
        drops = drops_of(dropped, True, row)
        return PreparedSample(conversations, row["id"], drops, row["images"], grids, weights)

    def _remembered(self, encode: Callable, *texts: Any) -> Any:
        """encode(tokenizer, *texts), kept in memory with `cache`."""
        if self.prepared is None:
            return encode(self.tokenizer, *texts)
        if (encode, texts) not in self.encoded:
            self.encoded[encode, texts] = encode(self.tokenizer, *texts)
        return self.encoded[encode, texts]

    def _usable_turns(self, row: dict) -> tuple[list[dict], Counter]:
        """(turns that can be learned, without space around them; reasons why the others cannot). Raises RowDropped."""
        if "bad" in row:
            raise RowDropped(row["bad"])
        if why := self._forged(row.get("system") or ""):
            raise RowDropped(Reason(why, f"{where_of(row)}: the system text"))
        rated = filter_turns(row, self.cfg)["texts"]
        dropped = Counter({LOW_RATING: len(row["texts"]) - len(rated)}) if len(rated) < len(row["texts"]) else Counter()
        turns = []
        for turn in rated:
            user, assistant = (turn["user"] or "").strip(), (turn["assistant"] or "").strip()
            if not assistant or not (user or turn.get("image_only")):
                dropped[NO_TEXT] += 1
            elif why := self._forged(f"{user}\n{assistant}"):
                dropped[why] += 1
            else:
                turns.append(turn | {"user": user, "assistant": assistant})
        if not row["texts"]:
            dropped[NO_TEXT] += 1
        return turns, dropped

    def _forged(self, text: str) -> str | None:
        """The reason why the text cannot be used, if it holds a token that only the template may write."""
        if self.extra_tokens.search(text):
            return IMAGE_TOKEN_IN_TEXT
        return CONTROL_TOKEN_IN_TEXT if self.control_tokens.search(text) else None

    def _grids(self, row: dict) -> list[tuple[int, int]]:
        """The grids of a row's images, from their headers. Raises RowDropped."""
        if (count := len(row["images"])) > (limit := self.cfg.max_images_per_example):
            raise RowDropped(Reason(TOO_MANY_IMAGES, f"{where_of(row)}: {count}, --max_images_per_example {limit}"))
        try:
            grids = [self.image_processor.grid(image) for image in row["images"]]
        except ImageDecodeError as error:
            raise RowDropped(image_reason(error, where_of(row))) from None
        if self.train and sum(map(self.image_processor.count, grids)) > (self.cfg.tiles_per_row or float("inf")):
            raise RowDropped(Reason(TOO_MANY_TILES, where_of(row)))
        return grids

    def _tiles(self, images: list, where: str) -> torch.Tensor | None:
        """uint8 [n, 3, S, S]: the tiles of all images of a row, None without any. Raises RowDropped."""
        try:
            tiles = [self.image_processor(image)[0] for image in images]
        except ImageDecodeError as error:
            raise RowDropped(image_reason(error, where)) from None
        if len(tiles) == 1:
            return tiles[0]  # copying a large image takes a third of what decoding it takes
        return torch.cat(tiles) if tiles else None

    def _mirror(self, images: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        mirror, count = self.image_processor.mirror, self.image_processor.count
        if len(grids) == 1:
            return mirror(images, grids[0])
        parts = images.split([count(grid) for grid in grids])
        return torch.cat([mirror(tiles, grid) for tiles, grid in zip(parts, grids, strict=True)])


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)))


def _conversation_tensors(
    tokenizer: Tokenizer, spoken: tuple[tuple[str, str], ...], image_text: str, system: str
) -> tuple[torch.Tensor, torch.Tensor]:
    turns = [{"user": user, "assistant": assistant} for user, assistant in spoken]
    ids, labels = encode_conversation(tokenizer, turns, image_text, system)
    return torch.tensor(ids), torch.tensor(labels)


def check_words(dataset: VQADataset, rows: Iterable[dict]) -> str | None:
    """Check on some rows of the training data that the tokenizer knows their words.

    A row (with turns_per_image a turn) with an unknown word is dropped: from <unk> nothing can be learned. Returns None
    if every word is known, else a note that names up to WORDS_TO_NAME others with their rows; raises ValueError with
    the same if none of the rows can be used. For a tokenizer that knows every word no row is read.
    """
    if knows_every_word(dataset.tokenizer):
        return None
    rows = list(rows)
    found: dict[str, str] = {}  # the word in lower case -> how to name it
    for row in rows:
        for text in (turn[speaker] or "" for turn in row["texts"] for speaker in ("user", "assistant")):
            for word in unknown_words(dataset.tokenizer, text):
                found.setdefault(word.lower(), f"{word!r} (row {row['id']})")
    if not found:
        return None
    prepared = [dataset.prepare_row(row) for row in rows]
    usable = sum(bool(one.conversations) for one in prepared)
    named = ", ".join([*list(found.values())[:WORDS_TO_NAME], *["..."] * (len(found) > WORDS_TO_NAME)])
    note = (
        f"--lm_tokenizer {dataset.vlm_cfg.lm_tokenizer}: does not know {named}; {usable} of {len(rows)} rows that were "
        f"tried can be used ({count_drops(prepared).summary()}). Take a recipe with SmolLM2's tokenizer, which "
        "knows every word: --config configs/smollm2_local.yaml"
    )
    if not usable:
        raise ValueError(note)
    return note


def answer_rarity(rows: Any) -> dict[tuple[str, str], float]:
    """1 / P(answer | question) over the texts of all rows: drawn by it, a question's answers come equally often.

    Then nothing can be learned from the question alone, which is what a model learns first and may stay with.
    Raises ValueError for a stream.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError("--balance_answers True: must be off for a streamed data set, whose answers are not known yet")
    turns = (turn for row in rows for turn in row["texts"])
    pairs = Counter(((turn["user"] or "").strip(), (turn["assistant"] or "").strip()) for turn in turns)
    questions: Counter = Counter()
    for (question, _), count in pairs.items():
        questions[question] += count
    return {(question, answer): questions[question] / count for (question, answer), count in pairs.items()}


def turn_weights(
    turns: list[dict], source_weights: dict[str, float], rarity: dict[tuple[str, str], float] | None
) -> list[float]:
    """How often to draw each turn of a row: the weight of its source (1 where not named), shared among its turns.

    rarity: what a turn's share of its source's weight is proportional to; None: equal shares.
    """
    shares = [rarity[turn["user"], turn["assistant"]] if rarity else 1.0 for turn in turns]
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
