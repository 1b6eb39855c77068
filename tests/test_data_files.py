"""Files of rows: lines, arrays, tables of text, packed files, folders, archives; and what is said of their bad rows."""

import functools
import gzip
import json
import pickle
import tarfile
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
import torch
from tiny.data import dataset, drawn, tiny_train, tiny_vlm
from tiny.lines import PNG, Q, bad, read_lines, turns

from data import json_places, text_files
from data.collators import TrainCollator
from data.drops import DropCounter
from data.loader import train_batches
from data.pipeline import load_data
from data.rows import load_rows, split_rows
from data.values import Reason

TURN_PAIR = ("what is the shape?", "red")


@pytest.fixture
def read(tmp_path):
    """read(record, ...) is what these lines of a file are as rows."""
    return functools.partial(read_lines, tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_lines_as_people_have_them(tmp_path, name):
    lines = [
        "\ufeff" + json.dumps(Q),
        "",
        "   ",
        json.dumps(Q | {"answer": "zwölf 😀"}, ensure_ascii=False),
        "\t" + json.dumps(Q),
    ]
    for end in ("\n", "\r\n"):
        (tmp_path / name).write_bytes(end.join([*lines, '{"question": "cut o']).encode())
        rows = load_rows(str(tmp_path / name))
        assert [turns(rows[i])[0][1] for i in range(3)] == ["red", "zwölf 😀", "red"]
        assert bad(rows[3])[1].startswith(f"{name}, line 6: ")
        assert len(rows) == 4


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_is_the_same_whatever_is_read_at_once(tmp_path, monkeypatch, chunk, indent):
    for module in (text_files, json_places):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    records = [Q | {"answer": answer} for answer in ("[{", "}]\\", 'ü"', "😀", ", ]", "x" * 300, "")]
    array = json.dumps(records, indent=indent, ensure_ascii=False)
    files = {
        "array.json": f"\n{array}\n", "cut.json": array[:-4], "lines.jsonl": "\n \n".join(map(json.dumps, records))
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows = load_rows(str(tmp_path / name))
        read = [(turns(rows[i])[0][1] or "") if rows[i]["texts"] else "" for i in range(len(rows))]
        assert read == [record["answer"].strip() for record in records[:-1]] + [""]
        assert ("bad" in rows[6]) == (name == "cut.json")


def test_an_array_of_other_things(tmp_path, read):
    (tmp_path / "rows.json").write_text("[]")
    assert len(load_rows(str(tmp_path / "rows.json"))) == 0
    path = tmp_path / "broken.json"
    path.write_text("[" + json.dumps(Q) + ", {]" + " " * 50)
    with pytest.raises(ValueError, match=r"broken.json: cannot be read: is not a JSON array at byte \d+"):
        load_rows(str(path))
    rows = read(json.dumps([Q, 12, "a", None, [Q]]), name="x.json")
    assert [str(row.get("bad")) for row in rows] == [
        "None", "row is a number", "row is a string", "row is null", "row is a list of objects"
    ]  # fmt: skip
    assert bad(rows[1])[1] == 'x.json, row 2: "12"'


@pytest.mark.parametrize(("name", "comma"), [("rows.csv", ","), ("rows.csv", ";"), ("rows.tsv", "\t")])
def test_tables_of_text(read, tmp_path, name, comma):
    lines = ["image,question,answer", 'a.png,"is it, or\nnot?",007', "", ',"say ""yes""",1.0', "a.png,what?",
             'a.png,"a"b,c', "a.png,5 inches\" big,ja", "a.png,open,", 'a.png,"open,x']  # fmt: skip
    rows = read(*[line.replace(",", comma) for line in lines], name=name)
    assert [turns(row)[0] if row["texts"] else str(row["bad"]) for row in rows] == [
        (f"is it{comma} or\nnot?", "007"), ('say "yes"', "1.0"), "another number of cells than of columns", "not CSV",
        ('5 inches" big', "ja"), ("open", None), "not CSV",
    ]  # fmt: skip
    assert [row["images"] for row in rows[:2]] == [[str(tmp_path / "a.png")], []]
    assert [bad(row)[1].split(":")[0] for row in rows if "bad" in row] == [f"{name}, line {n}" for n in (6, 7, 10)]


def test_one_object_over_several_lines_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [Q]}, indent=2))
    with pytest.raises(ValueError, match=r"--train_dataset_path .*rows.json: .* is one object over several lines"):
        load_rows(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text(json.dumps({"data": [Q]}))
    with pytest.raises(ValueError, match=r"rows.json: has the columns data; it needs images"):
        load_rows(str(tmp_path / "rows.json"))


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, text in {
        "a.jsonl": json.dumps(Q | {"image": "a.png"}) + "\n{",
        "a.csv": "question,answer\na,b\n",
    }.items():
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        for _ in range(2):
            rows = load_rows(str(path))
            assert rows[0]["id"] == f"{name}.gz#0"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{name}.gz: cannot be read: is not a whole gzip file"):
            load_rows(str(path))
        if name == "a.jsonl":
            assert rows[0]["images"] == [str(tmp_path / "a.png")]
            assert bad(rows[1])[1].startswith("a.jsonl.gz, line 2: ")
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 2


def test_what_lies_beside_rows_is_not_read(tmp_path):
    for name, text in {"a/rows.jsonl": json.dumps(Q), "a/results.csv": "x\n1\n", "images/all.tar": "",
                       "b/rows.csv": "question,answer\n?,yes\n"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    rows = load_rows(str(tmp_path))
    assert {name: len(found) for name, found in rows.by_subset().items()} == {"a": 1, "b": 1}
    (tmp_path / "b/rows.csv").write_text("question, answer,answer\n")
    with pytest.raises(ValueError, match=r"rows.csv: .* names a column twice: answer"):
        load_rows(str(tmp_path))


def test_a_folder_of_classes_and_one_with_metadata(tmp_path):
    for file in ("pets/train/cat/1.png", "pets/train/dog/2.JPG", "pets/test/cat/3.png", "pets/.cache/x/4.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(PNG)
    rows = load_rows(str(tmp_path / "pets"))
    assert [(row["images"], turns(row)) for row in map(rows.__getitem__, range(len(rows)))] == [
        ([str(tmp_path / "pets/train/cat/1.png")], [("", "cat")]),
        ([str(tmp_path / "pets/train/dog/2.JPG")], [("", "dog")]),
    ]
    assert len(load_rows(str(tmp_path / "pets"), split="test")) == 1
    (tmp_path / "pets/train/5.png").write_bytes(PNG)
    (tmp_path / "pets/5.png").write_bytes(PNG)
    with pytest.raises(ValueError, match=r"--train_dataset_path .*pets: holds images, .*metadata.jsonl"):
        load_rows(str(tmp_path / "pets"))
    for split, lines in (("train", 2), ("test", 1)):
        (tmp_path / f"pets/{split}/metadata.csv").write_text("file_name,text\n" + "cat/1.png,a red shape\n" * lines)
        rows = load_rows(str(tmp_path / "pets"), split=split)
        assert (len(rows), turns(rows[0])) == (lines, [("", "a red shape")])
    assert rows[0]["images"] == [str(tmp_path / "pets/test/cat/1.png")]


def test_samples_of_a_tar_file(tmp_path):
    members = {
        "d/1.jpg": PNG, "d/1.json": json.dumps(Q).encode(), "d/2.png": PNG, "d/2.txt": "é".encode(), "d/3.png": PNG,
        "d/3.cls": b"7", "d/4.0.png": PNG, "d/4.1.png": PNG, "d/4.json": json.dumps(Q | {"image": "x"}).encode(),
        "d/5.json": b"{", "d/6.txt": b"\xff", "d/7.npy": b"",
    }  # fmt: skip
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    rows = load_rows(str(tmp_path / "rows.tar"))
    rows = [rows[i] for i in range(len(rows))]
    assert [row["images"] for row in rows[:4]] == [[PNG]] * 3 + [[PNG, PNG]]
    assert [turns(row)[0] for row in rows[:4]] == [("what is the shape?", "red"), ("", "é"), ("", "7"), TURN_PAIR]
    assert [str(row["bad"]) for row in rows[4:]] == ["not JSON", "not UTF-8", "no known format"]
    assert bad(rows[4])[1].startswith("rows.tar, sample d/5: ")
    (tmp_path / "rows.tar").write_bytes((tmp_path / "rows.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"rows.tar: cannot be read: is not a whole tar file"):
        load_rows(str(tmp_path / "rows.tar"))


def test_the_index_of_a_file_takes_eight_bytes_per_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(Q) + "\n") * 1000)
    table = load_rows(str(path)).parts[0].table
    assert table.starts.nbytes == 8 * 1001
    assert table.starts.dtype == np.int64
    assert len(pickle.dumps(table)) < 9000


def test_nothing_usable_names_the_first_row_of_each_reason(read):
    rows = read(*[{"texts": ["what is the shape?", "red"]}] * 3)
    with pytest.raises(
        ValueError, match=r'3 texts is a list of strings.*\n.*rows.jsonl, line \d: \["what is the shape'
    ):
        next(train_batches(dataset(rows), TrainCollator(1, dataset(rows).vlm_cfg), tiny_train(batch_size=1)))


def test_a_reason_is_its_kind_and_keeps_the_first_row():
    counts = DropCounter()
    for found in ("a#1: x", "a#2: y"):
        counts.update({Reason("no such file", found): 1})
    sent = pickle.loads(pickle.dumps(counts))
    assert sent == {"no such file": 2}
    assert sent.examples() == {"no such file": "a#1: x"}
    assert all(type(name) is str for name in sent.plain())


def test_a_shuffled_file_with_bad_rows_resumes_and_reaches_workers(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    lines = [json.dumps(Q | {"image": "a.png"}) if i % 4 else "{" for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    train, val = split_rows(load_rows(str(tmp_path / "rows.jsonl")), 4, seed=0)
    assert (len(train), len(val)) == (12, 4)
    assert pickle.loads(pickle.dumps(train))[3] == train[3]

    def batches(count: int, start: int = 0, workers: int = 0) -> list:
        cfg = tiny_train(batch_size=2, num_workers=workers)
        data = dataset(train, train_cfg=cfg)
        found = islice(train_batches(data, TrainCollator(1, data.vlm_cfg), cfg, start), count)
        return [(batch["ids"], batch["dropped"], batch["position"]) for batch in found]

    whole = batches(9)
    assert whole == batches(9, workers=2)
    assert whole[4:] == batches(5, start=whole[3][2])
    assert sum(dropped.get("not JSON", 0) for _, dropped, _ in whole) >= 3


def test_the_first_row_of_each_reason_outlives_a_checkpoint(read, tmp_path):
    read(*[Q] * 6, "{", "{", Q)
    cfg = tiny_train(batch_size=3, val_size=0)

    def begin():
        return load_data(load_rows(str(tmp_path / "rows.jsonl")), tiny_vlm(), cfg, None)

    run, again = begin(), begin()
    run.start_reading()
    drawn(run, 3)
    file = BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    again.load_rank_states([torch.load(file, weights_only=True)])
    first = run.dropped["train"].examples()
    assert first["not JSON"].startswith(("rows.jsonl, line 7: ", "rows.jsonl, line 8: "))
    assert again.dropped["train"].examples() == first
    again.start_reading()
    drawn(again, 6)
    assert again.dropped["train"].examples() == first
    assert again.dropped["train"]["not JSON"] > run.dropped["train"]["not JSON"]
