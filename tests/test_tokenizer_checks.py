"""What can be wrong with a tokenizer and its chat template is told before any work, with the flag and what to do."""

import json
import random
import re
from pathlib import Path

import pytest
from test_data_formats import changed
from tiny.data import dataset, encoded, picture, row, tiny_train, tiny_vlm, turn
from tiny.templates import FAMILIES, IM, IM_TOKENS, tokenizer_of

from data.pipeline import load_data
from data.text import NotHere, encode_conversation, get_tokenizer
from data.tokenizer_checks import check_tokenizer, load_tokenizer
from models.config import CHATML

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
BOS = ["<s>", *IM_TOKENS]


def config(folder, template: str = CHATML, special=(), **more):
    """The config of a new tokenizer of bytes in the folder."""
    made = tokenizer_of(folder, list(special) or IM_TOKENS, **more)
    return tiny_vlm(lm_tokenizer=str(folder), lm_base_vocab_size=len(made), lm_chat_template=template)


def body(text: str) -> str:
    return "{% for m in messages %}" + text + "{% endfor %}"


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Template -> what is said of it.
REFUSED = {
    "raises": (body("{{ m.nothing.at_all }}"), "raises on a conversation of questions and answers: UndefinedError"),
    "is not Jinja": ("{% for m in messages %}", "raises on a conversation .* TemplateSyntaxError"),
    "refuses": ("{{ raise_exception('never') }}", "raises on .*never"),
    "refuses a second turn": (
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + body(IM) + PROMPT, "one turn",
    ),
    "no question": (body("{% if m.role != 'user' %}" + IM + "{% endif %}") + PROMPT, "does not write the question"),
    "no answer": ("{{ messages[0]['content'] }}", "does not write the answer"),
    "no history": (
        "{% for m in messages[-2:] %}" + IM + "{% endfor %}" + PROMPT, "each content of a conversation once"
    ),
    "no add_generation_prompt": (
        body(IM), r"has no add_generation_prompt: .* let it write '<\|im_start\|>assistant' at the end"
    ),
    "a prompt that ends too early": (
        body(IM) + "{% if add_generation_prompt %}<|im_start|>{% endif %}", "ends too early: .* 'assistant'"
    ),
    "an end that is not in the vocabulary": (
        body("<|im_start|>{{ m.role }}\n{{ m.content }}<|eot|>\n") + PROMPT,
        r"ends an answer with '<\|eot\|>', which --lm_tokenizer .* \(it is 7 of its tokens.*or end an answer with",
    ),
    "no end": (body("{{ m.role }}: {{ m.content }}\n") + "{% if add_generation_prompt %}assistant: {% endif %}",
               "writes nothing after an answer: .* end it with {{ eos_token }}"),
    "a space at the end of the prompt": (
        body("{{ m.role }}:{% if m.role == 'assistant' %} {% endif %}{{ m.content }}<|im_end|>")
        + "{% if add_generation_prompt %}assistant: {% endif %}",
        "ends within a token of the conversation",
    ),
    "BOS twice": ("{{ bos_token }}{{ bos_token }}" + body(IM) + PROMPT, "begins with '<s>' twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_trained_is_told_what_to_do(name, tmp_path):
    template, message = REFUSED[name]
    of_words = "space" in name
    vlm = config(tmp_path, template, BOS, eos="<|im_end|>", bos="<s>", of_words=of_words)
    with pytest.raises(ValueError, match=f"^--lm_chat_template: .*{message}") as told:
        check_tokenizer(get_tokenizer(vlm), vlm)
    assert len(str(told.value)) < 400
    assert "\n" not in str(told.value)


def test_an_end_that_is_unknown_names_the_tokenizer():
    vlm = tiny_vlm(lm_chat_template=CHATML.replace("im_end", "eot"))
    with pytest.raises(ValueError, match=r"'<\|eot\|>', which --lm_tokenizer easy-vqa .* \(it is unknown to it\)"):
        check_tokenizer(get_tokenizer(vlm), vlm)


def test_the_wrong_family_s_template_is_told(tmp_path):
    """The default template with Llama 3's tokenizer, which has none of its tokens."""
    llama = FAMILIES["Llama 3"]
    vlm = config(tmp_path, CHATML, llama.special, eos=llama.eos)
    with pytest.raises(ValueError, match=r"'<\|im_end\|>', which .* take the template that belongs to this tokenizer"):
        check_tokenizer(get_tokenizer(vlm), vlm)


def test_generation_stops_at_the_end_of_an_answer(tmp_path):
    vlm = config(tmp_path, eos="<|endoftext|>")
    tokenizer = get_tokenizer(vlm)
    assert check_tokenizer(tokenizer, vlm) == []
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"ends an answer with '<\|im_end\|>', but generation stops at '<\|endoftext"):
        check_tokenizer(tokenizer, vlm)


def test_a_pad_that_equals_the_end_hides_no_label(tmp_path):
    vlm = config(tmp_path, eos="<|im_end|>", pad_token="<|im_end|>")
    data = dataset([row([], texts=[turn()] * n) for n in (1, 3)], vlm, train=False)
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    assert check_tokenizer(data.tokenizer, vlm) == []
    from data.collators import TrainCollator

    batch = TrainCollator(data.tokenizer.pad_token_id, vlm)([data[0, 0], data[0, 1]])
    assert (batch["targets"] == data.tokenizer.eos_token_id).sum(1).tolist() == [1, 3]


def test_stored_truncation_and_padding_are_cleared_and_said(tmp_path):
    vlm = config(tmp_path)
    file = tmp_path / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    plain = get_tokenizer(vlm)
    file.write_text(json.dumps(stored), encoding="utf-8")
    tokenizer, notes = load_tokenizer(vlm, None)
    [note] = notes
    assert note.startswith(f"--lm_tokenizer {tmp_path}: its stored truncation to 8 tokens and padding")
    turns = [turn("what is the shape of all of this?", "a very long answer")]
    assert encode_conversation(tokenizer, turns, "") == encode_conversation(plain, turns, "")


def test_content_in_parts_is_written_in_parts(tmp_path):
    """As the templates of vision-language models have it."""
    parts = (
        "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    )
    vlm = config(tmp_path, body(parts + "{% endfor %}<|im_end|>\n") + PROMPT)
    tokenizer, notes = load_tokenizer(vlm, None)
    plain = get_tokenizer(tiny_vlm(**{name: getattr(vlm, name) for name in ("lm_tokenizer", "lm_base_vocab_size")}))
    turns = [turn("is it?", "yes"), turn("why?", "so")]
    for system in ("", "be kind"):
        assert encode_conversation(tokenizer, turns, "", system) == encode_conversation(plain, turns, "", system)
    assert notes == []


def test_think_blocks_are_noted(tmp_path):
    family = FAMILIES["Qwen3"]
    vlm = config(tmp_path, family.template, family.special)
    [note] = load_tokenizer(vlm, None)[1]
    assert note.startswith("--lm_chat_template: begins some answers in another way")


# Tokens


def test_tokens_beyond_the_embedding(tmp_path):
    vlm = config(tmp_path)
    tokenizer = get_tokenizer(vlm)
    tokenizer.add_tokens(["<|late|>"])
    with pytest.raises(
        ValueError, match=r"<\|late\|> has id \d+, but the embedding has \d+ rows; --lm_base_vocab_size"
    ):
        check_tokenizer(tokenizer, vlm)


def test_an_image_token_that_is_not_one_id(tmp_path):
    vlm = config(tmp_path)
    tokenizer = get_tokenizer(vlm)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    with pytest.raises(ValueError, match=r"does not keep <\|image\|> of --vlm_extra_tokens as one token"):
        check_tokenizer(tokenizer, vlm)


def test_no_text_forges_a_token_by_other_letters(tmp_path):
    """Where the tokenizer looks for its tokens in the normalized text, a full-width bracket makes one, too."""
    from tokenizers import AddedToken, Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    config(tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.normalizer = normalizers.NFKC()
    made.add_special_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    vlm = tiny_vlm(lm_tokenizer=str(tmp_path), lm_base_vocab_size=made.get_vocab_size())
    texts = ["a <|end|>", "a \uff1c|end|\uff1e", "a < |end|>"]
    data = dataset([row([], texts=[turn("what?", text)]) for text in texts], vlm, train=False)
    dropped = {"control token in text": 1}
    assert [data[0, i].dropped for i in range(3)] == [dropped, dropped, {}]


# Before any work


def test_data_is_not_touched_where_the_template_is_wrong(tmp_path):
    class Untouched(list):
        def __getitem__(self, index):
            pytest.fail("a row was read")

    vlm = tiny_vlm(lm_chat_template=body(IM))
    with pytest.raises(ValueError, match="--lm_chat_template: has no add_generation_prompt"):
        load_data(Untouched([row()] * 4), vlm, tiny_train(val_size=1), None)


def test_a_dry_run_checks_too_and_asks_no_hub(no_network, capsys):
    import train
    from training.arguments import parse_arguments

    assert train.main(parse_arguments(["--dry_run", "--lm_chat_template", body(IM)])) == 2
    assert "--lm_chat_template: has no add_generation_prompt" in capsys.readouterr().err
    for name in ("nobody/nothing", "./no/such/folder"):
        with pytest.raises(NotHere, match=f"--lm_tokenizer {name}"):
            load_tokenizer(tiny_vlm(lm_tokenizer=name, lm_base_vocab_size=9), None, local_only=True)
    assert no_network == []


# Tools

# Tools stand in a system turn, calls in the assistant's, results in a user's; the prompt may think.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% elif m.tool_calls %}<|im_start|>assistant\n{{ m.content }}{% for c in m.tool_calls %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% else %}" + IM + "{% endif %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "zoom", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "zoom", "arguments": '{"by": 2, "at": "\u00e9"}'}}
LOOKED = {
    "image": "a.png",
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "it is near"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "closer"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ],
}
CALLED = '<call>zoom {"by": 2, "at": "é"}</call>'


ASKED = LOOKED["messages"]


def read(tmp_path, *records: dict) -> list[dict]:
    from data.rows import load_rows

    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    return [rows[i] for i in range(len(rows))]


THINK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("think", ["", THINK])
def test_tool_calls_are_learned_and_results_are_not(tmp_path, think):
    template = TOOLS + PROMPT.replace("{% endif %}", think + "{% endif %}")
    vlm = config(tmp_path / "tokenizer", template, [*IM_TOKENS, "<think>", "</think>"])
    data = dataset(read(tmp_path, LOOKED), vlm, train=False)
    assert data[0, 0].dropped == {}
    [(ids, labels)] = data[0, 0].conversations
    decode = data.tokenizer.decode
    text = decode(ids)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "zoom"')
    assert text.endswith(f"assistant\n{think}{CALLED}<|im_end|>\n")
    assert text.count(think) == 3 or not think
    assert decode(labels[labels != -100]) == f"{CALLED}<|im_end|>a cat<|im_end|>{CALLED}<|im_end|>"
    assert "<result>it is near</result>" in text

    questions = data.questions(0)
    assert questions.answers == ["a cat", CALLED]
    first, second = map(decode, questions.prompts)
    assert first.endswith(f"<result>it is near</result><|im_end|>\n<|im_start|>assistant\n{think}")
    assert second.endswith(f"closer<|im_end|>\n<|im_start|>assistant\n{think}")
    last = dataset(data.rows, vlm, tiny_train(train_on="last_answer"))[0, 0].conversations[0][1]
    assert decode(last[last != -100]) == f"{CALLED}<|im_end|>"


def test_what_a_template_does_not_write_of_tools_is_a_bad_row(tmp_path):
    plain = {"messages": LOOKED["messages"][:1] + LOOKED["messages"][3:4]}
    rows = read(tmp_path, LOOKED, plain, plain | {"tools": [TOOL]}, plain | {"tools": []})
    vlm = config(tmp_path / "tokenizer")
    data = dataset(rows, vlm, train=False)
    assert [data[0, i].dropped for i in range(4)] == [{"tools unknown to the chat template": 1}, {}] * 2
    [reason] = data[0, 0].dropped
    assert reason.first == "rows.jsonl, line 1: see --lm_chat_template"

    strict = TOOLS.replace(
        "{% if tools %}", "{% if messages | length > 4 %}{{ raise_exception('too many') }}{% endif %}{% if tools %}"
    )
    vlm = vlm.__class__(**(vars(vlm) | {"lm_chat_template": strict + PROMPT}))
    data = dataset(rows[:2], vlm, train=False)
    assert [data[0, i].dropped for i in range(2)] == [{"refused by the chat template": 1}, {}]


def called(**call) -> list[dict]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "it"}], "a tool message that follows no tool call"),
        ([*ASKED[:1], {"role": "tool", "content": "it"}], "a tool message that follows no tool call"),
        ([{"role": "assistant", "tool_calls": [CALL]}], "tool calls that follow no question"),
        ([*ASKED[:1], {"role": "assistant", "tool_calls": "zoom"}], "tool_calls is a string"),
        (called(function={}), "a tool call has no name"),
        (called(name="a", arguments="{"), "arguments is not JSON"),
        (called(name="a", arguments='{"b": "\\ud83d"}'), "arguments of a tool call hold half of a surrogate pair"),
        (called(name="a", arguments={"b": "\ud83d"}), "a tool call holds what is not JSON"),
        (called(name="a", arguments=[1]), "arguments of a tool call is a list"),
    ],
)
def test_tools_that_can_mean_nothing_are_bad_rows(tmp_path, messages, reason):
    [found] = read(tmp_path, {"messages": messages})
    assert found["bad"] == reason


def test_the_page_s_row_with_tools_is_learned_as_it_says(tmp_path):
    blocks = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    [record] = [block for block in blocks if '"tools"' in block]
    (tmp_path / "cat.jpg").write_bytes(encoded(picture()))
    data = dataset(read(tmp_path, json.loads(record)), config(tmp_path / "tokenizer", TOOLS + PROMPT), train=False)
    [(_, labels)] = data[0, 0].conversations
    learned = data.tokenizer.decode(labels[labels != -100])
    assert learned == '<call>zoom {"by": 2}</call><|im_end|>A bell.<|im_end|>'


def test_any_value_at_any_place_of_a_row_is_used_or_counted(tmp_path):
    """Also where tools are called and pictures stand among words."""
    rng = random.Random(0)
    placed = {"images": ["a.png", "a.png"], "messages": [
        {"role": "user", "content": "is <image> red?"}, {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "text", "text": "or "}, {"type": "image", "image": "a.png"}, "?"]},
        {"role": "assistant", "content": "<image> yes"}]}  # fmt: skip
    records = [changed(rng.choice([LOOKED, LOOKED, placed]), rng) for _ in range(1500)]
    rows = read(tmp_path, *records)
    data = dataset(rows, config(tmp_path / "tokenizer", TOOLS + PROMPT), train=False)
    used = 0
    for i in range(len(rows)):
        sample = data.prepare((0, i))
        assert bool(sample.conversations) or sample.dropped
        used += bool(sample.conversations)
        asked = data.questions(i)
        assert bool(asked.prompts) or asked.dropped
    assert 100 < used < 1400


def test_no_tool_text_forges_a_token(tmp_path):
    said = json.loads(json.dumps(LOOKED).replace("it is near", "<|im_end|>"))
    given = json.loads(json.dumps(LOOKED).replace('"zoom"', '"<|im_end|>"'))
    data = dataset(read(tmp_path, said, given), config(tmp_path / "tokenizer", TOOLS + PROMPT), train=False)
    assert data[0, 0].dropped == {"turn: control token in text": 1}
    assert data[0, 1].dropped == {"control token in text": 1}
