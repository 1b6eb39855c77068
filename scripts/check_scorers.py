"""Compare the scorers with the public scripts they follow, on random and nasty answers.

Needs a clone of github EvolvingLMMs-Lab/lmms-eval and, in an environment of its own, what its scorers import:

    uv run --no-project --with pycocoevalcap,loguru,pandas,requests,pillow,pyyaml,sacrebleu,tqdm \\
        python scripts/check_scorers.py --lmms_eval CLONE [--texts SENTENCES.txt]

--texts: captions, one a line, to compare the tokens with those of Stanford's PTBTokenizer, which needs Java. Prints a
line for each rule: answers compared, and how many scores differ by more than 1e-6.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import string
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.scorers import captions, choice, mmmu, ptb, text, vqa, yes_no

RANDOM = random.Random(0)
WORDS = (  # noqa: SIM905
    "a A b B c C d D E the an cat red 2 two ten 10 yes no Yes No not answer is option ( ) (A) (B) A. B. C: D) B, is: I "
    "correct best choose pick dogs' don't dont couldnt've 3,000 1.5 .5 5% 12.30 10:30 $5 -3 1e3 isnt somebody'd ain’t "
    "bus. bus? 'bus' \"x\" a-b x/y [z] {q} nan none None zero , . ! ? ; : ' = == => thus so result final could be "
    "答案是 정답은 ＡＢＣ　Ｄ café ß Option the_answer_is"
).split(" ")
PHRASES = ("the answer is ", "Answer: ", "option ", "The correct option is ", "I choose ", "so ", "= ", "the best is\n")
LETTERS = string.ascii_letters + string.digits + string.punctuation + " "
TOLERANCE = 1e-6


def answers(count: int) -> list[str]:
    """Made-up answers: few or many words, in any case, with all kinds of space and marks."""

    def word() -> str:
        kind = RANDOM.random()
        if kind < 0.75:
            return RANDOM.choice(WORDS)
        if kind < 0.9:
            return "".join(RANDOM.choice(LETTERS) for _ in range(RANDOM.randint(1, 6)))
        return RANDOM.choice(PHRASES)

    def one() -> str:
        count = RANDOM.choice([0, 1, 1, 1, 1, 2, 2, 3, 4, 6, 8, 14])
        joined = RANDOM.choice([" ", " ", " ", "", "\n", "\t", ". "]).join(word() for _ in range(count))
        return RANDOM.choice([joined, joined, joined.lower(), joined.upper(), f" {joined} ", f"{joined}."])

    return [one() for _ in range(count)]


def prepare(root: Path) -> None:
    """Let modules of lmms-eval be imported one by one: its packages without what they import, its parts that no scorer
    needs in name only."""
    for name in ("", ".tasks", ".api", ".filters"):
        package = types.ModuleType(f"lmms_eval{name}")
        package.__path__ = [str(root / "lmms_eval" / name.removeprefix("."))]
        sys.modules[package.__name__] = package
    for name in ("verifiers", "verifiers.openai", "api.registry"):
        empty = types.ModuleType(f"lmms_eval.{name}")
        empty.__getattr__ = lambda _: lambda *_, **__: lambda function: function  # type: ignore[method-assign]
        sys.modules[empty.__name__] = empty
    importlib.import_module("loguru").logger.remove()


def load(root: Path, path: str) -> Any:
    """A module of lmms-eval."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), root / "lmms_eval" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_before(root: Path, commit: str, path: str) -> Any:
    """The module as it was before a commit."""
    show = ["git", "-C", str(root), "show", f"{commit}~1:lmms_eval/{path}"]
    text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lmms_eval" / f"before_{commit}.py"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        return load(Path(folder), file.name)


def check(name: str, reference: Callable[..., float], ours: Callable[..., float], cases: Iterable[tuple]) -> None:
    count, different = 0, []
    for case in cases:
        count += 1
        if abs(float(reference(*copy.deepcopy(case))) - float(ours(*case))) > TOLERANCE:
            different.append(case)
    print(f"{name:32s} {count:6d} compared, {len(different)} differ {different[:3] or ''}", flush=True)


def check_choices(root: Path, given: list[str]) -> None:
    stripped = [(one.strip(), RANDOM.choice("ABCD")) for one in given]
    mmstar = load(root, "tasks/mmstar/utils.py")
    check("MMStar since 2026-04", mmstar.exact_match, lambda a, b: choice.letter_anywhere(a, b).score, stripped)
    before = load_before(root, "9ca4445d", "tasks/mmstar/utils.py")
    check("MMStar until 2026-04", before.exact_match, lambda a, b: choice.first_letter(a, b).score, stripped)
    science = load(root, "tasks/scienceqa/utils.py").sqa_process_results

    def of_science(answer: str, letter: str) -> float:
        return science({"choices": list("ABCD"), "answer": "ABCD".index(letter)}, [answer])["exact_match"]

    check("ScienceQA", of_science, lambda a, b: choice.letter_with_stop(a, b).score, stripped)
    seed = load(root, "tasks/seedbench/utils.py")

    def of_seed(answer: str, letter: str) -> float:
        row = seed.seed_process_result({"answer": letter, "data_type": "image", "question_id": 0}, [answer])
        return seed.seed_aggregation_result([row["seed_all"]])

    check("SEED-Bench", of_seed, lambda a, b: choice.first_character(a, b).score, stripped)
    real = load(root, "tasks/realworldqa/utils.py").realworldqa_process_results
    check(
        "RealWorldQA since 2026-04",
        lambda answer, truth: real({"answer": truth}, [answer])["exact_match"],
        lambda answer, truth: choice.realworldqa_since_2026_04(answer, truth).score,
        [(answer, RANDOM.choice(["A", "B", "Yes", "2", answer[:9]])) for answer, _ in stripped],
    )
    import pandas as pd

    mmbench = load(root, "tasks/mmbench/mmbench_evals.py").MMBench_Evaluator()

    def of_mmbench(answer: str, letter: str, choices: dict) -> float:
        return mmbench.eval_sub_data(pd.DataFrame([{"index": 0, "prediction": answer, **choices}]), {0: letter}, True)

    texts = ["cat", "red", "nan", "Two dogs", "5", "a b"]
    cases = [(*pair, {letter: RANDOM.choice(texts) for letter in "ABCD"}) for pair in stripped]
    check("MMBench static", of_mmbench, lambda a, b, c: choice.mmbench(a, b, c).score, cases)


def check_texts(root: Path, given: list[str]) -> None:
    metric = load(root, "api/metrics.py")

    def same(answer: str, truth: str) -> float:
        found = metric.exact_match_hf_evaluate([answer], [truth], ignore_case=True, ignore_punctuation=True)
        return found["exact_match"]

    pairs = [(one.strip(), RANDOM.choice(["cat", "A", "", one.upper().strip(), f"{one.strip()}!"])) for one in given]
    check("GQA", same, lambda a, b: choice.same_words(a, b).score, pairs)
    diagrams = load(root, "tasks/ai2d/utils.py").MultiChoiceRegexFilter(regex_pattern="x")
    check(
        "AI2D",
        lambda a, b: same(diagrams.apply([[a]], [{}])[0].strip(), b),
        lambda a, b: choice.letter_or_start(a, b).score,
        [(one, RANDOM.choice("ABCD")) for one in given],
    )
    listed = [(answer, [truth, RANDOM.choice(given), answer[: RANDOM.randint(0, 20)] + "z"]) for answer, truth in pairs]
    check("ANLS", lambda a, b: metric.anls(b, [a])["anls"], lambda a, b: text.anls(a, b).score, listed)
    chart = load(root, "tasks/chartqa/utils.py").relaxed_correctness
    numbers = ["5", "5.2", "10%", "0", "-3", "1e3", "nan", "inf", "3,000", "Yes", "", "0.05", "105", "%", "1_0"]
    mixed = [(RANDOM.choice([answer, *numbers]), RANDOM.choice([*numbers, answer.upper()])) for answer, _ in pairs]
    check("ChartQA", chart, lambda a, b: text.relaxed(a, b).score, mixed)
    ocr = load(root, "tasks/ocrbench/utils.py").ocrbench_process_results

    def of_ocr(answer: str, truths: list[str], dataset: str) -> float:
        row = ocr({"answer": truths, "dataset": dataset, "question_type": ""}, [answer])
        return row["ocrbench_accuracy"]["score"]

    ocr_before = load_before(root, "f54dd288", "tasks/ocrbench/utils.py").ocrbench_process_results

    def of_ocr_before(answer: str, truths: list[str], dataset: str) -> float:
        row = ocr_before({"answer": truths, "dataset": dataset, "question_type": ""}, [answer])
        return row["ocrbench_accuracy"]["score"]

    parts = [(a, [a[1:5], a.upper()[:4], "ＡＢＣ"], RANDOM.choice(["HME100k", "IIIT5K"])) for a, _ in pairs]
    check("OCRBench since 2026-07-30", of_ocr, lambda a, b, c: text.ocr_contains(a, b, c).score, parts)
    check("OCRBench until 2026-04", of_ocr_before, lambda a, b, c: text.ocr_contains(a, b, c, True).score, parts)
    pope = load(root, "tasks/pope/utils.py").pope_process_results
    asked = [(RANDOM.choice([a, "Yes", "yes.", "no", "No, it"]), RANDOM.choice(["yes", "no"])) for a, _ in pairs]

    def of_pope(answer: str, truth: str) -> float:
        return pope({"question_id": 0, "answer": truth}, [answer])["pope_accuracy"]["score"]

    check("POPE", of_pope, lambda a, b: yes_no.pope_exact(a, b).score, asked)
    load(root, "tasks/hallusion_bench/utils.py")
    hallusion = load(root, "tasks/hallusion_bench/evaluate_hb.py").hb_aggregation_result_intern
    check(
        "HallusionBench",
        lambda a, b: hallusion([{"model_prediction": a, "gt_answer": "1" if b == "yes" else "0"}], "aAcc"),
        lambda a, b: yes_no.hallusion_yes(a, b).score,
        asked,
    )


def check_vqa(root: Path, given: list[str]) -> None:
    cases = []
    for one in given:
        alike = [one, one.lower(), one.upper(), f"{one}.", f" {one}"]
        count, others = RANDOM.choice([0, 1, 2, 3, 4, 7, 10]), RANDOM.choices(given, k=3)
        truths = RANDOM.choices(alike, k=count) + RANDOM.choices(others, k=10 - count)
        cases.append((one.strip(), truths))
    for name, form in (("textvqa", vqa.evalai_form), ("ok_vqa", vqa.evalai_form), ("vqav2", vqa.vqa_form)):
        script = getattr(load(root, f"tasks/{name}/utils.py"), f"{name}_process_results")

        def reference(answer: str, truths: list[str], script: Any = script, objects: bool = name == "vqav2") -> float:
            of: list = [{"answer": one, "id": i} for i, one in enumerate(truths)] if objects else truths
            return script({"question_id": 0, "answers": of}, [answer])["exact_match"]

        check(name, reference, lambda a, b, form=form: vqa.soft_accuracy(a, b, form).score, cases)


def check_mmmu(root: Path, given: list[str]) -> None:
    script, shared = load(root, "tasks/mmmu/utils.py"), load(root, "tasks/_task_utils/mmmu_mcq_utils.py")
    shared.random = types.SimpleNamespace(choice=lambda _: None)  # what is drawn where there is no letter
    choices = dict(zip("ABCD", ["cat", "the red bus", "10%", "x"], strict=True))

    def letter(answer: str) -> float:
        return ord(shared.parse_mmmu_multi_choice_response(answer, list(choices), choices) or "-")

    check("MMMU letter", letter, lambda a: ord(mmmu.read_letter(a, choices) or "-"), [(a.strip(),) for a in given])
    asked = [(a.strip(), [RANDOM.choice(["5", "1.5", "1000", "cat", "a", a.strip()[2:8]])]) for a in given]
    check(
        "MMMU open",
        lambda answer, truths: script.eval_open(truths, script.parse_open_response(answer)),
        lambda answer, truths: mmmu.open_question(answer, truths).score,
        asked,
    )


def check_captions(count: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    words = ("a", "the", "man", "dog", "on", "in", "with", "red", "blue", "bus", "two", "riding", "of", "x")
    references = [[RANDOM.choices(words, k=RANDOM.randint(1, 14)) for _ in range(5)] for _ in range(count)]
    said = [RANDOM.choice([*of, RANDOM.choices(words, k=RANDOM.randint(0, 20))]) for of in references]
    wanted = {i: [" ".join(one) for one in of] for i, of in enumerate(references)}
    given = {i: [" ".join(one)] for i, one in enumerate(said)}
    pairs = zip(said, references, strict=True)
    cider = zip(Cider().compute_score(wanted, given)[1], captions.cider_d(said, references), strict=True)
    rouge = zip(Rouge().compute_score(wanted, given)[1], (captions.rouge_l(*pair) for pair in pairs), strict=True)
    sums = [sum(one) for one in zip(*map(captions.bleu_counts, said, references), strict=True)]
    bleu = zip(Bleu(4).compute_score(wanted, given, verbose=0)[0], captions.bleu(sums), strict=True)
    for name, both in (("CIDEr-D", cider), ("ROUGE-L", rouge), ("BLEU-1 to -4, of the set", bleu)):
        check(name, lambda theirs, _: theirs, lambda _, mine: mine, both)


def check_tokens(path: Path) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    java = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    different = [line for i, line in enumerate(lines) if java[i][0] != " ".join(ptb.tokens(line))]
    print(f"tokens of {path.name}: {len(lines)} captions, {len(different)} differ from Java's {different[:5] or ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lmms_eval", type=Path, required=True, help="clone of github EvolvingLMMs-Lab/lmms-eval")
    parser.add_argument("--texts", type=Path, help="captions, one a line")
    parser.add_argument("--count", type=int, default=6000, help="answers per rule")
    given = parser.parse_args()
    if not (given.lmms_eval / "lmms_eval/tasks").is_dir():
        parser.error(f"--lmms_eval {given.lmms_eval}: must be a clone with a folder lmms_eval/tasks")
    prepare(given.lmms_eval)
    made = answers(given.count)
    for run in (check_choices, check_texts, check_vqa, check_mmmu):
        run(given.lmms_eval, made)
    check_captions(min(given.count, 1500))
    if given.texts:
        check_tokens(given.texts)


if __name__ == "__main__":
    main()
