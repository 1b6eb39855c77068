"""A few made-up records in the columns of each benchmark, with the answer that is right by every rule."""

import io
import json

import datasets
from PIL import Image

import evaluate
from eval.benchmarks import open_benchmark
from eval.tasks import TASKS


def image(number: int) -> dict:
    """A PNG of its own for each number, as parquet and save_to_disk hold images."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _mmstar(i: int) -> dict:
    question = f"What is this ({i})?\nOptions: A: cat, B: dog, C: cow, D: hen"
    groups = {"category": ["math", "logical reasoning"][i % 2], "l2_category": f"part {i % 4}"}
    return {"index": i, "question": question, "answer": "ABCD"[i % 4], "image": image(i), **groups}


def _vqa(i: int) -> dict:
    return {"question_id": 100 + i, "question": "is it red?", "answers": ["yes"] * 10, "image": image(i // 2)}


def _vqav2(i: int) -> dict:
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    return _vqa(i) | {"answers": answers, "answer_type": "yes/no", "image_id": i // 2}


def _mmbench(i: int) -> dict:
    """Every question twice, with its choices rotated."""
    choices = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    groups = {"category": "object", "L2-category": "perception", "hint": "nan"}
    index = i // 2 + 1_000_000 * (i % 2)
    return {"index": index, "question": "what?", "answer": "AB"[i % 2], "image": image(i // 2), **choices, **groups}


def _mmmu(i: int) -> dict:
    is_open = i == 3
    record = {"id": f"validation_Art_Theory_{i}", "question": "Which of <image 1> and <image 2>?", "image_1": image(i)}
    record |= {"options": "[]" if is_open else "['cat', 'dog', 'cow']", "answer": "['7', 'seven']" if is_open else "B"}
    return record | {"question_type": "open" if is_open else "multiple-choice", "image_2": image(i + 100)}


def _hallusion(i: int) -> dict:
    keys = {"category": "VD", "subcategory": "chart", "set_id": str(i // 4), "figure_id": str(i % 2)}
    keys["question_id"] = str(i // 2 % 2)
    return keys | {"question": "Is it so?", "gt_answer": str(i % 2), "image": image(i)}


def _doc(i: int) -> dict:
    return {"questionId": str(i), "question": "who?", "answers": ["Ann Lee", "A. Lee"], "image": image(i)}


def _pope(i: int) -> dict:
    groups = {"category": ["random", "popular"][i % 2], "image_source": f"coco {i // 4}"}
    record = {"question_id": str(i // 2), "question": "Is there a cat?", "answer": ["yes", "no"][i // 2 % 2]}
    return record | groups | {"image": image(i // 4)}


def _science(i: int) -> dict:
    record = {"question": "which?", "choices": ["a cat", "a dog"], "answer": i % 2, "hint": "" if i else "Look."}
    return record | {"image": image(i) if i else None, "subject": "biology"}


def _seed(i: int) -> dict:
    record = {"question_id": str(i), "question": "what?", "answer": "ABCD"[i % 4], "image": [image(i)]}
    return record | {f"choice_{letter}": f"thing {letter}" for letter in "abcd"} | {"data_type": "image"}


def _gqa(i: int) -> dict:
    return {"id": f"2{i}", "imageId": f"n{i // 2}", "question": "is it red?", "answer": "yes"}


RECORDS = {
    "mmstar": _mmstar,
    "gqa": _gqa,
    "vqav2_val": _vqav2,
    "textvqa_val": lambda i: _vqa(i) | {"image_id": f"m{i // 2}"},
    "ok_vqa_val2014": _vqa,
    "coco2017_cap_val": lambda i: {
        "question_id": f"{i:012d}.jpg",
        "answer": [f"A man on horse {i}.", f"The man rides horse {i}."],
        "image": image(i),
    },
    "pope": _pope,
    "ocrbench": lambda i: {
        "dataset": "IIIT5K",
        "question": "what is written?",
        "question_type": "Regular Text Recognition",
        "answer": ["STOP"],
        "image": image(i),
    },
    "ai2d": lambda i: {
        "question": "what is A?",
        "options": ["leaf", "root", "stem", "seed"],
        "answer": str(i % 4),
        "image": image(i // 2),
    },
    "scienceqa": _science,
    "scienceqa_img": _science,
    "mmmu_val": _mmmu,
    "chartqa": lambda i: {
        "type": ["human_test", "augmented_test"][i % 2],
        "question": "how many?",
        "answer": str(10 + i),
        "image": image(i),
    },
    "docvqa_val": _doc,
    "infovqa_val": _doc,
    "mmbench_en_dev": _mmbench,
    "seedbench": _seed,
    "realworldqa": lambda i: {
        "question": "Which way?\nA. left\nB. right\nAnswer with the letter.",
        "answer": "AB"[i % 2],
        "image": image(i),
    },
    "hallusion_bench_image": _hallusion,
}


def records(task: str, count: int = 8) -> list[dict]:
    return [RECORDS[task](i) for i in range(count)]


def right(truth: dict) -> str:
    """The right answer of a question, from its truth."""
    return truth["answer"] if "answer" in truth else truth["answers"][0]


def table(task, count=8):
    """A Dataset with real image columns."""
    rows = records(task, count)
    made = datasets.Dataset.from_list(rows)
    for column in TASKS[task].images:
        if column in made.column_names:
            of_list = isinstance(rows[0][column], list)
            made = made.cast_column(column, datasets.List(datasets.Image()) if of_list else datasets.Image())
    return made


def saved(folder, task, count=8):
    """The records as save_to_disk writes them, in a folder of the task's name."""
    datasets.DatasetDict({TASKS[task].split: table(task, count)}).save_to_disk(folder / task)
    return folder


def opened(folder, task, **options):
    return open_benchmark(TASKS[task], folder, options.pop("limit", None), options.pop("style", "lmms-eval"), **options)


def run(*arguments):
    evaluate.main(evaluate.parse_arguments([str(one) for one in arguments]))


def write_answers(path, pairs):
    path.write_text("".join(json.dumps({"id": one, "answer": answer}) + "\n" for one, answer in pairs))
    return path
