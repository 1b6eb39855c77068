"""One question as a demo shows it: the answer as it comes, what the model sees, the points of the answer on it, and how
fast it is."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from data.frames import small_frames
from data.images import ImageDecodeError, Source
from data.points import find_points
from data.video import sampled
from data.video_frames import Source as Video
from eval.answer_text import Speed
from eval.asking import Asker, Shown
from eval.drawing import draw_points, place_points, upright

FRAMES_IN_A_ROW = 8  # of a video
POINTED_SIDE = 640  # pixels of a frame with points, at most
WIDTH = 1024  # pixels of a drawing, at most
CELL = 288  # pixels of one tile in it, at most
GAP = 6  # pixels between tiles


@dataclass(frozen=True)
class Moment:
    """What there is to show at one moment."""

    answer: str
    numbers: str  # tokens and speed, in words
    seen: Image.Image | None  # what the vision tower sees, drawn
    pointed: list[tuple[Image.Image, str]] = field(default_factory=list)  # of a whole answer: pictures with its points


def show_answer(
    asker: Asker,
    images: Sequence[Source],
    text: str,
    max_new_tokens: int,
    video: Video | None = None,
    **sampling: Any,
) -> Generator[Moment, None, None]:
    """Yields once before the answer begins, then with every piece of it.

    sampling: as Asker.stream takes it. Raises ValueError for a question that cannot be asked.
    """
    if not text.strip() and not images and video is None:
        raise ValueError("a question, a picture or a video is needed")
    try:
        processed = [asker.reader.image(image) for image in images]
        processed += [] if video is None else [asker.reader.video(video)]
    except ImageDecodeError as error:
        raise ValueError(f"{error.kind}: {error}") from None
    spoken, shown = asker.reader.spoken(text, processed)
    question = asker.reader.conversation([spoken], shown)
    if problem := asker.reader.too_long(question, max_new_tokens):
        raise ValueError(problem)
    prompt = question.prompts[0]
    counted = f"{prompt.count(asker.model.cfg.image_token_id)} image tokens of {len(prompt)} in the prompt"
    seen = drawn([_lines(one) for one in processed]) if processed else None
    answer = ""
    yield Moment(answer, counted, seen)
    asker.speed = Speed()
    try:
        with contextlib.closing(asker.stream(question, max_new_tokens, **sampling)) as stream:
            for piece in stream:
                answer += piece
                yield Moment(answer, f"{counted}; {asker.speed}", seen)
    except torch.OutOfMemoryError:
        raise ValueError("out of memory: a smaller picture or a shorter answer may fit") from None
    pointed, note = with_points(answer, images, video, asker.reader.most_frames)
    yield Moment(answer, f"{counted}; {asker.speed}{note}", seen, pointed)


def with_points(
    answer: str, images: Sequence[Source], video: Video | None, max_frames: int
) -> tuple[list[tuple[Image.Image, str]], str]:
    """(each picture and frame in which the answer has points, with them drawn and what it is; what is not drawn, in
    words). Raises ImageDecodeError."""
    found = find_points(answer)
    frames = sampled(video, max_frames) if video is not None and found.points else []
    placed = place_points(found, len(images), [frame.time_s for frame in frames])
    pointed = [
        (draw_points(upright(image), labelled), f"points in picture {number}")
        for number, (image, labelled) in enumerate(zip(images, placed.images, strict=True), 1)
        if labelled
    ]
    chosen = [(frame, labelled) for frame, labelled in zip(frames, placed.frames, strict=True) if labelled]
    if chosen:
        pictures = small_frames([frame for frame, _ in chosen], POINTED_SIDE)
        for (frame, labelled), pixels in zip(chosen, pictures, strict=True):
            plain = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            pointed.append((draw_points(plain, labelled), f"points at {frame.time_s:.1f} s"))
    unknown = f"; {placed.elsewhere} points are in nothing that is shown" if placed.elsewhere else ""
    return pointed, unknown + "".join(f"; {reason}" for reason in placed.broken)


Grid = list[list[torch.Tensor]]  # tiles in rows and columns


def drawn(lines: Sequence[list[Grid]]) -> Image.Image:
    """What the vision tower sees, one picture or video below the other; grids of a line stand beside one another."""
    columns = max(sum(len(grid[0]) for grid in line) for line in lines)
    cell = max(16, min(CELL, WIDTH // columns - GAP))
    places = []
    top = right = 0
    for line in lines:
        left = 0
        for grid in line:
            for row, tiles in enumerate(grid):
                for column, tile in enumerate(tiles):
                    places.append((tile, (left + column * (cell + GAP), top + row * (cell + GAP))))
            left += len(grid[0]) * (cell + GAP) + 2 * GAP
        right = max(right, left - 3 * GAP)
        top += max(map(len, line)) * (cell + GAP) + 2 * GAP
    canvas = Image.new("RGB", (right, top - 3 * GAP), "white")
    for tile, (left, top) in places:
        canvas.paste("gray", (left - 1, top - 1, left + cell + 1, top + cell + 1))  # a frame, which white pictures need
        pixels = Image.fromarray(tile.permute(1, 2, 0).numpy())
        enlarged = Image.Resampling.NEAREST if cell > tile.shape[-1] else Image.Resampling.BILINEAR
        canvas.paste(pixels.resize((cell, cell), enlarged), (left, top))
    return canvas


def _lines(shown: Shown) -> list[Grid]:
    """The frames of a video in rows; of a picture the whole, if there is one besides, and what it is cut into."""
    if shown.is_video:
        return [[list(row) for row in shown.tiles.split(FRAMES_IN_A_ROW)]]
    return grids(shown.tiles, shown.grid)


def grids(tiles: torch.Tensor, grid: tuple[int, int]) -> list[Grid]:
    """Of an image as the ImageProcessor gives it, uint8 [n, 3, S, S] with the grid (rows, columns) of the tiles."""
    rows, cols = grid
    first = len(tiles) - rows * cols
    cut = [[tiles[first + row * cols + col] for col in range(cols)] for row in range(rows)]
    return [[[tiles[0]]], cut] if first else [cut]
