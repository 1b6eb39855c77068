"""<image> in texts: the tokens of the k-th picture stand where the k-th <image> stood, and its embeddings with them."""

import pytest
import torch
from tiny.data import dataset, encoded, picture, tiny_train, tiny_vlm
from tiny.grades import make_model

from data import easy_vqa
from data.collators import PromptCollator, TrainCollator, to_device
from data.conversations import read_record
from data.images import ImageProcessor
from data.packing import PackedCollator
from data.text import get_tokenizer, image_string
from data.values import BadRow
from eval.asking import Reader
from generate import main, parse_arguments
from models.vision_language_model import VisionLanguageModel

PAD = 1
SMALL = {
    "resize_to_max_side_len": False, "lm_max_length": 256,
    "vit_hidden_dim": 8, "vit_inter_dim": 8, "vit_n_heads": 1, "vit_n_blocks": 1,
    "lm_hidden_dim": 32, "lm_inter_dim": 16, "lm_n_heads": 2, "lm_n_kv_heads": 1, "lm_n_blocks": 2,
}  # fmt: skip
VLM = tiny_vlm(**SMALL)
SIZES = {"A": (16, 16), "B": (32, 16), "C": (16, 32)}  # one tile; two beside each other; two above each other
GRIDS = {"A": (1, 1), "B": (1, 2), "C": (2, 1)}
PICTURES = {name: encoded(picture(*size, seed=i)) for i, (name, size) in enumerate(SIZES.items())}


def llava(images: str, *texts: str) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"images": [PICTURES[name] for name in images], "conversations": said}


def row_of(record: dict) -> dict:
    return read_record(record, None) | {"id": "row"}


def written(data, ids) -> str:
    """The text of the ids, with A, B and C for the images."""
    text = data.tokenizer.decode(ids)
    for name in ("B", "C", "A"):
        text = text.replace(image_string([GRIDS[name]], VLM), name)
    return text


def questions(data, ids) -> list[str]:
    parts = written(data, ids).split("<|im_start|>user\n")[1:]
    return [part.partition("<|im_end|>")[0] for part in parts]


def asked(*records: dict, **changes) -> list[list[str]]:
    """The questions of each conversation of each record."""
    data = dataset([row_of(record) for record in records], VLM, tiny_train(**changes), train=False)
    samples = [data[0, i] for i in range(len(records))]
    assert not any(sample.dropped for sample in samples), [sample.dropped for sample in samples]
    return [questions(data, ids) for sample in samples for ids, _ in sample.conversations]


@pytest.fixture(scope="module", autouse=True)
def letters():
    """A tokenizer of words decodes "what is A" with its spaces in other places: these tests are about places."""
    patch = pytest.MonkeyPatch()
    words = ("\n", "user", "assistant", "system", " ", *"abcdefghijklmnopqrstuvwxyz?,.:<>\\")
    made = easy_vqa.tokenizer(words)
    from tokenizers import Regex, decoders, pre_tokenizers

    special = "|".join(("user", "assistant", "system", ".", "\n"))
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(special), "isolated")
    made.backend_tokenizer.decoder = decoders.Fuse()
    tokens = {"unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    patch.setattr(easy_vqa, "tokenizer", lambda: type(made)(tokenizer_object=made.backend_tokenizer, **tokens))
    patch.setattr("test_interleaved.VLM", tiny_vlm(**SMALL, lm_base_vocab_size=len(made)))
    yield
    patch.undo()


PLACED = {
    "in the middle": (llava("AB", "is <image> like <image>?", "no"), ["is A like B?"]),
    "one of two at the end": (llava("AB", "a: <image>\nb: <image>", "no"), ["a: A\nb: B"]),
    "one of two at the start": (llava("AB", "<image>\nis like <image> ?", "no"), ["Ais like B ?"]),
    "in the second question": (llava("AB", "<image>\nwhat?", "a", "and <image>?", "b"), ["Awhat?", "and B?"]),
    "at the start of later questions": (
        llava("ABC", "<image>\nwhat?", "a", "<image>\nand this?", "b", "and this?\n<image>", "c"),
        ["Awhat?", "Band this?", "Cand this?"],
    ),
    "the first question has none": (llava("BA", "hi", "ho", "<image> <image> what?", "b"), ["hi", "BAwhat?"]),
    "one alone": (llava("AB", "<image>", "a", "<image>", "b"), ["A", "B"]),
    "beside the word": (llava("A", "is \\<image> in <image> or \\<image>?", "a"), ["is <image> in A or <image>?"]),
    "the word alone": (llava("A", "is it \\<image>?", "a"), ["Ais it <image>?"]),
    "parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "is "}, {"type": "image", "image": PICTURES["C"]},
                                         {"type": "text", "text": " like "}, {"type": "image", "image": PICTURES["A"]},
                                         {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": [{"type": "text", "text": "or "}, {"type": "image", "image": PICTURES["B"]},
                                         {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "no"}]},
        ["is C like A?", "or B?"],
    ),
    "beside and in parts": (
        {"images": [PICTURES["A"]], "messages": [
            {"role": "user", "content": "is it <image>?"}, {"role": "assistant", "content": "no"},
            {"role": "user", "content": [{"type": "image", "image": PICTURES["B"]}, "or this?"]},
            {"role": "assistant", "content": "no"}]},
        ["is it A?", "Bor this?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACED)
def test_a_picture_stands_where_its_mark_stood(name):
    record, wanted = PLACED[name]
    assert asked(record) == [wanted]


@pytest.mark.parametrize(
    "text", ["<image>\nwhat?", "what?\n<image>", "<image>what?", "<image> what?", "  what?<image>  ", "what?"]
)
def test_at_the_start_or_end_of_a_question_it_stands_before_it_as_ever(text):
    plain = {"images": [PICTURES["A"]], "texts": [{"user": "what?", "assistant": "a"}]}
    record = llava("A", text, "a")
    assert asked(record) == asked(plain) == [["Awhat?"]]
    [found], [wanted] = ([{k: v.strip() for k, v in turn.items() if v} for turn in row_of(one)["texts"]]
                         for one in (record, plain))  # fmt: skip
    assert found == wanted
    two = llava("AB", text.replace("<image>", "<image> <image>"), "a")
    assert asked(two) == [["ABwhat?"]]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (llava("AB", "is <image> red?", "no"), "1 <image> in the text, 2 images"),
        (llava("A", "<image>what?", "a", "and <image>?", "b"), "2 <image> in the text, 1 image"),
        (llava("", "what is <image>?", "a"), "1 <image> in the text, 0 images"),
    ],
)
def test_another_number_of_marks_than_of_pictures_is_a_bad_row_with_both(record, found):
    with pytest.raises(BadRow) as bad:
        read_record(record, None)
    assert (bad.value.kind, bad.value.found) == ("another number of <image> than of images", found)


LONG = llava("ABC", "hi", "ho", "is <image> red?", "no", "why?", "so", "and <image> or <image>?", "no")


def test_a_turn_alone_brings_the_pictures_up_to_its_own():
    assert asked(LONG) == [["hi", "is A red?", "why?", "and B or C?"]]
    assert asked(LONG, turns_per_image=1) == [["hi"], ["is A red?"], ["Awhy?"], ["Aand B or C?"]]
    data = dataset([row_of(LONG)], VLM, train=False)
    prompts = data.questions(0).prompts
    assert [questions(data, ids) for ids in prompts] == asked(LONG, turns_per_image=1)
    first, rest = prompts[0], data[0, 0].conversations[0][0]
    assert rest[: len(first)].tolist() == first


@pytest.mark.parametrize("dropped", range(4))
def test_the_pictures_of_a_turn_that_is_not_used_stand_before_the_next(dropped):
    """A rating drops it; later questions may be about its pictures."""
    record = LONG | {"texts": None}
    row = row_of(record) | {"relevance_ratings": [0 if i == dropped else 5 for i in range(4)]}
    data = dataset([row], VLM, train=False)
    [(ids, _)] = data[0, 0].conversations
    every = ["hi", "is A red?", "why?", "and B or C?"]
    wanted = {
        0: every[1:], 1: ["hi", "Awhy?", "and B or C?"], 2: [every[0], every[1], every[3]], 3: every[:3],
    }  # fmt: skip
    assert questions(data, ids) == wanted[dropped]


# Pictures and their embeddings

RECORDS = [
    LONG,
    llava("A", "<image>what?", "a", "why?", "b"),
    llava("", "hi?", "ho"),
    llava("BA", "is <image> like <image>?", "no"),
]


def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(VLM)


def loss(model, **inputs) -> torch.Tensor:
    return model(**{name: value for name, value in inputs.items() if value is not None})


@pytest.mark.parametrize("collator", [TrainCollator, PackedCollator])
@pytest.mark.parametrize("turns_per_image", [None, 1])
def test_in_a_batch_each_conversation_sees_its_own_pictures(collator, turns_per_image):
    """The loss of all of them together is the sum of each on its own with as many tiles as it has tokens for."""
    data = dataset([row_of(one) for one in RECORDS], VLM, tiny_train(turns_per_image=turns_per_image), train=False)
    samples = [data[0, i] for i in range(len(RECORDS))]
    net = model()
    alone = torch.zeros(())
    for sample in samples:
        for ids, labels in sample.conversations:
            tiles = int((ids == VLM.image_token_id).sum()) // VLM.mp_image_token_length
            images = sample.images[:tiles] if tiles else None
            targets = labels[None]
            positions = (labels != -100).nonzero().squeeze(1)
            alone = alone + loss(net, input_ids=ids[None], targets=targets, images=images, label_positions=positions)
    groups = [samples] if collator is TrainCollator else [[samples]]
    batch = collator(PAD, VLM)(*groups)
    together = loss(net, **to_device(batch, "cpu"))
    assert together.item() == pytest.approx(alone.item(), rel=1e-4)
    assert (batch["image_sources"] is None) == (turns_per_image is None)


def test_at_evaluation_each_question_sees_its_own_pictures():
    data = dataset([row_of(one) for one in RECORDS], VLM, train=False)
    rows = [data.questions(i) for i in range(len(RECORDS))]
    net = model().eval()
    options = {"max_new_tokens": 3, "greedy": True}
    alone = []
    for row in rows:
        for prompt in row.prompts:
            tiles = prompt.count(VLM.image_token_id) // VLM.mp_image_token_length
            images = row.images[:tiles] if tiles else None
            alone += net.generate(torch.tensor([prompt]), images, **options).tolist()
    together = net.generate(**to_device(PromptCollator(PAD, VLM)(rows), "cpu"), **options)
    assert together.tolist() == alone


def test_pictures_that_no_turn_shows_take_no_place():
    """Of a drawn turn before all pictures: their tiles are in the batch and their embeddings nowhere."""
    data = dataset([row_of(LONG)], VLM, tiny_train(turns_per_image=1), train=False)
    sample = data[0, 0]
    sample.conversations = sample.conversations[:1]
    batch = TrainCollator(PAD, VLM)([sample])
    assert len(batch["images"]) == 7
    assert len(batch["image_slots"]) == len(batch["image_sources"]) == 0
    net = model()
    loss(net, **to_device(batch, "cpu")).backward()
    assert all(p.grad is None or not p.grad.any() for p in net.MP.parameters())


def test_what_stands_for_a_picture_is_never_learned():
    data = dataset([row_of(LONG)], VLM, tiny_train(train_on="all"), train=False)
    [(ids, labels)] = data[0, 0].conversations
    is_text = ids[1:] < VLM.image_token_id
    assert labels[:-1].tolist() == torch.where(is_text, ids[1:], -100).tolist()
    assert (~is_text).sum() == 7 * 4 + 3 + 4  # slots, whole images, tiles


def test_answers_are_balanced_where_a_text_ends_before_its_picture():
    record = llava("AB", "a: <image> b: <image>", "no", "why?", "so")
    config = tiny_train(turns_per_image=1, balance_answers=True)
    assert len(dataset([row_of(record)], VLM, config)[0, 0].conversations) == 1


def test_generate_puts_pictures_into_the_prompt(tmp_path, capsys, monkeypatch):
    sizes = {"lm_base_vocab_size": VLM.lm_base_vocab_size, "lm_tokenizer": easy_vqa.NAME}
    make_model(**sizes).save_pretrained(tmp_path)
    (tmp_path / "a.png").write_bytes(PICTURES["A"])
    seen = []
    monkeypatch.setattr("data.text.encode_prompt", lambda tokenizer, text, *_: seen.append(text) or [1, 2])
    monkeypatch.setattr("eval.asking.Asker.answer", lambda *given, **options: ["yes"])
    flags = ["--checkpoint", str(tmp_path), "--image", str(tmp_path / "a.png"), "--prompt"]
    main(parse_arguments([*flags, "is <image> red?"]))
    main(parse_arguments([*flags, "is it red?"]))
    slots = seen[1].removesuffix("is it red?")
    assert slots.startswith("<|image|>")
    assert seen[0] == f"is {slots} red?"
    with pytest.raises(ValueError, match="--prompt: another number of <image> than of images: 2 <image>"):
        main(parse_arguments([*flags, "is <image> like <image>?"]))


def test_a_prompt_has_places_also_where_the_image_token_is_spelled_as_one():
    tokens = {"image_token": "<image>"}
    vlm = tiny_vlm(vlm_extra_tokens=tokens, max_img_size=16, lm_base_vocab_size=VLM.lm_base_vocab_size)
    reader = Reader(get_tokenizer(vlm), ImageProcessor(vlm))
    shown = [reader.image(picture(seed=seed)) for seed in range(2)]
    picture_text = "<image>" * vlm.mp_image_token_length
    for text, wanted in (
        ("is <image> like <image>?", f"is {picture_text} like {picture_text}?"),
        ("<image><image> what is it?", 2 * picture_text + "what is it?"),
        ("what is it?", 2 * picture_text + "what is it?"),
    ):
        assert reader.spoken(text, shown)[0] == wanted
    for text, problem in (
        (r"what is \<image>?", "image token in text: <image> must not stand in it$"),  # as text it would be the token
        ("<image>what<|im_end|>", r"<\|im_end\|> must not stand in it$"),
        ("<image><image><image>", "another number of <image> than of images"),
    ):
        with pytest.raises(ValueError, match=problem):
            reader.spoken(text, shown[:1])
