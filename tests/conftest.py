"""Tests run on tiny tensors: one thread is fastest, and its sums come out the same on every machine."""

import json

import pytest
import torch
from tiny.data import encoded, picture

torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path):
    """Sixteen rows in the_cauldron's shape, one of which holds no image that decodes."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = []
    for i in range(16):
        (folder / f"{i}.png").write_bytes(encoded(picture(seed=i)) if i != 3 else b"not an image")
        texts = [
            {"user": "is there a red shape?", "assistant": "yes" if i % 2 else "no"},
            {"user": "what?", "assistant": "red"},
        ]
        lines.append(json.dumps({"images": [f"{i}.png"], "texts": texts}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder
