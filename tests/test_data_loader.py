"""Batches for training and evaluation: what is in them, their order, and where a run continues."""

import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from tiny.data import (
    STREAM_OF_10,
    dataset,
    drawn,
    encoded,
    picture,
    row,
    same,
    some_rows,
    stream,
    tiny_train,
    tiny_vlm,
    turn,
)
from tiny.runs import ROOT

from data.collators import PromptCollator, TrainCollator
from data.drops import DropCounter, DropRecord
from data.formats import Part
from data.loader import eval_batches, prompt_batches, train_batches
from data.order import EpochIndices, EpochOrder
from data.pipeline import Data, load_data
from data.streams import RowStream

SMALL = tiny_vlm(resize_to_max_side_len=False)
PAD = 1


def train_collator(vlm=SMALL) -> TrainCollator:
    return TrainCollator(PAD, vlm)


def check_images(batch: dict, expected: list[list[torch.Tensor]], vlm) -> None:
    """Every image token gets, in order, the embeddings of its own row's images. expected: of each conversation."""
    flat = batch["input_ids"].flatten().tolist()
    slots = [i for i, token in enumerate(flat) if token == vlm.image_token_id]
    if batch["images"] is None:
        assert (slots, batch["image_slots"]) == ([], None)
        return
    assert batch["image_slots"].tolist() == slots
    per_image = vlm.mp_image_token_length
    sources = batch["image_sources"]
    sources = list(range(len(slots))) if sources is None else sources.tolist()
    shown = [(batch["images"][source // per_image], source % per_image) for source in sources]
    wanted = [(image, i) for images in expected for image in images for i in range(per_image)]
    assert len(shown) == len(wanted)
    for (image, i), (wanted_image, wanted_i) in zip(shown, wanted, strict=True):
        assert i == wanted_i
        assert torch.equal(image, wanted_image)


@pytest.mark.parametrize("turns_per_image", [None, 3])
def test_train_batch_against_brute_force(turns_per_image):
    data = dataset(some_rows(7), SMALL, tiny_train(turns_per_image=turns_per_image))
    samples = [data[0, i] for i in range(7)]
    batch = train_collator()(samples)
    conversations = [(sample, ids, labels) for sample in samples for ids, labels in sample.conversations]
    longest = max(len(ids) for _, ids, _ in conversations)
    assert batch["input_ids"].shape == batch["targets"].shape == (len(conversations), longest)
    for i, (_, ids, labels) in enumerate(conversations):
        padding = longest - len(ids)
        assert batch["input_ids"][i].tolist() == ids.tolist() + [PAD] * padding
        assert batch["targets"][i].tolist() == labels.tolist() + [-100] * padding
    flat = batch["targets"].flatten().tolist()
    assert batch["label_positions"].tolist() == [i for i, label in enumerate(flat) if label != -100]
    assert batch["num_labels"] == len(batch["label_positions"])
    assert batch["num_tokens"] == sum(len(ids) for _, ids, _ in conversations)
    assert batch["ids"] == [f"row{i}" for i in range(7)]
    assert (batch["image_sources"] is None) == (turns_per_image is None)
    assert {batch[name].dtype for name in ("input_ids", "targets", "image_slots", "label_positions")} == {torch.int64}
    check_images(batch, [[] if s.images is None else list(s.images) for s, _, _ in conversations], SMALL)


def test_train_batch_leaves_out_and_counts_dropped_rows():
    rows = [row([b"junk"]), row(texts=[turn(), turn("")], name="good"), row([b"junk"])]
    data = dataset(rows, SMALL)
    batch = train_collator()([data[0, i] for i in range(3)])
    assert batch["ids"] == ["good"]
    assert batch["dropped"] == {"image does not decode": 2, "turn: no text": 1}
    reasons = [record.reason for record in batch["drop_records"]]
    assert reasons == ["image does not decode", "turn: no text", "image does not decode"]
    assert len(batch["input_ids"]) == len(batch["images"]) == 1
    empty = train_collator()([data[0, 0]])
    records = [DropRecord("row", "row", "image does not decode", "cannot identify image file")]
    dropped = {"dropped": {"image does not decode": 1}, "drop_records": records}
    assert empty == {"input_ids": None, "ids": []} | dropped
    text_only = train_collator()([dataset([row([])], SMALL)[0, 0]])
    assert [text_only[name] for name in ("images", "image_slots", "image_sources")] == [None] * 3


def test_prompt_batch_is_padded_on_the_left_and_shares_images():
    data = dataset(some_rows(6), SMALL, train=False)
    rows = [data.questions(i) for i in range(6)]
    batch = PromptCollator(PAD, SMALL)(rows)
    prompts = [(questions, prompt) for questions in rows for prompt in questions.prompts]
    longest = max(len(prompt) for _, prompt in prompts)
    for i, (_, prompt) in enumerate(prompts):
        padding = longest - len(prompt)
        assert batch["input_ids"][i].tolist() == [PAD] * padding + prompt
        assert batch["attention_mask"][i].tolist() == [0] * padding + [1] * len(prompt)
    assert len(batch["images"]) == sum(len(questions.images) for questions in rows if questions.images is not None)
    check_images(batch, [[] if q.images is None else list(q.images) for q, _ in prompts], SMALL)
    assert PromptCollator(PAD, SMALL)(rows[:1])["attention_mask"] is None


# Order


def order(rows: int, batch_size: int, count: int, seed: int = 0, start: int = 0) -> list[list[tuple[int, int]]]:
    return list(islice(EpochOrder(EpochIndices(range(rows), {}, seed), batch_size, start), count))


def test_every_epoch_is_a_new_permutation_without_the_last_incomplete_batch():
    batches = order(10, 3, 6)
    for epoch in (0, 1):
        keys = [key for batch in batches[epoch * 3 : epoch * 3 + 3] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 9
    assert [key[1] for key in batches[0]] != [key[1] for key in batches[3]]
    assert order(10, 3, 6) == batches != order(10, 3, 6, seed=1)
    for start in range(5):
        assert order(10, 3, 6 - start, start=start) == batches[start:]


def test_a_batch_larger_than_the_data_continues_into_the_next_epoch():
    keys = [key for batch in order(3, 5, 3) for key in batch]
    assert [key[0] for key in keys] == [epoch for epoch in range(5) for _ in range(3)]
    assert all(sorted(key[1] for key in keys[i : i + 3]) == [0, 1, 2] for i in range(0, 15, 3))


def first(rows, count: int, start: int | dict = 0, **changes) -> list[dict]:
    """The first training batches after a position."""
    config = tiny_train(**changes)
    return list(islice(train_batches(dataset(rows, SMALL, config), train_collator(), config, start), count))


def names(batches: list[dict]) -> list[str]:
    return [name for batch in batches for name in batch["ids"]]


@pytest.fixture
def start_method(request):
    """How processes start: "spawn" is the only way of Windows and macOS; None is this machine's own."""
    default = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(request.param or default, force=True)
    yield
    torch.multiprocessing.set_start_method(default, force=True)


@pytest.mark.parametrize("start_method", [None, pytest.param("spawn", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(("kind", "packing", "workers"), [("table", False, 2), ("stream", True, 1)])
@pytest.mark.usefixtures("start_method")
def test_batches_are_the_same_with_and_without_workers(kind, packing, workers):
    """All that goes to a worker can be pickled."""
    flags = {"turns_per_image": 2, "flip_images": True, "batch_size": 3, "packing": packing}
    rows = stream(12) if kind == "stream" else [*some_rows(9), row([b"junk"], name="bad")]
    alone, found = first(rows, 10, **flags), first(rows, 10, num_workers=workers, **flags)
    assert all(same(one, other) for one, other in zip(alone, found, strict=True))
    assert kind == "stream" or sum(batch["dropped"].get("image does not decode", 0) for batch in alone) >= 2


def test_batches_of_dropped_rows_are_skipped_and_counted():
    batches = first([row([b"junk"])] * 5 + [row(name="good")], 3, batch_size=1)
    assert [batch["ids"] for batch in batches] == [["good"]] * 3
    places = [i for i, [key] in enumerate(order(6, 1, 18)) if key[1] == 5]
    assert sum(batch["dropped"].get("image does not decode", 0) for batch in batches) == places[2] - 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error_with_counts(workers):
    flags = {"batch_size": 2, "num_workers": workers}
    with pytest.raises(ValueError, match=r"dropped 6 rows \(4 image does not decode, 2 no text\)"):
        first([row([b"junk"])] * 4 + [row(texts=[])] * 2, 1, **flags)
    with pytest.raises(ValueError, match="dropped 3 rows"):
        first(stream(3, junk=True), 1, **flags)
    for none in ([], stream(3).skip(5)):
        with pytest.raises(ValueError, match="no rows"):
            first(none, 1, **flags)


# Streams


def unequal(*sizes: int) -> RowStream:
    """A stream of a subset of one shard for each size."""
    import datasets

    image = {"bytes": encoded(picture()), "path": None}
    tables = [datasets.Dataset.from_list([{"images": [image], "texts": [turn()]}] * size) for size in sizes]
    parts = [(f"s{i}", table.to_iterable_dataset().with_format("arrow")) for i, table in enumerate(tables)]
    return RowStream([Part(name, table, name) for name, table in parts])


@pytest.mark.parametrize(("sizes", "workers"), [(None, 0), (None, 2), (None, 5), ((40, 4), 2)])
def test_workers_share_every_epoch_of_a_stream(sizes, workers):
    """By its two shards, or row by row where they are too few for each to have as many; without end."""
    rows = unequal(*sizes) if sizes else stream(10)
    size = len(list(rows))
    found = names(first(rows, 3 * size, batch_size=1, num_workers=workers))
    epochs = [found[start : start + size] for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == sorted(one["id"] for one in rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_share_may_be_empty_for_many_epochs(packing):
    flags = {"batch_size": 1, "num_workers": 2, "mixture_weights": {"s0": 0.1}, "packing": packing}
    assert set(names(first(unequal(2), 10, **flags))) == {"s0#0", "s0#1"}


def test_a_share_of_bad_rows_is_not_the_end():
    """Of three readers two have no other row in most epochs."""
    rows = [row([b"junk"])] * 2 + [row(name="good")]
    for rank in range(3):
        config = tiny_train(batch_size=1, packing=True)
        batches = train_batches(dataset(rows, SMALL, config), train_collator(), config, 0, rank, 3)
        assert [batch["ids"] for batch in islice(batches, 3)] == [["good"]] * 3


# Where a run continues


@pytest.mark.parametrize("packing", [False, True])
def test_another_batch_size_continues_after_the_same_rows(packing):
    flags = {"num_workers": 2, "packing": packing, "max_images_per_knapsack": 2}
    whole, begun = first(stream(24), 12, batch_size=1, **flags), first(stream(24), 2, batch_size=2, **flags)
    rest = first(stream(24), 8, begun[-1]["position"], batch_size=1, **flags)
    for worker in (0, 1):
        assert names(begun[worker::2]) + names(rest[worker::2]) == names(whole[worker::2])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_continue_after_any_of_them(workers):
    """Of more rows than a batch holds and of fewer, and of a stream; batches of dropped rows count as well."""
    flags = {"num_workers": workers, "turns_per_image": 1}
    bad = [row([b"junk"], name="bad")] * 4
    for rows, size in (([*some_rows(7), *bad], 2), ([*some_rows(3), *bad[:1]], 5), (stream(9), 4)):
        whole = first(rows, 9, batch_size=size, **flags)
        for batch, number in ((whole[0], 1), (whole[3], 4), (whole[5], 6)):
            rest = first(rows, 9 - number, batch["position"], batch_size=size, **flags)
            assert all(same(one, other) for one, other in zip(rest, whole[number:], strict=True))
    assert first([*some_rows(2), *bad], 3, batch_size=1, **flags)[-1]["position"] > 3


def ranks_of(rows, count: int, states: list[dict] | None = None, **changes) -> list[Data]:
    """The data of `count` ranks, begun or continued."""
    ranks = [load_data(rows, SMALL, tiny_train(val_size=0, **changes), None, rank, count) for rank in range(count)]
    for data in ranks:
        if states:
            data.load_rank_states(states)
        data.start_reading()
    return ranks


def test_other_ranks_continue_with_the_batches_of_all():
    rows = [*some_rows(22), row([b"junk"], name="bad")]
    one = ranks_of(rows, 1, batch_size=12)[0]
    whole = [drawn(one, 1)[0]["ids"] for _ in range(6)]
    three = ranks_of(rows, 3, batch_size=4)
    assert [[name for data in three for name in drawn(data, 1)[0]["ids"]] for _ in range(2)] == whole[:2]
    states = [data.state_dict() for data in three]
    two = ranks_of(rows, 2, states, batch_size=6)
    assert [[name for data in two for name in drawn(data, 1)[0]["ids"]] for _ in range(4)] == whole[2:]
    assert sum((data.dropped["train"] for data in two), DropCounter()) == one.dropped["train"] != {}
    smaller = ranks_of(rows, 1, states, batch_size=6)[0]  # 24 rows in the saved run: four batches of six
    assert smaller.position == 4


@pytest.mark.parametrize("packing", [False, True])
def test_other_ranks_begin_an_epoch_of_rows_that_are_shared_out(packing):
    """Every row comes once in it, in an order that no epoch before had."""
    flags = {"batch_size": 1, "packing": packing}
    before = ranks_of(stream(10), 3, **flags)
    for data in before:
        drawn(data, 12)
    states = [data.state_dict() for data in before]
    again = ranks_of(stream(10), 3, states, **flags)
    assert [data.position for data in again] == [data.position for data in before]
    found = ranks_of(stream(10), 2, states, **flags)
    begun = {data.position["places"][0][0] for data in found}
    assert min(begun) > max(state["position"]["places"][0][0] for state in states)
    assert sorted(name for data in found for name in names(drawn(data, 1 if packing else 5))) == STREAM_OF_10
    with pytest.raises(ValueError, match="--num_workers 2: must be 1"):
        ranks_of(stream(10), 3, states, num_workers=2, **flags)
    overridden = ranks_of(stream(10), 3, states, num_workers=2, resume_override=True, **flags)
    assert overridden[0].position["places"][1][0] in begun


def test_with_packing_switched_on_or_off_a_new_epoch_begins():
    rows = some_rows(12)
    table, packed = ranks_of(rows, 1, batch_size=4)[0], ranks_of(rows, 1, batch_size=1, packing=True)[0]
    for data in (table, packed):
        drawn(data, 5)
    ((epoch, *_),) = ranks_of(rows, 1, [table.state_dict()], packing=True)[0].position["places"]
    assert epoch > 5 // 3
    ((visited, *_),) = packed.position["places"]
    assert ranks_of(rows, 1, [packed.state_dict()], batch_size=4)[0].position == (visited + 1) * 3


# Evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_hold_every_conversation_once_in_order(workers):
    rows = [*some_rows(6), row([b"junk"]), row(name="last")]
    config = tiny_train(turns_per_image=1, eval_batch_size=4, num_workers=workers)
    data = dataset(rows, SMALL, config, train=False)
    dropped = DropCounter()
    batches = list(eval_batches(data, train_collator(), config, dropped))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 2]
    assert dropped == {"image does not decode": 1}
    expected = [ids.tolist() for i in range(8) for ids, _ in data[0, i].conversations]
    seen = [ids[ids != PAD].tolist() for batch in batches for ids in batch["input_ids"]]
    assert seen == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_prompt_batches_hold_every_question_once_in_order(workers):
    rows = [*some_rows(6), row([b"junk"]), row(texts=[turn("is the shape red?", "no"), turn("")], name="last")]
    config = tiny_train(eval_batch_size=4, num_workers=workers)
    data = dataset(rows, SMALL, config, train=False)
    dropped = DropCounter()
    seen = []
    for batch, answers, sources, ids in prompt_batches(data, PromptCollator(PAD, SMALL), config, dropped):
        assert len(batch["input_ids"]) == len(answers) == len(sources) == len(ids) <= 4
        questions = [data.tokenizer.decode(one, skip_special_tokens=True).split("\n")[-3] for one in batch["input_ids"]]
        seen += zip(questions, answers, sources, ids, strict=True)
    wanted = [(t["user"], t["assistant"], t["source"], one["id"]) for one in rows[:6] for t in one["texts"]]
    assert seen == [*wanted, ("is the shape red?", "no", None, "last")]
    assert dropped == {"image does not decode": 1, "turn: no text": 1}


def test_streams_can_be_evaluated():
    config = tiny_train()
    data = dataset(stream(6).take(5), SMALL, config, train=False)
    assert [name for batch in eval_batches(data, train_collator(), config) for name in batch["ids"]] == [
        "stream[0]#0", "stream[0]#1", "stream[0]#2", "stream[1]#0", "stream[1]#1"
    ]  # fmt: skip
    assert sum(len(answers) for _, answers, _, _ in prompt_batches(data, PromptCollator(PAD, SMALL), config)) == 5


BUSY = """
import time
import torch
from data.loader import init_worker

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, index):
        if index:
            time.sleep(0.5)  # until the first row is sent
            sum(range(10**12))  # one call that holds the interpreter's lock
        return index

if __name__ == "__main__":
    batches = iter(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1, worker_init_fn=init_worker))
    assert next(batches) == 0
    time.sleep(1)
"""


def test_a_worker_that_hears_nothing_does_not_keep_the_program_from_its_end(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "busy.py"], env=environment, timeout=60)
    assert done.returncode == 0
