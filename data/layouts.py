"""Layouts of a picture: which square images the vision tower gets of it, and which of their patches make a token.

All of it follows from the grid (rows, columns) of tiles or crops, which follows from the picture's size alone.

tiles: nanoVLM's. The picture in multiples of S, cut; where there is a global_image_token, the whole of it before.
resize: the whole picture, S x S.
molmo_crops: Molmo's "overlap-and-resize-c2" (arXiv:2409.17146, 2601.10611). First the whole picture, S x S, then crops
of the picture enlarged to a canvas. Neighbouring crops overlap by twice the margin, so that the vision tower sees what
is around each patch; each patch of the canvas is taken once, from the crop in which it is not in the margin, and they
form one raster before windows of it become tokens. Not here: the two embeddings that Molmo adds, with CLIP, to patches
that are padding in whole or in part.

Shapes: S vit_img_size, P patches of an image (vit_grid squared), n images of a picture, M image tokens, K patches of a
window.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from models.config import VLMConfig

Grid = tuple[int, int]  # rows and columns of tiles or crops
FRAME = (0, 0)  # that of a frame of a video: whatever the layout, the whole of it S x S, with windows of its own


def has_crops(cfg: VLMConfig) -> bool:
    """Whether the layout is molmo_crops."""
    return cfg.image_layout == "molmo_crops"


def grid_of(width: int, height: int, cfg: VLMConfig) -> Grid:
    """The grid of tiles or crops of a picture of width x height pixels."""
    if has_crops(cfg):
        return _tiling(width, height, cfg)
    if cfg.image_layout == "resize":
        return 1, 1
    columns, rows = (size // cfg.vit_img_size for size in tiled_size(width, height, cfg))
    return rows, columns


def tiled_size(width: int, height: int, cfg: VLMConfig) -> tuple[int, int]:
    """tiles: (width, height) in multiples of S: the longer side at most max_img_size, the shorter in proportion, up."""
    side, long, short = cfg.vit_img_size, max(width, height), min(width, height)
    new_long = cfg.max_img_size
    if not cfg.resize_to_max_side_len:
        new_long = min(new_long, -(-long // side) * side)
    # In integers: a rounding error must not add a row of tiles.
    new_short = -(-short * new_long // (long * side)) * side
    return (new_long, new_short) if width >= height else (new_short, new_long)


def _tiling(width: int, height: int, cfg: VLMConfig) -> Grid:
    """The (rows, columns) of crops that Molmo takes for a picture.

    Of the grids of at most max_crops crops whose canvas the picture fits into without being made smaller, the one that
    enlarges it least; where there is none, the one that makes it smallest by least. Of equal ones that of fewer crops.
    Measured without the margins, so that a side shorter than these has a negative scale: then, as in Molmo, few crops.
    """
    margins = 2 * cfg.overlap_margin * cfg.vit_patch_size
    step = crop_step(cfg)

    def scale(grid: Grid) -> float:
        lengths = zip(grid, (height - margins, width - margins), strict=True)
        return min(count * step / length if length else float("inf") for count, length in lengths)

    counts = range(1, cfg.max_crops + 1)
    grids = [grid for grid in product(counts, counts) if grid[0] * grid[1] <= cfg.max_crops]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    enlarging = [grid for grid in grids if scale(grid) >= 1]
    return min(enlarging, key=scale) if enlarging else max(grids, key=scale)


def canvas_size(grid: Grid, cfg: VLMConfig) -> tuple[int, int]:
    """molmo_crops: (width, height) in pixels of what the crops are cut from."""
    height, width = (patches * cfg.vit_patch_size for patches in _canvas_patches(grid, cfg))
    return width, height


def crop_step(cfg: VLMConfig) -> int:
    """molmo_crops: pixels from one crop to the next."""
    return (cfg.vit_grid - 2 * cfg.overlap_margin) * cfg.vit_patch_size


def _canvas_patches(grid: Grid, cfg: VLMConfig) -> tuple[int, int]:
    """molmo_crops: rows and columns of patches of the canvas."""
    margins = 2 * cfg.overlap_margin
    rows, columns = (count * (cfg.vit_grid - margins) + margins for count in grid)
    return rows, columns


def count_images(grid: Grid, cfg: VLMConfig) -> int:
    """n, how many images [3, S, S] the vision tower gets of a picture."""
    if grid == FRAME:
        return 1
    with_whole = has_crops(cfg) or (grid != (1, 1) and "global_image_token" in cfg.vlm_extra_tokens)
    return grid[0] * grid[1] + with_whole


def token_rows(grid: Grid, cfg: VLMConfig) -> tuple[int, int]:
    """molmo_crops: rows and columns of the image tokens that the crops make together."""
    rows, columns = (-(-patches // cfg.mp_window) for patches in _canvas_patches(grid, cfg))
    return rows, columns


def count_image_tokens(grid: Grid, cfg: VLMConfig) -> int:
    """M, the image tokens of a picture, without the other tokens of data.text.image_string."""
    if grid == FRAME:
        return frame_tokens(cfg)
    if not has_crops(cfg):
        return count_images(grid, cfg) * cfg.mp_image_token_length
    rows, columns = token_rows(grid, cfg)
    return cfg.mp_image_token_length + rows * columns


def image_tokens_in_words(cfg: VLMConfig) -> str:
    """How many image tokens stand for a picture, and for a frame of a video where these are not as many."""
    whole, frame = cfg.mp_image_token_length, frame_tokens(cfg)
    if has_crops(cfg):
        of_crops = count_image_tokens(largest_grid(cfg), cfg) - whole
        words = f"{whole:,} image tokens for the whole image and at most {of_crops:,} for its crops"
    else:
        is_tiled = cfg.image_layout == "tiles" and cfg.max_img_size > cfg.vit_img_size
        words = f"{whole:,} image tokens per image{' or tile' if is_tiled else ''}"
    return words if frame == whole else f"{words}, {frame:,} per frame of a video"


def largest_grid(cfg: VLMConfig) -> Grid:
    """The grid whose pictures have most images and, of these, most image tokens."""
    if cfg.image_layout == "resize":
        return 1, 1
    most = cfg.max_crops if has_crops(cfg) else cfg.max_img_size // cfg.vit_img_size
    counts = range(1, most + 1)
    grids = [grid for grid in product(counts, counts) if not has_crops(cfg) or grid[0] * grid[1] <= most]
    return max(grids, key=lambda grid: (count_images(grid, cfg), count_image_tokens(grid, cfg)))


def mirror_order(grid: Grid, count: int) -> list[int]:
    """Where the images of the mirrored picture come from, among the `count` images of a picture of that grid."""
    first = count - grid[0] * grid[1]  # 1 with the whole picture
    order = np.arange(first, count).reshape(grid)[:, ::-1]
    return [*range(first), *order.flatten().tolist()]


def pool_index(grids: Sequence[Grid], cfg: VLMConfig) -> torch.Tensor | None:
    """int64 [M, K]: for each image token of the pictures, in order, the patches that it is made of; -1: none.

    The patches are counted over the n * P of all these pictures. None where the layout needs none: each image's own
    patches make its tokens, as the projector does it by itself.
    """
    return joined([_of_picture(grid, cfg) for grid in grids], [count_images(grid, cfg) for grid in grids], cfg)


def frame_tokens(cfg: VLMConfig) -> int:
    """Image tokens of one frame: as Molmo pools it, mp_video_pool_size squared patches to a token."""
    return (-(-cfg.vit_grid // frame_window(cfg))) ** 2


def frame_length(cfg: VLMConfig) -> int:
    """Tokens of one frame in a row, with those that it stands between: see data.text."""
    marks = (
        {"frame_start", "global_image_token"} & cfg.vlm_extra_tokens.keys(),
        {"frame_end"} & cfg.vlm_extra_tokens.keys(),
    )
    return frame_tokens(cfg) + sum(map(bool, marks))


def frame_window(cfg: VLMConfig) -> int:
    """Side of a frame's window."""
    return cfg.mp_video_pool_size if cfg.mp_type == "molmo" else cfg.mp_window


def joined(parts: Sequence[torch.Tensor | None], images: Sequence[int], cfg: VLMConfig) -> torch.Tensor | None:
    """One pool_index of several, each counted from 0. images: n of each, which says how far the next ones are shifted.

    A part may be None: then its images are pooled each by itself. None where all are. Shorter windows end with -1.
    """
    if all(part is None for part in parts):
        return None
    # What model.MP does by itself where it gets no pool_index.
    found = [
        image_windows(count, cfg.vit_grid, cfg.mp_window) if part is None else part.numpy()
        for part, count in zip(parts, images, strict=True)
    ]
    table = np.full((sum(map(len, found)), max(part.shape[1] for part in found)), -1)
    row = patches = 0
    for part, count in zip(found, images, strict=True):
        table[row : row + len(part), : part.shape[1]] = np.where(part >= 0, part + patches, -1)
        row, patches = row + len(part), patches + count * cfg.vit_grid**2
    return torch.from_numpy(table)


@functools.lru_cache(maxsize=16)
def image_windows(images: int, side: int, window: int) -> np.ndarray:
    """int64 [M, K]: the windows of each of some images of side x side patches, row by row."""
    one = _windows(np.arange(side * side).reshape(side, side), window)
    shifts = np.arange(images)[:, None, None] * side * side
    return np.where(one >= 0, one + shifts, -1).reshape(-1, window * window)


def _of_picture(grid: Grid, cfg: VLMConfig) -> torch.Tensor | None:
    """pool_index of one picture."""
    if grid == FRAME:
        window = frame_window(cfg)
        return None if window == cfg.mp_window else torch.from_numpy(image_windows(1, cfg.vit_grid, window))
    if not has_crops(cfg):
        return None
    return torch.from_numpy(_crop_windows(grid, cfg.vit_grid, cfg.overlap_margin, cfg.mp_window))


@functools.lru_cache(maxsize=1024)
def _crop_windows(grid: Grid, side: int, margin: int, window: int) -> np.ndarray:
    """int64 [M, K]: the windows of the whole picture, then those of the crops' raster."""
    crops = _windows(side * side + _raster(grid, side, margin), window)
    return np.concatenate([image_windows(1, side, window), crops])


def _raster(grid: Grid, side: int, margin: int) -> np.ndarray:
    """int64 [rows, columns] of the canvas' patches: the number of each in the crop that it is taken from."""

    def along(crops: int) -> tuple[np.ndarray, np.ndarray]:
        """(the crop, the patch in it) of each patch along one side of the canvas."""
        step = side - 2 * margin
        patches = np.arange(crops * step + 2 * margin)
        crop = np.clip((patches - margin) // step, 0, crops - 1)  # the outer margins belong to the outer crops
        return crop, patches - crop * step

    (crop_row, row), (crop_column, column) = along(grid[0]), along(grid[1])
    crop = crop_row[:, None] * grid[1] + crop_column
    return crop * side * side + row[:, None] * side + column


def _windows(raster: np.ndarray, window: int) -> np.ndarray:
    """int64 [M, window squared]: the raster in windows, row by row; what a window lacks at the edges is -1.

    What is lacking is divided between the two edges, the larger half at the end.
    """
    lacking = [-size % window for size in raster.shape]
    raster = np.pad(raster, [(size // 2, size - size // 2) for size in lacking], constant_values=-1)
    rows, columns = (size // window for size in raster.shape)
    parts = raster.reshape(rows, window, columns, window).transpose(0, 2, 1, 3)
    return parts.reshape(rows * columns, window * window)
