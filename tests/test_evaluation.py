"""Evaluations in training: the loss and the answers of a row come from images that are decoded once."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny.data import dataset, encoded, picture, row, stream, tiny_train, tiny_vlm, turn

from data.collators import TrainCollator
from data.drops import DropCounter
from data.images import ImageProcessor
from eval.evaluation import Evaluator, summed_loss
from models.vision_language_model import VisionLanguageModel
from training.evaluation import EvaluationSchedule
from training.parallel import Parallel
from training.state import LoopState

CPU = torch.device("cpu")
SMALL = {
    "vit_hidden_dim": 16, "vit_inter_dim": 32, "vit_n_heads": 2, "vit_n_blocks": 1, "lm_hidden_dim": 16,
    "lm_inter_dim": 32, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 1,
}  # fmt: skip
# Two questions a row; the third has no image, the fourth one that does not decode.
ROWS = [row([encoded(picture(seed=i))], [turn(), turn("what?", "red")], f"row{i}") for i in range(9)]
ROWS[2], ROWS[3] = row([], name="text"), row([b"not an image"], name="bad")
WITH_IMAGE = 8


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded, or tried to be, since it was last cleared."""
    found, call = [], ImageProcessor.__call__
    monkeypatch.setattr(ImageProcessor, "__call__", lambda self, image: found.append(image) or call(self, image))
    return found


def make_evaluator(rows=ROWS, cache: bool = False, **train) -> Evaluator:
    vlm, cfg = tiny_vlm(**SMALL), tiny_train(eval_interval=1, max_new_tokens=3, **train)
    torch.manual_seed(0)
    model = VisionLanguageModel(vlm)
    val = dataset(rows, vlm, cfg, train=False, cache=cache)
    data = SimpleNamespace(tokenizer=val.tokenizer, val_dataset=val, test_dataset=None, dropped={"val": DropCounter()})
    return Evaluator(model, data, cfg, torch.device("cpu"), contextlib.nullcontext())


def apart(evaluator: Evaluator) -> dict:
    return {"val/loss": evaluator.loss()} | evaluator.answers()


@pytest.mark.parametrize("turns_per_image", [None, 1])
def test_one_pass_decodes_each_row_once_and_finds_what_two_find(decoded, turns_per_image):
    evaluator = make_evaluator(turns_per_image=turns_per_image)
    expected = apart(evaluator)
    dropped = dict(evaluator.data.dropped["val"])
    decoded.clear()
    together = evaluator.loss_and_answers()
    assert len(decoded) <= WITH_IMAGE + 1  # what does not decode may be tried again
    assert together.pop("val/loss") == pytest.approx(expected.pop("val/loss"), rel=1e-5)
    assert together == expected
    assert dict(evaluator.data.dropped["val"]) == dropped
    assert sum(dropped.values()) == 1


def test_kept_rows_are_decoded_in_the_first_evaluation_alone(decoded):
    evaluator = make_evaluator(ROWS[:3], cache=True)
    apart(evaluator)
    assert len(decoded) == 2
    evaluator.loss_and_answers()
    apart(evaluator)
    assert len(decoded) == 2


def test_rows_of_a_stream_too(decoded):
    evaluator = make_evaluator(stream(5))
    evaluator.loss_and_answers()
    assert len(decoded) == 5


def test_workers_send_loss_and_questions_of_a_row_together():
    evaluator, alone = make_evaluator(num_workers=1), make_evaluator()
    assert evaluator.loss_and_answers() == alone.loss_and_answers()


def test_an_evaluation_of_a_run_is_one_pass(decoded):
    evaluator = make_evaluator(ROWS[4:])
    nothing = SimpleNamespace(share=lambda: None, requested=False)
    parallel = SimpleNamespace(with_model=lambda compute: compute())
    meter = SimpleNamespace(seconds={"eval": 0.0}, clock=lambda name: contextlib.nullcontext())
    log = SimpleNamespace(record=lambda step, values: seen.update(values), say=lambda line: None)
    schedule, seen = EvaluationSchedule(evaluator.cfg, evaluator, None, parallel, nothing, meter, log), {}
    schedule.run(LoopState(step=1))
    assert len(decoded) == 5
    assert seen["val/loss"] > 0
    assert 0 <= seen["val/exact_match"] <= 1


def test_early_stopping_ends_no_cooldown():
    evaluator = make_evaluator(early_stopping=True, max_training_steps=100)
    monitor = SimpleNamespace(enough_frozen=lambda: False, converged_step=None)
    schedule = EvaluationSchedule(evaluator.cfg, evaluator, monitor, None, None, None, None)
    for _ in range(1 + evaluator.cfg.es_patience):
        schedule.early_stopping.update(1.0)
    assert schedule.end_reason(LoopState(step=41)) == "early_stopping"
    monitor.converged_step = 40
    assert schedule.end_reason(LoopState(step=41)) is None
    assert schedule.end_reason(LoopState(step=99)) == "converged"


@pytest.mark.parametrize("size", [1, 64])
def test_the_conversations_of_a_row_are_one_held_out_row(size):
    evaluator = held_out_evaluator(size)
    rows, losses = evaluator.data.val_dataset, flat(evaluator.row_losses(7))
    assert [len(sizes) for sizes in (batch["row_sizes"] for batch in evaluator.held_out)] == (
        [1] * 6 if size == 1 else [2, 1, 2, 1]
    )
    collator, expected = TrainCollator(rows.tokenizer.pad_token_id, rows.vlm_cfg), []
    for sample in (rows[0, i] for i in (0, 1, 2, 4, 5, 6)):  # the fourth cannot be used
        alone = [replace(sample, conversations=[one]) for one in sample.conversations]
        totals = [summed_loss(evaluator.model, [collator([one])], CPU, contextlib.nullcontext()) for one in alone]
        expected.append((sum(float(loss) for loss, _ in totals), sum(count for _, count in totals)))
    assert sum(len(batch["input_ids"]) for batch in evaluator.held_out) == 11  # of six rows
    assert [count for _, count in losses] == [count for _, count in expected]
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    first, others = (flat(evaluator.row_losses(7, first=part)) for part in (True, False))
    assert sorted(loss for loss, _ in first + others) == pytest.approx(sorted(loss for loss, _ in losses), rel=1e-6)


@pytest.mark.parametrize("size", [1, 64])
def test_ranks_measure_held_out_rows_together(size):
    """In the order of one rank, each with as many forward passes, also of a batch without an image,
    and with the features of before where the vision tower is the same."""
    ranks = 3
    evaluators = [held_out_evaluator(size, share=(rank, ranks), complete=with_blank) for rank in range(ranks)]
    alone = held_out_evaluator(size)
    expected = {first: flat(alone.row_losses(7, first=first)) for first in (True, False)}
    for vision in ("new", "same", "before"):
        if vision == "before":
            for evaluator in evaluators:
                evaluator.next_check("before")
                evaluator.model.vision_encoder.requires_grad_(False).apply(spoil)
        for first in (True, False):
            shares = [evaluator.row_losses(7, vision, first) for evaluator in evaluators]
            assert len({len(evaluator.measured) for evaluator in evaluators}) == 1
            found = flat([shares[i % ranks][i // ranks] for i in range(sum(map(len, shares)))])
            assert [count for _, count in found] == [count for _, count in expected[first]]
            assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected[first]], rel=1e-5)


def test_held_out_rows_keep_to_what_fits():
    """No more rows at a time than a micro-batch that is limited has, and logits of no more labels than a chunk."""
    evaluator = held_out_evaluator(64)
    expected = flat(evaluator.row_losses(7))
    limited = held_out_evaluator(64)
    limited.cfg = replace(limited.cfg, batch_size=1, max_tiles_per_batch=4)
    limited.model.loss_chunk_size = 2
    sizes: list[int] = []
    limited.model.decoder.head.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    found = flat(limited.row_losses(7))
    assert max(len(batch["row_sizes"]) for batch in evaluator.held_out) == 2
    assert max(len(batch["row_sizes"]) for batch in limited.held_out) == 1
    assert max(sizes) == 2
    assert sorted(count for _, count in found) == sorted(count for _, count in expected)
    assert sorted(loss for loss, _ in found) == pytest.approx(sorted(loss for loss, _ in expected), rel=1e-5)


def spoil(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.add_(0.3)


def held_out_evaluator(size: int, **others) -> Evaluator:
    """Without draws: each turn of a row is a conversation. Batches of so many rows."""
    evaluator = make_evaluator(turns_per_image=1, eval_batch_size=size)
    rows = evaluator.data.val_dataset
    evaluator.data.drawn_validation_rows = lambda: rows
    return replace(evaluator, held_out=[], features=[], measured=[], **others)


def flat(batches: list) -> list:
    return [row for batch in batches for row in batch]


def with_blank(inputs: dict, model: VisionLanguageModel) -> dict:
    return Parallel.complete(SimpleNamespace(is_alone=False), inputs, model)
