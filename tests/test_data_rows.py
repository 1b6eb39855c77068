"""Rows of local files and folders and of easy-VQA; which are held out; what is refused."""

import json
import time
from pathlib import Path

import pytest
import yaml
from tiny.data import encoded, picture, row, tiny_train, turn

from data import easy_vqa
from data.formats import RATINGS, filter_turns
from data.pipeline import identify
from data.rows import load_rows, split_rows

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(count: int = 3, **columns):
    """A Dataset of rows with one image each, the last of which does not decode."""
    import datasets

    images = [encoded(picture(seed=i)) for i in range(count - 1)] + [b"no image"]
    rows = [
        {"images": [{"bytes": image, "path": None}], "texts": [{"user": f"question {i}", "assistant": f"answer {i}"}]}
        for i, image in enumerate(images)
    ]
    made = datasets.Dataset.from_list([one | columns for one in rows])
    return made.cast_column("images", datasets.List(datasets.Image()))


def sizes(rows) -> dict[str, int]:
    return {name: len(indices) for name, indices in rows.by_subset().items()}


def write_lines(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# easy-VQA


def test_easy_vqa_has_subsets_by_kind_of_question():
    rows = load_rows("easy-vqa", ["color", "yes_no_shape"], "test")
    assert {turn["source"] for row in rows for turn in row["texts"]} == {"color", "yes_no_shape"}
    assert all(row["texts"] for row in rows)


def test_easy_vqa_has_one_row_per_image_with_kinds_of_questions():
    rows = load_rows("easy-vqa", split="test")
    assert (len(rows), sum(len(one["texts"]) for one in rows), rows[17]["id"]) == (1000, 9673, "easy-vqa/test/17")
    answers, kinds = {}, {}
    for one in [*rows, *load_rows("easy-vqa")]:
        for t in one["texts"]:
            answers.setdefault(t["source"], set()).add(t["assistant"])
            kinds[t["user"]] = t["source"]
    colors = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
    assert answers == {
        "yes_no_shape": {"yes", "no"}, "yes_no_color": {"yes", "no"}, "shape": set(easy_vqa.SHAPES), "color": colors
    }  # fmt: skip
    assert kinds["what color is the circle?"] == "color"
    assert kinds["what is the red shape?"] == "shape"
    assert kinds["is there a red shape?"] == "yes_no_color"
    assert kinds["is no triangle present?"] == "yes_no_shape"


def test_what_must_be_beaten_without_the_image():
    train = [row(texts=[turn("what?", "red"), turn("what?", "red"), turn("what?", "blue"), turn("is it?", "yes")])]
    test = [row(texts=[turn("what?", "red"), turn("is it?", "no"), turn("never asked", "red"), turn("what?", "blue")])]
    assert easy_vqa.question_only(train, test) == 0.5
    assert easy_vqa.question_only([], test) is easy_vqa.question_only(train, []) is None


# Files and folders


def test_parquet_file_keeps_images_encoded_and_ratings(tmp_path):
    table(source="web", **{f"{kind}_ratings": [5] for kind in RATINGS}).to_parquet(tmp_path / "file.parquet")
    rows = load_rows(str(tmp_path / "file.parquet"))
    assert len(rows) == 3
    assert rows[2]["images"] == [{"bytes": b"no image", "path": None}]
    assert rows[1]["texts"] == [turn("question 1", "answer 1", "web")]
    assert (rows[1]["id"], rows[0]["relevance_ratings"]) == ("file.parquet#1", [5])
    with pytest.raises(IndexError):
        rows[3]


def test_json_files_have_paths_relative_to_them(tmp_path):
    rows = load_rows(
        str(
            write_lines(
                tmp_path / "rows.jsonl",
                {"images": ["pictures/a.png"], "texts": [{"user": "how many?", "assistant": 3}]},
                {"images": [], "texts": [{"user": "what?", "assistant": "no image"}]},
                {"images": None, "texts": None},
            )
        )
    )
    assert rows[0]["images"] == [str(tmp_path / "pictures" / "a.png")]
    assert rows[0]["texts"] == [turn("how many?", "3")]
    assert (rows[2]["images"], rows[2]["texts"]) == ([], [])
    one_image = [{"image": "a.png", "texts": [{"user": "u", "assistant": "a"}]}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(one_image))
    assert [one["images"] for one in load_rows(str(tmp_path / "rows.json"))] == [[str(tmp_path / "a.png")]] * 2


def test_folder_of_files_by_split_and_subfolder(tmp_path):
    for name in ("cats/train-0", "cats/train-1", "cats/test", "dogs/train", "mice/no-split"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table(2, source=name).to_parquet(tmp_path / f"{name}.parquet")
    rows = load_rows(str(tmp_path))
    files = ("cats/train-0", "cats/train-1", "dogs/train", "mice/no-split")  # others beside splits are for training
    assert [one["id"] for one in rows] == [f"{tmp_path.name}/{name}.parquet#{i}" for name in files for i in (0, 1)]
    assert rows[5]["texts"][0]["source"] == "dogs/train"
    assert len(load_rows(str(tmp_path), names=["dogs"])) == 2
    assert sizes(load_rows(str(tmp_path), split="test")) == {"cats": 2}
    with pytest.raises(ValueError, match="no split validation; there are test, train"):
        load_rows(str(tmp_path), split="validation")
    with pytest.raises(ValueError, match=r"--train_dataset_name birds.*there are all, cats, dogs"):
        load_rows(str(tmp_path), names=["birds"])


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("rows_train.jsonl", "rows-valid.jsonl", "rows.test.jsonl"),
        ("my_train/a.jsonl", "my_dev/a.jsonl", "2024 Test set/a.jsonl"),
        ("training01.jsonl", "validation01.jsonl", "evaluation01.jsonl"),
        ("eval/a_train.jsonl", "eval/a_val.jsonl", "eval/a_testing.jsonl"),  # the file's name before its folder's
        ("test/train/a.jsonl", "test/val/a.jsonl", "train/eval/a.jsonl"),
        ("trainable/contest/a.jsonl", "val_train_split/a_val.jsonl", "trainable/a_test-dev2015.jsonl"),
    ],
)
def test_splits_are_named_as_in_hugging_face_datasets(tmp_path, train, validation, test):
    files = {"train": train, "validation": validation, "test": test}
    for split, name in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / name, {"images": [], "texts": [turn(split)]})
    for split in files:
        [found] = load_rows(str(tmp_path), split=split)
        assert found["texts"][0]["user"] == split


def test_a_name_with_two_splits_is_an_error(tmp_path):
    for name in ("train.jsonl", "test_of_train.jsonl"):
        write_lines(tmp_path / name, {"images": [], "texts": [turn()]})
    with pytest.raises(ValueError, match=r"test_of_train.jsonl must hold one split, not test and train"):
        load_rows(str(tmp_path))


def test_subfolders_that_are_saved_data_sets_name_splits(tmp_path):
    table(3).save_to_disk(tmp_path / "my_train")
    table(2).save_to_disk(tmp_path / "my_test")
    assert sizes(load_rows(str(tmp_path))) == {"my_train": 3}
    assert sizes(load_rows(str(tmp_path), split="test")) == {"my_test": 2}


def test_subfolders_of_every_format_are_subsets(tmp_path, capsys):
    import datasets

    table(3).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table(2), test=table(6)).save_to_disk(tmp_path / "splits")
    write_lines(tmp_path / "jsonl" / "x.jsonl", *[{"images": [], "texts": [turn()]}] * 7)
    for ignored in ("jsonl/dataset_infos.json", ".cache/x.json", "pictures/a.txt"):
        write_lines(tmp_path / ignored, {})
    table(4).to_parquet(tmp_path / "more.parquet")
    (tmp_path / "none" / "deeper").mkdir(parents=True)
    table(5).to_parquet(tmp_path / "none" / "deeper" / "x.parquet")
    assert sizes(load_rows(str(tmp_path))) == {"": 4, "jsonl": 7, "none": 5, "saved": 3, "splits": 2}
    assert len(load_rows(str(tmp_path / "splits"), split="test")) == 6
    with pytest.raises(ValueError, match="no split validation; there are train, test"):
        load_rows(str(tmp_path / "splits"), split="validation")

    (tmp_path / "saved" / "state.json").unlink()  # as of a save that was interrupted
    for names in (["all"], ["saved"]):
        with pytest.raises(ValueError, match=r"--train_dataset_path .*saved: holds .arrow files, but not .*state.json"):
            load_rows(str(tmp_path), names=names)
    (tmp_path / "jsonl" / "y.parquet").touch()
    with pytest.raises(ValueError, match=r"jsonl: holds .jsonl and .parquet files"):
        load_rows(str(tmp_path))
    rows = load_rows(str(tmp_path), skip_bad_subsets=True)
    assert (len(rows), rows.bad_subsets) == (11, ["jsonl", "saved"])
    assert "SKIPPED 2 of 5 subsets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.xlsx", "a,b\n", "must be one of .parquet"),
        ("rows.jsonl", '{"images": [], "tex', "rows.jsonl: cannot be read"),
        ("rows.jsonl", '{"img": "a.png", "question": "what?"}\n', "has the columns img, question; it needs images"),
        ("rows.jsonl/x", "", "holds no .parquet, .jsonl, .json, .csv, .tsv, .tar file"),
        (None, "", "no such file or folder"),
    ],
)
def test_errors_of_local_paths_name_the_flag(tmp_path, name, content, said):
    path = tmp_path / "rows.jsonl" if name is None else (tmp_path / name)
    if name is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path = tmp_path / name.split("/")[0]
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_rows(str(path), flag="test_dataset_path")
    assert path.name in str(error.value)


def test_unknown_parts_of_easy_vqa_and_an_unreachable_hub_are_one_sentence(monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(ValueError, match="--test_dataset_path easy-vqa: no split val; there are train and test"):
        load_rows("easy-vqa", split="val", flag="test_dataset_path")
    with pytest.raises(ValueError, match="--train_dataset_name cats"):
        load_rows("easy-vqa", names=["cats"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waits: list[float] = []  # not the time it takes: a package that is imported here takes long on a busy machine
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ConnectionError, match=r"--train_dataset_path some/rows: .*local folder or easy-vqa"):
        load_rows("some/rows")
    assert sum(waits) < 5


# Rows for validation


def test_split_rows_is_a_seeded_partition():
    rows = [row(name=str(i)) for i in range(20)]
    (train, val), (again, _), (other, _) = (split_rows(rows, 5, seed=seed) for seed in (3, 3, 4))
    names = [[part[i]["id"] for i in range(len(part))] for part in (train, val, again, other)]
    assert [len(part) for part in names] == [15, 5, 15, 15]
    assert sorted(names[0] + names[1], key=int) == [str(i) for i in range(20)]
    assert names[2] == names[0] != names[3]


@pytest.mark.parametrize(
    ("rows", "val_size", "held_out"),
    [(40, 0.05, 2), (4000, 0.05, 200), (40, 0.0005, 1), (40, 0.999, 39), (2, 0.5, 1), (3, 0, 0), (3, 2.0, 2)],
)
def test_a_share_of_the_rows_leaves_some_on_both_sides(rows, val_size, held_out):
    train, val = split_rows([row()] * rows, val_size, seed=0)
    assert (len(train), len(val)) == (rows - held_out, held_out)


@pytest.mark.parametrize(("rows", "val_size"), [(20, 20), (1, 0.5), (0, 0.5)])
def test_rows_must_remain_for_training(rows, val_size):
    with pytest.raises(ValueError, match=f"--val_size {val_size}: must be .*{rows} rows"):
        split_rows([row()] * rows, val_size, seed=0)


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_takes_forty_rows_of_ones_own(recipe):
    train, val = split_rows([row()] * 40, yaml.safe_load(recipe.read_text())["val_size"], seed=0)
    assert len(val) >= 1
    assert len(train) >= 30


def test_filter_turns_drops_low_ratings_and_keeps_unknown_ones():
    turns = [turn(str(i)) for i in range(5)]
    rated = row(
        texts=turns, relevance_ratings=[5, 1, None, 2, 5], formatting_ratings=[1, 5, 5], visual_dependency_ratings=None
    )
    config = tiny_train(relevance_min_rating=2, formatting_min_rating=2)
    assert [t["user"] for t in filter_turns(rated, config)["texts"]] == ["2", "3", "4"]
    assert filter_turns(rated, tiny_train()) is rated
    assert filter_turns(row(texts=turns), config)["texts"] == turns


def test_rows_of_choices_are_known_as_before_their_letters_were_kept(tmp_path):
    """Else a resume would take the same rows for other ones."""
    row = {"question": "which?", "choices": ["red", "blue"], "answer": "blue", "id": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    assert rows[0]["texts"][0]["letters"] == ["A", "B"]
    assert identify(rows)["hash"] == "a637495c0293e60b11132659de7413b409f4f80efa0f66f86745d208500aca8e"
