"""The rows that each of several processes reads, and when one of them gives up."""

from itertools import islice

import pytest
from tiny.data import dataset, row, stream, tiny_train, tiny_vlm, turn

from data import loader, readers
from data.collators import TrainCollator
from data.loader import train_batches
from data.pipeline import load_data

SMALL = tiny_vlm()


def batches_of(rows, rank: int, world_size: int, count: int, start=0, **changes) -> list[dict]:
    cfg = tiny_train(**changes)
    data = dataset(rows, SMALL, cfg)
    return list(islice(train_batches(data, TrainCollator(0, SMALL), cfg, start, rank, world_size), count))


def some_rows(count: int, bad: set[int] = frozenset()) -> list[dict]:
    return [row([b""] if i in bad else None, name=f"row{i}") for i in range(count)]


@pytest.mark.parametrize(("rows", "world_size", "batch_size"), [(24, 2, 3), (23, 3, 2), (5, 4, 2)])
def test_the_batches_of_all_ranks_are_those_of_one_process(rows, world_size, batch_size):
    whole = batches_of(some_rows(rows), 0, 1, 8, batch_size=world_size * batch_size)
    parts = [batches_of(some_rows(rows), rank, world_size, 8, batch_size=batch_size) for rank in range(world_size)]
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        assert batch["ids"] == [row for part in of_ranks for row in part["ids"]]
        assert all(len(part["ids"]) == batch_size for part in of_ranks)
        assert {part["position"] for part in of_ranks} == {batch["position"]}


def test_a_rank_whose_rows_are_all_dropped_makes_its_step_without_rows():
    bad = {0, 1, 2, 3, 4, 5}
    whole = batches_of(some_rows(12, bad), 0, 1, 6, batch_size=4)
    parts = [batches_of(some_rows(12, bad), rank, 2, 6, batch_size=2) for rank in (0, 1)]
    assert any(not part["ids"] for of_rank in parts for part in of_rank)
    for batch, *of_ranks in zip(whole, *parts, strict=True):
        assert batch["ids"] == [row for part in of_ranks for row in part["ids"]]
        assert batch["num_labels"] == sum(part["num_labels"] for part in of_ranks)
    empty = next(part for part in parts[0] + parts[1] if not part["ids"])
    assert (empty["num_labels"], empty["num_tokens"], empty["images"]) == (0, 0, None)
    assert empty["input_ids"].shape == (1, 2)


@pytest.fixture
def few(monkeypatch):
    """Fifty bad rows in a row are too many."""
    for module in (loader, readers):
        monkeypatch.setattr(module, "FRUITLESS_ROWS", 50)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["table", "stream"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.usefixtures("few")
def test_bad_rows_end_a_run_before_all_of_them_are_read(kind, packing, world_size):
    rows = stream(400, junk=True) if kind == "stream" else some_rows(400, set(range(400)))
    cfg = tiny_train(val_size=0, batch_size=2, packing=packing)
    data = load_data(rows, SMALL, cfg, None, world_size - 1, world_size)
    with pytest.raises(ValueError, match=r"no row of the training data can be used: dropped 5[12] rows"):
        data.start_reading()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.usefixtures("few")
def test_bad_rows_between_good_ones_do_not_end_a_run(packing):
    """Rows in a row, not rows in all; and what the flags leave out is not bad."""
    rows = some_rows(200, {i for i in range(200) if i % 4})
    found = batches_of(rows, 0, 1, 4, batch_size=2, packing=packing)
    assert sum(sum(batch["dropped"].values()) for batch in found) > 10
    long = [row([], [turn("is there a red shape? " * 100)], name=f"long{i}") for i in range(200)]
    kept = batches_of([*long, row([], name="kept")], 0, 1, 2, batch_size=1, packing=packing, max_sample_length=100)
    assert [batch["ids"] for batch in kept] == [["kept"]] * 2


def test_the_share_of_a_rank_may_be_bad_in_whole_epochs():
    for rank in range(4):
        found = batches_of(some_rows(9, {0, 1, 2}), rank, 4, 200, batch_size=1)
        assert sum(len(batch["ids"]) for batch in found) > 100
        assert any(not batch["ids"] and not other["ids"] for batch, other in zip(found[::2], found[1::2], strict=True))


def test_a_rank_gives_up_in_the_end(monkeypatch):
    """After so many epochs of few rows, and where an epoch has many, after so many rows."""
    with pytest.raises(ValueError, match=r"dropped 602 rows \(602 image"):
        batches_of(some_rows(4, {0, 1, 2, 3}), 1, 2, 1000, batch_size=1)
    monkeypatch.setattr(loader, "FRUITLESS_ROWS", 50)
    long = [row([], [turn("is there a red shape? " * 100)], name=f"long{i}") for i in range(80)]
    with pytest.raises(ValueError, match=r"dropped 80 rows \(80 too long\)"):
        batches_of(long, 1, 2, 1000, batch_size=1, max_sample_length=100)
