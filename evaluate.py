"""Let a model answer benchmarks, score answers, and compare two evaluations.

    python evaluate.py --list
    python evaluate.py --checkpoint grades_output/<run name> --tasks mmstar,pope --data_root data --output results/a
    python evaluate.py --answers answers.jsonl --tasks mmstar --data_root data --output results/b
    python evaluate.py --compare results/a results/b

docs/evaluation.md says what each number is, by which rule, and where the data comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.prompts import STYLES

# Flags that say how a model is asked.
ASKING = ("batch_size", "num_workers", "max_new_tokens", "without_image", "likelihood", "dtype", "lm_tokenizer")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Whatever is wrong with them alone ends the program."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the tasks, their data and rules, and end")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two --output folders")
    parser.add_argument(
        "--tasks",
        help="names, as mmstar,pope, or a file or folder of your own rows (docs/data.md); mmstar:200: 200 drawn rows",
    )
    parser.add_argument("--data_root", type=Path, help="folder with the benchmarks' data; without it, the hub")
    parser.add_argument("--checkpoint", help="the model that answers: a run folder, a checkpoint folder or a hub id")
    parser.add_argument("--batch_size", type=_batch_size, default="auto", help="questions at once; auto: what fits")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that decode images meanwhile; 0: none")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer, in tokens; by default the task's")
    parser.add_argument("--max_video_frames", type=int, help="frames of a video at most; by default as in training")
    parser.add_argument("--without_image", action="store_true", help="ask without the images: the blind score")
    parser.add_argument("--likelihood", action="store_true", help="score the likeliest letter too, where there are any")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="as in train.py")
    parser.add_argument("--lm_tokenizer", help="as in train.py, for a checkpoint without a tokenizer of its own")
    parser.add_argument("--answers", type=Path, help='score these answers: .jsonl of {"id": ..., "answer": ...}')
    parser.add_argument(
        "--missing",
        choices=("error", "wrong", "skip"),
        default="error",
        help="questions without answer, or that cannot be asked",
    )
    parser.add_argument("--output", type=Path, help="folder for results.json, answers.jsonl, answers.html ...")
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    parser.add_argument("--prompt_style", choices=STYLES, help="whose prompts the answers are to")
    given = parser.parse_args(argv)
    if given.list or given.compare:
        return given
    problems = []
    if not given.tasks:
        problems.append("--tasks: is needed, unless --list or --compare is given; --list names what there is")
    if given.tasks and bool(given.answers) == bool(given.checkpoint):
        problems.append("--checkpoint or --answers: one of them is needed, to know whose answers are scored")
    if given.checkpoint and not given.output:
        problems.append("--output: is needed with --checkpoint; each answer is there as soon as it is made")
    if given.answers and not given.checkpoint:
        problems += _unused(given, parser.parse_args([]))
    bounds = (("limit", 1), ("max_new_tokens", 1), ("num_workers", 0), ("max_video_frames", 1))
    for name, least in bounds:
        if (value := getattr(given, name)) is not None and value < least:
            problems.append(f"--{name} {value}: must be >= {least}")
    if problems:
        parser.error("\n  ".join(problems))
    return given


def _unused(given: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """A line for each flag that would change nothing, as the answers are there already."""
    lines = []
    for name in ASKING:
        if (value := getattr(given, name)) != getattr(defaults, name):
            flag = f"--{name}" if value is True else f"--{name} {value}"
            lines.append(
                f"{flag}: says how a model is asked, and must not be given with --answers {given.answers}; leave "
                "it out, or ask a model with --checkpoint"
            )
    return lines


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be auto or a whole number >= 1")
    return int(text)


def list_tasks() -> str:
    """The table of tasks as text: a line of each, and its rules below."""
    from eval.tasks import TASKS

    lines = []
    for task in TASKS.values():
        chance = "1 / choices" if task.chance == "choices" else task.chance or "none"
        where = "/".join(filter(None, (task.hub_id, task.config)))
        lines.append(f"{task.name}  {where}, split {task.split}, {task.published_rows or '?'} rows")
        lines.append(f"    columns: {', '.join(task.columns)}")
        lines.append(
            f"    id: {'/'.join(task.id_columns) or 'row number, from 0'}; number: {task.main}; chance: {chance}"
        )
        lines += [f"    rule: {rule.name}: {rule.source}" for rule in task.rules]
    return "\n".join(lines)


def open_benchmarks(given: argparse.Namespace, earlier: dict[str, Any]) -> list[Any]:
    """The benchmarks that --tasks names, rows of one's own among them, asked as `earlier` says, the results.json of the
    answers, unless --prompt_style does. Raises ValueError, OSError."""
    from eval.task_list import open_tasks

    asks = bool(given.checkpoint)

    def style_of(name: str) -> str | None:
        style = given.prompt_style or earlier.get("tasks", {}).get(name, {}).get("prompt", {}).get("style")
        return style or (STYLES[0] if asks else None)

    with_images = asks and not given.without_image
    return open_tasks(given.tasks, given.data_root, "tasks", given.limit, style_of, with_images)


def evaluate(given: argparse.Namespace) -> None:
    """Score the answers of a file, print the main numbers, and write --output."""
    from eval.answers import match, read_answers
    from eval.output import check_output, settings_of
    from eval.own_rows import show_frames
    from eval.results import score

    earlier = _earlier(given.answers)
    benchmarks = open_benchmarks(given, earlier)
    for one in benchmarks:
        shown = earlier.get("tasks", {}).get(one.task.name, {}).get("data", {}).get("max_video_frames")
        if frames := given.max_video_frames or shown:
            show_frames([one], frames)
    answers = read_answers(given.answers, [one.task.name for one in benchmarks])
    run = {"model": earlier.get("model"), "answers": str(given.answers)}
    decoding = {one.task.name: earlier.get("tasks", {}).get(one.task.name, {}).get("decoding") for one in benchmarks}
    if given.output:
        tasks = {one.task.name: settings_of(one, decoding[one.task.name]) for one in benchmarks}
        check_output(given.output, run, tasks)
    scored = []
    for one in benchmarks:
        rows, summary = score(one, match(answers[one.task.name], one, given.missing))
        scored.append((one.task, rows, summary | {"decoding": decoding[one.task.name]}))
    finish(given, run, scored, benchmarks)


def ask(given: argparse.Namespace) -> None:
    """Let the model answer, on every process of torchrun its part, and score it as `evaluate` does, on the first."""
    from eval.answering import Answering, describe_model, scored_answers
    from eval.asking import Asker
    from eval.output import check_output
    from eval.own_rows import show_frames
    from models.config import TrainConfig
    from models.hub import BackboneUnavailable, checkpoint_folder
    from training.checkpoint_folder import find_checkpoint
    from training.parallel import Parallel
    from training.setup import autocast, pick_device, prepare_backend

    benchmarks = open_benchmarks(given, {})
    try:
        folder = checkpoint_folder(find_checkpoint(given.checkpoint), flag="checkpoint")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--checkpoint {error}") from None
    except BackboneUnavailable as error:
        raise FileNotFoundError(error) from None
    parallel = Parallel.start(TrainConfig())
    device = pick_device()
    prepare_backend(device)
    asker = Asker(folder, device, autocast(device, given.dtype), given.lm_tokenizer)
    show_frames(benchmarks, given.max_video_frames or asker.model.cfg.max_video_frames)
    asking = Answering(
        asker, given.output / "progress", given.batch_size, given.num_workers, given.without_image,
        given.max_new_tokens, given.likelihood, parallel.rank, parallel.world_size,
    )  # fmt: skip
    model = describe_model(asker, given.checkpoint)
    planned = {name: settings for one in benchmarks for name, settings in asking.planned(one).items()}
    check_output(given.output, {"model": model}, planned)
    for one in benchmarks:
        asking.answer(one, model)
    parallel.gather(None)  # until all have answered
    if parallel.is_main:
        scored = [part for one in benchmarks for part in scored_answers(asking, one, model, given.missing)]
        finish(given, {"model": model}, scored, benchmarks)
        asking.forget(benchmarks)


def finish(
    given: argparse.Namespace, run: dict[str, Any], scored: list[tuple[Any, list[dict], dict]], benchmarks: list[Any]
) -> None:
    """Write --output and print the main numbers of scored tasks: (task, rows of answers.jsonl, summary)."""
    from eval.answers_page import make_page
    from eval.output import markdown, write_results

    run = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **run,
    }
    summaries = {task.name: summary for task, _, summary in scored}
    if given.output:
        rows = [row for _, rows, _ in scored for row in rows]
        by_name = {one.task.name: one for one in benchmarks}
        asked = {task.name: by_name[task.name.split("/")[0]] for task, _, _ in scored}  # of mmstar/likelihood: mmstar
        answers = make_page({**run, "tasks": summaries}, {task.name: rows for task, rows, _ in scored}, asked)
        write_results(given.output, run, [task for task, _, _ in scored], rows, summaries, answers)
    print(markdown({**run, "tasks": summaries}, short=True))


def _earlier(answers: Path) -> dict[str, Any]:
    """The results.json beside the answers of an earlier evaluation, which knows the model, its prompts and decoding."""
    beside = answers.parent / "results.json"
    if answers.name != "answers.jsonl" or not beside.is_file():
        return {}
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def main(given: argparse.Namespace) -> None:
    """Do what the flags ask for. Raises ValueError, OSError."""
    if given.list:
        print(list_tasks())
    elif given.compare:
        from eval.compare import compare, compared, read_evaluation

        first, second = (read_evaluation(folder.expanduser()) for folder in given.compare)
        print(compared(compare(first, second), *given.compare))
    elif given.checkpoint:
        ask(given)
    else:
        evaluate(given)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # where the console lacks a letter
    try:
        main(parse_arguments())
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
