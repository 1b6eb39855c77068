"""Questions about the same images in one sequence: what each sees, its positions, its logits, its gradients."""

import copy

import pytest
import torch

from data.collators import TrainCollator
from data.conversations import read_record
from data.loader import eval_batches
from data.message_tree import grow_trees, positions_of
from data.packing import PackedCollator
from models.attention import attend_flex, block_mask
from models.language_model import attention_mask_4d
from models.vision_language_model import VisionLanguageModel
from tests.tiny.data import dataset, encoded, picture, row, tiny_train, tiny_vlm, turn
from training.arguments import parse_arguments

VLM = tiny_vlm(
    vit_hidden_dim=16, vit_inter_dim=32, vit_n_heads=2, vit_n_blocks=1, lm_hidden_dim=16, lm_inter_dim=32,
    lm_n_heads=2, lm_n_kv_heads=1, lm_n_blocks=2, max_img_size=16, lm_max_length=256,
)  # fmt: skip
TURNS = [turn(assistant="yes"), turn("what?", "the red shape is a circle"), turn("is the shape blue?", "no")]
ROWS = [
    row(texts=TURNS, name="three"),
    row([], [turn("what?", "red"), turn("is there a circle?", "no")], name="text"),
    row([encoded(picture(seed=1))], TURNS[:2], name="two"),
]


def samples(rows=ROWS, **flags) -> list:
    data = dataset(rows, VLM, tiny_train(**{"message_tree": True} | flags))
    return [data[0, i] for i in range(len(rows))]


def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(copy.deepcopy(VLM)).eval()


def tensors(batch: dict) -> dict:
    left_out = ("label_positions", "label_weights", "targets")
    return {name: value for name, value in batch.items() if torch.is_tensor(value) and name not in left_out}


def batch_of(given: list, packed: bool) -> dict:
    return PackedCollator(0, VLM)([given]) if packed else TrainCollator(0, VLM)(given)


def test_a_tree_has_the_images_once_and_each_branch_as_it_is_alone():
    tree, text, _ = samples()
    [(ids, labels)], [branches] = tree.conversations, tree.branches
    assert int((ids == VLM.image_token_id).sum()) == VLM.mp_image_token_length
    alone = dataset(ROWS, VLM, tiny_train(message_tree=True), train=False)[0, 0]
    assert len(alone.conversations) == 3  # of an evaluation: questions of their own
    prefix = branches == 0
    assert labels[prefix].eq(-100).all()
    for number, (one_ids, one_labels) in enumerate(alone.conversations, start=1):
        mine = prefix | (branches == number)
        assert torch.equal(ids[mine], one_ids)
        assert torch.equal(labels[mine], one_labels)
        assert positions_of(branches.numpy())[mine.numpy()].tolist() == list(range(len(one_ids)))
        end = dataset(ROWS).tokenizer.eos_token_id
        assert labels[branches == number][labels[branches == number] != -100][-1] == end
    [(text_ids, _)], [text_branches] = text.conversations, text.branches  # a conversation stays one
    assert not text_branches.any()
    assert len(text_ids) == len(samples(message_tree=False)[1].conversations[0][0])


CHAIN = {"image_url": "https://example.org/a.png", "answer": "red",
         "question": "[USER] is there a circle? [ASSISTANT] yes [USER] what is the shape? [ASSISTANT]"}  # fmt: skip
SAID = [{"from": "human", "value": "is there a circle?"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "what is the shape?"}, {"from": "gpt", "value": "red"}]  # fmt: skip
PAIRS = {"image": "a.png", "qa_pairs": {"question": ["is there a circle?", "what?"], "answer": ["yes", "red"]}}


@pytest.mark.parametrize(
    ("record", "branches"), [(CHAIN, 0), ({"image": "a.png", "conversations": SAID}, 0), (PAIRS, 2)]
)
def test_a_question_that_may_rest_on_the_turns_before_it_has_them(record, branches):
    given = read_record(record, None) | {"id": "one", "images": [encoded(picture())]}
    [tree] = samples([given])
    [(ids, labels)] = tree.conversations
    assert int(tree.branches[0].max()) == branches
    [whole] = samples([given], message_tree=False)
    assert torch.equal(ids, whole.conversations[0][0]) == (branches == 0)
    assert int((labels == dataset(ROWS).tokenizer.eos_token_id).sum()) == 2  # both answers are learned


@pytest.mark.parametrize("packed", [False, True])
def test_the_logits_of_a_branch_are_those_of_its_sequence_alone(packed):
    """With padding on the right, and packed behind other documents."""
    given, made = samples(), model()
    batch = batch_of(given, packed)
    logits = made(**tensors(batch))[0].flatten(0, 1)
    apart = dataset(ROWS, VLM, tiny_train(message_tree=True), train=False)
    start = 0
    for i, sample in enumerate(given):
        [(ids, _)], [branches] = sample.conversations, sample.branches
        ours = logits[start : start + len(ids)]
        start += len(ids) if packed else batch["input_ids"].shape[1]
        for number, (one_ids, _) in enumerate(apart[0, i].conversations, start=1):
            alone = made(one_ids[None], sample.images)[0][0]
            mine = (branches == 0) | (branches == number)
            torch.testing.assert_close(ours[mine], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_no_branch_learns_from_another(packed):
    given, made = samples(), model()
    batch = batch_of(given, packed)
    x = made.embed(batch["input_ids"], batch["images"], batch["image_slots"], batch["image_sources"])
    x = x.detach().requires_grad_()
    names = ("position_ids", "document_ids", "branch_ids")
    masks = {name: batch[name] for name in names if name in batch}
    hidden = made.decoder(x, **masks)
    documents = masks.get("document_ids", torch.arange(len(x))[:, None].expand(batch["input_ids"].shape))
    branches = batch["branch_ids"]
    for document, numbers in ((0, (1, 2, 3)), (2, (1, 2))):
        here = documents == document
        for number in numbers:
            mine = here & (branches == number)
            [gradient] = torch.autograd.grad(hidden[mine].square().sum(), x, retain_graph=True)
            reached = gradient.abs().sum(-1) > 0
            assert reached[mine].all()
            assert reached[here & (branches == 0)].all()
            assert not reached[~(mine | (here & (branches == 0)))].any()  # other branches, documents, padding


def test_the_block_mask_is_the_plain_mask():
    torch.manual_seed(0)
    T = 256
    branches = torch.stack([torch.arange(T) // 50, (torch.arange(T) // 32) % 4]).int()
    documents = (torch.arange(T) // 128)[None].expand(2, T).int()
    q, k, v = (torch.randn(2, 2, T, 16) for _ in range(3))
    for given in (documents, None):
        plain = attention_mask_4d(None, given, T, branches)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=plain)
        torch.testing.assert_close(attend_flex(q, k, v, block_mask(given, branches)), expected, rtol=1e-4, atol=1e-4)


def test_trees_are_divided_where_they_are_too_long_and_left_alone_without_a_common_image():
    def conversation(*ids):
        return torch.tensor(ids), torch.tensor([-100] * (len(ids) - 2) + [ids[-1], -100])

    several = [conversation(9, 9, 1, n, n, n) for n in (2, 3, 4)]
    trees, branches = grow_trees(several, 10, image_token=9)
    assert [one[0].tolist() for one in trees] == [[9, 9, 1, 2, 2, 2, 3, 3, 3], [9, 9, 1, 4, 4, 4]]
    assert [one.tolist() for one in branches] == [[0] * 3 + [1] * 3 + [2] * 3, [0] * 3 + [1] * 3]
    assert positions_of(branches[0].numpy()).tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    late = [conversation(1, n, 9, n, n) for n in (2, 3)]
    trees, branches = grow_trees(late, 10, image_token=9)
    assert trees is late
    assert not torch.cat(branches).any()


def test_trees_with_drawn_turns_weights_and_row_losses(capsys):
    [sample, *_] = samples(turns_per_image=2, loss_weighting="sqrt_answer")
    assert sample.branches[0].max() == 2
    assert sample.loss_weight.messages == 2
    batch = TrainCollator(0, VLM)([sample])
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    made = model().train()
    made(**inputs).backward()
    assert made.decoder.blocks[0].attn.q_proj.weight.grad.isfinite().all()
    data, cfg = dataset(ROWS, VLM, tiny_train(message_tree=True)), tiny_train(eval_batch_size=2, num_workers=0)
    assert [tuple(b["branch_ids"].shape) for b in eval_batches(data, TrainCollator(0, VLM), cfg)]
    with pytest.raises(SystemExit):
        parse_arguments(["--message_tree", "--train_on", "all"])
    assert "--message_tree True: must be off with train_on all" in capsys.readouterr().err
