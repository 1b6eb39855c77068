"""Chat templates of families of language models, written from the formats that their makers publish, and tokenizers.

A family is its template, its special tokens (bos and end among them), and what it writes, said once more in Python:
`wanted(system, turns)` is a list of (text, whether it is learned).
"""

from collections.abc import Callable
from dataclasses import dataclass

Parts = list[tuple[str, bool]]


@dataclass
class Family:
    template: str
    special: list[str]
    end: str  # of an answer
    wanted: Callable[[str, list[tuple[str, str]]], Parts]
    eos: str | None = None  # the tokenizer's own, where it is another one
    bos: str | None = None
    of_words: bool = False  # a space belongs to the word after it, as in Llama 2's tokenizer


def _loop(body: str, prompt: str) -> str:
    prompted = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    return "{% for m in messages %}" + body + "{% endfor %}" + prompted


def _block(role: str, text: str, begin: str = "<|im_start|>", sep: str = "\n", end: str = "<|im_end|>\n") -> str:
    return begin + role + sep + text + end


def _chatml(default: str = "", think: str = "") -> Callable[[str, list[tuple[str, str]]], Parts]:
    def wanted(system: str, turns: list[tuple[str, str]]) -> Parts:
        said = system or default
        parts = [(_block("system", said), False)] if said else []
        for user, answer in turns:
            parts += [(_block("user", user) + "<|im_start|>assistant\n" + think, False)]
            parts += [(answer + "<|im_end|>", True), ("\n", False)]
        return parts

    return wanted


def _pairs(
    begin: str, user: str, end: str, after: str = "\n", no_system: bool = False
) -> Callable[[str, list[tuple[str, str]]], Parts]:
    """A format that is `begin` once and `user` with %s for each question."""

    def wanted(system: str, turns: list[tuple[str, str]]) -> Parts:
        parts: Parts = [(begin.replace("%s", system) if system and not no_system else begin.partition("%s")[0], False)]
        for i, (question, answer) in enumerate(turns):
            asked = f"{system}\n\n{question}" if system and no_system and i == 0 else question
            parts += [(user.replace("%s", asked), False), (answer + end, True), (after, False)]
        return parts

    return wanted


def _llama2(system: str, turns: list[tuple[str, str]]) -> Parts:
    parts: Parts = []
    for i, (user, answer) in enumerate(turns):
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else ""
        parts += [(f"<s>[INST] {before}{user} [/INST]", False), (f" {answer} </s>", True)]
    return parts


def _with_system(begin: str, wanted: Callable) -> Callable[[str, list[tuple[str, str]]], Parts]:
    """The format with `begin` (%s: the system text) before it where there is one."""
    return lambda system, turns: [(begin.replace("%s", system) if system else "", False), *wanted("", turns)]


IM = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "<|im_start|>assistant\n"
IM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM3_SYSTEM = "## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
SMOLLM3_DEFAULT = SMOLLM3_SYSTEM + "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
EMPTY_THINK = "<think>\n\n</think>\n\n"


def _default_system(text: str) -> str:
    return (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        + text
        + "<|im_end|>\n{% endif %}"
        + _loop(IM, ASKED)
    )


# The last answer has an empty think block, earlier ones have none, and the prompt has it where thinking is off.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.lstrip('\n') }}"
    "<|im_end|>\n{% else %}" + IM + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SMOLLM3 = (
    "{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
    "{% set think = '' if mode == '/think' else '<think>\n\n</think>\n' %}"
    "<|im_start|>system\n## Metadata\n\nReasoning Mode: {{ mode }}\n\n## Custom Instructions\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}" + SMOLLM + ".{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}" + IM + "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ think }}{{ m.content.lstrip('\n') }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ think }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set said = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ said if loop.first else '' }}"
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = "{{ bos_token }}" + _loop(
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _loop(
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
    )
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = _loop(
    "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>",
    "<|im_start|>assistant<|im_sep|>",
)
# The system text stands in the last question, wherever that is.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set said = none %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.index0 >= rest | length - 2 and said %}{{ said }}"
    "\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _deepseek(think: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>" + think + "{% endif %}"
    )


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _llama3(system: str, turns: list[tuple[str, str]]) -> Parts:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    parts: Parts = [("<|begin_of_text|>" + (header("system") + system + "<|eot_id|>" if system else ""), False)]
    for user, answer in turns:
        parts += [(header("user") + user + "<|eot_id|>" + header("assistant"), False), (answer + "<|eot_id|>", True)]
    return parts


GEMMA_USER = "<start_of_turn>user\n%s<end_of_turn>\n<start_of_turn>model\n"
PHI4_USER = "<|im_start|>user<|im_sep|>%s<|im_end|><|im_start|>assistant<|im_sep|>"
FAMILIES = {
    "Llama 2": Family(LLAMA2, ["<s>", "</s>"], "</s>", _llama2, "</s>", "<s>", of_words=True),
    "Llama 3": Family(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>", _llama3, "<|end_of_text|>", "<|begin_of_text|>"),
    "ChatML": Family(_loop(IM, ASKED), IM_TOKENS, "<|im_end|>", _chatml(), "<|endoftext|>"),
    "SmolLM2": Family(_default_system(SMOLLM), IM_TOKENS, "<|im_end|>", _chatml(SMOLLM)),
    "SmolLM3": Family(
        SMOLLM3,
        [*IM_TOKENS, "<think>", "</think>"],
        "<|im_end|>",
        lambda system, turns: _chatml(SMOLLM3_DEFAULT, EMPTY_THINK[:-1])(system and SMOLLM3_SYSTEM + system, turns),
    ),
    "Qwen2": Family(_default_system("You are a helpful assistant."), IM_TOKENS, "<|im_end|>",
                    _chatml("You are a helpful assistant.")),
    "Qwen2.5": Family(_default_system(QWEN), IM_TOKENS, "<|im_end|>", _chatml(QWEN)),
    "Qwen3": Family(QWEN3, [*IM_TOKENS, "<think>", "</think>"], "<|im_end|>", _chatml("", EMPTY_THINK)),
    "Gemma": Family(GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
                    _pairs("<bos>", GEMMA_USER, "<end_of_turn>", no_system=True), "<eos>", "<bos>"),
    "Phi-3": Family(PHI3, ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>",
                    _with_system("<|system|>\n%s<|end|>\n",
                                 _pairs("", "<|user|>\n%s<|end|>\n<|assistant|>\n", "<|end|>")), "<|endoftext|>"),
    "Phi-4": Family(PHI4, [*IM_TOKENS, "<|im_sep|>"], "<|im_end|>",
                    _with_system("<|im_start|>system<|im_sep|>%s<|im_end|>", _pairs("", PHI4_USER, "<|im_end|>", "")),
                    "<|endoftext|>"),
    "Mistral": Family(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>",
                      lambda system, turns: [
                          (text, learned) if not learned else (" " + text, True)
                          for text, learned in
                          _pairs("<s>", "[INST] %s [/INST]", "</s>", "", no_system=True)(system, turns)
                      ], "</s>", "<s>", of_words=True),
    "DeepSeek V3": Family(_deepseek(""), DEEPSEEK_TOKENS, DEEPSEEK_TOKENS[1],
                          _pairs("<｜begin▁of▁sentence｜>%s", "<｜User｜>%s<｜Assistant｜>", DEEPSEEK_TOKENS[1], ""),
                          DEEPSEEK_TOKENS[1], DEEPSEEK_TOKENS[0]),
    "DeepSeek R1": Family(_deepseek("<think>\n"), [*DEEPSEEK_TOKENS, "<think>"], DEEPSEEK_TOKENS[1],
                          _pairs("<｜begin▁of▁sentence｜>%s", "<｜User｜>%s<｜Assistant｜><think>\n",
                                 DEEPSEEK_TOKENS[1], ""),
                          DEEPSEEK_TOKENS[1], DEEPSEEK_TOKENS[0]),
    "Zephyr": Family(ZEPHYR, ["<s>", "</s>"], "</s>",
                     _with_system("<|system|>\n%s</s>\n", _pairs("", "<|user|>\n%s</s>\n<|assistant|>\n", "</s>")),
                     "</s>", "<s>"),
}  # fmt: skip


def tokenizer_of(folder, special: list[str], eos: str | None = None, bos: str | None = None, of_words=False, **more):
    """Write a tokenizer of letters into the folder: of bytes, or as Llama 2's, where a space begins a word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if of_words:
        letters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
        tokens = ["<unk>", *letters, *("▁" + letter for letter in letters[:-2])]
        made = Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", one) for one in letters[:-2]],
                       unk_token="<unk>")
        )  # fmt: skip
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos, **more)
    tokenizer.save_pretrained(folder)
    return tokenizer
