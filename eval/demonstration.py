"""One question as a demo shows it: the answer as it comes, what of the pictures the model sees, and how fast it is."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from data.images import ImageDecodeError, Source
from eval.answer_text import Speed
from eval.asking import Asker

WIDTH = 1024  # pixels of a drawing, at most
CELL = 288  # pixels of one tile in it, at most
GAP = 6  # pixels between tiles


@dataclass(frozen=True)
class Shown:
    """What there is to show at one moment."""

    answer: str
    numbers: str  # tokens and speed, in words
    seen: Image.Image | None  # what the vision tower sees, drawn


def show_answer(
    asker: Asker, images: Sequence[Source], text: str, max_new_tokens: int, **sampling: Any
) -> Generator[Shown, None, None]:
    """Yields once before the answer begins, then with every piece of it.

    sampling: as Asker.stream takes it. Raises ValueError for a question that cannot be asked.
    """
    if not text.strip() and not images:
        raise ValueError("a question or a picture is needed")
    processed = []
    for image in images:
        try:
            processed.append(asker.reader.image(image))
        except ImageDecodeError as error:
            raise ValueError(f"{error.kind}: {error}") from None
    spoken, shown = asker.reader.spoken(text, processed)
    question = asker.reader.conversation([spoken], shown)
    if problem := asker.too_long(question, max_new_tokens):
        raise ValueError(problem)
    prompt = question.prompts[0]
    counted = f"{prompt.count(asker.model.cfg.image_token_id)} image tokens of {len(prompt)} in the prompt"
    seen = drawn([(one.tiles, one.grid) for one in processed]) if processed else None
    answer = ""
    yield Shown(answer, counted, seen)
    asker.speed = Speed()
    try:
        with contextlib.closing(asker.stream(question, max_new_tokens, **sampling)) as stream:
            for piece in stream:
                answer += piece
                yield Shown(answer, f"{counted}; {asker.speed}", seen)
    except torch.OutOfMemoryError:
        raise ValueError("out of memory: a smaller picture or a shorter answer may fit") from None
    yield Shown(answer, f"{counted}; {asker.speed}", seen)


def drawn(pictures: Sequence[tuple[torch.Tensor, tuple[int, int]]]) -> Image.Image:
    """What the vision tower sees of each picture, one below the other: to the left the whole, then the tiles.

    pictures: as the ImageProcessor gives them, uint8 [n, 3, S, S] with the grid (rows, columns) of the tiles.
    """
    # A whole is a grid of one tile, which stands beside the grid of the others.
    lines = [_grids(tiles, grid) for tiles, grid in pictures]
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


def _grids(tiles: torch.Tensor, grid: tuple[int, int]) -> list[list[list[torch.Tensor]]]:
    """The tiles in rows and columns: of the whole picture, if there is one besides, and of what it is cut into."""
    rows, cols = grid
    first = len(tiles) - rows * cols
    cut = [[tiles[first + row * cols + col] for col in range(cols)] for row in range(rows)]
    return [[[tiles[0]]], cut] if first else [cut]
