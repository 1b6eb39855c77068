import json
import subprocess
import sys
import time

import datasets
import pytest
from tiny.data import encoded, picture, row, tiny_train, turn

from data import sources
from data.sources import RowStream, filter_turns, load_rows, split_rows

RATED = {f"{kind}_ratings": [5] for kind in sources.RATINGS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(count: int = 3, **columns) -> datasets.Dataset:
    """Rows with one image each, the last of which does not decode."""
    images = [encoded(picture(seed=i)) for i in range(count - 1)] + [b"no image"]
    rows = [
        {"images": [{"bytes": image, "path": None}], "texts": [{"user": f"question {i}", "assistant": f"answer {i}"}]}
        for i, image in enumerate(images)
    ]
    made = datasets.Dataset.from_list([one | columns for one in rows])
    return made.cast_column("images", datasets.List(datasets.Image()))


def questions(rows) -> list[str]:
    return [one["texts"][0]["user"] for one in rows]


def test_easy_vqa_has_one_row_an_image_with_kinds_of_answers():
    rows = load_rows("easy-vqa", split="test")
    assert len(rows) == 1000
    assert sum(len(one["texts"]) for one in rows) == 9673
    assert rows[17]["id"] == "easy-vqa/test/17"
    answers = {}
    for one in rows:
        for t in one["texts"]:
            answers.setdefault(t["source"], set()).add(t["assistant"])
    assert answers["yes_no_shape"] == answers["yes_no_color"] == {"yes", "no"}
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert answers["color"] == {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def test_easy_vqa_kinds_follow_what_is_asked_for():
    kinds = {t["user"]: t["source"] for one in load_rows("easy-vqa") for t in one["texts"]}
    assert kinds["what color is the circle?"] == "color"
    assert kinds["what is the red shape?"] == "shape"
    assert kinds["is there a red shape?"] == "yes_no_color"
    assert kinds["is no triangle present?"] == "yes_no_shape"


def test_easy_vqa_does_not_import_datasets():
    code = (
        "import sys; from data.sources import load_rows, split_rows; split_rows(load_rows('easy-vqa'), 10, 0); "
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_file_keeps_images_encoded_and_ratings(tmp_path):
    table(source="web", **RATED).to_parquet(tmp_path / "file.parquet")
    rows = load_rows(str(tmp_path / "file.parquet"))
    assert len(rows) == 3
    assert rows[2]["images"] == [{"bytes": b"no image", "path": None}]
    assert rows[1]["texts"] == [turn("question 1", "answer 1", "web")]
    assert rows[1]["id"] == "file.parquet#1"
    assert rows[0]["relevance_ratings"] == [5]
    with pytest.raises(IndexError):
        rows[3]


def test_jsonl_image_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "a.png")
    lines = [
        {"images": ["pictures/a.png"], "texts": [{"user": "how many?", "assistant": 3}]},
        {"images": [], "texts": [{"user": "what?", "assistant": "no image"}]},
        {"images": None, "texts": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    assert rows[0]["images"] == [str(tmp_path / "pictures" / "a.png")]
    assert rows[0]["texts"] == [turn("how many?", "3")]
    assert (rows[2]["images"], rows[2]["texts"]) == ([], [])


def test_json_list_with_one_image_a_row(tmp_path):
    (tmp_path / "rows.json").write_text(
        json.dumps([{"image": "a.png", "texts": [{"user": "u", "assistant": "a"}]}] * 2)
    )
    rows = load_rows(str(tmp_path / "rows.json"))
    assert [one["images"] for one in rows] == [[str(tmp_path / "a.png")]] * 2


def test_folder_of_files_by_split_and_subfolder(tmp_path):
    for name in ("cats/train-0", "cats/train-1", "cats/test", "dogs/train"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        table(2, source=name).to_parquet(path)
    rows = load_rows(str(tmp_path))
    assert [rows[i]["id"] for i in range(6)] == [
        f"{tmp_path.name}/{name}.parquet#{i}" for name in ("cats/train-0", "cats/train-1", "dogs/train") for i in (0, 1)
    ]
    assert rows[5]["texts"][0]["source"] == "dogs/train"
    assert len(load_rows(str(tmp_path), names=["dogs"])) == 2
    assert len(load_rows(str(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match="no split validation; there are test, train"):
        load_rows(str(tmp_path), split="validation")
    with pytest.raises(ValueError, match=r"--train_dataset_name birds.*there are all, cats, dogs"):
        load_rows(str(tmp_path), names=["birds"])


def test_save_to_disk_folders(tmp_path):
    table().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table(2), test=table(4)).save_to_disk(tmp_path / "splits")
    assert questions(load_rows(str(tmp_path / "one"))) == ["question 0", "question 1", "question 2"]
    assert len(load_rows(str(tmp_path / "splits"), split="test")) == 4
    with pytest.raises(ValueError, match="no split validation; there are train, test"):
        load_rows(str(tmp_path / "splits"), split="validation")


def test_subfolders_of_every_format_are_subsets(tmp_path, capsys):
    lines = [json.dumps({"images": [], "texts": [turn()]})] * 7
    for name in ("jsonl", "none/deeper", ".cache", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    table(3).save_to_disk(tmp_path / "saved")
    (tmp_path / "jsonl" / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "jsonl" / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache" / "x.json").write_text("{}")
    picture().save(tmp_path / "pictures" / "a.png")
    table(4).to_parquet(tmp_path / "more.parquet")
    table(5).to_parquet(tmp_path / "none" / "deeper" / "x.parquet")
    sizes = {name: len(indices) for name, indices in load_rows(str(tmp_path)).by_subset().items()}
    assert sizes == {"": 4, "jsonl": 7, "none": 5, "saved": 3}

    (tmp_path / "saved" / "state.json").unlink()  # as of a save that was interrupted
    with pytest.raises(ValueError, match=r"--train_dataset_path .*saved: holds .arrow files, but not the state.json"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match=r"saved: holds .arrow files, but not the state.json"):
        load_rows(str(tmp_path), names=["saved"])
    (tmp_path / "jsonl" / "y.parquet").touch()
    with pytest.raises(ValueError, match=r"jsonl: holds .jsonl and .parquet files; those of a subset must be of one"):
        load_rows(str(tmp_path))
    rows = load_rows(str(tmp_path), skip_bad_subsets=True)
    assert (len(rows), rows.bad_subsets) == (9, ["jsonl", "saved"])
    assert "SKIPPED 2 of 4 subsets" in capsys.readouterr().err


def test_files_that_name_no_split_are_of_train_where_others_name_one(tmp_path):
    for name in ("a/train-0", "a/test-0", "b/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table(2).to_parquet(tmp_path / f"{name}.parquet")
    assert set(load_rows(str(tmp_path)).by_subset()) == {"a", "b"}
    assert set(load_rows(str(tmp_path), split="test").by_subset()) == {"a"}


def test_errors_of_local_paths_name_the_flag(tmp_path):
    with pytest.raises(FileNotFoundError, match="--test_dataset_path /nowhere/rows: no such file or folder"):
        load_rows("/nowhere/rows", flag="test_dataset_path")
    with pytest.raises(FileNotFoundError, match=r"holds no .parquet, .jsonl, .json file"):
        load_rows(str(tmp_path))
    with pytest.raises(ValueError, match="no split val; there are train and test"):
        load_rows("easy-vqa", split="val")
    with pytest.raises(ValueError, match="--train_dataset_name cats"):
        load_rows("easy-vqa", names=["cats"])
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"rows.csv: must be one of .parquet"):
        load_rows(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.jsonl").write_text('{"images": [], "tex')
    with pytest.raises(ValueError, match=r"rows.jsonl: cannot be read"):
        load_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"img": "a.png", "question": "what?"}\n')
    with pytest.raises(ValueError, match="has the columns img, question; it needs images"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_unreachable_hub_is_one_sentence_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"--train_dataset_path some/rows: .*local folder or easy-vqa"):
        load_rows("some/rows")
    assert time.monotonic() - start < 5


@pytest.fixture
def hub(monkeypatch):
    """A hub with the data set some/rows of configurations a (3 rows) and b (2 rows)."""
    sizes = {"a": 3, "b": 2}

    def load(path, name, split, streaming):
        if split != "train":
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        return table(sizes[name]).to_iterable_dataset() if streaming else table(sizes[name])

    monkeypatch.setattr(sources, "require_hub", lambda what, instead: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: list(sizes))
    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub")
def test_hub_configurations_one_after_the_other():
    rows = load_rows("some/rows")
    assert [rows[i]["id"] for i in (0, 2, 3, 4)] == ["some/rows/a#0", "some/rows/a#2", "some/rows/b#0", "some/rows/b#1"]
    assert len(load_rows("some/rows", names=["b"])) == 2
    with pytest.raises(ValueError, match=r"--train_dataset_name c: .* there are all, a, b"):
        load_rows("some/rows", names=["a", "c"])
    with pytest.raises(ValueError, match="--train_dataset_path some/rows, subset a: Unknown split"):
        load_rows("some/rows", split="val")


@pytest.mark.usefixtures("hub")
def test_stream_keeps_images_encoded_and_splits_by_take_and_skip():
    rows = load_rows("some/rows", streaming=True)
    assert isinstance(rows, RowStream)
    assert list(rows)[2]["images"] == [{"bytes": b"no image", "path": None}]
    train, val = split_rows(rows, 2, seed=0)
    names = [one["id"] for one in rows]
    assert [one["id"] for one in val] == names[:2]
    assert [one["id"] for one in train] == names[2:]
    assert [one["id"] for one in train] == names[2:]  # a stream can be read again
    assert [one["id"] for one in train.skip(1).take(1)] == names[3:4]


def test_split_rows_is_a_seeded_partition():
    rows = [row(name=str(i)) for i in range(20)]
    train, val = split_rows(rows, 5, seed=3)
    names = [[part[i]["id"] for i in range(len(part))] for part in (train, val)]
    assert [len(part) for part in names] == [15, 5]
    assert sorted(names[0] + names[1], key=int) == [str(i) for i in range(20)]
    again, _ = split_rows(rows, 5, seed=3)
    other, _ = split_rows(rows, 5, seed=4)
    assert [again[i]["id"] for i in range(15)] == names[0]
    assert [other[i]["id"] for i in range(15)] != names[0]
    with pytest.raises(ValueError, match="--val_size 20: must be less than the 20 rows"):
        split_rows(rows, 20, seed=0)


def test_filter_turns_drops_low_ratings_and_keeps_unknown_ones():
    turns = [turn(str(i)) for i in range(5)]
    rated = row(
        texts=turns, relevance_ratings=[5, 1, None, 2, 5], formatting_ratings=[1, 5, 5], visual_dependency_ratings=None
    )
    config = tiny_train(relevance_min_rating=2, formatting_min_rating=2)
    assert [t["user"] for t in filter_turns(rated, config)["texts"]] == ["2", "3", "4"]
    assert filter_turns(rated, tiny_train()) is rated
    assert filter_turns(row(texts=turns), config)["texts"] == turns
