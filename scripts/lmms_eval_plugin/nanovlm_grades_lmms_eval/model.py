"""The model nanovlm_grades of lmms-eval. What it answers, and how, is eval/harness.py's.

lmms-eval --model nanovlm_grades --model_args pretrained=CHECKPOINT --tasks mmstar --batch_size auto ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[3]
if not (CHECKOUT / "eval" / "harness.py").is_file():
    raise ImportError(f"{CHECKOUT}: is no checkout of nanoVLM with GradES; install this package from one, with -e")
if Path(str(getattr(sys.modules.get("evaluate"), "__file__", ""))) == CHECKOUT / "evaluate.py":
    raise ImportError(
        "evaluate.py of the checkout hides the package evaluate from lmms-eval; start the program lmms-eval instead of "
        "python -m lmms_eval, or start it in another folder"
    )
sys.path.append(str(CHECKOUT))  # last, so that evaluate.py hides no package

from data.datasets import Questions
from eval.asking import Asker
from eval.batches import Batches
from eval.harness import Decoding, Request, answer_requests, chat_question, simple_question
from eval.prompts import STYLES
from models.hub import checkpoint_folder
from training.checkpoint_folder import find_checkpoint
from training.setup import autocast, pick_device, prepare_backend


class _NanoVLMGrades(lmms):
    """What both ways of asking share."""

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        lm_tokenizer: str | None = None,
        prompt_style: str = STYLES[0],
        max_new_tokens: int | None = None,
        **unknown: Any,
    ):
        """pretrained: run folder, checkpoint folder or hub id. dtype, lm_tokenizer: as of evaluate.py.

        prompt_style: lmms-eval or nanovlm. max_new_tokens: of tasks that say none (50). max_batch_size: not used.
        """
        super().__init__()
        styles, dtypes = STYLES[:2], ("auto", "bfloat16", "float32")
        problems = [f"{name}: is none of the arguments of nanovlm_grades" for name in unknown]
        if not pretrained:
            problems.append("pretrained: is needed, as --model_args pretrained=CHECKPOINT")
        if prompt_style not in styles:
            problems.append(f"prompt_style={prompt_style}: must be {' or '.join(styles)}")
        if dtype not in dtypes:
            problems.append(f"dtype={dtype}: must be {' or '.join(dtypes)}")
        if batch_size not in (None, "auto") and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            problems.append(f"--batch_size {batch_size}: must be auto or a whole number >= 1")
        if problems:
            raise ValueError("; ".join(problems))
        folder = checkpoint_folder(find_checkpoint(str(pretrained)), flag="model_args pretrained")
        self._device = _device(device)
        prepare_backend(self._device)
        self.asker: Any = Asker(folder, self._device, autocast(self._device, dtype), lm_tokenizer)
        self.batches = Batches(None if batch_size in (None, "auto") else int(batch_size), self._device)
        self.prompt_style, self.max_new_tokens = prompt_style, max_new_tokens

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what its processes tell each other."""
        return self._device

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _decoding(self, options: dict[str, Any] | None) -> Decoding:
        return Decoding.of(options or {}, self.max_new_tokens)

    def _simple(self, context: str, to_visual: Callable, number: int, task: str, split: str) -> Questions:
        images = [image for image in to_visual(self._document(task, split, number)) or [] if image is not None]
        return simple_question(self.asker.reader, _known_name(task), context, images, self.prompt_style)

    def _request(self, *arguments: Any) -> Request:
        """Of what lmms-eval gives a model of this kind for one question."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        asked = [self._request(*request.args) for request in requests]
        found = answer_requests(self.asker, asked, self.batches)
        by_number = dict(tqdm(found, total=len(asked), desc="answers", disable=self.rank > 0))
        return [by_number[number] for number in range(len(asked))]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        # It turns the numbers into text before it compares them, of every model, and then takes the smallest one, since
        # most of its models give it losses.
        raise NotImplementedError(
            "lmms-eval 0.7.3 cannot compare likelihoods of choices; evaluate.py --likelihood can, of letters"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("nanovlm_grades answers tasks of one round alone")

    def clean(self) -> None:
        """Let go of the model, whose memory a judge may need."""
        self.asker = None
        super().clean()


class NanoVLMGradesSimple(_NanoVLMGrades):
    """Takes a task's text with its images before it, as evaluate.py does."""

    is_simple = True

    def _request(self, context: str, options: dict, to_visual: Callable, number: int, task: str, split: str) -> Request:
        read = partial(self._simple, context, to_visual, number, task, split)
        return Request(read, self._decoding(options), f"{task}: question {number}")


class NanoVLMGradesChat(_NanoVLMGrades):
    """Takes a task's messages, with images where they stand; of a task that has none the simple class's prompt."""

    is_simple = False

    def _request(self, _: str, to_messages: Callable, options: dict, number: int, task: str, split: str) -> Request:
        read = partial(self._chat, to_messages, number, task, split)
        return Request(read, self._decoding(options), f"{task}: question {number}")

    def _chat(self, to_messages: Callable, number: int, task: str, split: str) -> Questions:
        messages = to_messages(self._document(task, split, number))
        return chat_question(self.asker.reader, _known_name(task), messages, self.prompt_style)


def _known_name(task: str) -> str:
    """lmms-eval's own name of a task that scripts/lmms_eval_local.py has made."""
    return task.removesuffix("_local")


def _device(name: str | None) -> torch.device:
    """The named one; of several processes each one's own."""
    device = torch.device(name) if name else pick_device()
    if device.type == "cuda" and device.index is None:
        from accelerate import PartialState

        device = PartialState().device
    return device
