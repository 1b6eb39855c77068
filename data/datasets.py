"""Rows to samples: images as tiles, turns as token ids and labels. A row or a turn that cannot be used is counted."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from data.processors import ImageDecodeError, ImageProcessor, encode_conversation, encode_prompt, image_string
from data.sources import filter_turns
from models.config import TrainConfig, VLMConfig

NOT_DECODED = "image does not decode"
TOO_MANY_IMAGES = "too many images"
NO_TEXT = "no text"
IMAGE_TOKEN_IN_TEXT = "image token in text"
CONTROL_TOKEN_IN_TEXT = "control token in text"  # "<|im_end|>" would end the turn and let another one begin
LOW_RATING = "rating"
TOO_LONG = "too long"
NO_LABEL = "no label"
UNKNOWN_WORD = "word not in the vocabulary"
BAD_SUBSET = "subset that cannot be loaded"
TURN = "turn: "  # before the reason where a turn was dropped and its row kept


@dataclass
class Sample:
    """What one row gives to a batch; without conversations it is a dropped row."""

    images: torch.Tensor | None  # float32 [n, 3, S, S], shared by the conversations
    conversations: list[tuple[torch.Tensor, torch.Tensor]]  # (ids, labels), int64 [T]; ids hold the image tokens
    id: str
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows, "turn: " + reason -> turns


@dataclass
class Questions:
    """The questions of one row, for generation; each prompt ends where the answer begins."""

    images: torch.Tensor | None
    prompts: list[list[int]]  # token ids
    answers: list[str]
    sources: list[str | None]
    id: str
    dropped: dict[str, int] = field(default_factory=dict)


class DropCounter(Counter):
    """How many rows (and turns of rows that were kept) could not be used, by reason; a row counts at every visit."""

    def summary(self) -> str:
        rows = {reason: count for reason, count in self.most_common() if not reason.startswith(TURN)}
        turns = {reason.removeprefix(TURN): count for reason, count in self.most_common() if reason not in rows}
        listed = [_listed(rows, "row"), _listed(turns, "turn")]
        return "dropped " + (" and ".join(filter(None, listed)) or "nothing")


def count_drops(samples: list[Sample]) -> DropCounter:
    """The drops of all the samples."""
    dropped = DropCounter()
    for sample in samples:
        dropped.update(sample.dropped)
    return dropped


def nothing_usable(dropped: DropCounter) -> ValueError:
    return ValueError(f"no row of a whole epoch of training data can be used: {dropped.summary()}")


def _listed(counts: dict[str, int], unit: str) -> str:
    total = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{total} {unit}{'s' * (total != 1)} ({reasons})" if counts else ""


@dataclass
class Plan:
    """What a row will give, known from its texts and the headers of its images: as Sample's, but not decoded yet."""

    conversations: list[tuple[torch.Tensor, torch.Tensor]]
    id: str
    dropped: dict[str, int]
    images: list = field(default_factory=list)  # as the row has them
    grids: list[tuple[int, int]] = field(default_factory=list)  # rows and columns of each image's tiles
    weights: list[float] = field(default_factory=list)  # of each conversation, for the draws of turns_per_image
    tiles: torch.Tensor | None = None  # the decoded images, where they are
    mirrored: bool = False  # left to right


class VQADataset:
    """Samples of rows. dataset[epoch, index] depends on (seed, epoch, index) alone, whichever process asks.

    Without turns_per_image a row is one conversation; with it each turn is one, and `train` draws so many of them.
    cache: keep every prepared row in memory (images as float32).
    """

    def __init__(
        self,
        rows,
        tokenizer,
        image_processor: ImageProcessor,
        vlm_cfg: VLMConfig,
        train_cfg: TrainConfig,
        train: bool,
        cache: bool = False,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.vlm_cfg = vlm_cfg
        self.cfg = train_cfg
        self.train = train
        self.extra_tokens = _any_of(vlm_cfg.vlm_extra_tokens.values())
        self.control_tokens = _any_of(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
        self.prepared: dict[int, Plan] | None = {} if cache else None
        self.asked: dict[int, Questions] = {}
        self.rarity = answer_rarity(rows) if train and train_cfg.balance_answers else None
        self.encoded: dict[tuple, tuple] = {}  # with cache: of texts, which a small data set repeats in many rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.decode(self.plan(key))

    def plan(self, key: tuple[int, int]) -> Plan:
        """dataset[key] up to where its images are decoded, which `decode` does: what a packer needs to know."""
        epoch, index = key
        if self.prepared is None:
            prepared = self._prepare(self.rows[index])
        else:
            if index not in self.prepared:
                self.prepared[index] = self._decoded(self._prepare(self.rows[index]))
            prepared = self.prepared[index]
        return self._visit(prepared, f"{self.cfg.seed}/{epoch}/{index}")

    def plan_row(self, row: dict, key: str = "") -> Plan:
        """The plan of a row that has no index; `key` seeds what is random in it."""
        return self._visit(self._prepare(row), f"{self.cfg.seed}/{key}")

    def sample(self, row: dict, key: str = "") -> Sample:
        """The sample of a row that has no index; `key` seeds what is random in it."""
        return self.decode(self.plan_row(row, key))

    def decode(self, plan: Plan) -> Sample:
        """The sample with its images; without conversations where one does not decode."""
        plan = self._decoded(plan)
        mirrored = plan.mirrored and plan.tiles is not None
        images = self._mirror(plan.tiles, plan.grids) if mirrored else plan.tiles
        return Sample(images, plan.conversations, plan.id, plan.dropped)

    def _decoded(self, plan: Plan) -> Plan:
        """The plan with its tiles in place of its images."""
        if not plan.images:
            return plan
        try:
            return replace(plan, images=[], tiles=self._tiles(plan.images))
        except _RowDropped as reason:
            return Plan([], plan.id, {str(reason): 1})

    def _visit(self, plan: Plan, key: str) -> Plan:
        """What is drawn anew at each visit: turns and mirroring."""
        cfg = self.cfg
        if not self.train or not plan.conversations or not (cfg.turns_per_image or cfg.flip_images):
            return plan
        rng = random.Random(key)
        conversations = plan.conversations
        if cfg.turns_per_image:
            drawn = draw_turns(plan.weights, cfg.turns_per_image, rng)
            conversations = [conversations[i] for i in drawn]
        mirrored = cfg.flip_images and bool(plan.grids) and rng.random() < 0.5
        return replace(plan, conversations=conversations, mirrored=mirrored)

    def questions(self, index: int) -> Questions:
        """Every usable turn of a row as a question of its own, with its answer."""
        if index in self.asked:
            return self.asked[index]
        questions = self.questions_of(self.rows[index])
        if self.prepared is not None:
            self.asked[index] = questions
        return questions

    def questions_of(self, row: dict) -> Questions:
        """The questions of a row that has no index."""
        turns, dropped = self._usable_turns(row)
        try:
            grids = self._grids(row)
            images = self._tiles(row["images"])
        except _RowDropped as reason:
            return Questions(None, [], [], [], row["id"], {str(reason): 1})
        text = image_string(grids, self.vlm_cfg)
        prompts = [self._encoded(encode_prompt, turn["user"], text) for turn in turns]
        answers, sources = [turn["assistant"] for turn in turns], [turn.get("source") for turn in turns]
        return Questions(images, prompts, answers, sources, row["id"], _drops(dropped, bool(turns)))

    def _prepare(self, row: dict) -> Plan:
        """All that is the same at every visit."""
        turns, dropped = self._usable_turns(row)
        try:
            if not turns:
                raise _RowDropped(dropped.most_common(1)[0][0])
            grids = self._grids(row)
        except _RowDropped as reason:
            return Plan([], row["id"], {str(reason): 1})
        conversations, kept_turns = [], []
        text = image_string(grids, self.vlm_cfg)
        for group in [[turn] for turn in turns] if self.cfg.turns_per_image else [turns]:
            spoken = tuple((turn["user"], turn["assistant"]) for turn in group)
            ids, labels = self._encoded(_conversation_tensors, spoken, text)
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
            return Plan([], row["id"], _drops(dropped, kept=False))
        weights = turn_weights(kept_turns, self.cfg.source_weights, self.rarity)
        return Plan(conversations, row["id"], _drops(dropped, kept=True), row["images"], grids, weights)

    def _encoded(self, encode, *texts):
        """encode(tokenizer, *texts), remembered with `cache`."""
        if self.prepared is None:
            return encode(self.tokenizer, *texts)
        if (encode, texts) not in self.encoded:
            self.encoded[encode, texts] = encode(self.tokenizer, *texts)
        return self.encoded[encode, texts]

    def _usable_turns(self, row: dict) -> tuple[list[dict], Counter]:
        """The turns that can be learned, without space around them, and why the others cannot."""
        rated = filter_turns(row, self.cfg)["texts"]
        dropped = Counter({LOW_RATING: len(row["texts"]) - len(rated)}) if len(rated) < len(row["texts"]) else Counter()
        turns = []
        for turn in rated:
            user, assistant = (turn["user"] or "").strip(), (turn["assistant"] or "").strip()
            if not user or not assistant:
                dropped[NO_TEXT] += 1
            elif self.extra_tokens.search(user) or self.extra_tokens.search(assistant):
                dropped[IMAGE_TOKEN_IN_TEXT] += 1
            elif self.control_tokens.search(user) or self.control_tokens.search(assistant):
                dropped[CONTROL_TOKEN_IN_TEXT] += 1
            else:
                turns.append(turn | {"user": user, "assistant": assistant})
        if not row["texts"]:
            dropped[NO_TEXT] += 1
        return turns, dropped

    def _grids(self, row: dict) -> list[tuple[int, int]]:
        """The grids of a row's images, which are not decoded for it."""
        if len(row["images"]) > self.cfg.max_images_per_example:
            raise _RowDropped(TOO_MANY_IMAGES)
        try:
            return [self.image_processor.grid(image) for image in row["images"]]
        except ImageDecodeError:
            raise _RowDropped(NOT_DECODED) from None

    def _tiles(self, images: list) -> torch.Tensor | None:
        """All tiles of a row's images, None without any."""
        try:
            tiles = [self.image_processor(image)[0] for image in images]
        except ImageDecodeError:
            raise _RowDropped(NOT_DECODED) from None
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


def _conversation_tensors(tokenizer, spoken: tuple[tuple[str, str], ...], image_text: str) -> tuple:
    turns = [{"user": user, "assistant": assistant} for user, assistant in spoken]
    ids, labels = encode_conversation(tokenizer, turns, image_text)
    return torch.tensor(ids), torch.tensor(labels)


class _RowDropped(Exception):
    """The reason why a whole row cannot be used."""


def _drops(turns: Counter, kept: bool) -> dict[str, int]:
    """The counts of a row of which `turns` were dropped: by turn if it was kept, else one row for the main reason."""
    if kept:
        return {TURN + reason: count for reason, count in turns.items()}
    return {turns.most_common(1)[0][0]: 1}


def answer_rarity(rows) -> dict[tuple[str, str], float]:
    """1 / P(answer | question) over the texts of all rows: drawn by it, a question's answers come equally often.

    Then nothing can be learned from the question alone, which is what a model learns first and may stay with.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError(
            "--balance_answers: must be off for a streamed data set, whose answers are not known beforehand"
        )
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
    totals: Counter = Counter()
    for turn, share in zip(turns, shares, strict=True):
        totals[turn.get("source")] += share
    return [
        source_weights.get(str(turn.get("source")), 1.0) * share / totals[turn.get("source")]
        for turn, share in zip(turns, shares, strict=True)
    ]


def draw_turns(weights: list[float], count: int, rng: random.Random) -> list[int]:
    """`count` indices of `weights`, drawn by them, none a second time before all were drawn."""
    drawn: list[int] = []
    while len(drawn) < count:
        # Efraimidis and Spirakis: the largest u^(1/w) are a weighted draw without replacement.
        keys = [rng.random() ** (1.0 / weight) for weight in weights]
        drawn += sorted(range(len(weights)), key=keys.__getitem__, reverse=True)
    return drawn[:count]
