"""Own names of columns, a function of one's own, and where images lie; values that only typed tables have."""

import datetime
import json
import pickle
import re
from decimal import Decimal
from pathlib import Path

import pytest
from tiny.data import dataset, encoded, picture, tiny_train, tiny_vlm

from data.options import KNOWN_KEYS, RowFunction, RowOptions, renamed
from data.pipeline import format_names, load_data
from data.rows import load_rows
from data.streams import RowStream
from training.arguments import parse_arguments

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
OWN = [{"frage": "what?", "antwort": answer, "bild": "a.png"} for answer in ("red", "blue")]
OWN_COLUMNS = {"question": "frage", "answer": "antwort", "image": "bild"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(folder: Path, records: list[dict], kind: str = "jsonl") -> str:
    import datasets

    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(encoded(picture()))
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "csv":
        path.write_text("\n".join(",".join(row) for row in [list(records[0]), *(row.values() for row in records)]))
    elif kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return str(path)


def rows_of(path: str, **options) -> list[dict]:
    rows = load_rows(path, options=RowOptions(**options))
    return [rows[i] for i in range(len(rows))]


def said(rows: list[dict]) -> list:
    return [
        str(row["bad"]) if "bad" in row else [(one["user"], one["assistant"]) for one in row["texts"]] for row in rows
    ]


# --columns


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_columns_of_ones_own_in_every_container(tmp_path, kind):
    rows = rows_of(write(tmp_path, OWN, kind), columns=OWN_COLUMNS)
    assert said(rows) == [[("what?", "red")], [("what?", "blue")]]
    folder = tmp_path / "rows.saved" if kind == "saved" else tmp_path
    assert [row["images"] for row in rows] == [[str(folder / "a.png")]] * 2
    assert {row["format"] for row in rows} == {"questions and answers"}


@pytest.mark.parametrize(
    ("columns", "record", "wanted"),
    [
        ({"question": "answer", "answer": "question"}, {"question": "q", "answer": "a"}, [("a", "q")]),
        ({"answer": "right"}, {"question": "q", "answers": ["no"], "right": "yes"}, [("q", "yes")]),
        ({"image": "bild"}, {"images": ["x.png"], "bild": "a.png", "caption": "red"}, [("", "red")]),
        ({"caption": "said"}, {"image": "a.png", "said": "red", "text": "no", "question": "no"}, [("", "red")]),
        ({"question": "q", "answer": "a"}, {"texts": ["other"], "q": "what?", "a": 1}, [("what?", "1")]),
        ({"question": "q"}, {"q": "what?", "choices": ["no", "yes"], "answer": "yes"}, None),
        ({"texts": "talk", "source": "of"}, {"talk": {"user": "u", "assistant": "a"}, "of": 7}, [("u", "a")]),
        ({"question": "frage"}, {"question": "in English", "answer": "a"}, [("in English", "a")]),
    ],
)
def test_a_mapped_column_counts_before_all_others(tmp_path, columns, record, wanted):
    more = dict.fromkeys(columns.values(), "x") | {"question": "q", "answer": "a"}
    row, _ = rows_of(write(tmp_path, [record, more]), columns=columns)
    if wanted is None:
        assert row["format"] == "multiple choice"
    else:
        assert said([row]) == [wanted]
    if "image" in columns:
        assert row["images"] == [str(tmp_path / "a.png")]
    if "source" in columns:
        assert row["texts"][0]["source"] == "7"


def test_without_columns_a_record_stays_as_it_is():
    record = {"question": "q"}
    assert renamed(record, {}) is record
    assert renamed(record, {"answer": "a"}) is record


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_wrong_mapping_is_an_error_that_names_it(tmp_path, kind):
    path = write(tmp_path, OWN, kind)
    wrong = OWN_COLUMNS | {"image": "bidl"}
    with pytest.raises(
        ValueError, match=r"--columns image=bidl: --train_dataset_path .* has no column bidl; it has fra"
    ):
        rows_of(path, columns=wrong)
    with pytest.raises(ValueError, match=r"has the columns frage, antwort, bild; it needs .* --columns"):
        rows_of(path)
    with pytest.raises(ValueError, match="easy-vqa: must be of files without --columns"):
        load_rows("easy-vqa", options=RowOptions(columns=OWN_COLUMNS))


def test_flags_are_read_and_refused_before_any_work(tmp_path, capsys):
    words = "--columns question=frage,answer=antwort"
    assert parse_arguments(words.split()).train.columns == {"question": "frage", "answer": "antwort"}
    assert parse_arguments(["--columns", '{"question": "a,b=c"}']).train.columns == {"question": "a,b=c"}
    assert parse_arguments(["--mixture_weights", "a=2,b=0.5"]).train.mixture_weights == {"a": 2.0, "b": 0.5}
    for text in ("question", "question=", "question=a,question=b", "=a"):
        with pytest.raises(SystemExit):
            parse_arguments(["--columns", text])
        assert f"--columns {text}: must be a mapping, as a=b,c=d" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("import json\nnumber = 3\ndef row(record):\n    return record\n")
    (tmp_path / "broken.py").write_text("import json\nraise KeyError('x')\n")
    (tmp_path / "syntax.py").write_text("x = (\n")
    for flags, wanted in {
        "columns=qestion:frage": "--columns qestion=frage: qestion must be one of",
        "image_root=/nowhere": "--image_root /nowhere: no such folder",
        "row_function=mine.py": "must be a file and the name of a function in it, file.py:name",
        "row_function=/nowhere.py:row": "no such file /nowhere.py",
        f"row_function={tmp_path}/mine.py:rwo": "mine.py has no function rwo",
        f"row_function={tmp_path}/mine.py:number": "mine.py has no function number",
        f"row_function={tmp_path}/broken.py:row": "broken.py cannot be imported: KeyError: 'x' (line 2 of broken.py)",
        f"row_function={tmp_path}/syntax.py:row": "syntax.py cannot be imported: SyntaxError",
    }.items():
        name, _, value = flags.partition("=")
        given = dict([value.split(":")]) if name == "columns" else value
        with pytest.raises(ValueError, match=re.escape(wanted)) as error:
            RowOptions.of(tiny_train(**{name: given}))
        assert str(error.value).startswith(f"--{name} ")
    assert RowOptions.of(tiny_train(row_function=f"{tmp_path}/mine.py:row")).function is not None
    assert {"question", "image", "texts", "caption", "source", "formatting_ratings"} <= set(KNOWN_KEYS)


# --row_function


FUNCTION = """
from helper import WORDS  # a file beside it

def row(record):
    if record["skip"]:
        return None
    if record["n"] == 4:
        raise KeyError("four")
    if record["n"] == 5:
        return [record]
    return {"question": WORDS, "answer": record["n"] + 1, "answers": [], "images": record["image"], "n": record["n"]}

def same(record):
    return {"question": "?", "answer": record["n"]}
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTION)
    (tmp_path / "helper.py").write_text("WORDS = 'what?'\n")

    def load(name: str) -> RowFunction:
        return RowFunction.of(f"{tmp_path / 'mine.py'}:{name}")

    return load


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved"])
def test_a_function_makes_rows_or_skips_them_or_fails_at_one(tmp_path, functions, kind):
    records = [{"n": n, "skip": n == 3, "image": "a.png"} for n in range(1, 6)]
    rows = rows_of(write(tmp_path, records, kind), function=functions("row"))
    assert said(rows) == [
        [("what?", "2")], [("what?", "3")], "skipped by --row_function", "--row_function failed",
        "--row_function returned no row",
    ]  # fmt: skip
    assert Path(rows[0]["images"][0]).name == "a.png"
    assert rows[3]["bad"].first.endswith(": KeyError: 'four' (line 8 of mine.py)")
    assert "a list of objects" in rows[4]["bad"].first
    assert [row["id"].rpartition("#")[2] for row in rows] == list("01234")


def test_a_function_and_columns_hold_for_streams(functions):
    import datasets

    from data.formats import Part

    table = datasets.Dataset.from_list([{"nr": n, "frage": "?"} for n in range(3)])
    for options, wanted in (
        (RowOptions({"n": "nr"}, functions("same")), [[("?", str(n))] for n in range(3)]),
        (RowOptions({"question": "frage", "answer": "nr"}), [[("?", str(n))] for n in range(3)]),
    ):
        part = Part("stream", table.to_iterable_dataset(num_shards=2).with_format("arrow"), options=options)
        assert said(list(RowStream([part]))) == wanted


def test_a_number_that_a_function_passes_on_keeps_its_letters(tmp_path, functions):
    letters = ["3", "3.0", "1e3", "-0", "12345678901234567890123", "0.10", "9" * 5000]
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"n": {one}}}' for one in letters))
    rows = rows_of(str(tmp_path / "rows.jsonl"), function=functions("same"))
    assert [row["texts"][0]["assistant"] for row in rows] == letters


def test_a_function_that_fails_everywhere_ends_the_run_at_once_and_columns_come_before_it(tmp_path, functions):
    path = write(tmp_path, [{"nr": 1}] * 3)
    with pytest.raises(ValueError, match=r"cannot be read: --row_function failed, .*KeyError: 'n'"):
        rows_of(path, function=functions("same"))
    (tmp_path / "mine.py").write_text("def row(record):\n    return record | {'answer': record['question']}\n")
    function = RowFunction.of(f"{tmp_path / 'mine.py'}:row")
    assert said(rows_of(path, columns={"question": "nr"}, function=function)) == [[("1", "1")]] * 3


def test_a_function_is_imported_again_in_another_process(functions):
    function = functions("same")
    again = pickle.loads(pickle.dumps(function))
    assert "function" not in again.__dict__
    assert again({"n": 3}) == {"question": "?", "answer": 3}


# --image_root, and values of typed tables


def test_image_root_is_where_relative_paths_start(tmp_path):
    path = write(tmp_path, [{"image": image, "caption": "red"} for image in ("a.png", str(tmp_path / "a.png"))])
    root = tmp_path / "elsewhere"
    assert [row["images"][0] for row in rows_of(path, image_root=root)] == [
        str(root / "a.png"),
        str(tmp_path / "a.png"),
    ]
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "1.png").write_bytes(b"")
    [row] = rows_of(str(tmp_path / "classes"), image_root=root)
    assert row["images"] == [str(tmp_path / "classes" / "cat" / "1.png")]


MOMENT = datetime.datetime(2023, 7, 5, 12, 30, 0, 250000, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("date32", datetime.date(2023, 7, 5), "2023-07-05"),
        ("timestamp", datetime.datetime(2023, 7, 5), "2023-07-05T00:00:00"),
        ("timestamp_utc", MOMENT, "2023-07-05T12:30:00.250000+00:00"),
        ("time", datetime.time(12, 30), "12:30:00"),
        ("decimal", Decimal("12.50"), "12.50"),
        ("float32", 0.1, "0.1"),
        ("float16", 0.1, "0.1"),
        ("float64", 0.1, "0.1"),
        ("int8", 3, "3"),
        ("bool", True, "true"),
        ("null", None, None),
        ("binary", b"red", "answer is bytes"),
        ("struct", {"a": 1}, "answer is an object"),
        ("list", [["red"]], "answer is a list of strings"),
        ("duration", datetime.timedelta(1), "answer is a timedelta"),
    ],
)
@pytest.mark.parametrize("container", ["parquet", "saved", "stream"])
def test_a_typed_answer_is_its_text_or_one_bad_row(tmp_path, container, kind, value, wanted):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    types = {
        "date32": pa.date32(), "timestamp": pa.timestamp("us"), "timestamp_utc": pa.timestamp("us", "UTC"),
        "time": pa.time64("us"), "decimal": pa.decimal128(10, 2), "float32": pa.float32(), "float16": pa.float16(),
        "float64": pa.float64(), "int8": pa.int8(), "bool": pa.bool_(), "null": pa.null(), "binary": pa.binary(),
        "struct": pa.struct([("a", pa.int8())]), "list": pa.list_(pa.list_(pa.string())), "duration": pa.duration("s"),
    }  # fmt: skip
    if kind == "float16" and container == "saved":
        pytest.skip("datasets does not write it")
    table = pa.table({"question": ["?", "?"], "answer": pa.array([value, None], types[kind])})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    if container == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    if container == "stream":
        files = str(tmp_path / "rows.parquet")
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        from data.formats import Part

        rows = list(RowStream([Part("stream", stream.with_format("arrow"))]))
    else:
        rows = rows_of(str(tmp_path / ("saved" if container == "saved" else "rows.parquet")))
    assert said(rows) == [wanted if str(wanted).startswith("answer is") else [("?", wanted)], [("?", None)]]


def test_the_formats_of_a_stream_are_named(tmp_path):
    import datasets

    from data.formats import Part

    record = {"image": "a.png", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]}
    table = datasets.Dataset.from_list([record] * 4).to_iterable_dataset().with_format("arrow")
    part = Part("stream", table)
    part.check_columns(part.columns())
    assert format_names(RowStream([part])) == ["LLaVA conversations"]
    rows = load_rows(write(tmp_path, OWN), options=RowOptions(columns=OWN_COLUMNS))
    assert format_names(rows) == ["questions and answers"]


# The page


def test_the_examples_of_the_page_work_as_it_says(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    section = text[text.index("## Columns of your own") :]
    command, code, row = (
        re.search(pattern, section, re.DOTALL)[1]
        for pattern in (r"(--columns \S+)", r"```python\n(.*?)```", r"```json\n(.*?)\n```")
    )
    cfg = parse_arguments(command.split()).train
    (tmp_path / "cat.jpg").write_bytes(encoded(picture()))
    (tmp_path / "own.jsonl").write_text(row)
    [found] = rows_of(str(tmp_path / "own.jsonl"), columns=cfg.columns)
    assert said([found]) == [[("Was ist das?", "eine Katze")]]
    assert found["images"] == [str(tmp_path / "cat.jpg")]
    (tmp_path / "my_rows.py").write_text(code)
    name = re.search(r"--row_function my_rows.py:(\w+)", section)[1]
    records = [{"id": 1, "boxes": 3, "photo": "cat.jpg"}, {"id": 2, "boxes": 0, "photo": "cat.jpg"}]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = rows_of(str(tmp_path / "boxes.jsonl"), function=RowFunction.of(f"{tmp_path}/my_rows.py:{name}"))
    assert said(rows) == [[("How many cats are there?", "3")], "skipped by --row_function"]
    assert rows[0]["images"] == [str(tmp_path / "cat.jpg")]


def test_a_run_reads_its_test_rows_by_the_same_options(tmp_path):
    path = write(tmp_path, OWN * 4)
    cfg = tiny_train(
        train_dataset_path=path, test_dataset_path=path, columns=OWN_COLUMNS, val_size=1, turns_per_image=1
    )
    data = load_data(load_rows(path, options=RowOptions.of(cfg)), tiny_vlm(), cfg, None)
    assert said([data.test_rows[0]]) == [[("what?", "red")]]
    assert dataset([data.test_rows[0]], train=False).questions(0).answers == ["red"]
