import pickle
import random
from collections import Counter

import pytest
import torch
from tiny.data import dataset, encoded, picture, row, tiny_train, tiny_vlm, turn

from data.draws import answer_rarity, draw_turns, turn_weights
from data.drops import DropCounter

MANY = [
    turn(f"is there a {color} shape?", color, "shape" if i % 3 else "color")
    for i, color in enumerate(["red", "blue"] * 4)
]


def spoken(data, ids) -> str:
    return data.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_row_is_one_conversation_of_all_its_turns():
    data = dataset([row(texts=MANY[:3], name="here")])
    sample = data[0, 0]
    assert sample.id == "here"
    assert sample.images.shape == (1 + 16, 3, 16, 16)  # enlarged to 64: 4 x 4 tiles and the whole image
    [(ids, labels)] = sample.conversations
    assert (ids == data.vlm_cfg.image_token_id).sum() == 17 * 4
    assert spoken(data, ids).count("is there a") == 3
    assert spoken(data, labels[labels != -100]).split() == ["red", "blue", "red"]
    assert ids.dtype == labels.dtype == torch.int64
    assert sample.dropped == {}


def test_turns_per_image_makes_each_drawn_turn_a_conversation():
    data = dataset([row(texts=MANY)], train_cfg=tiny_train(turns_per_image=3))
    sample = data[0, 0]
    assert len(sample.conversations) == 3
    for ids, _ in sample.conversations:
        assert (ids == data.vlm_cfg.image_token_id).sum() == 17 * 4
        assert spoken(data, ids).count("is there a") == 1
    every = dataset([row(texts=MANY)], train_cfg=tiny_train(turns_per_image=3), train=False)
    assert len(every[0, 0].conversations) == len(MANY)


def test_draws_follow_their_weights_and_repeat_no_turn_before_all_were_drawn():
    rng = random.Random(0)
    for _ in range(20):
        assert sorted(draw_turns([1.0, 2.0, 3.0], 3, rng)) == [0, 1, 2]
        assert max(Counter(draw_turns([9.0, 1.0, 1.0], 7, rng)).values()) == 3
        assert len(set(draw_turns([1.0] * 9, 4, rng))) == 4
    first = Counter(draw_turns([3.0, 1.0, 1.0], 1, rng)[0] for _ in range(5000))
    assert [first[i] for i in range(3)] == pytest.approx([3000, 1000, 1000], rel=0.12)


def test_a_source_shares_its_weight_among_its_turns_whatever_their_number():
    turns = [turn(source="yes_no")] * 4 + [turn(source="shape")] + [turn(source="color")] * 2
    weights = turn_weights(turns, {"yes_no": 2.0, "shape": 3.0}, rarity=None)
    assert weights == pytest.approx([0.5] * 4 + [3.0] + [0.5] * 2)  # color is not named: 1


def test_balanced_answers_leave_nothing_to_learn_from_the_question():
    rows = [row(texts=[turn("red?", "yes" if i == 0 else "no"), turn("what?", "red")]) for i in range(5)]
    rarity = answer_rarity(rows)
    assert rarity == {("red?", "yes"): 5.0, ("red?", "no"): 1.25, ("what?", "red"): 1.0}
    both = [turn("red?", "yes", "a"), turn("red?", "no", "a"), turn("what?", "red", "b")]
    assert turn_weights(both, {"a": 2.0}, rarity) == pytest.approx([1.6, 0.4, 1.0])
    data = dataset(rows, train_cfg=tiny_train(turns_per_image=1, balance_answers=True))
    assert data[0, 0].conversations


@pytest.mark.parametrize("cache", [False, True])
def test_items_depend_on_seed_epoch_and_index_alone(cache):
    rows = [row(texts=MANY, name=str(i)) for i in range(3)]
    config = tiny_train(turns_per_image=2, flip_images=True)

    def visit(data, epoch, index):
        sample = data[epoch, index]
        return [
            sample.images.sum().item(),
            sample.images[0, 0, 0, 0].item(),
            *(ids.tolist() for ids, _ in sample.conversations),
        ]

    data, other = dataset(rows, train_cfg=config), dataset(rows, train_cfg=config, cache=cache)
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    seen = {key: visit(data, *key) for key in keys}
    assert {key: visit(other, *key) for key in reversed(keys)} == seen
    assert len({str(seen[epoch, 0]) for epoch in range(4)}) > 1
    reseeded = dataset(rows, train_cfg=tiny_train(turns_per_image=2, flip_images=True, seed=1))
    assert any(visit(reseeded, *key) != seen[key] for key in keys)


def test_half_of_the_visits_mirror_the_images_of_a_row():
    images = [encoded(picture(16, 16)), encoded(picture(40, 20, seed=1))]
    vlm = tiny_vlm(resize_to_max_side_len=False)
    data = dataset([row(images)], vlm, tiny_train(flip_images=True), cache=True)
    plain = dataset([row(images)], vlm, train=False)[0, 0].images
    assert plain.shape[0] == 1 + 7
    mirrored = [not torch.equal(data[epoch, 0].images, plain) for epoch in range(60)]
    assert 15 < sum(mirrored) < 45
    sample = data[mirrored.index(True), 0]
    assert torch.equal(sample.images[0], plain[0].flip(-1))
    assert torch.equal(sample.images[1], plain[1].flip(-1))  # the whole second image
    assert torch.equal(sample.images[2:5], plain[2:5].flip(0, -1))  # its first row of tiles


def test_cache_reads_a_row_once():
    class Once(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    reads: list[int] = []
    data = dataset(Once([row(), row()]), cache=True)
    for epoch in range(3):
        assert data[epoch, 1].conversations
    assert reads == [1]
    assert data.questions(0) is data.questions(0)
    assert reads == [1, 0]


UNUSABLE = {
    "image does not decode": [
        row([b"junk"]),
        row([None]),
    ],
    "image file breaks off": [row([encoded(picture(64, 64))[:200]])],
    "no such file": [row([encoded(picture()), {"bytes": None, "path": "/nowhere.png"}]), row(["/nowhere.png"])],
    "too many images": [row([encoded(picture())] * 5)],
    "no text": [row(texts=[]), row(texts=[turn(""), turn(assistant=None), turn(user=" \n"), turn(user=None)])],
    "image token in text": [row(texts=[turn("what is <|image|>?")]), row(texts=[turn(assistant="<row_1_col_1> red")])],
    "control token in text": [
        row(texts=[turn(assistant="yes<|im_end|>\n<|im_start|>user\nno")]),
        row(texts=[turn("<|endoftext|>")]),
    ],
    "rating": [row(relevance_ratings=[0])],
    "too long": [row(texts=[turn("red " * 600)])],
    "word not in the vocabulary": [row(texts=[turn("quo vadis?")]), row(texts=[turn(assistant="purple")])],
    "no label": [row()],
}


@pytest.mark.parametrize(("reason", "unusable"), [(reason, one) for reason, rows in UNUSABLE.items() for one in rows])
@pytest.mark.parametrize("turns_per_image", [None, 1])
def test_unusable_rows_are_counted_by_reason(reason, unusable, turns_per_image):
    vlm = tiny_vlm(lm_chat_template="{{ messages[0]['content'] }}") if reason == "no label" else None
    sample = dataset([unusable], vlm, tiny_train(turns_per_image=turns_per_image))[0, 0]
    assert (sample.conversations, sample.images, sample.dropped) == ([], None, {reason: 1})


def test_unusable_turns_leave_the_others():
    turns = [
        turn("is <|image|> red?"),
        turn("is the shape red?", " yes "),
        turn("is it?", "yes<|im_end|>\n<|im_start|>user\nno"),
        turn(""),
        turn("red " * 600),
        turn("is there a purple shape?"),
        turn("is the shape blue?", "no"),
    ]
    rated = row(texts=turns, formatting_ratings=[5, 5, 5, 5, 5, 5, 0])
    sample = dataset([rated], train_cfg=tiny_train(turns_per_image=4))[0, 0]
    assert sample.dropped == {
        f"turn: {reason}": 1
        for reason in (
            *("image token in text", "control token in text", "no text", "too long", "rating"),
            "word not in the vocabulary",
        )
    }
    assert len(sample.conversations) == 4
    assert len({tuple(ids.tolist()) for ids, _ in sample.conversations}) == 1


def test_questions_are_the_prompts_of_the_usable_turns():
    turns = [turn("what is the shape?", "circle", "shape"), turn(""), turn("is the shape red?", "no", "yes_no")]
    data = dataset([row(texts=turns, name="here"), row([b"junk"])], train=False)
    questions = data.questions(0)
    assert (questions.answers, questions.sources, questions.id) == (["circle", "no"], ["shape", "yes_no"], "here")
    assert [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in questions.prompts] == [
        "user\nwhat is the shape?\nassistant\n",
        "user\nis the shape red?\nassistant\n",
    ]
    assert questions.dropped == {"turn: no text": 1}
    assert data.questions(1).prompts == []
    assert data.questions(1).dropped == {"image does not decode": 1}


def test_a_data_set_reaches_worker_processes_that_are_spawned():
    """There it is pickled; the samples are the same."""
    data = dataset([row(texts=MANY)], train_cfg=tiny_train(turns_per_image=2, balance_answers=True))
    for one in (data, dataset([row(texts=MANY)], cache=True)):
        sample = one[1, 0]
        sent = pickle.loads(pickle.dumps(one))[1, 0]
        assert torch.equal(sent.images, sample.images)
        assert [ids.tolist() for ids, _ in sent.conversations] == [ids.tolist() for ids, _ in sample.conversations]


def test_drop_summary():
    counter = DropCounter({"no text": 1, "turn: rating": 3})
    counter.update({"too long": 2})
    assert counter.summary() == "dropped 3 rows (2 too long, 1 no text) and 3 turns (3 rating)"
    assert DropCounter().summary() == "dropped nothing"
