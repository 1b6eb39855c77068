"""answers.html: answers with their pictures and videos, wrong ones first, in one file that opens offline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.html_page import page, text
from eval.benchmarks import Benchmark
from eval.output import UNKNOWN, is_detail, percent
from eval.page_pictures import STYLE as PICTURE_STYLE
from eval.page_pictures import PagePictures

ROWS = 200  # answers on a page
WRONG_ROWS = 150  # of them at most, where there are others
PICTURES, FRAMES = 4, 16  # per answer, and per video
SIDE, FRAME_SIDE = 224, 128  # pixels of the longer side of a picture, and of a frame
LETTERS = 2000  # of a text
VERDICTS = {"wrong": "wrong", "partly": "partly right", "right": "right"}
STYLE = """
table { border-collapse: collapse; font-size: .85em; margin: .4em 0 } th { color: #555; font-weight: 600 }
td, th { text-align: left; padding: .1em .8em .1em 0; vertical-align: top; font-variant-numeric: tabular-nums }
.note { color: #555; font-size: .85em; overflow-wrap: anywhere }
form { position: sticky; top: 0; background: #fff; padding: .6em 0; border-bottom: 1px solid #ccc; z-index: 1 }
form label { margin-right: 1.2em } select { font: inherit; max-width: 24em }
article { display: flex; gap: 1em; border-left: .3em solid #d90; padding: .2em 0 .2em .8em; margin: 1.2em 0 }
article.wrong { border-color: #c33 } article.right { border-color: #2a7 } article[hidden] { display: none }
.pictures { flex: 0 0 auto; max-width: 224px } .said { flex: 1; min-width: 0 } .said h2 { margin: 0 0 .3em }
.pictures img { max-width: 100%; display: block; margin-bottom: .4em; border: 1px solid #bbb }
dl { display: grid; grid-template-columns: 5em 1fr; margin: 0; gap: .15em .6em } dt { color: #777; font-size: .85em }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere } dd.answer { font-weight: 600 }
dd.rule { color: #555; font-size: .85em }
@media (max-width: 40em) { article { display: block } }
"""
SCRIPT = """
const verdict = document.getElementById("verdict"), group = document.getElementById("group");
const articles = [...document.querySelectorAll("article")], shown = document.getElementById("shown");
function filter() {
  let count = 0;
  for (const one of articles) {
    one.hidden = (verdict.value && one.className !== verdict.value)
      || (group.value && !JSON.parse(one.dataset.groups).includes(group.value));
    count += !one.hidden;
  }
  shown.textContent = count + " of " + articles.length + " answers";
}
verdict.onchange = group.onchange = filter;
filter();
"""


def make_page(
    results: Mapping[str, Any], rows: Mapping[str, Sequence[dict]], benchmarks: Mapping[str, Benchmark]
) -> str:
    """The page. results: as in results.json; rows: of answers.jsonl, by task; benchmarks: by task, for the pictures.

    A score is that of the task's first rule. Each task has an equal share of the ROWS.
    """
    share = max(1, ROWS // max(1, len(rows)))
    chosen = {task: choose(of_task, share) for task, of_task in rows.items()}
    pictures = _Pictures()
    shown = [row for task in rows for row in chosen[task]]
    shown.sort(key=row_score)  # stable: tasks and rows stay in order
    articles = [_article(row, *pictures.of_row(benchmarks[row["task"]], row), len(rows) > 1) for row in shown]
    title = f"Answers of {_model(results)}"
    body = [
        *_numbers(results),
        *(f'<p class="note">{text(_counts(task, of_task, chosen[task]))}</p>' for task, of_task in rows.items()),
        f'<p class="note">{text(pictures.note())}</p>',
        _form(shown, len(rows) > 1),
        *articles,
    ]
    return page(title, PICTURE_STYLE + STYLE, body, SCRIPT)


def row_score(row: Mapping[str, Any]) -> float:
    """By the first rule."""
    return next(iter(row["rules"].values()))["score"]


def _verdict(row: Mapping[str, Any]) -> str:
    score = row_score(row)
    return "wrong" if score <= 0 else "right" if score >= 1 else "partly"


def choose(rows: Sequence[dict], count: int) -> list[dict]:
    """At most `count` rows in order: wrong ones up to WRONG_ROWS of ROWS, more where there are no others. Of more than
    fit every n-th one, so that they are of all parts of the data."""
    wrong = [row for row in rows if _verdict(row) == "wrong"]
    others = [row for row in rows if _verdict(row) != "wrong"]
    room = max(count * WRONG_ROWS // ROWS, count - len(others))
    wrong = _spread(wrong, room)
    return wrong + _spread(others, count - len(wrong))


def _spread(rows: list[dict], count: int) -> list[dict]:
    if len(rows) <= count:
        return rows
    return [rows[number * len(rows) // count] for number in range(count)]


def _counts(task: str, rows: Sequence[dict], chosen: Sequence[dict]) -> str:
    there, here = Counter(map(_verdict, rows)), Counter(map(_verdict, chosen))
    parts = (f"{here[one]} of {there[one]:,} {name}" for one, name in VERDICTS.items() if there[one])
    spread = ", spread evenly over the data; answers.jsonl has all" if len(chosen) < len(rows) else ""
    return f"{task}: on this page {', '.join(parts)}{spread}."


def _model(results: Mapping[str, Any]) -> str:
    model = results.get("model") or "given answers"
    return model["checkpoint"] if isinstance(model, Mapping) else str(model)


def _numbers(results: Mapping[str, Any]) -> Iterator[str]:
    """A table for each task, a column for each rule, and how the answers were made."""
    yield '<p class="note">In percent; ± is one standard error. Right and wrong are by the first rule of a task.</p>'
    for name, task in results["tasks"].items():
        rules: Mapping[str, Any] = task["rules"]
        names = {metric: one for found in rules.values() for metric, one in found["metrics"].items()}
        heads = "".join(f"<th>{text(head)}</th>" for head in ("rows", "chance", *rules))
        yield f"<table><tr><th>{text(name)}</th>{heads}</tr>"
        for metric, any_rule in names.items():
            if is_detail(metric):
                continue
            found = [rules[rule]["metrics"].get(metric) for rule in rules]
            values = [f"{percent(one['value'])} ± {percent(one['stderr'])}" if one else "–" for one in found]
            cells = [str(any_rule["rows"]), percent(any_rule["chance"]), *values]
            yield f"<tr><td>{text(metric)}</td>{''.join(f'<td>{value}</td>' for value in cells)}</tr>"
        yield "</table>"
        decoding = task.get("decoding") or UNKNOWN
        if isinstance(decoding, Mapping):
            decoding = ", ".join(f"{key} {value}" for key, value in decoding.items())
        data = f"{task['data']['source']} {task['data']['split']}".strip()
        style = task["prompt"]["style"] or UNKNOWN
        yield f'<p class="note">{text(f"{name}: data {data}; prompt style: {style}; decoding: {decoding}")}</p>'


def _groups(row: Mapping[str, Any], several: bool) -> list[str]:
    """What the filter may ask for: the task, where there are several, and each category with its value."""
    of_task = [f"task: {row['task']}"] if several else []
    return of_task + [f"{key}: {value}" for key, value in row["categories"].items()]


def _form(rows: Sequence[dict], several: bool) -> str:
    groups = Counter(group for row in rows for group in _groups(row, several))
    verdicts = Counter(map(_verdict, rows))
    counted = [(one, f"{name} ({verdicts[one]})") for one, name in VERDICTS.items() if verdicts[one]]
    lists = (
        ("verdict", "Score", counted),
        ("group", "Category", [(one, f"{one} ({groups[one]})") for one in sorted(groups)]),
    )
    fields = []
    for name, label, choices in lists:
        options = "".join(f'<option value="{text(value)}">{text(said)}</option>' for value, said in choices)
        fields.append(f'<label>{label} <select id="{name}"><option value="">all</option>{options}</select></label>')
    return f'<form autocomplete="off">{"".join(fields)}<span class="note" id="shown"></span></form>'


def _article(row: Mapping[str, Any], strips: str, pictures: str, several: bool) -> str:
    """One answer: what it is about, prompt, answer, truth, and by each rule what was parsed; rules that agree in one
    line."""
    prompt_name = "question" if row["prompt"] is None else "prompt"
    said = [(prompt_name, row["question"] if row["prompt"] is None else row["prompt"], "")]
    if row.get("answer_prefix"):
        said.append(("begins", row["answer_prefix"], ""))
    said.append(("answer", row["answer"], "answer"))
    said.append(("truth", _truth(row["truth"]), ""))
    agreeing: dict[tuple[str | None, float], list[str]] = {}
    for rule, one in row["rules"].items():
        agreeing.setdefault((one["parsed"], one["score"]), []).append(rule)
    for (parsed, score), rules in agreeing.items():
        found = "nothing that can be read" if parsed is None else f'"{_short(str(parsed))}"'
        said.append(("parsed", f"{found}: score {score:.3g} by {', '.join(rules)}", "rule"))
    terms = "".join(f'<dt>{term}</dt><dd class="{kind}">{text(_short(value))}</dd>' for term, value, kind in said)
    groups = _groups(row, several)
    label = " · ".join([row["id"], *groups])
    return (
        f'<article class="{_verdict(row)}" data-groups="{text(json.dumps(groups))}">{pictures}<div class="said">'
        f"<h2>{text(label)}</h2>{strips}<dl>{terms}</dl></div></article>"
    )


def _truth(truth: Mapping[str, Any]) -> str:
    """The answers that are right, with how often each was given, and what else the rules know."""
    counts = Counter(_answers(truth))
    parts = [f"{one} ({count} times)" if count > 1 else one for one, count in counts.most_common()]
    others = {key: value for key, value in truth.items() if key not in ("answer", "answers") and value}
    said = " | ".join(parts)
    return f"{said}   {json.dumps(others, ensure_ascii=False)}" if others else said


def _answers(truth: Mapping[str, Any]) -> list[str]:
    answers = truth["answers"] if "answers" in truth else [truth["answer"]] if "answer" in truth else []
    return list(map(str, answers))


def _short(value: str) -> str:
    return value if len(value) <= LETTERS else f"{value[:LETTERS]} … ({len(value) - LETTERS:,} more letters)"


class _Pictures(PagePictures):
    """Those of questions of benchmarks."""

    def __init__(self) -> None:
        super().__init__(SIDE, FRAME_SIDE, PICTURES, FRAMES)
        self.numbers: dict[str, dict[str, int]] = {}  # task -> id -> place in the benchmark's questions

    def of_row(self, benchmark: Benchmark, row: Mapping[str, Any]) -> tuple[str, str]:
        """HTML of (the videos, the pictures) of an answer; "" where the data has none."""
        name = benchmark.task.name
        if name not in self.numbers:
            self.numbers[name] = {one.id: number for number, one in enumerate(benchmark.questions)}
        question = benchmark.questions[self.numbers[name][row["id"]]]
        try:
            _, shown = benchmark.asked(question)
        except (ValueError, OSError) as error:
            return "", f'<div class="pictures note">no picture: {text(_short(str(error)))}</div>'
        strips, pictures = self.of(shown, next(iter(_answers(row["truth"])), ""), row["answer"])
        return strips, f'<div class="pictures">{pictures}</div>' if pictures else ""
