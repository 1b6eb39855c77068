from itertools import islice

import datasets
import pytest
import torch
from tiny.data import (
    STREAM_OF_10,
    dataset,
    encoded,
    picture,
    row,
    some_rows,
    stream,
    tiny_train,
    tiny_vlm,
    turn,
)

from data.collators import PromptCollator, TrainCollator
from data.datasets import DropCounter
from data.loader import EpochOrder, eval_batches, prompt_batches, train_batches
from data.sources import RowStream, _Part

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
    assert len(batch["input_ids"]) == len(batch["images"]) == 1
    empty = train_collator()([data[0, 0]])
    assert empty == {"input_ids": None, "ids": [], "dropped": {"image does not decode": 1}}


def test_text_only_batch_has_no_image_inputs():
    data = dataset([row([])], SMALL)
    batch = train_collator()([data[0, 0]])
    assert [batch[name] for name in ("images", "image_slots", "image_sources")] == [None] * 3


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


def test_every_epoch_is_a_new_permutation_without_the_last_incomplete_batch():
    batches = list(islice(EpochOrder(10, 3, seed=0), 6))
    for epoch in (0, 1):
        keys = [key for batch in batches[epoch * 3 : epoch * 3 + 3] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == 9
    assert [key[1] for key in batches[0]] != [key[1] for key in batches[3]]
    assert list(islice(EpochOrder(10, 3, seed=0), 6)) == batches
    assert list(islice(EpochOrder(10, 3, seed=1), 6)) != batches
    for start in range(5):
        assert list(islice(EpochOrder(10, 3, seed=0, start=start), 6 - start)) == batches[start:]


def test_a_batch_larger_than_the_data_goes_on_into_the_next_epoch():
    batches = list(islice(EpochOrder(3, 5, seed=0), 3))
    keys = [key for batch in batches for key in batch]
    assert [key[0] for key in keys] == [epoch for epoch in range(5) for _ in range(3)]
    assert all(sorted(key[1] for key in keys[i : i + 3]) == [0, 1, 2] for i in range(0, 15, 3))


def same(one: dict, other: dict) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a is b or a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def test_batches_are_the_same_with_and_without_workers():
    rows = [*some_rows(9), row([b"junk"], name="bad")]

    def first(count, **changes):
        config = tiny_train(turns_per_image=2, flip_images=True, batch_size=3, **changes)
        return list(islice(train_batches(dataset(rows, SMALL, config), train_collator(), config), count))

    alone, workers = first(10), first(10, num_workers=2)
    assert all(same(one, other) for one, other in zip(alone, workers, strict=True))
    assert sum(batch["dropped"].get("image does not decode", 0) for batch in alone) >= 2


def test_batches_of_dropped_rows_are_skipped_and_counted():
    rows = [row([b"junk"])] * 5 + [row(name="good")]
    config = tiny_train(batch_size=1)
    batches = list(islice(train_batches(dataset(rows, SMALL, config), train_collator(), config), 3))
    assert [batch["ids"] for batch in batches] == [["good"]] * 3
    order = list(islice(EpochOrder(6, 1, config.seed), 18))
    places = [i for i, [key] in enumerate(order) if key[1] == 5]
    assert sum(batch["dropped"].get("image does not decode", 0) for batch in batches) == places[2] - 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error_with_counts(workers):
    config = tiny_train(batch_size=2, num_workers=workers)
    rows = [row([b"junk"])] * 4 + [row(texts=[])] * 2
    with pytest.raises(ValueError, match=r"dropped 6 rows \(4 image does not decode, 2 no text\)"):
        next(train_batches(dataset(rows, SMALL, config), train_collator(), config))
    with pytest.raises(ValueError, match="no rows"):
        next(train_batches(dataset([], SMALL, config), train_collator(), config))


# Streams


def test_stream_is_shuffled_and_endless():
    config = tiny_train(batch_size=4)
    batches = train_batches(dataset(stream(10), SMALL, config), train_collator(), config)
    names = [name for batch in islice(batches, 5) for name in batch["ids"]]
    assert sorted(names[:10]) == sorted(names[10:]) == STREAM_OF_10
    assert names[:10] != names[10:]


def unequal(*sizes: int) -> RowStream:
    """A stream of a subset of one shard for each size."""
    image = {"bytes": encoded(picture()), "path": None}
    tables = [datasets.Dataset.from_list([{"images": [image], "texts": [turn()]}] * size) for size in sizes]
    parts = [(f"s{i}", table.to_iterable_dataset().with_format("arrow")) for i, table in enumerate(tables)]
    return RowStream([_Part(name, table, name) for name, table in parts])


@pytest.mark.parametrize(("rows", "workers"), [(stream(10), 2), (stream(10), 5), (unequal(40, 4), 2)])
def test_workers_share_every_epoch_of_a_stream(rows, workers):
    """By its two shards, or row by row where they are too few for each to have as many."""
    size = len(list(rows))
    config = tiny_train(batch_size=1, num_workers=workers)
    batches = train_batches(dataset(rows, SMALL, config), train_collator(), config)
    names = [name for batch in islice(batches, 3 * size) for name in batch["ids"]]
    epochs = [names[start : start + size] for start in (0, size, 2 * size)]
    assert all(sorted(epoch) == sorted(one["id"] for one in rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_share_may_be_empty_for_many_epochs(packing):
    config = tiny_train(batch_size=1, num_workers=2, mixture_weights={"s0": 0.1}, packing=packing)
    batches = train_batches(dataset(unequal(2), SMALL, config), train_collator(), config)
    assert {name for batch in islice(batches, 10) for name in batch["ids"]} == {"s0#0", "s0#1"}


def test_a_share_of_bad_rows_is_not_the_end():
    """Of three readers two have no other row in most epochs."""
    rows = [row([b"junk"])] * 2 + [row(name="good")]
    for rank in range(3):
        config = tiny_train(batch_size=1, packing=True)
        batches = train_batches(dataset(rows, SMALL, config), train_collator(), config, 0, rank, 3)
        assert [batch["ids"] for batch in islice(batches, 3)] == [["good"]] * 3


@pytest.mark.parametrize("packing", [False, True])
def test_another_batch_size_goes_on_after_the_same_rows(packing):
    def first(count: int, size: int, start=0) -> list[dict]:
        config = tiny_train(batch_size=size, num_workers=2, packing=packing, max_images_per_knapsack=2)
        return list(islice(train_batches(dataset(stream(24), SMALL, config), train_collator(), config, start), count))

    def names(batches: list[dict], worker: int) -> list[str]:
        return [name for batch in batches[worker::2] for name in batch["ids"]]

    whole, begun = first(12, 1), first(2, 2)
    rest = first(8, 1, begun[-1]["position"])
    assert all(names(begun, worker) + names(rest, worker) == names(whole, worker) for worker in (0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_after_any_of_them(workers):
    """Of more rows than a batch holds and of fewer, and of a stream; batches of dropped rows count as well."""

    def first(rows, size: int, count: int, start: int = 0) -> list[dict]:
        config = tiny_train(batch_size=size, num_workers=workers, turns_per_image=1)
        return list(islice(train_batches(dataset(rows, SMALL, config), train_collator(), config, start), count))

    bad = [row([b"junk"], name="bad")] * 4
    for rows, size in (([*some_rows(7), *bad], 2), ([*some_rows(3), *bad[:1]], 5), (stream(9), 4)):
        whole = first(rows, size, 9)
        for batch, number in ((whole[0], 1), (whole[3], 4), (whole[5], 6)):
            rest = first(rows, size, 9 - number, batch["position"])
            assert all(same(one, other) for one, other in zip(rest, whole[number:], strict=True))
    assert first([*some_rows(2), *bad], 1, 3)[-1]["position"] > 3


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_stream_is_an_error_with_counts(workers):
    config = tiny_train(num_workers=workers)
    with pytest.raises(ValueError, match="dropped 3 rows"):
        next(train_batches(dataset(stream(3, junk=True), SMALL, config), train_collator(), config))
    with pytest.raises(ValueError, match="no row"):
        next(train_batches(dataset(stream(3).skip(5), SMALL, config), train_collator(), config))


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


def test_model_takes_both_kinds_of_batches():
    from models.vision_language_model import VisionLanguageModel

    vlm = tiny_vlm(
        resize_to_max_side_len=False,
        **{"vit_hidden_dim": 8, "vit_inter_dim": 8, "vit_n_heads": 1, "vit_n_blocks": 1},
        **{"lm_hidden_dim": 16, "lm_inter_dim": 16, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 1},
    )
    model = VisionLanguageModel(vlm).eval()
    config = tiny_train(turns_per_image=2)
    batch = next(train_batches(dataset(some_rows(5), vlm, config), train_collator(vlm), config))
    inputs = ("input_ids", "targets", "images", "image_slots", "image_sources", "label_positions")
    summed = model(**{name: batch[name] for name in inputs})
    each = []  # a conversation alone, its images found by the model
    data = dataset(some_rows(5), vlm, config)
    for [_, index] in next(iter(EpochOrder(5, 4, config.seed))):
        sample = data[0, index]
        for ids, labels in sample.conversations:
            each.append(model(ids[None], sample.images, targets=labels[None])[1] * (labels != -100).sum())
    torch.testing.assert_close(summed, sum(each))
    prompts, *_ = next(prompt_batches(dataset(some_rows(5), vlm, train=False), PromptCollator(PAD, vlm), config))
    assert model.generate(**prompts, max_new_tokens=2, greedy=True).shape == (4, 2)
