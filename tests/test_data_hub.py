"""The hub's data sets, as local folders in the same format: subsets, mixtures, streams, resumed streams, dirty rows."""

import io
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from tiny.data import dataset, drawn, encoded, picture, same, tiny_train, tiny_vlm

import data.parts
from data import streams
from data.collators import TrainCollator
from data.formats import RATINGS
from data.loader import train_batches
from data.order import EpochIndices
from data.pipeline import identify, load_data
from data.rows import RowSubset, load_rows, split_rows
from data.streams import RowStream

JUNK = {"bytes": b"not an image", "path": None}
SMALL = tiny_vlm(resize_to_max_side_len=False)


def image(seed: int, kind: str = "PNG", **size) -> dict:
    return {"bytes": encoded(picture(seed=seed, **size), kind), "path": None}


def cauldron_row(i: int) -> dict:
    """Clean rows but for every seventh, which has one of four kinds of dirt."""
    texts = [{"user": "is there a red shape?", "assistant": "yes", "source": "made"}] * (1 + i % 3)
    images = [image(i, "JPEG", width=20)]
    if i % 7 == 6:
        images, texts = [
            ([JUNK], texts),
            (images, [{"user": "what is <|image|>?", "assistant": "red", "source": "made"}]),
            ([], texts),
            (images * 5, texts),
        ][i // 7 % 4]
    return {"images": images, "texts": texts}


def finevision_row(i: int) -> dict:
    turns = [{"user": "is there a red shape?", "assistant": "yes"}, {"user": "what?", "assistant": "red"}]
    ratings = {f"{kind}_ratings": [5, 4] for kind in RATINGS}
    ratings["relevance_ratings"] = [5, 1 + i % 4]
    if i == 0:
        ratings["formatting_ratings"] = [None, None]
    lowest = {f"{name.removesuffix('s')}_min".replace("rating_min", "min"): 1 for name in ratings}
    return {"images": [image(i)] if i % 3 else [], "texts": turns, "source": "made"} | ratings | lowest


def rows_of(count: int, start: int = 0) -> list[dict]:
    return [cauldron_row(i) for i in range(start, start + count)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(subset=[rows of its first file, of its second, ...]) makes such a repository; its id is made/up."""
    import datasets

    folder = tmp_path / "repository"
    real = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.parts, "require_hub", lambda what, instead: None)
    monkeypatch.setattr(
        datasets, "get_dataset_config_names", lambda _: sorted(child.name for child in folder.iterdir())
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, **options: (
            real("parquet", data_files=str(folder / name / "train-*"), **options)
            if path == "made/up"
            else real(path, name, **options)
        ),
    )

    def make(row_group: int = 1000, **subsets):
        for name, files in subsets.items():
            (folder / name).mkdir(parents=True)
            for number, rows in enumerate(files):
                made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
                path = folder / name / f"train-{number:05d}-of-{len(files):05d}.parquet"
                made.to_parquet(path, batch_size=row_group)
        return folder

    return make


@pytest.fixture
def rows_read(monkeypatch):
    """rows_read() is how many rows have been read from parquet files in this process since it was asked last."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    real, counted = Parquet._generate_tables, [0]

    def _generate_tables(self, *args, **kwargs):  # with this name it can be pickled
        for key, table in real(self, *args, **kwargs):
            counted[0] += len(table)
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", _generate_tables)

    def read() -> int:
        found, counted[0] = counted[0], 0
        return found

    return read


def ids(rows) -> list[str]:
    return [row["id"].removeprefix("made/up/") for row in rows]


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch["ids"]]


# Subsets and splits


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_cauldron_all_and_chosen_subsets(hub, streaming, packing):
    hub(ai2d=[rows_of(12), rows_of(9, 12)], vqav2=[rows_of(7, 21)])
    whole = load_rows("made/up", streaming=streaming)
    assert ids(load_rows("made/up", names=["vqav2"], streaming=streaming)) == [f"vqav2#{i}" for i in range(7)]
    with pytest.raises(ValueError, match=r"--train_dataset_name c: .* there are all, ai2d, vqav2"):
        load_rows("made/up", names=["ai2d", "c"], streaming=streaming)
    with pytest.raises(ValueError, match=r"--train_dataset_path made/up, subset ai2d: .*val"):
        load_rows("made/up", split="val", streaming=streaming)
    cfg = tiny_train(packing=packing, batch_size=1)
    seen, dropped = Counter(), Counter()
    for batch in train_batches(dataset(whole, SMALL, cfg), TrainCollator(1, SMALL), cfg):
        seen.update(batch["ids"])
        dropped.update(batch["dropped"])
        if set(seen.values()) == {3}:
            break
    assert len(seen) == 28 - 3  # one of the four dirty rows is text without an image
    visits = {reason: count / 3 for reason, count in dropped.items()}
    assert set(visits) == {"image does not decode", "image token in text", "too many images"}
    assert all(0.6 < count < 1.4 for count in visits.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_finevision_drops_turns_below_a_rating(hub, streaming):
    hub(finevision=[[finevision_row(i) for i in range(8)], [finevision_row(i) for i in range(8, 16)]])
    rows = load_rows("made/up", streaming=streaming)
    for minimum, turns in ((1, 32), (3, 24), (5, 16)):
        cfg = tiny_train(relevance_min_rating=minimum, formatting_min_rating=minimum)
        data = dataset(rows, SMALL, cfg)
        kept = [data.sample(row) for row in rows]
        spoken = sum((labels == data.tokenizer.eos_token_id).sum() for one in kept for _, labels in one.conversations)
        assert spoken == turns


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_subset_is_an_error_or_is_skipped_aloud(hub, streaming, capsys):
    import datasets

    folder = hub(a=[rows_of(6)], b=[rows_of(6)], c=[rows_of(6)])
    (folder / "b" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not so")
    datasets.Dataset.from_list([{"question": "what?"}]).to_parquet(folder / "c" / "train-00000-of-00001.parquet")
    for path, said in (("made/up", "--train_dataset_path made/up, subset b: "), (str(folder), "cannot be read")):
        with pytest.raises(ValueError, match=said):
            load_rows(path, streaming=streaming)
    for path in (str(folder), "made/up"):
        rows = load_rows(path, streaming=streaming, skip_bad_subsets=True)
        said = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0][-1] for line in said if "SKIPPED subset" in line] == ["b", "c"]
        assert f"SKIPPED 2 of 3 subsets of --train_dataset_path {path}: b, c" in said
    assert isinstance(rows, RowStream) == streaming
    cfg = tiny_train(val_size=1)
    loaded = load_data(rows, SMALL, cfg, None)
    assert loaded.dropped["train"] == {"subset that cannot be loaded": 2}
    loaded.load_rank_states([load_data(rows, SMALL, cfg, None).state_dict()])
    assert loaded.dropped["train"] == {"subset that cannot be loaded": 2}
    with pytest.raises(ValueError, match="none of its 1 subsets can be loaded"):
        load_rows("made/up", names=["b"], streaming=streaming, skip_bad_subsets=True)
    with pytest.raises(ValueError, match=r"--train_dataset_name d: .* no such configuration"):
        load_rows("made/up", names=["a", "d"], streaming=streaming, skip_bad_subsets=True)


def test_rows_are_told_from_others(hub):
    def stream(*names):
        return identify(load_rows("made/up", names, streaming=True))

    hub(a=[rows_of(3), rows_of(3)], b=[rows_of(200)])
    whole, both = identify(load_rows("made/up")), stream("a", "b")
    assert whole == identify(load_rows("made/up"))
    assert (whole["size"], both["size"]) == ("206 rows", "3 shards of a stream")
    assert len({found["hash"] for found in (whole, both, stream("b"), identify(load_rows("made/up", ["b"])))}) == 4
    assert identify(load_rows("easy-vqa")) == identify(load_rows("easy-vqa"))


def test_a_stream_keeps_images_encoded_and_is_split_by_take_and_skip(hub, monkeypatch):
    from datasets.splits import SplitDict

    hub(row_group=2, a=[rows_of(5)], b=[rows_of(8)])
    rows = load_rows("made/up", streaming=True)
    assert list(rows)[6]["images"][0]["bytes"] == image(1, "JPEG", width=20)["bytes"]
    train, val = split_rows(rows, 2, seed=0)
    everything = ids(rows)
    assert (ids(val), ids(train)) == (everything[:2], everything[2:])
    assert ids(train) == everything[2:]  # a stream can be read again
    assert ids(train.skip(1).take(1)) == everything[3:4]
    # Of a share the whole must be known: from a description, or about, from the row groups of the first file.
    assert len(ids(split_rows(rows, 0.5, seed=0)[1])) == 6  # of 2 files x 3 groups x 2 rows
    for part, length in zip(rows.parts, (5, 8), strict=True):
        part.table.info.splits = SplitDict.from_split_dict([{"name": "train", "num_examples": length}])
    assert len(ids(split_rows(rows, 0.3, seed=0)[1])) == 4
    unknown = load_rows("made/up", names=["b"], streaming=True)
    monkeypatch.setattr(type(unknown.parts[0].table), "reshard", lambda table: table)
    with pytest.raises(ValueError, match=r"--val_size 0.5: must be a number of rows"):
        split_rows(unknown, 0.5, seed=0)


# Readers and mixtures


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 8])
def test_readers_share_a_stream_without_loss_or_repetition(hub, shares):
    hub(a=[rows_of(5), rows_of(6), rows_of(2)], b=[rows_of(7)], c=[rows_of(4)])
    train, val = split_rows(load_rows("made/up", streaming=True), 7, seed=0)
    everything = ids(load_rows("made/up", streaming=True))
    assert ids(val) == everything[:7]
    for key in ("0/0", "0/1"):
        seen = [name for share in range(shares) for name in ids(train.epoch(key, {}, share, shares))]
        assert sorted(seen) == sorted(everything[7:])
    orders = [ids(train.epoch(key, {})) for key in ("0/0", "0/0", "0/1")]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_readers_have_equal_shares_of_equal_shards(hub, shares):
    """Of 4 shards whole ones where they can be divided, of the rest each so many rows."""
    hub(a=[rows_of(6)] * 4, b=[rows_of(13)])
    stream = load_rows("made/up", streaming=True)
    found = [ids(stream.epoch("0/0", {}, i, shares)) for i in range(shares)]
    of_a = [Counter(name[:4] for name in names if name[0] == "a") for names in found]
    assert all(sum(counts.values()) == 24 // shares for counts in of_a)
    whole = 4 // shares
    assert all(sorted(counts.values())[-whole:] == [6] * whole for counts in of_a)
    assert {sum(name[0] == "b" for name in names) for names in found} <= {13 // shares, -(-13 // shares)}
    halves = [
        [name for name in ids(stream.epoch("0/0", {"b": 0.5}, i, shares)) if name[0] == "b"] for i in range(shares)
    ]
    assert max(map(len, halves)) - min(map(len, halves)) <= 1


def test_a_stream_mixes_its_subsets_by_their_weights(hub):
    hub(a=[rows_of(30), rows_of(30)], b=[rows_of(40)], c=[rows_of(10)])
    rows = load_rows("made/up", streaming=True)
    weights = {"a": 2, "b": 0.5, "c": 1.5}
    for shares in (1, 3):
        epochs = [
            Counter(name for share in range(shares) for name in ids(rows.epoch(key, weights, share, shares)))
            for key in ("0/0", "0/1")
        ]
        for visits in epochs:
            subsets = Counter(name[0] for name in visits.elements())
            assert all(visits[name] == 2 for name in visits if name[0] == "a")
            assert subsets["a"] == 120
            assert 10 < subsets["b"] < 30
            assert 10 <= subsets["c"] <= 20
        assert epochs[0] != epochs[1]


def test_a_table_mixes_its_subsets_by_their_weights(hub):
    hub(a=[rows_of(10)], b=[rows_of(20)], c=[rows_of(8)])
    mixed = RowSubset(load_rows("made/up"), np.random.default_rng(0).permutation(38)[:30])  # without validation rows
    size = {name: len(indices) for name, indices in mixed.by_subset().items()}
    order = EpochIndices(mixed, {"a": 2, "b": 0.5}, seed=0)
    epochs = [[mixed[i]["id"] for i in order[epoch]] for epoch in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == len(order)
        visits = Counter(epoch)
        assert all(count == (2 if "/a#" in name else 1) for name, count in visits.items())
        by_subset = Counter(name.split("#")[0][-1] for name in visits)
        assert by_subset == {"a": size["a"], "b": round(size["b"] / 2), "c": size["c"]}
    of_b = [{name for name in epoch if "/b#" in name} for epoch in epochs]
    assert len(of_b[0] | of_b[1]) >= size["b"] - 1  # an epoch takes what the one before has left
    assert epochs[0] != epochs[1]
    plain = EpochIndices(mixed, {}, seed=0)[1]
    assert plain.tolist() == np.random.default_rng((0, 1)).permutation(30).tolist()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_weights_reach_the_batches_and_unknown_subsets_are_an_error(hub, streaming, packing):
    hub(a=[rows_of(6)], b=[rows_of(6)])
    cfg = tiny_train(mixture_weights={"b": 3}, batch_size=1, packing=packing)
    data = dataset(load_rows("made/up", streaming=streaming), SMALL, cfg)
    seen = names(islice(train_batches(data, TrainCollator(1, SMALL), cfg), 24))[:24]
    assert Counter(name.split("#")[0] for name in seen) == {"made/up/a": 6, "made/up/b": 18}  # of one epoch
    cfg.mixture_weights = {"nowhere": 1.0}
    with pytest.raises(ValueError, match=r"--mixture_weights nowhere: no such subset .* there are a, b"):
        next(train_batches(data, TrainCollator(1, SMALL), cfg))
    with pytest.raises(ValueError, match="there are no subsets"):
        EpochIndices([{}], {"a": 2.0}, 0)


# Resumed streams


@pytest.mark.parametrize("shares", [1, 3])
def test_an_epoch_continues_after_any_of_its_rows(hub, shares, monkeypatch):
    """Of several blocks, open shards and row groups; the place is plain numbers."""
    import datasets

    monkeypatch.setattr(streams, "BLOCK_ROWS", 7)
    monkeypatch.setattr(streams, "OPEN_SHARDS", 2)
    hub(row_group=4, a=[rows_of(21), rows_of(19)], b=[rows_of(14)], c=[rows_of(3)] * 4)
    train, _ = split_rows(load_rows("made/up", streaming=True), 13, seed=0)
    weights = {"a": 2, "b": 0.6}
    for share in range(shares):
        rows = train.epoch("0/3", weights, share, shares)
        whole = [(name, json.dumps(rows.place)) for (name,) in (ids([row]) for row in rows)]
        assert len(whole) > 14  # two blocks
        for done in (1, 2, 6, 7, 8, 13, 14, len(whole) - 1, len(whole)):
            rest = train.epoch("0/3", weights, share, shares, json.loads(whole[done - 1][1]))
            assert ids(rest) == [name for name, _ in whole[done:]]
    with monkeypatch.context() as older:  # of `datasets`, where a file is not divided into its row groups
        older.delattr(datasets.IterableDataset, "reshard")
        _, place = whole[8]
        assert ids(train.epoch("0/3", weights, share, shares, json.loads(place))) == [name for name, _ in whole[9:]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 2), (2, 1)])
def test_a_resumed_stream_is_the_same_and_reads_few_rows(hub, rows_read, monkeypatch, workers, ranks, packing):
    group, blocks = 5, 2
    monkeypatch.setattr(streams, "BLOCK_ROWS", 10)
    hub(row_group=group, a=[[cauldron_row(i) for i in range(80)]] * 4)
    vlm = tiny_vlm(resize_to_max_side_len=False, lm_max_length=64)
    cfg = tiny_train(batch_size=2, num_workers=workers, val_size=100, packing=packing, max_sample_length=64)
    monkeypatch.setattr("data.packing.WINDOW_ROWS", 4)

    def begin(rank: int, states: list[dict] | None = None):
        loaded = load_data(load_rows("made/up", streaming=True), vlm, cfg, None, rank, ranks)
        if states:
            loaded.load_rank_states(saved_and_loaded(states))
        rows_read()
        loaded.start_reading()
        return loaded

    runs = [begin(rank) for rank in range(ranks)]
    for loaded in runs:
        drawn(loaded, 100 // ranks)
    read, states = rows_read(), [loaded.state_dict() for loaded in runs]
    for rank, loaded in enumerate(runs):
        rest, dropped = drawn(loaded, 5), dict(loaded.dropped["train"])
        again = begin(rank, states)
        assert all(same(one, other) for one, other in zip(drawn(again, 5), rest, strict=True))
        assert again.dropped["train"] == dropped
        if workers == 0:
            assert read > 250
            # Two blocks, then five batches (of packing two windows); of each open shard a row group before and after.
            used = 5 * cfg.batch_size if not packing else 2 * 4 * 64 // 12
            assert 0 < rows_read() <= blocks * 10 + used + 2 * streams.OPEN_SHARDS * group
