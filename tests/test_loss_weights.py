"""Weights of messages in the loss, z-loss and dropout at answers, against plain loops."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F

from data.collators import TrainCollator
from data.loss_weights import LossWeight, message_lengths
from data.packing import PackedCollator
from models.vision_language_model import VisionLanguageModel
from tests.tiny.data import dataset, row, tiny_train, tiny_vlm, turn
from training import setup
from training.arguments import parse_arguments
from training.parallel import Parallel
from training.step import forward_backward

VLM = tiny_vlm(
    vit_hidden_dim=16, vit_inter_dim=32, vit_n_heads=2, vit_n_blocks=1, lm_hidden_dim=16, lm_inter_dim=32,
    lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2, max_img_size=16, lm_max_length=256,
)  # fmt: skip
ROWS = [
    row(texts=[turn(assistant="yes"), turn("what?", "the red shape is a circle")], name="two"),
    row(texts=[turn("is the shape blue?", "no not blue")], name="one"),
    row(texts=[turn("what?", "a green circle"), turn("is there a circle?", "no")], name="fixed", loss_weight=0.2),
]
CPU = torch.device("cpu")


def model(**flags) -> VisionLanguageModel:
    torch.manual_seed(0)
    made = VisionLanguageModel(copy.deepcopy(VLM))
    setup.apply_to_model(made, tiny_train(**flags))
    return made.train()


def samples(weighting: str = "sqrt_answer", rows=ROWS, **flags) -> list:
    data = dataset(rows, VLM, tiny_train(loss_weighting=weighting, **flags))
    return [data[0, i] for i in range(len(rows))]


def plain_loss(made, batch, given, weighting, z_loss=0.0) -> torch.Tensor:
    """The weighted sum, message by message, of the logits of all positions. given: the samples in the batch."""
    inputs = {name: batch.get(name) for name in ("input_ids", "images", "position_ids", "document_ids")}
    logits, _ = made(**inputs, image_slots=batch["image_slots"], image_sources=batch["image_sources"])
    logits, targets = logits.flatten(0, 1).float(), batch["targets"].flatten().tolist()
    messages, current = [], []
    for place, target in enumerate([*targets, -100]):
        if target != -100:
            current.append((place, target))
        elif current:
            messages.append(current)
            current = []
    owners = [s.id for s in given for _, labels in s.conversations for _ in message_lengths(labels.numpy())]
    total = torch.zeros(())
    for message, owner in zip(messages, owners, strict=True):
        if owner == "fixed":
            weight = 0.2
        else:
            weight = 2 / math.sqrt(len(message)) / math.sqrt(owners.count(owner)) if weighting else 1.0
        for place, target in message:
            log_z = logits[place].logsumexp(0)
            total = total + weight * (log_z - logits[place, target] + z_loss * log_z**2)
    return total


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("weighting", ["sqrt_answer", "none"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("turns", [None, 2])
def test_the_weighted_loss_and_its_gradient_are_those_of_a_plain_loop(chunk, weighting, packed, turns):
    given = samples(weighting, turns_per_image=turns)
    batch = PackedCollator(0, VLM)([given]) if packed else TrainCollator(0, VLM)(given)
    made, plain = model(loss_chunk_size=chunk, z_loss=1e-2), model()
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    loss = made(**inputs)
    expected = plain_loss(plain, batch, given, weighting == "sqrt_answer", z_loss=1e-2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert batch["total_weight"] == pytest.approx(batch["label_weights"].double().sum().item())


def test_weights_of_a_message():
    labels = torch.tensor([-100, 5, 6, 7, 8, -100, -100, 9, -100]).numpy()
    assert message_lengths(labels).tolist() == [4, 1]
    assert LossWeight(None, 4).of_labels(labels).tolist() == [0.5] * 4 + [1.0]
    assert LossWeight(0.25).of_labels(labels).tolist() == [0.25] * 5
    drawn = samples(turns_per_image=3)[0]  # the messages of this visit count
    assert drawn.loss_weight == LossWeight(None, 3)
    assert "label_weights" not in TrainCollator(0, VLM)(samples("none", ROWS[:2]))
    evaluated = dataset(ROWS, VLM, tiny_train(loss_weighting="sqrt_answer"), train=False)
    assert all(evaluated[0, i].loss_weight is None for i in range(3))


class OneOfTwo(Parallel):
    """A rank whose other rank has the sums that it is given."""

    def __init__(self, others: list[float]):
        super().__init__()
        self.others, self.world_size = others, 2

    def sum(self, *values: float) -> list[float]:
        return [mine + other for mine, other in zip(values, self.others, strict=True)]

    def forget_blanks(self, *_: object) -> None:
        pass

    def complete(self, inputs: dict, *_: object) -> dict:
        return inputs


def test_a_step_divides_by_the_weight_of_all_micro_batches_and_ranks():
    collate = TrainCollator(0, VLM)
    batches = [collate([sample]) for sample in samples()]
    none = contextlib.nullcontext()
    whole = model()
    loss = forward_backward(whole, batches, CPU, none)
    total = sum(batch["total_weight"] for batch in batches)
    plain = model()
    summed = sum(plain(**{n: v for n, v in b.items() if torch.is_tensor(v)}) for b in batches) / total
    summed.backward()
    torch.testing.assert_close(loss, summed.detach())
    halves, losses = (batches[:1], batches[1:]), []
    both = model()
    for mine, other in (halves, halves[::-1]):  # gradients are averaged over the ranks
        sums = [sum(b["total_weight"] for b in other), sum(len(b["images"]) for b in other)]
        losses.append(forward_backward(both, mine, CPU, none, OneOfTwo(sums)))
    torch.testing.assert_close(sum(losses) / 2, loss)
    for one, other, third in zip(whole.parameters(), plain.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(one.grad, third.grad / 2, rtol=1e-4, atol=1e-6)


def test_z_loss_is_of_training_alone():
    made, batch = model(z_loss=0.1), TrainCollator(0, VLM)(samples("none", ROWS[:2]))
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    assert made(**inputs) > model()(**inputs)
    assert torch.equal(made.eval()(**inputs), model().eval()(**inputs))
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.tensor([1, 2, 3, 4, 0])
    made.cross_entropy(logits, labels, torch.ones(5), 0.1).backward()
    logits_too = logits.detach().clone().requires_grad_()
    (F.cross_entropy(logits_too, labels, reduction="sum") + 0.1 * logits_too.logsumexp(1).square().sum()).backward()
    torch.testing.assert_close(logits.grad, logits_too.grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_at_answers_changes_those_positions_alone(checkpointing):
    made = model(response_dropout=0.5, activation_checkpointing=checkpointing)
    x = torch.randn(2, 6, 16)
    response = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]).bool()
    decoder, block = made.decoder, made.decoder.blocks[0]
    assert decoder.drops_responses()
    plain = decoder(x)
    torch.manual_seed(1)
    changed = (decoder(x, response=response) != plain).any(-1)
    assert not changed[0, :3].any()  # nothing before the answer
    assert not changed[1, :4].any()
    assert changed[response].all()
    cos, sin = decoder.rotary_embd(torch.arange(6)[None], 6)
    added = block(x, cos, sin, None, None, 0, response[..., None]) - x
    assert torch.equal(added[~response], (block(x, cos, sin) - x)[~response])  # of one block: these positions alone
    mean = torch.stack([F.dropout(torch.ones(1000), 0.5) for _ in range(50)]).mean()  # what remains is scaled up
    assert abs(mean - 1) < 0.05
    inputs = {n: v for n, v in TrainCollator(0, VLM)(samples("none", ROWS[:2])).items() if torch.is_tensor(v)}
    torch.manual_seed(0)
    made(**inputs).backward()
    assert not made.eval().decoder.drops_responses()
    assert torch.equal(made(**inputs), model().eval()(**inputs))


def test_settings_that_do_not_go_together(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--loss_weighting", "sqrt_answer", "--train_on", "all"])
    assert "--loss_weighting sqrt_answer: must be none with train_on all" in capsys.readouterr().err
