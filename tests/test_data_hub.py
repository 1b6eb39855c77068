"""The hub's data sets, as local folders in the same format: subsets, mixtures, streams, dirty rows."""

from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
from tiny.data import dataset, encoded, picture, tiny_train, tiny_vlm

from data import sources
from data.collators import TrainCollator
from data.loader import train_batches
from data.pipeline import identify, load_data
from data.sources import EpochIndices, RowStream, RowSubset, load_rows, split_rows

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
            (images, [{"user": "what is <image> <|image|>?", "assistant": "red", "source": "made"}]),
            ([], texts),
            (images * 5, texts),
        ][i // 7 % 4]
    return {"images": images, "texts": texts}


def finevision_row(i: int) -> dict:
    turns = [{"user": "is there a red shape?", "assistant": "yes"}, {"user": "what?", "assistant": "red"}]
    ratings = {f"{kind}_ratings": [5, 4] for kind in sources.RATINGS}
    ratings["relevance_ratings"] = [5, 1 + i % 4]
    if i == 0:
        ratings["formatting_ratings"] = [None, None]
    lowest = {f"{name.removesuffix('s')}_min".replace("rating_min", "min"): 1 for name in ratings}
    return {"images": [image(i)] if i % 3 else [], "texts": turns, "source": "made"} | ratings | lowest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(subset=[rows of its first file, of its second, ...]) makes such a repository; its id is made/up."""
    folder = tmp_path / "repository"
    real = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "require_hub", lambda what, instead: None)
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

    def make(**subsets):
        for name, files in subsets.items():
            (folder / name).mkdir(parents=True)
            for number, rows in enumerate(files):
                made = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
                made.to_parquet(folder / name / f"train-{number:05d}-of-{len(files):05d}.parquet")
        return folder

    return make


def rows_of(count: int, start: int = 0) -> list[dict]:
    return [cauldron_row(i) for i in range(start, start + count)]


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch["ids"]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_cauldron_all_and_chosen_subsets(hub, streaming, packing):
    hub(ai2d=[rows_of(12), rows_of(9, 12)], vqav2=[rows_of(7, 21)])
    whole = load_rows("made/up", streaming=streaming)
    chosen = load_rows("made/up", names=["vqav2"], streaming=streaming)
    assert len(list(chosen) if streaming else chosen) == 7
    cfg = tiny_train(packing=packing, batch_size=1)
    data = dataset(whole, SMALL, cfg)
    seen, dropped = Counter(), Counter()
    for batch in train_batches(data, TrainCollator(1, SMALL), cfg):
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
        kept = [data.sample(row) for row in (rows if streaming else [rows[i] for i in range(16)])]
        spoken = sum((labels == data.tokenizer.eos_token_id).sum() for one in kept for _, labels in one.conversations)
        assert spoken == turns


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 8])
def test_readers_share_a_stream_without_loss_or_repetition(hub, shares):
    hub(a=[rows_of(5), rows_of(6), rows_of(2)], b=[rows_of(7)], c=[rows_of(4)])
    train, val = split_rows(load_rows("made/up", streaming=True), 7, seed=0)
    everything = [row["id"] for row in load_rows("made/up", streaming=True)]
    held_out = [row["id"] for row in val]
    assert held_out == everything[:7]
    for key in ("0/0", "0/1"):
        seen = [row["id"] for share in range(shares) for row in train.epoch(key, {}, share, shares)]
        assert sorted(seen) == sorted(everything[7:])
    orders = [[row["id"] for row in train.epoch(key, {})] for key in ("0/0", "0/0", "0/1")]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_readers_have_equal_shares_of_equal_shards(hub, shares):
    """Of 4 shards whole ones where they can be divided, of the rest each so many rows."""
    hub(a=[rows_of(6)] * 4, b=[rows_of(13)])
    stream = load_rows("made/up", streaming=True)
    found = [[row["id"].removeprefix("made/up/") for row in stream.epoch("0/0", {}, i, shares)] for i in range(shares)]
    of_a = [Counter(name[:4] for name in names if name[0] == "a") for names in found]
    assert all(sum(counts.values()) == 24 // shares for counts in of_a)
    whole = 4 // shares
    assert all(sorted(counts.values())[-whole:] == [6] * whole for counts in of_a)
    assert {sum(name[0] == "b" for name in names) for names in found} <= {13 // shares, -(-13 // shares)}
    halves = [
        [row["id"] for row in stream.epoch("0/0", {"b": 0.5}, i, shares) if "/b#" in row["id"]] for i in range(shares)
    ]
    assert max(map(len, halves)) - min(map(len, halves)) <= 1


def test_a_stream_mixes_its_subsets_by_their_weights(hub):
    hub(a=[rows_of(30), rows_of(30)], b=[rows_of(40)], c=[rows_of(10)])
    rows = load_rows("made/up", streaming=True)
    weights = {"a": 2, "b": 0.5, "c": 1.5}
    for shares in (1, 3):
        epochs = [
            Counter(row["id"] for share in range(shares) for row in rows.epoch(key, weights, share, shares))
            for key in ("0/0", "0/1")
        ]
        for visits in epochs:
            subsets = Counter()
            for name, count in visits.items():
                subsets[name.removeprefix("made/up/")[0]] += count
            assert all(visits[name] == 2 for name in visits if "/a" in name.removeprefix("made/up"))
            assert subsets["a"] == 120
            assert 10 < subsets["b"] < 30
            assert 10 <= subsets["c"] <= 20
        assert epochs[0] != epochs[1]


def test_a_table_mixes_its_subsets_by_their_weights(hub):
    hub(a=[rows_of(10)], b=[rows_of(20)], c=[rows_of(8)])
    rows = load_rows("made/up")
    mixed = RowSubset(rows, np.random.default_rng(0).permutation(38)[:30])  # as without the validation rows
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


def test_weights_reach_the_batches_and_unknown_subsets_are_an_error(hub):
    hub(a=[rows_of(6)], b=[rows_of(6)])
    for streaming in (False, True):
        for packing in (False, True):
            rows = load_rows("made/up", streaming=streaming)
            cfg = tiny_train(mixture_weights={"b": 3}, batch_size=1, packing=packing)
            data = dataset(rows, SMALL, cfg)
            seen = names(islice(train_batches(data, TrainCollator(1, SMALL), cfg), 24))[:24]
            assert Counter(name.split("#")[0] for name in seen) == {"made/up/a": 6, "made/up/b": 18}  # of one epoch
            cfg.mixture_weights = {"nowhere": 1.0}
            with pytest.raises(ValueError, match=r"--mixture_weights nowhere: no such subset .* there are a, b"):
                next(train_batches(data, TrainCollator(1, SMALL), cfg))
    with pytest.raises(ValueError, match="there are no subsets"):
        EpochIndices([{}], {"a": 2.0}, 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_subset_is_an_error_or_is_skipped_aloud(hub, streaming, capsys):
    folder = hub(a=[rows_of(6)], b=[rows_of(6)], c=[rows_of(6)])
    (folder / "b" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not so")
    datasets.Dataset.from_list([{"question": "what?"}]).to_parquet(folder / "c" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="--train_dataset_path made/up, subset b: "):
        load_rows("made/up", streaming=streaming)
    rows = load_rows("made/up", streaming=streaming, skip_bad_subsets=True)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said if "SKIPPED subset" in line] == ["SKIPPED subset b", "SKIPPED subset c"]
    assert "SKIPPED 2 of 3 subsets of --train_dataset_path made/up: b, c" in said
    assert isinstance(rows, RowStream) == streaming
    data = load_data(rows, SMALL, tiny_train(val_size=1), None)
    assert data.dropped["train"]["subset that cannot be loaded"] == 2
    with pytest.raises(ValueError, match="none of its 1 subsets can be loaded"):
        load_rows("made/up", names=["b"], streaming=streaming, skip_bad_subsets=True)
    with pytest.raises(ValueError, match=r"--train_dataset_name d: .* no such configuration"):
        load_rows("made/up", names=["a", "d"], streaming=streaming, skip_bad_subsets=True)


def test_local_folders_have_subsets_too(hub, capsys):
    folder = hub(a=[rows_of(3), rows_of(2)], b=[rows_of(4)])
    rows = load_rows(str(folder))
    assert {name: len(indices) for name, indices in rows.by_subset().items()} == {"a": 5, "b": 4}
    (folder / "b" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not so")
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(str(folder))
    assert len(load_rows(str(folder), skip_bad_subsets=True)) == 5
    assert "SKIPPED subset b" in capsys.readouterr().err
    saved = folder.parent / "saved"
    for name in ("x", "y"):
        datasets.Dataset.from_list(rows_of(3)).save_to_disk(saved / name)
    assert {name: len(i) for name, i in load_rows(str(saved)).by_subset().items()} == {"x": 3, "y": 3}
    with pytest.raises(ValueError, match="--train_dataset_name a"):
        load_rows(str(folder / "a" / "train-00000-of-00002.parquet"), names=["a"])


def test_rows_are_told_from_others(hub):
    def stream(*names):
        return identify(load_rows("made/up", names, streaming=True))

    hub(a=[rows_of(3), rows_of(3)], b=[rows_of(200)])
    whole, both = identify(load_rows("made/up")), stream("a", "b")
    assert whole == identify(load_rows("made/up"))
    assert (whole["size"], both["size"]) == ("206 rows", "3 shards of a stream")
    assert len({found["hash"] for found in (whole, both, stream("b"), identify(load_rows("made/up", ["b"])))}) == 4
    assert identify(load_rows("easy-vqa")) == identify(load_rows("easy-vqa"))
