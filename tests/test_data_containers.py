"""The same rows from every container: what they are as samples, in which order, resumed, and of two ranks."""

import gzip
import json
import re
import sys
import tarfile
from io import BytesIO
from itertools import islice

import pytest
from tiny.data import dataset, encoded, picture, tiny_train

from data.collators import TrainCollator
from data.drops import UNKNOWN_WORD
from data.formats import Part
from data.loader import train_batches
from data.options import RowOptions
from data.rows import load_rows
from data.streams import RowStream

PNG = [encoded(picture(seed=i)) for i in range(3)]
WHAT = "what is the shape?"


def turn(assistant="red", **more) -> dict:
    return {"user": WHAT, "assistant": assistant} | more


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages(*contents, system: str | None = None) -> list[dict]:
    spoken = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


RED = [(WHAT, "red")]
# name: (records, of each the images, the turns and the system text, or the reason why it is bad)
KINDS = {
    "dates": ([{"image": "0.png", "texts": [turn("2023-07-05")]}], [(1, [(WHAT, "2023-07-05")], None)]),
    "a number or a word": (
        [{"images": ["0.png"], "texts": [turn(answer)]} for answer in ("two", "a few", 2)],
        [(1, [(WHAT, answer)], None) for answer in ("two", "a few", "2")],
    ),
    "an extra key": (
        [{"images": ["0.png"], "texts": [turn()]}, {"images": ["1.png"], "texts": [turn(score=1)]}],
        [(1, RED, None)] * 2,
    ),
    "null": ([{"image": one, "texts": [turn()]} for one in ("0.png", None)], [(1, RED, None), (0, RED, None)]),
    "one string": ([{"images": "0.png", "texts": [turn()]}], [(1, RED, None)]),
    "a list": ([{"image": ["0.png"], "texts": [turn()]}], [(1, RED, None)]),
    "text first": (
        [{"texts": [turn()]}, {"images": ["0.png"], "texts": [turn()]}],
        [(0, RED, None), (1, RED, None)],
    ),
    "texts are strings": ([{"images": ["0.png"], "texts": [WHAT, "red"]}], ["texts is a list of strings"]),
    "one turn": ([{"images": ["0.png"], "texts": turn()}], [(1, RED, None)]),
    "a missing file and a URL": (
        [{"images": [name], "texts": [turn()]} for name in ("0.png", "none.png", "https://example.org/a.png")],
        [(1, RED, None), "no such file", "image is a URL, which --fetch_images fetches"],
    ),
    "LLaVA": (
        [{"image": "0.png", "conversations": said(f"<image>\n{WHAT}", "red", "is it?", "yes")}],
        [(1, [*RED, ("is it?", "yes")], None)],
    ),
    "messages": (
        [{"images": ["0.png"], "messages": messages(f"<image>{WHAT}", "red", system="the shape")}],
        [(1, RED, "the shape")],
    ),
    "question": ([{"image": "0.png", "question": WHAT, "answer": "red"}], [(1, RED, None)]),
    "answers": ([{"image": "0.png", "question": WHAT, "answers": ["red", "red", "blue"]}], [(1, RED, None)]),
    "captions": ([{"file_name": "0.png", "text": "a red shape"}], [(1, [("", "a red shape")], None)]),
    "not UTF-8": (
        [{"image": "0.png", "question": WHAT, "answer": answer} for answer in ("red", "r\udce9d", "red")],
        [(1, RED, None), "not UTF-8", (1, RED, None)],
    ),
}
# What a table of one type per column cannot hold.
NO_COLUMN = {"a number or a word"}


def line(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape")


def write_lines(folder, records):
    (folder / "rows.jsonl").write_bytes(b"\n".join(map(line, records)))
    return folder / "rows.jsonl"


def write_array(folder, records):
    (folder / "rows.json").write_bytes(b"[" + b", ".join(map(line, records)) + b"]")
    return folder / "rows.json"


def write_gzip(folder, records):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"\n".join(map(line, records))))
    return folder / "rows.jsonl.gz"


def write_zstd(folder, records):
    zstandard = pytest.importorskip("zstandard")
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(map(line, records))))
    return folder / "rows.jsonl.zst"


def write_shards(folder, records):
    for number in range(0, len(records), 2):
        (folder / f"train-{number}.jsonl").write_bytes(b"\n".join(map(line, records[number : number + 2])))
    return folder


def arrow_table(records):
    import pyarrow

    keys = list(dict.fromkeys(key for record in records for key in record))
    columns = {}
    for key in keys:
        values = [record.get(key) for record in records]
        if any(isinstance(value, str) and not value.isprintable() for value in values):  # half of a pair: no UTF-8
            raw = [value.encode("utf-8", "surrogateescape") for value in values]
            columns[key] = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
        else:
            columns[key] = pyarrow.array(values)
    return pyarrow.table(columns)


def write_parquet(folder, records):
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow_table(records), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder, records):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(arrow_table(records)).save_to_disk(folder / "saved")
    return folder / "saved"


def add_member(tar, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


def write_tar(folder, records, mode: str = "w", name: str = "rows.tar"):
    """Each row's own images as members, as far as there are such files; else its json says where they are."""
    with tarfile.open(folder / name, mode) as tar:
        for number, record in enumerate(records):
            names = record.get("images", record.get("image", record.get("file_name")))
            names = names if isinstance(names, list) else [names] if names else []
            files = [folder / one for one in names if (folder / one).is_file()]
            for i, file in enumerate(files):
                add_member(tar, f"{number:04d}.{i}.png", file.read_bytes())
            rest = {key: value for key, value in record.items() if not files or key not in ("images", "image")}
            add_member(tar, f"{number:04d}.json", line(rest))
    return folder / name


def write_packed_tar(folder, records):
    return write_tar(folder, records, "w:gz", "rows.tar.gz")


WRITERS = [
    write_lines, write_array, write_gzip, write_zstd, write_shards, write_tar, write_packed_tar, write_parquet,
    write_saved,
]  # fmt: skip


def read(write, folder, records):
    rows = load_rows(str(write(folder, records)), options=RowOptions(image_root=folder))
    return [rows[i] for i in range(len(rows))]


def stream(folder, records, shards: int = 1) -> RowStream:
    """As of a data set on the hub: parquet files that are read as a stream."""
    import datasets

    size = -(-len(records) // shards)
    files = []
    for number in range(shards):
        (folder / str(number)).mkdir()
        files.append(str(write_parquet(folder / str(number), records[number * size : (number + 1) * size])))
    table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("arrow")
    part = Part("stream", table, options=RowOptions(image_root=folder))
    part.check_columns(part.columns())
    return RowStream([part])


def read_stream(folder, records):
    return list(stream(folder, records))


@pytest.fixture(autouse=True)
def images(tmp_path, tmp_path_factory, monkeypatch):
    import datasets

    for number, data in enumerate(PNG):
        (tmp_path / f"{number}.png").write_bytes(data)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


CONTAINERS = {write.__name__.removeprefix("write_"): lambda folder, records, w=write: read(w, folder, records)
              for write in WRITERS} | {"stream": read_stream}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_row_is_the_same_in_every_container(container, kind, tmp_path):
    records, wanted = KINDS[kind]
    if container in ("parquet", "saved", "stream") and kind in NO_COLUMN:
        pytest.skip("a column has one type")
    rows = CONTAINERS[container](tmp_path, records)
    data = dataset(rows)
    found = []
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        sample = data.prepare((0, i))
        reasons = [str(reason) for reason in sample.dropped if reason != UNKNOWN_WORD]
        turns = [(one["user"].strip(), one["assistant"]) for one in row["texts"]]
        found.append(reasons[0] if reasons else (len(row["images"]), turns, row.get("system")))
        if sample.conversations and row["images"]:
            picture_of_row = PNG[int(re.search(r"(\d).png", str(record))[1])]
            alone = dataset([row | {"images": [picture_of_row]}])
            assert (data.decode(sample).images == alone[0, 0].images).all()
    assert found == wanted


MIXED = [{"image": f"{i % 3}.png", "question": WHAT, "answer": "red"} if i % 5 else
         {"image": "none.png", "question": WHAT, "answer": "red"} for i in range(12)]  # fmt: skip


def seen(rows, count: int, start=0, batch_size: int = 2, rank: int = 0, world_size: int = 1) -> list:
    cfg = tiny_train(batch_size=batch_size)
    data = dataset(rows, train_cfg=cfg)
    batches = train_batches(data, TrainCollator(1, data.vlm_cfg), cfg, start, rank, world_size)
    return [(batch["ids"], dict(batch["dropped"]), batch["position"]) for batch in islice(batches, count)]


@pytest.mark.parametrize("container", [w for w in WRITERS if w is not write_shards], ids=lambda w: w.__name__[6:])
def test_order_resume_and_ranks_do_not_depend_on_the_container(container, tmp_path):
    rows = read(container, tmp_path, MIXED)
    number = [int(row["id"].rpartition("#")[2]) for row in rows]
    assert number == list(range(12))
    whole = seen(rows, 8)
    lines = seen(read(write_lines, tmp_path, MIXED), 8)
    order, wanted = ([[name.rpartition("#")[2] for name in ids] for ids, *_ in found] for found in (whole, lines))
    assert order == wanted
    assert [dropped for _, dropped, _ in whole] == [dropped for _, dropped, _ in lines]
    assert seen(rows, 5, start=whole[2][2]) == whole[3:]
    mine, other = (seen(rows, 4, rank=rank, world_size=2) for rank in (0, 1))
    both = seen(rows, 4, batch_size=4)
    assert [one[0] + two[0] for one, two in zip(mine, other, strict=True)] == [ids for ids, *_ in both]


def test_a_stream_resumes_and_is_shared_by_ranks(tmp_path):
    rows = stream(tmp_path, MIXED, shards=2)
    whole = seen(rows, 8)
    assert seen(rows, 5, start=whole[2][2]) == whole[3:]
    names = [name for rank in (0, 1) for ids, *_ in seen(rows, 2, rank=rank, world_size=2) for name in ids]
    assert len(names) == len(set(names)) > 5
    assert sum(dropped.get("no such file", 0) for _, dropped, _ in whole[:6]) >= 2


# Packed files


@pytest.mark.parametrize("name", ["rows.tar.zst", "rows.tgz", "ROWS.JSONL.ZST", "rows.csv.zst", "rows.json.zst"])
def test_packed_files_are_known_by_their_endings(tmp_path, name):
    zstandard = pytest.importorskip("zstandard")
    kind = name.lower().removesuffix(".zst")
    records = KINDS["question"][0]
    if "csv" in kind:
        data = b"image,question,answer\n0.png,what is the shape?,red\n"
    elif kind.endswith((".tar", ".tgz")):
        data = write_tar(tmp_path, records, "w:gz" if kind.endswith("tgz") else "w", "x").read_bytes()
    else:
        data = line(records[0]) if "jsonl" in kind else b"[" + line(records[0]) + b"]"
    if name.lower().endswith(".zst"):
        half = len(data) // 2
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])  # two frames
    (tmp_path / name).write_bytes(data)
    rows = load_rows(str(tmp_path / name))
    assert [[(one["user"], one["assistant"]) for one in rows[i]["texts"]] for i in range(len(rows))] == [RED]
    assert len(rows[0]["images"]) == 1
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / name).write_bytes(data)
    assert len(load_rows(str(tmp_path / "only"))) == 1
    (tmp_path / "only" / name).write_bytes(data[:-5])
    with pytest.raises(ValueError, match=rf"--train_dataset_path .*{name}: cannot be read: is not a whole"):
        load_rows(str(tmp_path / "only"))


def test_without_the_package_zst_files_are_refused_by_its_name(tmp_path, monkeypatch):
    path = write_zstd(tmp_path, KINDS["question"][0])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"rows.jsonl.zst: cannot be read: .* install the package zstandard"):
        load_rows(str(path))
    path.write_bytes(b"no zst")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is not a whole Zstandard file"):
        load_rows(str(path))
