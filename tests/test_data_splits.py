"""How validation rows are held out: by row, by image, or from a data set of their own."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny.data import encoded, picture, row, stream, tiny_train, tiny_vlm, turn

from data import splits
from data.options import RowOptions
from data.pipeline import load_data
from data.rows import load_rows, split_rows
from data.splits import image_groups, split_by


def write_lines(path: Path, records: list) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records), encoding="utf-8")
    return path


def asked(image, number: int = 0) -> dict:
    return {"image": image, "question": "what is" + " the" * number + " color?", "answer": "red"}


def images_of(rows) -> set[str]:
    return {str(one) for i in range(len(rows)) for one in rows[i]["images"]}


def test_all_rows_of_an_image_are_on_one_side(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [asked(f"{i % 20}.png", i) for i in range(100)])
    rows = load_rows(str(path))
    train, val, how = split_by(rows, "auto", 0.2, seed=3)
    assert "by image" in how
    assert (len(train), len(val)) == (80, 20)
    assert not images_of(train) & images_of(val)
    again = split_by(rows, "image", 20, seed=3)[1]
    assert again.indices.tolist() == val.indices.tolist()
    assert split_by(rows, "auto", 0.2, seed=4)[1].indices.tolist() != val.indices.tolist()
    by_row = split_by(rows, "row", 0.2, seed=3)
    assert [part.indices.tolist() for part in by_row[:2]] == [
        part.indices.tolist() for part in split_rows(rows, 0.2, 3)
    ]
    assert images_of(by_row[0]) & images_of(by_row[1])


@pytest.mark.parametrize("by", ["auto", "image"])
def test_rows_that_share_no_image_are_split_as_ever(by):
    rows = load_rows("easy-vqa")[:50]
    train, val, how = split_by(rows, by, 0.1, seed=0)
    assert "no image is in two rows" in how
    for ours, theirs in zip((train, val), split_rows(rows, 0.1, 0), strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()


def containers(folder: Path) -> dict[str, Path]:
    """Ten images with three questions each, in every kind of file that has them."""
    pictures = [encoded(picture(seed=i)) for i in range(10)]
    for i, data in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(data)
    records = [asked(f"{i % 10}.png", i) for i in range(30)]
    found = {"jsonl": write_lines(folder / "a.jsonl", [*records[:-1], '{"image": broken', records[-1]])}
    found["json"] = folder / "b.json"
    found["json"].write_text(json.dumps(records))
    found["csv"] = write_lines(folder / "c.csv", ["image,question,answer", *[",".join(r.values()) for r in records]])
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    spoken = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    found["messages"] = write_lines(
        folder / "d.jsonl",
        [
            {"messages": [{"role": "user", "content": [{"type": "image", "image": r["image"]}, parts[1]]}, spoken[1]]}
            for r in records
        ],
    )
    embedded = [asked({"bytes": pictures[i % 10], "path": None}, i) for i in range(30)]
    table = datasets.Dataset.from_list(embedded)
    table.to_parquet(folder / "e.parquet")
    found["parquet"] = folder / "e.parquet"
    table.save_to_disk(folder / "saved")
    found["save_to_disk"] = folder / "saved"
    lists = [{"images": [f"{i % 10}.png"], "texts": [turn()]} for i in range(30)]
    datasets.Dataset.from_list(lists).to_parquet(folder / "f.parquet")
    found["parquet of paths"] = folder / "f.parquet"
    return found


def test_images_are_told_apart_in_every_container(tmp_path):
    for kind, path in containers(tmp_path).items():
        groups, why = image_groups(load_rows(str(path)), probe=True)
        assert groups is not None, (kind, why)
        places = [i for i in range(len(groups)) if kind != "jsonl" or i != 29]
        number = [groups[i] for i in places]
        assert len(set(number)) == 10, kind
        assert number == [number[i % 10] for i in range(30)], kind
    assert len(groups) == 30


def test_rows_that_are_tied_by_other_rows_stay_together():
    chain = [row([f"{i}.png", f"{i + 1}.png"]) for i in range(0, 50)]
    groups, _ = image_groups([*chain, row(["x.png"]), row([]), row([]), row(["x.png"])], probe=False)
    assert set(groups[:50].tolist()) == {0}
    assert groups[50:].tolist() == [1, 2, 3, 1]


def test_a_large_data_set_is_probed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "PROBED_ROWS", 20)
    own = load_rows(str(write_lines(tmp_path / "own.jsonl", [asked(f"{i}.png") for i in range(200)])))
    shared = load_rows(str(write_lines(tmp_path / "shared.jsonl", [asked(f"{i // 2}.png") for i in range(200)])))
    assert "by image, 100" in split_by(shared, "auto", 0.1, 0)[2]
    monkeypatch.setattr(splits, "_all_keys", lambda rows: pytest.fail("all rows were read"))
    train, val, how = split_by(own, "auto", 0.1, 0)
    assert how.startswith("by row: no image is in two of")
    assert val.indices.tolist() == split_rows(own, 0.1, 0)[1].indices.tolist()
    assert len(train) == 180


def test_what_cannot_be_split_by_image_says_so(monkeypatch):
    one = [row(["a.png"], name=str(i)) for i in range(10)]
    with pytest.raises(ValueError, match="--split_by image: must be row"):
        split_by(one, "image", 2, 0)
    train, val, how = split_by(one, "auto", 2, 0)
    assert (len(train), len(val)) == (8, 2)
    assert how.startswith("by row: ")
    with pytest.raises(ValueError, match="--split_by image: must be row for a stream"):
        split_by(stream(10), "image", 2, 0)
    assert split_by(stream(10), "auto", 2, 0)[2] == "the first rows of the stream"


def test_images_in_a_large_table_are_not_read(tmp_path, monkeypatch):
    rows = load_rows(str(containers(tmp_path)["parquet"]))
    monkeypatch.setattr(splits, "EMBEDDED_BYTES", 100)
    assert "by row: the images are in the table itself" in split_by(rows, "auto", 0.2, 0)[2]
    with pytest.raises(ValueError, match="--split_by image: must be row"):
        split_by(rows, "image", 0.2, 0)


def test_validation_rows_of_their_own(tmp_path):
    (tmp_path / "rows").mkdir()
    train = write_lines(tmp_path / "rows" / "train.jsonl", [asked("a.png", i) for i in range(9)])
    val = write_lines(tmp_path / "rows" / "validation.jsonl", [asked("b.png", i) for i in range(4)])
    cfg = tiny_train(train_dataset_path=str(train), val_dataset_path=str(val))
    for path in (str(val), str(tmp_path / "rows")):  # a file, or the split of a folder
        data = load_data(load_rows(str(train)), tiny_vlm(), tiny_train(val_dataset_path=path), None)
        assert (len(data.train_rows), len(data.val_rows)) == (9, 4)
        assert path in data.split
    assert not [one for one in cfg.problems() if "val_size" in one]
    with pytest.raises(FileNotFoundError, match="--val_dataset_path"):
        load_data(load_rows(str(train)), tiny_vlm(), tiny_train(val_dataset_path=str(tmp_path / "no.jsonl")), None)


def test_numbers_of_groups_are_those_of_their_first_rows():
    groups = splits._connected(np.array([0, 1, 2, 4]), np.array([7, 9, 7, 9]), 5)
    assert groups.tolist() == [0, 1, 0, 2, 1]


WEB = "https://example.org/%d.png"


def web_files(folder: Path) -> dict[str, Path]:
    """Ten images on the web with three questions each, in the ways that rows name them."""
    found = {"image": write_lines(folder / "a.jsonl", [asked(WEB % (i % 10), i) for i in range(30)])}
    found["object"] = write_lines(folder / "b.jsonl", [asked({"url": WEB % (i % 10)}, i) for i in range(30)])
    text, spoken = {"type": "text", "text": "what?"}, {"role": "assistant", "content": "red"}
    parts = [[{"type": "image_url", "image_url": {"url": WEB % (i % 10)}}, text] for i in range(30)]
    records = [{"messages": [{"role": "user", "content": one}, spoken]} for one in parts]
    found["messages"] = write_lines(folder / "c.jsonl", records)
    datasets.Dataset.from_list([asked(WEB % (i % 10), i) for i in range(30)]).to_parquet(folder / "d.parquet")
    found["parquet"] = folder / "d.parquet"
    return found


def test_images_on_the_web_are_told_apart_by_their_urls(tmp_path, monkeypatch):
    for kind, path in web_files(tmp_path).items():
        rows = load_rows(str(path), options=RowOptions(fetch_images=True))
        groups, why = image_groups(rows, probe=False)
        assert groups is not None, (kind, why)
        assert groups.tolist() == [i % 10 for i in range(30)], kind
        assert splits.keys_of(rows[3]["images"], tmp_path) == splits.keys_of([WEB % 3], tmp_path), kind
        train, val, _ = split_by(rows, "auto", 0.2, 0)
        assert (len(train), len(val)) == (24, 6)
        assert not images_of(train) & images_of(val)
        monkeypatch.setattr(splits, "PROBED_ROWS", 5)  # of a large data set some rows are looked at first
        assert "by image" in split_by(rows, "auto", 0.2, 0)[2], kind
        monkeypatch.undo()
