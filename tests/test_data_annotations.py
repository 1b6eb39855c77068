"""Annotation files of VQAv2, OK-VQA and COCO captions, in the layout in which they are published."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tiny.data import dataset, encoded, picture, tiny_vlm

from data import annotation_files
from data.annotation_files import AnnotationFile
from data.formats import count_formats
from data.options import RowOptions
from data.rows import load_rows

PNG = encoded(picture())
ANSWERS = ["net"] * 4 + ["netting"] * 3 + ["mesh", "fence", "pole"]
INFO = {"description": '[{"questions": []}]', "year": 2017, "version": "1.9"}


def questions(split: str = "train2014", count: int = 3, first: int = 458752) -> dict:
    asked = [{"image_id": first + i // 2, "question": f"What is this {i}?", "question_id": first * 1000 + i}
             for i in range(count)]  # fmt: skip
    kind = {"info": INFO, "task_type": "Open-Ended", "data_type": "mscoco", "license": {"url": "x", "name": "y"}}
    return kind | {"data_subtype": split, "questions": asked}


def annotations(of: dict) -> dict:
    """In another order than the questions."""
    made = [
        {"question_type": "what is this", "multiple_choice_answer": "net", "answer_type": "other",
         "answers": [{"answer": one, "answer_confidence": "maybe", "answer_id": i} for i, one in enumerate(ANSWERS, 1)],
         "image_id": one["image_id"], "question_id": one["question_id"]}
        for one in reversed(of["questions"])
    ]  # fmt: skip
    return {"info": INFO, "license": {"name": "y"}, "data_subtype": of["data_subtype"], "annotations": made,
            "data_type": "mscoco"}  # fmt: skip


def captions(count: int = 2, first: int = 522418) -> dict:
    ids = range(first, first + count)
    images = [{"license": 3, "file_name": f"{i:012d}.jpg", "height": 16, "width": 16, "id": i} for i in ids]
    said = [{"image_id": i, "id": 10 * i + k, "caption": f"A shape {k}."} for k in range(2) for i in ids]
    return {"info": INFO, "images": images, "licenses": [{"id": 1}], "annotations": said}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)


@pytest.fixture
def vqa(tmp_path):
    """VQAv2 as its zip files unpack, train and val in one folder, with the images of train."""
    for split, first in (("train2014", 458752), ("val2014", 262148)):
        asked = questions(split, first=first)
        write(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", asked)
        write(tmp_path / f"v2_mscoco_{split}_annotations.json", annotations(asked))
        write(tmp_path / f"v2_mscoco_{split}_complementary_pairs.json", [[1, 2], [3, 4]])
    for number in (458752, 458753):
        write_image(tmp_path / "train2014" / f"COCO_train2014_{number:012d}.jpg")
    return tmp_path


def rows_of(path, split="train", **options) -> list[dict]:
    rows = load_rows(str(path), split=split, options=RowOptions(**options))
    return [rows[i] for i in range(len(rows))]


QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"


@pytest.mark.parametrize("given", ["", QUESTIONS, "v2_mscoco_train2014_annotations.json"])
def test_vqav2_is_read_as_it_is_published(vqa, given):
    rows = rows_of(vqa / given)
    assert count_formats(rows) == {"VQAv2 questions": 3}
    assert [row["texts"][0]["user"] for row in rows] == [f"What is this {i}?" for i in range(3)]
    for row in rows:
        [turn] = row["texts"]
        assert (turn["assistant"], turn["source"]) == ("net", "other")
        assert turn["answers"] == ["net", "netting", "mesh", "fence", "pole"]
    images = [f"COCO_train2014_{number:012d}.jpg" for number in (458752, 458752, 458753)]
    assert [row["images"] for row in rows] == [[str(vqa / "train2014" / name)] for name in images]
    assert rows[1]["id"].endswith(f"{QUESTIONS}#1")
    data = dataset(rows, tiny_vlm(resize_to_max_side_len=False))
    assert data.questions(0).images.shape == (1, 3, 16, 16)
    assert data.questions(0).answers == [("net", "netting", "mesh", "fence", "pole")]


def test_splits_of_annotation_files_are_those_of_their_names(vqa):
    assert [row["texts"][0]["user"] for row in rows_of(vqa, "validation")] == [f"What is this {i}?" for i in range(3)]
    [row, *_] = rows_of(vqa, "validation")
    data = dataset([row])
    assert list(data.prepare((0, 0)).dropped) == ["no such file"]
    write(vqa / "v2_OpenEnded_mscoco_test-dev2015_questions.json", questions("test-dev2015"))
    assert len(rows_of(vqa)) == 3
    with pytest.raises(ValueError, match=r"holds questions of a visual question answering .* annotations beside it"):
        rows_of(vqa, "test")


def test_okvqa_packed_in_folders_of_its_own_with_images_elsewhere(tmp_path):
    asked = questions()
    data = tmp_path / "okvqa"
    write(data / "mscoco_train2014_annotations.json", annotations(asked))
    text = json.dumps(asked).encode()
    (data / "OpenEnded_mscoco_train2014_questions.json.gz").write_bytes(gzip.compress(text))
    image = tmp_path / "coco" / "train2014" / "COCO_train2014_000000458752.jpg"
    write_image(image)
    for root in (tmp_path / "coco", tmp_path / "coco" / "train2014"):
        assert rows_of(data, image_root=root)[0]["images"] == [str(image)]


@pytest.mark.parametrize("given", ["", "annotations/captions_train2017.json", "annotations"])
def test_coco_captions_are_read_as_they_are_published(tmp_path, given):
    write(tmp_path / "annotations" / "captions_train2017.json", captions())
    write(tmp_path / "annotations" / "captions_val2017.json", captions(first=9))
    boxes = captions() | {"annotations": [{"image_id": 522418, "bbox": [0, 0, 1, 1], "id": 1}]}
    write(tmp_path / "annotations" / "instances_train2017.json", boxes)
    for number in (522418, 522419):
        write_image(tmp_path / "train2017" / f"{number:012d}.jpg")
    rows = rows_of(tmp_path / given)
    assert count_formats(rows) == {"COCO captions": 4}
    assert [row["texts"][0]["answers"] for row in rows] == [["A shape 0.", "A shape 1."]] * 2 + [
        ["A shape 1.", "A shape 0."]
    ] * 2
    images = [str(tmp_path / "train2017" / f"{number:012d}.jpg") for number in (522418, 522419)]
    assert [row["images"] for row in rows] == [[one] for one in images * 2]
    assert len(rows_of(tmp_path, "validation")) == 4


def test_wrong_elements_are_bad_rows_and_wrong_files_errors(tmp_path):
    asked = questions(count=6)
    said = annotations(asked)
    for one, wrong in zip(asked["questions"][:3], ({"question_id": "x"}, {"question": {"a": 1}}, {"question_id": 7}),
                          strict=True):  # fmt: skip
        one |= wrong
    said["annotations"][0]["answers"] = [{"answer": None}]  # of the last question
    write(tmp_path / "my_questions.json", asked)
    write(tmp_path / "my_annotations.json", said)
    rows = rows_of(tmp_path)
    assert [str(row.get("bad")) for row in rows] == [
        "a question without question_id and image_id", "question is an object", "a question without an annotation",
        "None", "None", "None",
    ]  # fmt: skip
    assert rows[2]["bad"].first == f"{tmp_path.name}/my_questions.json, question 3: question_id 7, my_annotations.json"
    assert rows[5]["texts"][0]["assistant"] is None
    wrong = captions()
    wrong["annotations"][0]["image_id"] = 7
    wrong["annotations"][1]["caption"] = 3
    write(tmp_path / "c" / "captions.json", wrong)
    rows = rows_of(tmp_path / "c")
    assert [str(row.get("bad", row["texts"] and row["texts"][0]["assistant"])) for row in rows] == [
        "a caption without an image in the file", "3", "A shape 1.", "A shape 1."
    ]  # fmt: skip
    write(tmp_path / "b" / "instances.json", captions() | {"annotations": [{"image_id": 522418, "bbox": [0]}]})
    with pytest.raises(ValueError, match="hold neither questions nor captions"):
        rows_of(tmp_path / "b")


def test_an_element_that_is_not_utf8_is_one_bad_row(tmp_path):
    path = write(tmp_path / "captions.json", captions())
    path.write_bytes(path.read_bytes().replace(b"A shape 1.", b"A sh\xe9pe.", 1))
    rows = rows_of(path)
    assert [str(row.get("bad")) for row in rows] == ["None", "None", "not UTF-8", "None"]
    assert "A sh\\xe9pe." in rows[2]["bad"].first


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_members_of_an_object_whatever_is_read_at_once(tmp_path, monkeypatch, chunk):
    from data import json_places

    monkeypatch.setattr(json_places, "CHUNK_BYTES", chunk)
    asked = [{"question_id": 1, "x": "]}"}, {}]
    content = {"a": 'ü"[', "questions": asked, "b": {"c": [1]}, "d": 1.5, "e": [], "f": None}
    for indent in (None, 2):
        path = tmp_path / "x.json"
        path.write_bytes(b"\xef\xbb\xbf " + json.dumps(content, indent=indent, ensure_ascii=False).encode())
        found = AnnotationFile.of(path)
        assert found.kind == "questions"
        assert list(found.members) == list(content)
        assert found.members["a"] == content["a"]
        assert found.members["b"] is found.members["d"] is None
        assert [found.count(name) for name in ("questions", "e", "b")] == [2, 0, 0]
        assert [found.element("questions", i) for i in (0, 1)] == [{"question_id": "1", "x": "]}"}, {}]
        assert found.whole_numbers("questions", "question_id").tolist() == [1, -1]
        cut = path.read_bytes()
        for end in range(1, len(cut), 3):  # wherever it breaks off
            path.write_bytes(cut[:end])
            AnnotationFile.of(path)
    path.write_text('[{"question_id": 1}]')
    assert AnnotationFile.of(path) is None


def test_the_index_of_annotations_takes_a_few_bytes_per_element(tmp_path):
    asked = questions(count=1000)
    write(tmp_path / "questions.json", asked)
    write(tmp_path / "annotations.json", annotations(asked))
    table = load_rows(str(tmp_path)).parts[0].table
    arrays = [table.ids, table.order, table.questions.members["questions"], table.annotations.members["annotations"]]
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}
    assert sum(array.nbytes for array in arrays) == 4 * 8000 + 16
    assert annotation_files.TRIED_IMAGES == 100
