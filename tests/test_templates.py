"""Over the chat templates of many families: exactly the answers and their end tokens are labels."""

import pytest
from tiny.data import dataset, row, tiny_train, tiny_vlm, turn
from tiny.templates import FAMILIES, tokenizer_of

from data import templates
from data.text import encode_chat, encode_conversation, encode_prompt, get_tokenizer
from data.tokenizer_checks import check_tokenizer

TURNS = [("what is this?", "a red cat"), ("and  that,\nbelow?", "two dogs.\n\nOne is (not) red"), ("why", "1 2 3")]
SYSTEM = "Be brief.\nBe kind."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(what the family writes, its config, its tokenizer)."""
    folder, made = tmp_path_factory.mktemp("tokenizer"), FAMILIES[request.param]
    plain = tokenizer_of(folder, made.special, made.eos, made.bos, made.of_words)
    vlm = tiny_vlm(lm_tokenizer=str(folder), lm_base_vocab_size=len(plain), lm_chat_template=made.template)
    return made, vlm, get_tokenizer(vlm)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_exactly_the_answers_and_their_end_are_labels(family, count, system):
    made, _, tokenizer = family
    parts = made.wanted(system, TURNS[:count])
    turns = [turn(*one) for one in TURNS[:count]]
    ids, labels = encode_conversation(tokenizer, turns, "", system)
    assert text_of(tokenizer, ids) == "".join(text for text, _ in parts)
    assert [label for label in labels if label != -100] == [
        token for text, learned in parts if learned for token in tokenizer.backend_tokenizer.encode(text).ids
    ]
    assert all(label in (-100, following) for label, following in zip(labels, [*ids[1:], None], strict=True))
    assert tokenizer.eos_token == made.end
    assert labels.count(tokenizer.eos_token_id) == count

    _, of_last = encode_conversation(tokenizer, turns, "", system, train_on="last_answer")
    [last] = [text for text, learned in parts if learned][-1:]
    assert text_of(tokenizer, [label for label in of_last if label != -100]) == last
    _, of_all = encode_conversation(tokenizer, turns, "", system, train_on="all")
    assert of_all == [*ids[1:], -100]


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_an_answer_follows_the_prompt_of_generation(family, system):
    _, _, tokenizer = family
    ids, labels = encode_conversation(tokenizer, [turn(*TURNS[0])], "", system)
    prompt = encode_prompt(tokenizer, TURNS[0][0], "", system)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt) - 1] == [-100] * (len(prompt) - 1)
    assert labels[len(prompt) - 1] == ids[len(prompt)]


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_a_later_question_of_a_chat_is_asked_as_it_was_trained(family, system):
    _, _, tokenizer = family
    ids, labels = encode_conversation(tokenizer, [turn(*one) for one in TURNS], "", system, train_on="last_answer")
    said = [text for one in TURNS for text in one][:-1]
    prompt = encode_chat(tokenizer, said, system)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt) - 1] == [-100] * (len(prompt) - 1)
    assert labels[len(prompt) - 1] == ids[len(prompt)]
    assert encode_chat(tokenizer, said[:1], system) == encode_prompt(tokenizer, said[0], "", system)


def test_the_families_pass_the_checks_and_a_conversation_is_rendered_once(family, monkeypatch):
    _, vlm, tokenizer = family
    notes = check_tokenizer(tokenizer, vlm)
    frame = templates.frame_of(tokenizer, 3, False)
    assert len(notes) == frame.rewrites
    render, rendered = templates.render, []
    monkeypatch.setattr(templates, "render", lambda *given, **flags: rendered.append(1) or render(*given, **flags))
    encode_conversation(tokenizer, [turn(*one) for one in TURNS], "")
    assert len(rendered) == (not frame.rewrites)


def test_a_row_says_which_tokens_are_learned(family):
    _, vlm, _ = family
    one = row([], texts=[turn(*one) for one in TURNS], system=SYSTEM)
    learned = {}
    for train_on in ("answers", "last_answer", "all"):
        sample = dataset([one], vlm, tiny_train(train_on=train_on))[0, 0]
        [(ids, labels)] = sample.conversations
        learned[train_on] = int((labels != -100).sum())
    assert 0 < learned["last_answer"] < learned["answers"] < learned["all"] == len(ids) - 1
