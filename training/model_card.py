"""README.md of a checkpoint: what the model is, how it was trained, and what was measured, with the hub's metadata.

What was not measured of these weights does not stand in it. A card that its user has edited is left alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData

from data import easy_vqa
from data.layouts import image_tokens_in_words
from data.pipeline import Data, format_names
from grades import GradESMonitor
from grades.policy import lasting
from models.vision_language_model import VisionLanguageModel
from training.arguments import Settings
from training.environment import without_private
from training.state import LoopState
from training.task_numbers import main_numbers

MARK = re.compile(rb"<!-- written by train\.py; of the text above: ([0-9a-f]{16}) -->\n\Z")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Of pretrained models and data, by the beginning of their name.
LICENCES = {
    "google/siglip": "Apache-2.0",
    "HuggingFaceTB/SmolLM2": "Apache-2.0",
    easy_vqa.NAME: "MIT",
}
METRICS = {
    "val/loss": ("validation", "loss", "cross-entropy, nats per label token"),
    "val/exact_match": ("validation", "exact_match", "share of the answers that are the expected one"),
    "test/exact_match": ("test", "exact_match", "share of the answers that are the expected one"),
}
# Columns of the curve: names in metrics.jsonl.
CURVES = {"val/loss": "loss", "val/loss_averaged": "loss, averaged weights", "val/exact_match": "exact match"}
CURVE_ROWS = 12


def is_edited(path: Path) -> bool:
    """Whether there is a card that is not, to the letter, what was written."""
    if not path.exists():
        return False
    content = path.read_bytes().replace(b"\r\n", b"\n")
    mark = MARK.search(content)
    return mark is None or mark[1].decode() != _digest(content[: mark.start()])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class ModelCard:
    """What the cards of a run's checkpoints say. On rank 0 alone."""

    def __init__(
        self, settings: Settings, folder: Path, model: VisionLanguageModel, data: Data, monitor: GradESMonitor | None
    ):
        """folder: of the run, with environment.json."""
        self.settings, self.folder, self.data, self.monitor = settings, folder, data, monitor
        parts = {"vision tower": model.vision_encoder, "projector": model.MP, "language model": model.decoder}
        self.sizes = {name: _merged_size(part) for name, part in (parts | {"all": model}).items()}
        self.meters: list[dict] = []  # of all ranks, at the latest checkpoint

    def take(self, content: Mapping[str, Any]) -> None:
        """Note what a checkpoint holds: the clocks and FLOPs of all ranks."""
        self.meters = content["states"].get("meter", [])

    def text(self, state: LoopState, test: Mapping[str, float | None] | None = None) -> str:
        """The card of the checkpoint of state.step. test: what the test at the end has measured."""
        scores = self._scores(state, test)
        vlm, name = self.settings.vlm, self.folder.name
        lines = [
            f"# {name}\n",
            f"A vision-language model of the nanoVLM family with {self.sizes['all']:,} parameters, after step "
            f"{state.step:,} of a run of at most {self.settings.train.max_training_steps:,}: {vlm.in_words}.\n",
            "| part | parameters | shape |",
            "|---|--:|---|",
            f"| vision tower | {self.sizes['vision tower']:,} | {vlm.vit_n_blocks} blocks, width {vlm.vit_hidden_dim}, "
            f"images, tiles or crops of {vlm.vit_img_size} x {vlm.vit_img_size} pixels, patches of "
            f"{vlm.vit_patch_size} |",
            f"| projector | {self.sizes['projector']:,} | {image_tokens_in_words(vlm)} |",
            f"| language model | {self.sizes['language model']:,} | {vlm.lm_n_blocks} blocks, width "
            f"{vlm.lm_hidden_dim}, {vlm.lm_vocab_size:,} tokens |",
            "\n## How to ask it\n",
            "```\npython generate.py --checkpoint CHECKPOINT --image IMAGE.png --prompt '...'\n```\n",
            "`CHECKPOINT` is the folder of this file or the id of this model on the hub. Answers may be wrong.",
            "\n## What was measured\n",
            *_score_lines(scores, state),
            *_task_lines(_tasks(state)),
            *_curve(self.folder / "metrics.jsonl", state.step),
            "\n## Training\n",
            "| | |\n|---|---|",
            *(f"| {key} | {_cell(value)} |" for key, value in self._training().items() if value),
            "\n## What froze when\n",
            *self._frozen(),
            "\n## Licences of the parts\n",
            *self._licences(),
        ]
        body = f"---\n{self._metadata(scores, _tasks(state))}\n---\n\n" + "\n".join(lines) + "\n\n"
        content = body.encode("utf-8", "backslashreplace")  # a path may hold what is no text
        return f"{content.decode()}<!-- written by train.py; of the text above: {_digest(content)} -->\n"

    def _scores(self, state: LoopState, test: Mapping[str, float | None] | None) -> dict[str, float]:
        """Of METRICS those that were measured with the weights of this step, that the checkpoint holds."""
        found = dict(state.val) if state.val_step == state.step else {}
        if state.averaged_is_better:
            found["val/loss"] = found.get("val/loss_averaged")
        found |= test or {}
        return {name: value for name in METRICS if (value := found.get(name)) is not None}

    def _metadata(self, scores: Mapping[str, float], tasks: Mapping[str, Any]) -> str:
        """The hub's: YAML, checked by the hub's own classes."""
        data, results = self._data_name("train"), []
        for metric, value in scores.items():
            split, kind, what = METRICS[metric]
            of = self._data_name(split)
            slug = of if _is_hub_id(of) else re.sub(r"[^\w.-]+", "-", Path(of).name).strip("-") or "own-rows"
            results.append(
                EvalResult(
                    "image-text-to-text", slug, of, kind, round(value, 6), "Visual question answering",
                    dataset_split=split, metric_name=f"{split} {kind.replace('_', ' ')} ({what})",
                )
            )  # fmt: skip
        for one in main_numbers(tasks):
            if one.value is not None:
                error = "" if one.stderr is None else f", standard error {one.stderr:.4f}"
                of_split = tasks[one.task]["data"]["split"] or None
                results.append(
                    EvalResult(
                        "image-text-to-text", one.task, one.task, one.metric, round(one.value, 6),
                        "Visual question answering", dataset_split=of_split,
                        metric_name=f"{one.metric} of {one.rows:,} rows by the rule {one.rule}{error}",
                    )
                )  # fmt: skip
        card = ModelCardData(
            library_name="nanovlm",
            pipeline_tag="image-text-to-text",
            tags=["nanovlm", "vision-language-model", *(["grades"] if self.monitor else [])],
            base_model=[one for one in self._bases() if _is_hub_id(one)] or None,
            datasets=[data] if _is_hub_id(data) else None,
            model_name=self.folder.name,
            eval_results=results or None,
        )
        return card.to_yaml(line_break="\n").strip()

    def _data_name(self, split: str) -> str:
        """Where the rows of "train", "validation" or "test" are from."""
        train = self.settings.train
        own = {"validation": train.val_dataset_path, "test": train.test_dataset_path}.get(split)
        return ", ".join(without_private([own] if own else train.train_data))

    def _bases(self) -> list[str]:
        """What the weights started from; nothing where they were random."""
        vlm = self.settings.vlm
        if self.settings.weights is not None:
            return without_private([self.settings.weights[1]])
        names = [vlm.vit_model_type, vlm.lm_model_type] if vlm.vlm_load_backbone_weights else []
        return without_private([name for name in names if name != "scratch"])

    def _training(self) -> dict[str, str]:
        """How the model was made, by name; empty where it is not known."""
        starts = self._starts()
        start: dict[str, Any] = starts[-1] if starts else {}
        commit, versions = start.get("commit") or {}, start.get("versions", {})
        machine = [start.get("gpu"), start.get("cpu"), start.get("cores") and f"{start['cores']} cores"]
        machine += [f"{len(self.meters)} processes"] if len(self.meters) > 1 else []
        software = (f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name))
        return {
            "data": self._data_words,
            "weights at first": " and ".join(self._bases()) or "random",
            "command": f"`{' '.join(start.get('command', []))}`" if start else "",
            "commit": commit.get("id", "") + (", with changes to its files" if commit.get("is_dirty") else ""),
            "machine": ", ".join(filter(None, machine)),
            "precision": start.get("dtype", ""),
            "software": ", ".join(software),
            "begun": start.get("time", ""),
            "resumed": f"{len(starts) - 1} times; command to begun are of the last start" if len(starts) > 1 else "",
            **self._cost(),
        }

    @cached_property
    def _data_words(self) -> str:
        """The data with its subsets, counts and formats, for which some rows are read."""
        rows = {"training": self.data.train_rows, "validation": self.data.val_rows, "test": self.data.test_rows}
        counts = ", ".join(f"{len(found):,} {name} rows" for name, found in rows.items() if hasattr(found, "__len__"))
        train = self.settings.train
        subsets = [name for name in train.train_dataset_name if name != "all" and not train.mixture]
        formats = format_names(self.data.train_rows)
        parts = [
            self._data_name("train"),
            ", ".join(subsets),
            counts or "a stream",
            f"format {', '.join(formats)}" * bool(formats),
        ]
        return "; ".join(filter(None, parts))

    def _cost(self) -> dict[str, str]:
        """Time and FLOPs until the checkpoint was saved; nothing where they were not counted."""
        if not self.meters:
            return {}
        seconds = self.meters[0]["seconds"]
        done, unfrozen = (sum(one["flops"][name] for one in self.meters) for name in ("done", "unfrozen"))
        share = f", {done / unfrozen:.1%} of as many steps with nothing frozen" if unfrozen else ""
        return {
            "time until saved": f"{sum(seconds.values()):,.0f} s, {seconds.get('train', 0.0):,.0f} s of them steps",
            "FLOPs": f"{done:.4g} in matrix products{share}",
        }

    def _starts(self) -> list[dict[str, Any]]:
        path = self.folder / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _frozen(self) -> list[str]:
        """In words, and as a table: the step at which each matrix froze."""
        if self.monitor is None:
            return ["Trained without GradES: nothing froze."]
        steps = {event["name"]: event["step"] for event in lasting(self.monitor.events)}
        lines = [f"GradES with the metric {self.monitor.config.metric}.\n"]
        for tower in dict.fromkeys(component.tower for component in self.monitor.components):
            own = [component for component in self.monitor.components if component.tower == tower]
            frozen = [steps[component.name] for component in own if component.name in steps]
            when = f", between step {min(frozen):,} and {max(frozen):,}" if frozen else ""
            lines.append(f"{tower}: {len(frozen)} of {len(own)} matrices froze{when}.\n")
            if not frozen:
                continue
            kinds = list(dict.fromkeys(component.kind for component in own))
            lines += [f"| {tower} layer | {' | '.join(kinds)} |", f"|--:|{'--:|' * len(kinds)}"]
            for layer in dict.fromkeys(component.layer for component in own):
                of_layer = {one.kind: steps.get(one.name) for one in own if one.layer == layer}
                cells = (f"{step:,}" if (step := of_layer.get(kind)) else "–" for kind in kinds)
                lines.append(f"| {layer} | {' | '.join(cells)} |")
            lines.append("")
        return lines

    def _licences(self) -> list[str]:
        lines = []
        for part in dict.fromkeys([*self._bases(), *map(self._data_name, ("train", "validation", "test"))]):
            known = next((licence for name, licence in LICENCES.items() if part.startswith(name)), None)
            lines.append(f"- {part}: {known or 'not known here; see where it is from'}")
        return [*lines, "- the code that trained it: MIT"]


def _score_lines(scores: Mapping[str, float], state: LoopState) -> list[str]:
    if not scores:
        return [] if _tasks(state) else ["Nothing was measured with the weights of this step."]
    lines = ["| split | number | value | what it is |", "|---|---|--:|---|"]
    for metric, value in scores.items():
        split, kind, what = METRICS[metric]
        lines.append(f"| {split} | {kind} | {value:.4f} | {what} |")
    averaged = " The weights are averages over the last steps." if state.averaged_is_better else ""
    return [*lines, f"\nMeasured by train.py at the end of step {state.step:,}.{averaged}"]


def _curve(path: Path, step: int) -> list[str]:
    """The validations of the run until this step, as a table of at most CURVE_ROWS spread over it."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # Most lines are of steps, and are not parsed.
        if '"val/loss"' in line and (point := json.loads(line))["step"] <= step:
            points.append(point)
    if len(points) < 2:  # one point, if any, stands among the numbers
        return []
    count = min(len(points), CURVE_ROWS)
    spread = [points[round(index * (len(points) - 1) / (count - 1))] for index in range(count)]
    names = [name for name in CURVES if any(point.get(name) is not None for point in points)]
    lines = [f"| step | {' | '.join(CURVES[name] for name in names)} |", f"|--:|{'--:|' * len(names)}"]
    for point in spread:
        values = ("–" if (value := point.get(name)) is None else f"{value:.4f}" for name in names)
        lines.append(f"| {point['step']:,} | {' | '.join(values)} |")
    return ["\nValidation over the run:\n", *lines]


def _tasks(state: LoopState) -> dict[str, Any]:
    """Of --eval_tasks, as in results.json, where they were measured with the weights of this step."""
    return state.tasks if state.tasks_step == state.step else {}


def _task_lines(tasks: Mapping[str, Any]) -> list[str]:
    """The main number of each benchmark by each of its rules, and how it was asked."""
    if not tasks:
        return []
    lines = ["", "| benchmark | number | value | ± | rows | chance | rule |", "|---|---|--:|--:|--:|--:|---|"]
    for name, task in tasks.items():
        for rule, found in task["rules"].items():
            one = found["metrics"][task["main"]]
            numbers = ["–" if one[key] is None else f"{one[key]:.4f}" for key in ("value", "stderr")]
            numbers += [f"{one['rows']:,}", "–" if one["chance"] is None else f"{one['chance']:.4f}"]
            cells = [name, task["main"], *numbers, f"{rule}: {found['source']}"]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines.append("\n± is one standard error. Asked as by evaluate.py:\n")
    for name, task in tasks.items():
        data, decoding = task["data"], ", ".join(f"{key} {value}" for key, value in task["decoding"].items())
        published = f" of {data['published_rows']:,} published" if data["published_rows"] else ""
        lines.append(
            f"- {name}: {task['rows']:,} rows{published}, SHA-256 {data['fingerprint'][:16]}; prompts of "
            f"{task['prompt']['style']}; {decoding}"
        )
    return lines


def _merged_size(part: nn.Module) -> int:
    """Parameters of the part once its LoRA adapters are merged into its matrices, as a checkpoint holds them."""
    return sum(parameter.numel() for name, parameter in part.named_parameters() if ".lora_" not in name)


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
