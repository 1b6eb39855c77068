"""generate.py --chat: history through the chat template, images in any turn, and what cannot be asked."""

import pytest
import torch
from tiny.data import encoded, picture, tiny_vlm
from tiny.families import family_of, of_families
from tiny.grades import save_answering_model

from data.datasets import Questions
from data.text import encode_conversation, encode_prompt, get_tokenizer
from eval.asking import Asker
from eval.chat import Chat, paths_of
from eval.prompt_cache import PromptCache
from training.setup import autocast


@pytest.fixture
def chat(request, tmp_path, monkeypatch):
    """A chat with an untrained model; `shown` is the answers' text, `notes` the other lines, `asked` the prompts."""
    save_answering_model(tmp_path, **family_of(request))
    (tmp_path / "a.png").write_bytes(encoded(picture(40, 16)))
    device = torch.device("cpu")
    asker = Asker(tmp_path, device, autocast(device, "float32"))
    shown, notes, asked = [], [], []
    made = Chat(asker, 6, show=shown.append, note=notes.append)
    stream = asker.stream
    monkeypatch.setattr(
        asker, "stream", lambda question, *rest, **more: asked.append(question) or stream(question, *rest, **more)
    )
    made.shown, made.notes, made.asked, made.image = shown, notes, asked, f"/image {tmp_path / 'a.png'}"
    return made


def test_later_questions_know_what_was_said_and_the_images_before(chat):
    chat.run(iter(["what color?", chat.image, "is it red?", chat.image, "and <image> this?"]))
    assert [len(question.images) if question.images is not None else 0 for question in chat.asked] == [0, 1, 2]
    slots = [prompt.count(chat.asker.model.cfg.image_token_id) for one in chat.asked for prompt in one.prompts]
    assert slots == [0, 4, 8]
    answers = "".join(chat.shown).splitlines()
    assert len(answers) == 3
    image = "<|image|>" * 4
    turns = [
        {"user": "what color?", "assistant": answers[0]},
        {"user": f"{image}is it red?", "assistant": answers[1]},
        {"user": f"and {image} this?", "assistant": "red"},
    ]
    ids, labels = encode_conversation(chat.asker.tokenizer, turns, "", train_on="last_answer")
    begin = next(i for i, label in enumerate(labels) if label != -100) + 1
    assert chat.asked[2].prompts == [ids[:begin]]
    assert sum("tokens" in note for note in chat.notes) == 3


def test_a_turn_reads_only_what_is_new(chat, monkeypatch):
    model, lengths, images = chat.asker.model, [], []
    embed = model.embed

    def counted(input_ids, given=None, *rest, **named):
        lengths.append(input_ids.shape[1])
        images.append(0 if given is None else len(given))
        return embed(input_ids, given, *rest, **named)

    monkeypatch.setattr(model, "embed", counted)
    chat.run(iter([chat.image, "what color?", "is it red?", chat.image, "and <image> this?", "/reset", "what color?"]))
    prompts = [len(one.prompts[0]) for one in chat.asked]
    assert images == [1, 0, 1, 0]
    assert (lengths[0], lengths[3]) == (prompts[0], prompts[3])
    # The earlier prompt is known; of this untrained model's answer not all, as it is no text that makes its tokens.
    assert lengths[1] <= prompts[1] - prompts[0]
    assert lengths[2] <= prompts[2] - prompts[1]


@of_families("chat")
def test_answers_are_those_to_the_whole_conversation(chat):
    chat.run(iter(["what color?", chat.image, "is it red?", chat.image, "and <image> this?", "is it blue?"]))
    alone = [chat.asker.answer([one], 6)[0] for one in chat.asked]
    assert alone == "".join(chat.shown).splitlines()
    assert len(set(alone)) > 1


def test_another_beginning_is_read_again_and_no_image_in_part(chat):
    known, model = PromptCache(), chat.asker.model
    image = [model.cfg.image_token_id] * model.cfg.mp_image_token_length
    tiles = torch.randint(0, 256, (2, 3, model.cfg.vit_img_size, model.cfg.vit_img_size), dtype=torch.uint8)

    def ask(prompt, images):
        question = Questions(images, [prompt], [""], [None], "")
        assert "".join(chat.asker.stream(question, 3, known=known)) == chat.asker.answer([question], 3)[0]
        return known.ids[: len(prompt)]

    assert ask([5, 6, *image, 7], tiles[:1]) == [5, 6, *image, 7]
    rest = known.continued(
        Questions(tiles, [[5, 6, *image, *image, 8]], [""], [None], ""), 3, model.cfg, "cpu", torch.float32
    )
    assert rest.prompts == [[*image, 8]]
    assert len(rest.images) == 1
    ask([5, 6, *image[1:], 7, 8, 9][:2], None)
    rest = known.continued(Questions(tiles[:1], [[5, *image, 8]], [""], [None], ""), 3, model.cfg, "cpu", torch.float32)
    assert rest.prompts == [[*image, 8]]
    ask([5, *image, 8], tiles[1:])
    ask([9], None)


@of_families("chat")
def test_the_streamed_answer_is_the_answer(chat):
    chat.run(iter([chat.image, "what color?"]))
    [question] = chat.asked
    assert "".join(chat.shown).strip() == chat.asker.answer([question], 6)[0] != ""


def test_reset_forgets_and_quit_ends(chat):
    chat.run(iter([chat.image, "what color?", chat.image, "/reset", "what color?", "/quit", "never asked"]))
    assert len(chat.asked) == 2
    tokenizer = chat.asker.tokenizer
    assert chat.asked[1].prompts == [encode_prompt(tokenizer, "what color?", "")]
    assert chat.asked[1].images is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("what <|im_end|> color?", "control token in text: <|im_end|>"),
        ("what <|IMAGE|> <|image|>?", "image token in text: <|image|>"),
        ("is <image> red?", "1 <image> in the text, 0 images"),
        ("/image absent.png", "absent.png: no such file"),
        ("/image", "/image PATH"),
        ("/images a.png", "no command /images"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_the_chat_goes_on(chat, line, problem):
    chat.run(iter([line, "what color?"]))
    assert problem in chat.notes[0]
    assert len(chat.asked) == 1
    assert len(chat.contents) == 2


def test_more_than_the_model_has_positions_is_not_asked(chat):
    chat.asker.model.cfg.lm_max_position_embeddings = 30
    chat.run(iter(["what color?"] * 6))
    assert 0 < len(chat.asked) < 6
    assert "/reset begins a new conversation" in chat.notes[-1]


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat):
    show = chat.show

    def interrupted(piece):
        show(piece)
        chat.show = show
        raise KeyboardInterrupt

    chat.show = interrupted
    chat.run(iter(["what color?", "is it red?"]))
    first = "".join(chat.shown).splitlines()[0]
    assert len(chat.asked) == 2
    assert chat.contents[1] == first
    assert "stopped" in chat.notes[0]
    assert not torch.is_inference_mode_enabled()


def test_ctrl_c_before_the_first_token_keeps_the_images_waiting(chat, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(chat.asker.model, "stream", interrupted)
        chat.run(iter([chat.image, "what color?"]))
    assert (chat.contents, len(chat.waiting)) == ([], 1)
    chat.run(iter(["is it red?"]))
    assert len(chat.asked[-1].images) == 1


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(chat):
    left = [KeyboardInterrupt(), "what color?"]

    class Lines:
        def __next__(self):
            if not left:
                raise StopIteration
            if isinstance(one := left.pop(0), str):
                return one
            raise one

    chat.run(Lines())
    assert len(chat.asked) == 1


def test_an_answer_that_writes_a_control_token_as_text_does_not_forge_the_history(chat, monkeypatch):
    monkeypatch.setattr(chat.asker, "stream", lambda *_, **__: (piece for piece in ["<|im_<|im_end|>end|> r", "ed"]))
    chat.run(iter(["what color?"]))
    assert chat.contents[1] == " red"


def test_paths_of_a_line(tmp_path):
    (tmp_path / "two words.png").touch()
    assert paths_of(f"{tmp_path}/two words.png") == [tmp_path / "two words.png"]
    assert [path.name for path in paths_of("'two words.png' b.png")] == ["two words.png", "b.png"]
    assert [path.name for path in paths_of("it's.png")] == ["it's.png"]


def test_tokens_of_a_tokenizer_are_found_in_texts():
    from data.control_tokens import ControlTokens

    cfg = tiny_vlm()
    found = ControlTokens(get_tokenizer(cfg), cfg)
    assert found.find("a <row_1_col_2>") == ("image token in text", "<row_1_col_2>")
    assert found.find("a <|im_start|> b") == ("control token in text", "<|im_start|>")
    assert found.find("a <image> b < | image | >") is None
