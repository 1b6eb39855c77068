"""The model nanovlm_grades of lmms-eval: against a stub of lmms-eval, and against the real one where it is installed.

The real one is looked for in $LMMS_EVAL_ENV, else where scripts/run_lmms_eval.sh builds it.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny.data import picture
from tiny.lmms_eval import save_data, save_speaking_model

from eval.asking import Asker
from eval.batches import Batches
from eval.benchmarks import open_benchmark
from eval.harness import Decoding, chat_question, simple_question
from eval.tasks import TASKS
from scripts import lmms_eval_local

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "scripts" / "lmms_eval_plugin" / "nanovlm_grades_lmms_eval"
RUN = ROOT / "scripts" / "run_lmms_eval.sh"
ENVIRONMENT = Path(os.environ.get("LMMS_EVAL_ENV", Path.home() / ".cache/nanovlm-grades/lmms-eval")).absolute()
CPU = torch.device("cpu")
COMPARED = ("mmstar", "pope", "ai2d", "vqav2_val")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "model"
    save_speaking_model(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_data(tmp_path_factory.mktemp("lmms") / "data", COMPARED)


@pytest.fixture(scope="module")
def asker(checkpoint):
    return Asker(checkpoint, CPU, contextlib.nullcontext())


class StubModel:
    """lmms_eval.api.model.lmms, as far as the plug-in uses it."""

    def __init__(self):
        self.rank, self.task_dict = 0, {}

    def clean(self):
        pass


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in's module, for an lmms-eval of which only the base class is there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    base = types.ModuleType("lmms_eval.api.model")
    base.lmms = StubModel
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    return load_plugin


def load_plugin():
    spec = importlib.util.spec_from_file_location("nanovlm_grades_lmms_eval_model", PLUGIN / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS = [{"question": f"which answer {'red ' * i}is there ?", "image": picture(16, 16, seed=i)} for i in range(5)]
OPTIONS = [{"max_new_tokens": 6}, {"max_new_tokens": 6, "until": ["\n\n", "."]}, {"max_new_tokens": 3, "until": "."}]


def arguments(checkpoint):
    return {"pretrained": str(checkpoint), "device": "cpu", "dtype": "float32"}


def images_of(document):
    return [document["image"]]


def messages_of(document):
    parts = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("kind", ["Simple", "Chat"])
def test_answers_are_those_of_the_asker_in_the_order_of_the_requests(plugin, checkpoint, asker, kind):
    model = getattr(plugin(), f"NanoVLMGrades{kind}")(**arguments(checkpoint), batch_size=2)
    assert model.is_simple == (kind == "Simple")
    model.task_dict = {"made_up": {"test": DOCUMENTS}}
    requests, expected = [], []
    for number, document in enumerate(DOCUMENTS):
        options = OPTIONS[number % 3]
        where = (number, "made_up", "test")
        args = (document["question"], options, images_of, *where)
        requests.append(args if kind == "Simple" else (document["question"], messages_of, options, *where))
        question = asker.reader.read({"user": document["question"]}, [document["image"]])
        stop = ["."] if "until" in options else []
        expected += asker.answer([question], options["max_new_tokens"], stop)
    assert model.generate_until([SimpleNamespace(args=args) for args in requests]) == expected
    assert len(set(expected)) > 2
    model.clean()
    assert model.asker is None


@pytest.mark.parametrize("kind", ["Simple", "Chat"])
def test_what_cannot_be_asked_has_an_empty_answer_and_a_reason(plugin, checkpoint, asker, kind, capsys):
    model = getattr(plugin(), f"NanoVLMGrades{kind}")(**arguments(checkpoint), batch_size=2)
    room, image = asker.model.cfg.lm_max_position_embeddings, picture()
    documents = [
        {"question": "what is there ?", "image": b"junk"},
        {"question": "what <|im_end|> is there ?", "image": image},
        {"question": "red " * room, "image": image},
        DOCUMENTS[1],  # whose answer may be too long
        DOCUMENTS[1],
    ]
    model.task_dict = {"made_up": {"test": documents}}
    requests = []
    for number, document in enumerate(documents):
        options, where = {"max_new_tokens": room if number == 3 else 6}, (number, "made_up", "test")
        args = (document["question"], options, images_of, *where)
        requests.append(args if kind == "Simple" else (document["question"], messages_of, options, *where))
    answers = model.generate_until([SimpleNamespace(args=args) for args in requests])
    assert answers[:4] == [""] * 4
    last = asker.reader.read({"user": documents[4]["question"]}, [documents[4]["image"]])
    assert answers[4] == asker.answer([last], 6)[0] != ""
    said = dict(re.findall(r"made_up: question (\d) cannot be asked: (.*)", capsys.readouterr().err))
    assert sorted(said) == ["0", "1", "2", "3"]
    for number, reason in enumerate(("image does not decode", "must not stand in it", "positions", "positions")):
        assert reason in said[str(number)]


def test_what_it_cannot_do_is_said(plugin, checkpoint):
    model = plugin().NanoVLMGradesSimple(**arguments(checkpoint))
    with pytest.raises(NotImplementedError, match=r"evaluate\.py --likelihood can"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


def test_wrong_arguments_are_named_in_a_sentence(plugin, checkpoint):
    model = plugin().NanoVLMGradesSimple
    with pytest.raises(ValueError, match=r"pretrained: is needed.*prompt_style=x: must be lmms-eval or nanovlm"):
        model(prompt_style="x")
    with pytest.raises(ValueError, match=r"colour: is none.*dtype=int8: must be.*--batch_size 0: must be"):
        model(pretrained=str(checkpoint), colour=1, dtype="int8", batch_size=0)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        model(pretrained=str(checkpoint.parent))


def test_the_checkouts_evaluate_py_in_place_of_the_package_is_named(plugin, monkeypatch):
    import evaluate

    assert Path(evaluate.__file__) == ROOT / "evaluate.py"
    with pytest.raises(ImportError, match="start the program lmms-eval instead of python -m lmms_eval"):
        plugin()


def test_decoding_is_what_the_task_says():
    assert Decoding.of({}) == Decoding(50)
    assert Decoding.of({}, 7) == Decoding(7)
    given = {"max_new_tokens": 9, "until": ["\n\n", "ASSISTANT:"], "temperature": 0, "do_sample": False, "num_beams": 1}
    assert Decoding.of(given, 7) == Decoding(9, ("ASSISTANT:",))
    sampled = Decoding.of({"do_sample": True, "temperature": 0.5, "top_k": 5.0}).sampling
    assert dict(sampled) == {"temperature": 0.5, "top_p": 1.0, "top_k": 5}
    with pytest.raises(ValueError, match="num_beams 3: must be 1"):
        Decoding.of({"num_beams": 3})


def test_a_chat_with_one_question_is_asked_as_the_simple_one(asker, data):
    """In both styles, with evaluate.py's prompts."""
    for style in ("lmms-eval", "nanovlm"):
        benchmark = open_benchmark(TASKS["mmstar"], data, 3, style, True, alone=False)
        for question in benchmark.questions:
            images, text = benchmark.images(question), question.item.prompt
            ours = asker.reader.read({"user": question.prompt}, images, "", question.answer_prefix)
            simple = simple_question(asker.reader, "mmstar", text, images, style)
            content = [*({"type": "image", "url": one} for one in images), {"type": "text", "text": text}]
            chat = chat_question(asker.reader, "mmstar", [{"role": "user", "content": content}], style)
            assert ours.prompts == simple.prompts == chat.prompts
            assert torch.equal(ours.images, chat.images)


def test_a_chat_has_its_images_where_they_stand(asker):
    image = {"type": "image", "url": picture()}
    said = [{"type": "text", "text": "what is"}, image, {"type": "text", "text": "there"}]
    messages = [{"role": "system", "content": "the"}, {"role": "user", "content": "a"}]
    messages += [{"role": "assistant", "content": "b"}, {"role": "user", "content": said}]
    question = chat_question(asker.reader, "t", messages, "lmms-eval")
    slots = "<|image|>" * 4
    system = "<|im_start|>system\nthe<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    expected = f"{system}<|im_start|>user\nwhat is{slots}there<|im_end|>\n<|im_start|>assistant\n"
    assert question.prompts == [asker.reader.ids(expected)]
    assert len(question.images) == 1
    for wrong, message in [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "t: holds video"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the user last"),
        ([{"role": "user", "content": "a <|im_end|>"}], "must not stand in it"),
    ]:
        with pytest.raises(ValueError, match=message):
            chat_question(asker.reader, "t", wrong, "lmms-eval")


def test_batches_of_a_fixed_size_do_not_shrink():
    def refuses(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(ValueError, match="--batch_size 4: out of memory"):
        list(Batches(4, CPU).run([1, 2, 3], refuses))


@pytest.fixture
def tasks(tmp_path):
    """A folder like that of lmms-eval's tasks."""
    folder = tmp_path / "tasks" / "mmstar"
    folder.mkdir(parents=True)
    (folder / "mmstar.yaml").write_text(
        'dataset_path: Lin-Chen/MMStar\ntask: "mmstar"\ninclude: base\ndoc_to_text: !function utils.text\n'
    )
    (folder / "base").write_text("dataset_kwargs:\n  token: True\ntest_split: val\ndataset_path: other\n")
    (folder / "pope.yaml").write_text("dataset_path: a/POPE\ntask: pope\ntest_split: test\ndataset_name: Full\n")
    return tmp_path / "tasks"


def test_a_task_of_lmms_eval_on_local_data(tasks, data):
    made = lmms_eval_local.local_task(tasks, "mmstar", data)
    [file] = (data / "mmstar").rglob("*.parquet")
    assert made == {
        "include": str(tasks / "mmstar" / "mmstar.yaml"), "task": "mmstar_local", "dataset_name": None,
        "dataset_path": "parquet", "dataset_kwargs": {"data_files": {"val": [str(file)]}},
    }  # fmt: skip
    assert yaml.safe_load(yaml.safe_dump(made)) == made
    made = lmms_eval_local.local_task(tasks, "pope", data)
    assert made["dataset_path"] == str(data / "pope")
    assert made["dataset_kwargs"] == {"load_from_disk": True}


def test_data_that_lmms_eval_cannot_read_is_named(tasks, data, tmp_path):
    with pytest.raises(ValueError, match="--tasks nothing: is no single task"):
        lmms_eval_local.local_task(tasks, "nothing", data)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lmms_eval_local.local_task(tasks, "pope", tmp_path / "nowhere")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "test.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"must hold \.parquet files"):
        lmms_eval_local.local_task(tasks, "pope", tmp_path / "json")
    with pytest.raises(ValueError, match="must be a saved DatasetDict"):
        lmms_eval_local.local_task(tasks, "pope", data / "pope" / "test")


def test_the_files_of_tasks_and_a_checkpoint_that_is_not_there(tasks, data, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lmms_eval_local, "tasks_folder", lambda: tasks)
    flags = ["--tasks", "mmstar, pope", "--data_root", str(data), "--folder", str(tmp_path / "made"), "--checkpoint"]
    lmms_eval_local.main([*flags, str(checkpoint)])
    assert capsys.readouterr().out == "mmstar_local,pope_local\n"
    assert yaml.safe_load((tmp_path / "made" / "pope_local.yaml").read_text())["dataset_path"] == str(data / "pope")
    with pytest.raises(SystemExit, match=r"error: --checkpoint .* holds no checkpoint"):
        lmms_eval_local.main([*flags, str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--checkpoint: is needed"),
        (["--checkpoint", "a"], "--data_root: is needed"),
        (["--checkpoint", "a", "--data_root", "nowhere"], "--data_root nowhere: no such folder"),
        (["--checkpoint", "a", "--data_root", ".", "--limit", "0"], "--limit 0: must be a whole number >= 1"),
        (["--checkpoint"], "--checkpoint: needs a value"),
        (["--tsks", "a"], "--tsks: no such flag"),
    ],
)
def test_flags_of_the_script_that_cannot_be_meant(flags, problem):
    done = subprocess.run(["bash", str(RUN), *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert problem in done.stderr


def run(command, **options):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LMMS_EVAL_ENV": str(ENVIRONMENT)}
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def evaluated(output, data, *flags):
    """Ours: (task -> answers in order, task -> numbers under lmms-eval's names)."""
    run([sys.executable, ROOT / "evaluate.py", "--data_root", data, "--output", output, *flags])
    answers = {}
    for line in (output / "answers.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers.setdefault(row["task"], []).append(row["answer"])
    [layout] = (output / "lmms_eval").glob("*_results.json")
    return answers, json.loads(layout.read_text())["results"]


def lmms_evaluated(output, checkpoint, data, *flags):
    """The same of lmms-eval itself, and its files of samples by task."""
    command = ["bash", RUN, "--checkpoint", checkpoint, "--data_root", data, "--output", output]
    command += ["--model_args", "dtype=float32", *flags]
    results = json.loads(Path(run(command, cwd=ROOT).splitlines()[-1]).read_text())
    answers, files = {}, {}
    for path in output.rglob("*_samples_*_local.jsonl"):
        task = path.stem.split("_samples_")[1].removesuffix("_local")
        rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        raw = [row.get("resps", row["filtered_resps"]) for row in rows]  # left out where no filter has changed it
        answers[task] = [one[0] if isinstance(one, list) else one for one in raw]
        files[task] = path
    return answers, {name.removesuffix("_local"): found for name, found in results["results"].items()}, files


def assert_same_numbers(ours, theirs):
    """All that have a name of lmms-eval, by the rule of its version; its standard errors are computed otherwise."""
    names = [name for name in ours if name != "alias" and "_stderr" not in name and "[" not in name]
    assert names
    for name in names:
        assert theirs[name] == pytest.approx(ours[name], abs=1e-12), name


needs_lmms_eval = pytest.mark.skipif(
    not (ENVIRONMENT / "bin" / "lmms-eval").exists(), reason=f"{ENVIRONMENT}: lmms-eval is not installed there"
)


@needs_lmms_eval
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_table_of_tasks_says_what_lmms_eval_says(task):
    [tasks] = ENVIRONMENT.glob("lib/python*/site-packages/lmms_eval/tasks")
    theirs = lmms_eval_local.settings_of(lmms_eval_local.find_task(tasks, task.name))
    assert Decoding.of(theirs.get("generation_kwargs") or {}) == Decoding(task.max_new_tokens, task.stop)
    assert theirs["dataset_path"] == task.hub_id
    assert theirs.get("dataset_name") == task.config
    assert task.split == (theirs.get("test_split") or theirs["validation_split"])


@pytest.mark.slow
@needs_lmms_eval
@pytest.mark.parametrize(("tasks", "more"), [(COMPARED, []), (("mmstar",), ["--", "--force_simple"])])
def test_lmms_eval_itself_gets_the_same_answers_and_numbers(checkpoint, data, tmp_path, tasks, more):
    version = "from importlib.metadata import version; print(version('lmms-eval'))"
    assert run([ENVIRONMENT / "bin" / "python", "-c", version]) == "0.7.3\n"  # of which our first rules are
    flags = ["--tasks", ",".join(tasks)]
    answers, numbers = evaluated(tmp_path / "ours", data, "--checkpoint", checkpoint, "--dtype", "float32", *flags)
    their_answers, their_numbers, files = lmms_evaluated(tmp_path / "theirs", checkpoint, data, *flags, *more)
    assert their_answers == answers
    for task in tasks:
        assert len(set(answers[task])) > 5, task
        assert numbers[task][f"{TASKS[task].lmms_metrics[TASKS[task].main]},{TASKS[task].lmms_filter}"] > 0, task
        assert_same_numbers(numbers[task], their_numbers[task])
        again = tmp_path / f"again_{task}"
        _, counted = evaluated(again, data, "--answers", files[task], "--tasks", task)
        assert_same_numbers(counted[task], their_numbers[task])
