"""Tests run on tiny tensors: one thread is fastest, and its sums come out the same on every machine."""

import json
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that a test starts inherit it


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Up to four processes for the whole suite, none besides this one where files or a keyword were given.

    Each process imports torch and collects all tests, which takes longer than a few tests run.
    """
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    return 0 if chosen else min(4, os.cpu_count() or 1)


@pytest.fixture
def data(tmp_path):
    """Sixteen rows in the_cauldron's shape, one of which holds no image that decodes."""
    from tiny.data import encoded, picture

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
