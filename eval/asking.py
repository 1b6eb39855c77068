"""A model that is asked: text and images to token ids, and ids to answers, as in training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.collators import PromptCollator, to_device
from data.control_tokens import ControlTokens
from data.datasets import Questions
from data.drops import IMAGE_TOKEN_IN_TEXT
from data.frames import decode_pictures, grid_of, picture_text, with_times
from data.images import ImageDecodeError, ImageProcessor
from data.layouts import FRAME, Grid, pool_index
from data.places import PLACE, place_images, with_images
from data.text import encode_chat, encode_prompt, get_tokenizer
from data.values import BadRow
from data.video import sampled
from eval.answer_text import AnswerText, Speed
from eval.prompt_cache import PromptCache
from models.attention import compute_dtype
from models.vision_language_model import VisionLanguageModel


@dataclass
class Shown:
    """An image or a video that a user shows."""

    tiles: torch.Tensor  # uint8 [n, 3, S, S]
    text: str  # what stands for it in a prompt
    grid: Grid = FRAME  # of an image; that of each frame of a video
    is_video: bool = False

    @property
    def grids(self) -> list[Grid]:
        """Of all its pictures."""
        return [self.grid] * len(self.tiles) if self.is_video else [self.grid]


@dataclass
class Reader:
    """Makes prompts; holds no weights, so that worker processes can have it."""

    tokenizer: Any
    processor: ImageProcessor
    max_video_frames: int | None = None  # None: as many as the model was trained with

    def __post_init__(self) -> None:
        self.control_tokens = ControlTokens(self.tokenizer, self.processor.cfg)
        self.most_frames = self.max_video_frames or self.processor.cfg.max_video_frames

    def check(self, text: str) -> None:
        """Raise ValueError where a user's text holds a token that only the chat template or an image may write."""
        if found := self.control_tokens.find(text):
            reason, token = found
            place = f"; an image is {PLACE}" if reason == IMAGE_TOKEN_IN_TEXT and token != PLACE else ""
            raise ValueError(f"{reason}: {token} must not stand in it{place}")

    def read(
        self, turn: Mapping[str, Any], images: Sequence[Any], system: str = "", answer_prefix: str = "", id: str = ""
    ) -> Questions:
        """One question as the model gets it.

        turn: {"user": text}, with the places of its images where they do not stand before it (data.places). images: in
        any form that rows may have, frames among them. answer_prefix: stands after the assistant's header. Raises
        ImageDecodeError.
        """
        texts = self._texts(images)
        prompt = encode_prompt(self.tokenizer, with_images(dict(turn), texts)[0], "", system) + self.ids(answer_prefix)
        tiles, _ = decode_pictures(images, self.processor)
        windows = pool_index([grid_of(one, self.processor) for one in images], self.processor.cfg)
        return Questions(torch.cat(tiles) if tiles else None, [prompt], [""], [None], id, pool_index=windows)

    def _texts(self, pictures: Sequence[Any]) -> list[str]:
        """The text that stands for each image and frame. Raises ValueError as `check` does at subtitles."""
        for one in pictures:
            self.check(getattr(one, "after", ""))
        return [picture_text(one, grid_of(one, self.processor), self.processor.cfg) for one in pictures]

    def image(self, source: Any) -> Shown:
        """Raises ImageDecodeError."""
        tiles, _ = decode_pictures([source], self.processor)
        return Shown(tiles[0], self._texts([source])[0], grid_of(source, self.processor))

    def video(self, source: Any) -> Shown:
        """Its frames, each with its time. Raises ImageDecodeError."""
        frames = with_times(sampled(source, self.most_frames))
        tiles, _ = decode_pictures(frames, self.processor)
        return Shown(torch.cat(tiles), "".join(self._texts(frames)), is_video=True)

    def spoken(self, text: str, shown: Sequence[Shown]) -> tuple[str, list[Shown]]:
        """(what a user says, with the tokens of what it shows: before it, or where it says <image> and <video>; these
        in their order).

        Raises ValueError where these are not as many as the <image> or <video> in it, and as `check` does.
        """
        images, videos = ([one for one in shown if one.is_video == kind] for kind in (False, True))
        try:
            [turn], numbers = place_images(
                [{"user": text.strip(), "assistant": None}], None, len(images), len(videos) or None
            )
        except BadRow as bad:
            raise ValueError(f"{bad.kind}: {bad.found}") from None
        self.check(turn["user"])  # without the places, as the image token itself may be spelled <image>
        rest = {True: iter(videos), False: iter(images)}
        ordered = [next(rest[number in numbers]) for number in range(len(shown))]
        return with_images(turn, [one.text for one in ordered])[0], ordered

    def conversation(
        self, contents: Sequence[str], shown: Sequence[Shown], system: str = "", answer_prefix: str = ""
    ) -> Questions:
        """The last question of a conversation. contents: what was said in turn, of the user as `spoken` gives it.

        shown: all its images and videos in order. answer_prefix: as in `read`.
        """
        prompt = encode_chat(self.tokenizer, list(contents), system) + self.ids(answer_prefix)
        tiles = torch.cat([one.tiles for one in shown]) if shown else None
        windows = pool_index([grid for one in shown for grid in one.grids], self.processor.cfg)
        return Questions(tiles, [prompt], [""], [None], "", pool_index=windows)

    def question(self, read: Callable[[], Questions], max_new_tokens: int) -> Questions | str:
        """What `read` gives, or why it cannot be asked: in words, as an error of a worker process would arrive with its
        traceback."""
        try:
            question = read()
        except ImageDecodeError as error:
            return f"{error.kind}: {error}"
        except (ValueError, OSError) as error:
            return str(error)
        return self.too_long(question, max_new_tokens) or question

    def too_long(self, question: Questions, max_new_tokens: int) -> str | None:
        """What is wrong where the question and the longest answer are more tokens than the model has positions."""
        room, length = self.processor.cfg.lm_max_position_embeddings, len(question.prompts[0])
        if length + max_new_tokens <= room:
            return None
        return (
            f"{length} tokens of conversation and --max_new_tokens {max_new_tokens} are more than the model's {room} "
            "positions"
        )

    def ids(self, text: str) -> list[int]:
        """Of a text that follows another one's ids."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


class ModelAsker:
    """A model that answers."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Any,
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
        max_video_frames: int | None = None,
    ):
        """model: on the device, without dropout while it is asked."""
        self.model, self.tokenizer, self.device, self.autocast = model, tokenizer, device, autocast
        self.reader = Reader(tokenizer, ImageProcessor(model.cfg), max_video_frames)
        self.collator = PromptCollator(tokenizer.pad_token_id, model.cfg)
        self.speed = Speed()  # of all answers so far

    def answer(
        self, questions: Sequence[Questions], max_new_tokens: int, stop: Sequence[str] = (), **sampling: Any
    ) -> list[str]:
        """The answer to each prompt; greedy, unless `sampling`, as the model's generate takes it, says otherwise.

        stop: an answer ends before the first of these texts in it.
        """
        texts = [AnswerText(self.tokenizer, stop, max_new_tokens) for row in questions for _ in row.prompts]
        for _ in self._steps(questions, texts, max_new_tokens, sampling):
            pass
        return [text.text for text in texts]

    def stream(
        self,
        question: Questions,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        known: PromptCache | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """The same of one prompt, piece by piece as its tokens come. Close it where it is not taken to the end.

        known: of the conversation that the question continues; it takes in what is new.
        """
        text = AnswerText(self.tokenizer, stop, max_new_tokens)
        with contextlib.closing(self._steps([question], [text], max_new_tokens, sampling, known)) as steps:
            for _ in steps:
                if piece := text.take():
                    yield piece

    def _steps(
        self,
        questions: Sequence[Questions],
        texts: Sequence[AnswerText],
        max_new_tokens: int,
        sampling: dict[str, Any],
        known: PromptCache | None = None,
    ) -> Generator[None, None, None]:
        """Give each text its next token, until all are done. known: as in `stream`, for a single question."""
        options: dict[str, Any] = {"greedy": not sampling, "eos_token_id": self.tokenizer.eos_token_id} | sampling
        self.speed.begin()
        if known is not None:
            sizes = self.model.cfg, self.device, self.compute_dtype()
            questions = [known.continued(questions[0], max_new_tokens, *sizes)]
            options["cache"] = known.cache
        options |= to_device(self.collator(list(questions)), self.device)
        # Held over all tokens: at its end the weights that it has cast are forgotten.
        with self.autocast, contextlib.closing(self.model.stream(max_new_tokens=max_new_tokens, **options)) as stream:
            for new_ids in stream:
                tokens = new_ids.tolist()  # waits for the device
                if known is not None:
                    known.ids += tokens
                self.speed.add(sum(not text.done for text in texts))
                for text, token in zip(texts, tokens, strict=True):
                    text.add(token)
                yield
                if all(text.done for text in texts):
                    return

    def compute_dtype(self) -> torch.dtype:
        """Of its matrix products."""
        with self.autocast:
            return compute_dtype(next(self.model.parameters()))

    @torch.no_grad()
    def likeliest(self, questions: Sequence[Questions], choices: Sequence[Sequence[str]]) -> list[str]:
        """Which of its choices each answer most likely begins with, by the probability of the choice's first token."""
        batch = to_device(self.collator(list(questions)), self.device)
        mask = batch.pop("attention_mask", None)
        with self.autocast:
            x = self.model.embed(**batch)
            positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_(min=0)
            hidden = self.model.decoder(x, mask, positions)[:, -1]
            scores = self.model.decoder.head(hidden).float().log_softmax(dim=-1)
        return [max(given, key=lambda one: self._score(row, one)) for row, given in zip(scores, choices, strict=True)]

    def _score(self, scores: torch.Tensor, choice: str) -> float:
        """The larger one of the first token with and without a space before it, as the prompt may end in either."""
        starts = {self.reader.ids(text)[0] for text in (choice, f" {choice}")}
        return max(scores[start].item() for start in starts)


class Asker(ModelAsker):
    """A checkpoint that answers."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
        lm_tokenizer: str | None = None,
        max_video_frames: int | None = None,
    ):
        """folder: a checkpoint in nanoVLM's format. lm_tokenizer: in place of the checkpoint's own.

        Raises ValueError or OSError for a checkpoint that cannot be used.
        """
        model = VisionLanguageModel.from_pretrained(folder).to(device).eval()
        model.cfg.lm_tokenizer = lm_tokenizer or model.cfg.lm_tokenizer
        tokenizer = get_tokenizer(model.cfg, None if lm_tokenizer else folder)
        super().__init__(model, tokenizer, device, autocast, max_video_frames)
        self.folder = folder
