"""The rows that each of several processes reads."""

from itertools import islice

import pytest
from tiny.data import dataset, row, tiny_train, tiny_vlm

from data.collators import TrainCollator
from data.loader import train_batches

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
