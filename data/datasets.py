"""Rows to samples: images as tiles, turns as token ids and labels. A row or a turn that cannot be used is counted.

Shapes: T tokens of a conversation, n images that the vision tower sees (see data.images), S vit_img_size.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.control_tokens import ControlTokens
from data.conversations import CHAINED
from data.draws import answer_rarity, draw_turns, turn_weights
from data.drops import (
    LOW_RATING,
    NO_LABEL,
    NO_TEXT,
    TOO_LONG,
    TOO_MANY_IMAGES,
    TOO_MANY_TILES,
    TRUNCATED,
    TRUNCATED_VIDEO,
    UNKNOWN_WORD,
    RowDropped,
    drops_of,
    image_reason,
    where_of,
)
from data.formats import filter_turns
from data.frames import decode_pictures, grid_of, picture_text, with_frames
from data.images import ImageDecodeError, ImageProcessor
from data.layouts import pool_index
from data.loss_weights import LossWeight, loss_weight_of
from data.message_tree import grow_trees
from data.places import with_images
from data.points import has_points
from data.templates import TemplateRefused, knows_tools
from data.text import Tokenizer, conversation_tensors, encode_conversation, encode_prompt, spoken_call, unknown_words
from data.values import Reason, shown
from models.config import TrainConfig, VLMConfig

NO_TOOLS = "tools unknown to the chat template"
REFUSED = "refused by the chat template"


@dataclass
class Sample:
    """What one row gives to a batch; without conversations it is a dropped row."""

    images: torch.Tensor | None  # uint8 [n, 3, S, S], shared by the conversations
    conversations: list[tuple[torch.Tensor, torch.Tensor]]  # (ids, labels), int64 [T]; ids hold the image tokens
    id: str
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows, "turn: " + reason -> turns
    mirrored: bool = False  # the images, left to right
    loss_weight: LossWeight | None = None  # in training; None: each label counts 1
    # With message_tree: branch ids, int32 [T], of each conversation.
    branches: list[torch.Tensor] = field(default_factory=list)
    pool_index: torch.Tensor | None = None  # int64 [M, K], of its images: see data.layouts


@dataclass
class Questions:
    """The questions of one row, for generation; each prompt ends where the answer begins."""

    images: torch.Tensor | None  # uint8 [n, 3, S, S], shared by the questions
    prompts: list[list[int]]  # token ids, with the image tokens
    answers: list[str | tuple[str, ...]]  # a tuple where several count as right
    sources: list[str | None]
    id: str
    dropped: dict[str, int] = field(default_factory=dict)
    pool_index: torch.Tensor | None = None  # as of Sample
    texts: list[str] = field(default_factory=list)  # of the questions, as the row has them


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
    has_points: bool = False  # in its texts: their coordinates hold for the images as they are
    mirrored: bool = False  # left to right
    fixed_weight: float | None = None  # the row's loss_weight
    loss_weight: LossWeight | None = None  # as in Sample, as are the branches: once the turns are drawn
    branches: list[torch.Tensor] = field(default_factory=list)


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
        self.control_tokens = ControlTokens(tokenizer, vlm_cfg)
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
        windows = pool_index(prepared.grids, self.vlm_cfg) if images is not None else None
        return Sample(images, prepared.conversations, prepared.id, prepared.dropped, prepared.mirrored,
                      prepared.loss_weight, prepared.branches, windows)  # fmt: skip

    def _with_tiles(self, prepared: PreparedSample) -> PreparedSample:
        """With the tiles in place of the images."""
        if not prepared.images:
            return prepared
        try:
            tiles, truncated = self._tiles(prepared.images, prepared.id)
            return replace(prepared, images=[], tiles=tiles, dropped=prepared.dropped | truncated)
        except RowDropped as dropped:
            return PreparedSample([], prepared.id, {dropped.reason: 1})

    def _drawn(self, prepared: PreparedSample, key: str) -> PreparedSample:
        """With what is drawn at each visit of a row: its turns, and whether it is mirrored."""
        cfg = self.cfg
        if not self.train or not prepared.conversations:
            return prepared
        rng = random.Random(key)
        conversations = prepared.conversations
        if cfg.turns_per_image:
            drawn = draw_turns(prepared.weights, cfg.turns_per_image, rng)
            conversations = [conversations[i] for i in drawn]
        mirrored = cfg.flip_images and bool(prepared.grids) and rng.random() < 0.5 and not prepared.has_points
        weight = loss_weight_of(conversations, cfg.loss_weighting, prepared.fixed_weight)
        branches: list[torch.Tensor] = []
        if cfg.message_tree:
            limit = min(cfg.max_sample_length, self.vlm_cfg.lm_max_length) if cfg.packing else cfg.max_sample_length
            conversations, branches = grow_trees(conversations, limit, self.vlm_cfg.image_token_id)
        return replace(prepared, conversations=conversations, branches=branches, mirrored=mirrored, loss_weight=weight)

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
            row = self._with_frames(row)
            turns, dropped = self._usable_turns(row)
            grids = self._grids(row)
            images, truncated = self._tiles(row["images"], where_of(row)) if tiles is None else (tiles, {})
        except RowDropped as bad:
            return Questions(None, [], [], [], row["id"], {bad.reason: 1})
        found = Questions(images, [], [], [], row["id"], pool_index=pool_index(grids, self.vlm_cfg))
        for turn in turns:
            asked = turn | {"user": with_images(turn, self._image_texts(row, grids))[0]}
            try:
                prompt, answer = self._prompt(asked, row), self._answer(asked, row)
            except TemplateRefused:
                dropped[REFUSED] += 1
                continue
            found.prompts.append(prompt)
            found.answers.append(answer)
            found.sources.append(turn.get("source"))
            found.texts.append(turn["user"])
        return replace(found, dropped=drops_of(dropped, bool(found.prompts), row) | truncated)

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
            row = self._with_frames(row)
            turns, dropped = self._usable_turns(row)
            if not turns:
                raise RowDropped(*drops_of(dropped, False, row))
            grids = self._grids(row)
        except RowDropped as bad:
            return PreparedSample([], row["id"], {bad.reason: 1})
        conversations, kept_turns = [], []
        image_texts = self._image_texts(row, grids)
        apart = self.cfg.turns_per_image or (self.cfg.message_tree and grids and row.get("format") not in CHAINED)
        for group in [[turn] for turn in turns] if apart else [turns]:
            try:
                ids, labels = self._conversation(group, image_texts, row)
            except TemplateRefused as error:
                dropped[Reason(REFUSED, where_of(row), f"{error}")] += len(group)
                continue
            if len(ids) > (most := self.cfg.max_sample_length):
                dropped[Reason(TOO_LONG, where_of(row), f"{len(ids)} tokens, max_sample_length {most}")] += len(group)
            elif self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
                spoken = [turn[speaker] for turn in group for speaker in ("user", "assistant")]
                words = unknown_words(self.tokenizer, " ".join([*image_texts, *spoken]))
                dropped[Reason(UNKNOWN_WORD, where_of(row), shown(words))] += len(group)
            elif bool((labels == -100).all()):
                dropped[NO_LABEL] += len(group)
            else:
                conversations.append((ids, labels))
                kept_turns.append(group[0])
        if not conversations:
            return PreparedSample([], row["id"], drops_of(dropped, False, row))
        weights = turn_weights(kept_turns, self.cfg.source_weights, self.rarity)
        drops = drops_of(dropped, True, row)
        made = PreparedSample(conversations, row["id"], drops, row["images"], grids, weights)
        return replace(made, has_points=has_points(row["texts"]), fixed_weight=row.get("loss_weight"))

    def _image_texts(self, row: dict, grids: list[tuple[int, int]]) -> list[str]:
        """The text that stands for each image of a row, and each frame of its videos."""
        return [picture_text(one, grid, self.vlm_cfg) for one, grid in zip(row["images"], grids, strict=True)]

    def _conversation(self, turns: list[dict], image_texts: list[str], row: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, labels) of some turns of the row; images that stand in turns after the last of them are not in it."""
        asked, images = [], 0
        for turn in turns:
            text, images = with_images(turn, image_texts, images)
            asked.append(turn | {"user": text})
        system, train_on = row.get("system") or "", self.cfg.train_on
        if row.get("tools") or any("steps" in turn for turn in asked):
            found = encode_conversation(self.tokenizer, asked, "", system, train_on, row.get("tools"))
            ids, labels = map(torch.tensor, found)
        else:
            spoken = tuple((turn["user"], turn["assistant"]) for turn in asked)
            ids, labels = self._remembered(conversation_tensors, spoken, system, train_on)
        if train_on == "all":
            first = self.vlm_cfg.image_token_id
            labels = labels.masked_fill((labels >= first) & (labels < first + self.vlm_cfg.extra_token_amount), -100)
        return ids, labels

    def _prompt(self, turn: dict, row: dict) -> list[int]:
        """The ids of a question, its images in it, and of the tool calls after it, up to what is to be answered."""
        system, steps, tools = row.get("system") or "", turn.get("steps") or [], row.get("tools")
        if not steps and not tools:
            return self._remembered(encode_prompt, turn["user"], "", system)
        before = steps if turn["assistant"] else steps[:-1]
        return encode_prompt(self.tokenizer, turn["user"], "", system, before, tools)

    def _answer(self, turn: dict, row: dict) -> str | tuple[str, ...]:
        """What answers the question, the text of a tool call where that ends the turn; a tuple of all that count."""
        if not turn["assistant"]:
            return spoken_call(self.tokenizer, turn | {"assistant": None}, row.get("system") or "", row.get("tools"))
        return tuple(turn["answers"]) if turn.get("answers") else turn["assistant"]

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
        if why := self.control_tokens.reason(row.get("system") or ""):
            raise RowDropped(Reason(why, where_of(row), "the system text"))
        if (row.get("tools") or any("steps" in turn for turn in row["texts"])) and not knows_tools(self.tokenizer):
            raise RowDropped(Reason(NO_TOOLS, where_of(row), "see --lm_chat_template"))
        if row.get("tools") and (why := self.control_tokens.reason(json.dumps(row["tools"], ensure_ascii=False))):
            raise RowDropped(Reason(why, where_of(row), "the tools"))
        rated = filter_turns(row, self.cfg)["texts"]
        dropped = Counter({LOW_RATING: len(row["texts"]) - len(rated)}) if len(rated) < len(row["texts"]) else Counter()
        turns = []
        for turn in rated:
            user, assistant = turn["user"] or "", (turn["assistant"] or "").strip()
            user = user if turn.get("image_places") else user.strip()  # the places count from where it begins
            steps = turn.get("steps") or []
            if not (assistant or (steps and "tool_calls" in steps[-1])) or not (user or turn.get("image_only")):
                dropped[NO_TEXT] += 1
            elif why := self.control_tokens.reason("\n".join([user, assistant, json.dumps(steps, ensure_ascii=False)])):
                dropped[why] += 1
            else:
                turns.append(turn | {"user": user, "assistant": assistant or (None if steps else "")})
        if not row["texts"]:
            dropped[NO_TEXT] += 1
        return turns, dropped

    def _with_frames(self, row: dict) -> dict:
        """The row with the frames of its videos among its images. Raises RowDropped."""
        if not row.get("videos"):
            return row
        self._check_count(len(row["images"]) + len(row["videos"]), row)
        if why := self.control_tokens.reason("\n".join(one["text"] for one in row.get("subtitles") or ())):
            raise RowDropped(Reason(why, where_of(row), "the subtitles"))
        try:
            return with_frames(row, self.vlm_cfg.max_video_frames, self.image_processor.use_truncated)
        except ImageDecodeError as error:
            raise RowDropped(image_reason(error, where_of(row))) from None

    def _check_count(self, count: int, row: dict) -> None:
        """Raise RowDropped where a row has more images and videos than it may; the frames of a video count as one."""
        if count > (limit := self.cfg.max_images_per_example):
            raise RowDropped(Reason(TOO_MANY_IMAGES, where_of(row), f"{count}, --max_images_per_example {limit}"))

    def _grids(self, row: dict) -> list[tuple[int, int]]:
        """The grids of a row's images, from their headers. Raises RowDropped."""
        if "video_numbers" not in row:  # else they are counted
            self._check_count(len(row["images"]), row)
        try:
            grids = [grid_of(image, self.image_processor) for image in row["images"]]
        except ImageDecodeError as error:
            raise RowDropped(image_reason(error, where_of(row))) from None
        if self.train and sum(map(self.image_processor.count, grids)) > (self.cfg.tiles_per_row or float("inf")):
            raise RowDropped(Reason(TOO_MANY_TILES, where_of(row)))
        return grids

    def _tiles(self, images: list, where: str) -> tuple[torch.Tensor | None, dict[str, int]]:
        """(uint8 [n, 3, S, S], the tiles of all images of a row, or None without any; how many images broke off and
        were used, as drops are counted). Raises RowDropped."""
        before = self.image_processor.truncated
        try:
            tiles, videos = decode_pictures(images, self.image_processor)
        except ImageDecodeError as error:
            raise RowDropped(image_reason(error, where)) from None
        more = self.image_processor.truncated - before
        truncated = {TRUNCATED: more} if more else {}
        truncated |= {TRUNCATED_VIDEO: videos} if videos else {}
        if len(tiles) == 1:
            return tiles[0], truncated  # copying a large image takes a third of what decoding it takes
        return torch.cat(tiles) if tiles else None, truncated

    def _mirror(self, images: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        mirror, count = self.image_processor.mirror, self.image_processor.count
        if len(grids) == 1:
            return mirror(images, grids[0])
        parts = images.split([count(grid) for grid in grids])
        return torch.cat([mirror(tiles, grid) for tiles, grid in zip(parts, grids, strict=True)])
