"""The files of an evaluation: results.json, answers.jsonl, answers.html, results.md, and lmms-eval's layout of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark
from eval.rules import Task
from grades.files import write_json, write_text

SCHEMA = "nanovlm-grades-evaluation-1"
UNKNOWN = "not known: the answers were made elsewhere"


def write_results(
    folder: Path,
    run: Mapping[str, Any],
    tasks: Sequence[Task],
    rows: Sequence[dict],
    summaries: Mapping[str, dict],
    page: str,
) -> None:
    """Write all files. run: what holds for all tasks: "model", "command", "created" (ISO 8601, UTC) and more.

    summaries: task name -> its part of results.json (eval.results.score), with its "decoding".
    page: of eval.answers_page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {"schema": SCHEMA, **run, "tasks": dict(summaries)}
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "answers.jsonl", "".join(lines))
    write_text(folder / "answers.html", page)
    write_text(folder / "results.md", markdown(results))
    stamp = "".join(letter for letter in run["created"][:19] if letter.isdigit() or letter == "T").replace("T", "_")
    other = folder / "lmms_eval"
    other.mkdir(exist_ok=True)
    write_json(other / f"{stamp}_results.json", lmms_eval_layout(results, tasks))
    for task in tasks:
        samples = (json.dumps(one, ensure_ascii=False) + "\n" for one in _samples(rows, task.name))
        write_text(other / f"{stamp}_samples_{task.name.replace('/', '_')}.jsonl", "".join(samples))
    write_json(folder / "results.json", results)  # last: where it stands, the others do too


def settings_of(benchmark: Benchmark, decoding: Any) -> dict[str, Any]:
    """What a task's part of results.json will say of its settings."""
    data = {"fingerprint": benchmark.fingerprint, "source": benchmark.table.source}
    return {"data": data, "prompt": {"style": benchmark.prompt_style}, "decoding": decoding}


def check_output(folder: Path, run: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError where the folder has results that those of this evaluation would replace and do not repeat.

    run: as write_results takes it. tasks: name -> settings_of each.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: must be a folder")
    path = folder / "results.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        before = _settings(there, there["tasks"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--output {folder}: its results.json cannot be read; take another --output, or remove the file"
        ) from None
    if lost := [name for name in there["tasks"] if name not in tasks]:
        raise ValueError(
            f"--output {folder}: holds results of {', '.join(lost)}, which would be lost; take another --output, or "
            "remove the folder"
        )
    now, answers = _settings(run, tasks), run.get("answers")
    if answers and Path(answers).resolve().parent == folder.resolve():  # its own answers are scored again
        now["answers"] = before.get("answers")
    check_same_settings(f"--output {folder}", before, {name: now.get(name) for name in before})


def _settings(run: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All that results depend on, by name; "answers" only where they came from a file."""
    model = run.get("model")
    found = {**model} if isinstance(model, Mapping) else {"model": model}
    if "answers" in run:
        found["answers"] = run["answers"]
    for name, task in tasks.items():
        found[f"data of {name}"] = task["data"]["fingerprint"]
        found[f"source of {name}"] = task["data"]["source"]
        found[f"prompt style of {name}"] = task["prompt"]["style"]
        found[f"decoding of {name}"] = task.get("decoding")
    return found


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def is_detail(metric: str) -> bool:
    """Whether it is the number of a small part of a benchmark."""
    return "/" in metric and not metric.startswith(("category/", "domain/", "split/", "data_type/", "source/"))


def markdown(results: Mapping[str, Any], short: bool = False) -> str:
    """Every number with its rule, error and chance, and below each task its prompt, decoding and data.

    short: without the numbers of parts, as "subject/Art", but for those of "category"."""
    model = results.get("model") or "given answers"
    if isinstance(model, Mapping):
        model = f"{model['checkpoint']} ({model['parameters']:,} parameters, {model['dtype']})"
    parts = [f"# Evaluation of {model}\n", "In percent; ± is one standard error.\n"]
    for name, task in results["tasks"].items():
        data, decoding = task["data"], task.get("decoding") or UNKNOWN
        if isinstance(decoding, Mapping):
            decoding = ", ".join(f"{key} {value}" for key, value in decoding.items())
        published = data["published_rows"]
        rows = f"{task['rows']} rows" + (f" of {published} published" if published not in (None, task["rows"]) else "")
        parts.append(f"## {name}\n")
        parts += ["| rule | number | value | ± | rows | chance |", "|---|---|--:|--:|--:|--:|"]
        for rule, found in task["rules"].items():
            parts += [
                f"| {rule} | {metric} | {percent(one['value'])} | {percent(one['stderr'])} | {one['rows']} | "
                f"{percent(one['chance'])} |"
                for metric, one in found["metrics"].items()
                if not (short and is_detail(metric))
            ]
        parts.append("")
        for rule, found in task["rules"].items():
            constant = found["constant"]
            always = f'; always "{constant["answer"]}": {percent(constant["value"])}' if constant else ""
            parts.append(f"- {rule}: {found['source']}{always}")
        parts.append(f"- data: {rows}, {data['source']} {data['split']}, SHA-256 {data['fingerprint'][:16]}")
        parts.append(f"- prompt style: {task['prompt']['style'] or UNKNOWN}; decoding: {decoding}\n")
    return "\n".join(parts)


def lmms_eval_layout(results: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """What lmms-eval writes as <time>_results.json. The first rule of a task stands under lmms-eval's names; those of
    the others end with the rule, since readers such as nanoVLM's drop what follows the comma."""
    layout: dict[str, Any] = {key: {} for key in ("results", "configs", "versions", "n-shot", "higher_is_better")}
    layout |= {"n-samples": {}, "group_subtasks": {}}
    for task in tasks:
        summary = results["tasks"][task.name]
        numbers: dict[str, Any] = {"alias": task.name}
        names = task.lmms_metrics or {task.main: task.main}
        for number, (rule, found) in enumerate(summary["rules"].items()):
            for ours, theirs in _named(found["metrics"], names).items():
                value, error = (found["metrics"][ours][key] for key in ("value", "stderr"))
                name = f"{theirs} [{rule.replace(',', ' ')}]" if number else theirs
                numbers[f"{name},{task.lmms_filter}"] = "N/A" if value is None else value * task.lmms_scale
                numbers[f"{name}_stderr,{task.lmms_filter}"] = "N/A" if error is None else error * task.lmms_scale
        layout["results"][task.name] = numbers
        layout["configs"][task.name] = {
            "task": task.name, "dataset_path": task.hub_id, "dataset_name": task.config, "test_split": task.split,
            "output_type": "generate_until", "generation_kwargs": summary.get("decoding"), "metadata": summary["data"],
        }  # fmt: skip
        layout["versions"][task.name], layout["n-shot"][task.name] = "Yaml", 0
        better = dict.fromkeys(_named(summary["rules"][task.rules[0].name]["metrics"], names).values(), True)
        layout["higher_is_better"][task.name] = better
        layout["n-samples"][task.name] = {"original": summary["data"]["rows"], "effective": summary["rows"]}
        layout["group_subtasks"][task.name] = []
    model = str(results.get("model") or "given answers")
    return layout | {
        "config": {"model": "nanovlm_grades", "model_args": model}, "model_name": model, "date": results["created"],
    }  # fmt: skip


def _named(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Our name -> lmms-eval's, of the numbers that are there; a category of MMStar has its bare name."""
    mapped = {ours: theirs for ours, theirs in names.items() if ours in found}
    if "average" in names:
        mapped |= {one: one.removeprefix("category/") for one in found if one.startswith("category/")}
    return mapped


def _samples(rows: Sequence[dict], task: str) -> list[dict[str, Any]]:
    """What lmms-eval writes as <time>_samples_<task>.jsonl."""
    return [
        {
            "doc_id": row["number"],
            "target": json.dumps(row["truth"], ensure_ascii=False),
            "filtered_resps": [row["answer"]],
            "input": row["prompt"] or row["question"],
            "doc_hash": hashlib.sha256(row["id"].encode()).hexdigest(),
        }
        for row in rows
        if row["task"] == task
    ]


def check_same_settings(where: Path | str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError that names a setting which was another when the answers that are there were made."""
    if changed := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        name = changed[0]
        raise ValueError(
            f"{where}: holds answers of another evaluation, whose {name} was {before.get(name)} and is now "
            f"{now.get(name)}; take another --output, or remove it"
        )
