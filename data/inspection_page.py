"""A page of rows as the model gets them, in one HTML file that refers to nothing outside: see inspect_data.py.

Shapes: B rows, T tokens, N images or tiles, S vit_img_size, K image slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from data.html_page import data_url, page, text
from models.config import VLMConfig

NUMBERED = 10  # every so many positions have their number
STYLE = """
pre.facts { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: .85em; line-height: 1.35 }
.tiles { display: flex; flex-wrap: wrap; gap: .6em; margin: .6em 0 }
figure { margin: 0; font-size: .75em; color: #555; text-align: center }
figure img { display: block; width: 128px; height: 128px; image-rendering: auto; border: 1px solid #bbb }
.tokens { font-family: ui-monospace, monospace; font-size: .85em; line-height: 2.1; overflow-wrap: anywhere }
.tokens span, .key span { padding: .15em .1em; border-radius: .2em; white-space: pre-wrap; margin-right: 1px }
.label { background: #bfe8c5 } .prompt { background: #e8ecf4 } .image { background: #f7dba7 }
.padding { background: #fff; color: #999; border: 1px dashed #bbb }
.document { background: #5b3a8c; color: #fff }
sup { color: #888; font-size: .65em } .dropped { color: #a22 }
"""


def _numbers(value: float | list[float]) -> str:
    """One number, or one for each color."""
    return ", ".join(f"{number:g}" for number in (value if isinstance(value, list) else [value]))


def make_page(
    title: str, facts: Iterable[str], batches: Iterable[dict], tokenizer: Any, cfg: VLMConfig, rows: int
) -> str:
    """The page: the facts, then the first `rows` rows of the training batches (see TrainCollator, PackedCollator)."""
    parts = [
        f'<pre class="facts">{text(chr(10).join(facts))}</pre>',
        '<p class="key">A token is <span class="label">learned</span>, <span class="prompt">read as the prompt</span>, '
        'stands for a <span class="image">tile</span> of an image, or is <span class="padding">padding</span>. Small '
        "numbers are positions; a token's own position and id show under the pointer. Pictures are the model's tiles "
        f"of {cfg.vit_img_size} x {cfg.vit_img_size} pixels as they were cut, before it takes "
        f"{_numbers(cfg.image_mean)} from values in [0, 1] and divides them by {_numbers(cfg.image_std)}.</p>",
    ]
    shown = 0
    seen: set[str] = set()
    for batch in batches:
        if seen.issuperset(batch["ids"]):  # the next epoch
            break
        seen.update(batch["ids"])
        count = 0 if batch["input_ids"] is None else min(len(batch["input_ids"]), rows - shown)
        for row in range(count):
            parts += _row(batch, row, shown + row + 1, tokenizer, cfg)
        shown += count
        for record in batch["drop_records"]:
            parts.append(f'<p class="dropped">Not used: {text(record.where)}: {text(record.reason)}</p>')
        if shown >= rows:
            break
    return page(title, STYLE, parts)


def _row(batch: dict, row: int, number: int, tokenizer: Any, cfg: VLMConfig) -> list[str]:
    """A row of a batch: its name, its tiles, its tokens."""
    ids, targets = batch["input_ids"][row].tolist(), batch["targets"][row].tolist()
    tiles = _tiles_at(batch, row, cfg)
    used, learned = len(ids) - _padding(ids, targets, tokenizer.pad_token_id), sum(t != -100 for t in targets)
    if "document_ids" in batch:
        used = int((batch["document_ids"][row] >= 0).sum())
        names = list(dict.fromkeys(batch["ids"])) if len(batch["input_ids"]) == 1 else []
    else:
        names = [batch["ids"][row * len(batch["ids"]) // len(batch["input_ids"])]]
    places: dict[int, list[int]] = {}
    for position, tile in tiles.items():
        places.setdefault(tile, []).append(position)
    title = f"{number}. {', '.join(names)}" if names else f"{number}."
    counts = f"{used} tokens, {len(ids) - used} of padding; {learned} are learned; tiles: {len(places)}"
    parts = [f"<section>\n<h2>{text(title)}</h2>\n<p>{counts}</p>", '<div class="tiles">']
    for order, (tile, positions) in enumerate(places.items(), start=1):
        caption = f"tile {order}: positions {positions[0]} to {positions[-1]}"
        if len(positions) <= positions[-1] - positions[0]:  # other crops and column tokens stand between
            caption = f"tile {order}: {len(positions)} of the positions {positions[0]} to {positions[-1]}"
        parts.append(f'<figure><img alt="{caption}" src="{data_url(batch["images"][tile])}"><figcaption>{caption}')
        parts.append("</figcaption></figure>")
    order_of = {tile: order for order, tile in enumerate(places, start=1)}
    images = {position: order_of[tile] for position, tile in tiles.items()}
    documents = batch["document_ids"][row].tolist() if "document_ids" in batch else None
    positions = batch["position_ids"][row].tolist() if "position_ids" in batch else list(range(len(ids)))
    spans = _spans(ids, targets, images, documents, positions, used, tokenizer)
    return [*parts, f'</div>\n<div class="tokens">{"".join(spans)}</div>\n</section>']


def _tiles_at(batch: dict, row: int, cfg: VLMConfig) -> dict[int, int]:
    """Position in the row -> the tile, of the batch's N, of which an embedding goes there."""
    if batch["image_slots"] is None:
        return {}
    slots, sources = batch["image_slots"].numpy(), batch["image_sources"]
    sources = np.arange(len(slots)) if sources is None else sources.numpy()
    length = batch["input_ids"].shape[1]
    mine = slots // length == row
    if "pool_index" in batch:  # of a window over two crops the first patch's
        windows = batch["pool_index"].numpy()[sources[mine]]
        first = windows[np.arange(len(windows)), (windows >= 0).argmax(axis=1)]
        tiles = first // cfg.vit_grid**2
    else:
        tiles = sources[mine] // cfg.mp_image_token_length
    return dict(zip((slots[mine] % length).tolist(), tiles.tolist(), strict=True))


def _padding(ids: list[int], targets: list[int], pad_id: int) -> int:
    """How many positions at the end are padding; the pad may be the token that ends an answer, which is learned."""
    end = len(ids)
    while end > 0 and ids[end - 1] == pad_id and (end < 2 or targets[end - 2] == -100):
        end -= 1
    return len(ids) - end


def _spans(
    ids: list[int],
    targets: list[int],
    images: dict[int, int],
    documents: list[int] | None,
    positions: list[int],
    used: int,
    tokenizer: Any,
) -> list[str]:
    """The tokens, each coloured by what it is; those of an image, and the padding, in one."""
    spans: list[str] = []
    at = 0
    while at < used:
        document = "" if documents is None else f", document {documents[at]}"
        if documents is not None and (at == 0 or documents[at] != documents[at - 1]):
            spans.append(f'{"<br>" if at else ""}<span class="document">document {documents[at]}</span>')
        if at in images:
            end = at
            while end < used and images.get(end) == images[at]:
                end += 1
            said = f"tile {images[at]}: {end - at} tokens"
            spans.append(f'<span class="image" title="positions {at} to {end - 1}{document}">{said}</span>')
            at = end
            continue
        kind = "label" if at and targets[at - 1] != -100 else "prompt"
        number = f"<sup>{at}</sup>" if at % NUMBERED == 0 else ""
        own = f", {positions[at]} in its document" if documents is not None else ""
        title = f"position {at}{own}, id {ids[at]}{document}"
        spans.append(f'{number}<span class="{kind}" title="{title}">{_token(tokenizer, ids[at])}</span>')
        at += 1
    if used < len(ids):
        spans.append(
            f'<span class="padding" title="positions {used} to {len(ids) - 1}">{len(ids) - used} of padding</span>'
        )
    return spans


def _token(tokenizer: Any, token: int) -> str:
    """The token as text; where it is a part of a letter, its name in the vocabulary."""
    word = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in word or not word:
        word = tokenizer.convert_ids_to_tokens(token) or ""
    return text(word).replace("\n", "\u21b5<wbr>")
