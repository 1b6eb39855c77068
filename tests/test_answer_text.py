"""The text of an answer as its tokens come: stop strings, half letters, and what can be shown."""

import pytest
import torch
from tiny.data import byte_level_tokenizer

from data.easy_vqa import tokenizer
from eval.answer_text import AnswerText, Speed


class Letters:
    """Tokens of a byte each; 0 ends an answer."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def taken(text: str, stop=(), room=None, ended=False) -> tuple[str, list[str], AnswerText]:
    """(the answer, what was shown of it at each token, the AnswerText)."""
    answer = AnswerText(Letters(), stop, room)
    pieces = []
    for token in [*text.encode(), *[0] * ended]:
        answer.add(token)
        pieces.append(answer.take())
    return answer.text, pieces, answer


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("red\nQ: what", ["\nQ:"], "red"),
        ("a cat. END of it", ["END"], "a cat."),
        ("one two three", ["three", "two"], "one"),
        ("stop", ["stop"], ""),
        ("EN END", ["END"], "EN"),
        ("ENEND", ["END"], "EN"),
        ("no stop in it EN", ["END"], "no stop in it EN"),
        ("  space  around  ", [], "space  around"),
        ("grün 猫 ", ["x"], "grün 猫"),
        ("a b a c", ["a b c", "a c"], "a b"),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(text, stop, expected):
    found, pieces, answer = taken(text, stop, ended=True)
    assert found == expected == "".join(pieces)
    assert answer.done


def test_what_could_begin_a_stop_string_and_half_letters_are_held_back():
    _, pieces, _ = taken("ab猫 EN", ["END"])
    assert pieces == ["a", "b", "", "", "猫", "", "", ""]
    _, pieces, _ = taken("ENough", ["END"])
    assert pieces[:3] == ["", "", "ENo"]


def test_it_is_done_at_the_end_token_and_where_there_is_no_more_room():
    text, _, answer = taken("red", room=2)
    assert (text, answer.done, answer.count) == ("re", True, 2)
    answer = AnswerText(Letters())
    for token in (*b"re", 0, *b"d"):
        answer.add(token)
    assert (answer.text, answer.count) == ("re", 3)


def test_the_pieces_are_the_answer_with_real_tokenizers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    byte_level_tokenizer(tmp_path)
    for made in (tokenizer(), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        made.eos_token = "<|im_end|>"
        ids = torch.randint(0, len(made), (200,), generator=torch.Generator().manual_seed(0)).tolist()
        ids = [token for token in ids if token != made.eos_token_id]
        answer = AnswerText(made)
        shown = ""
        for token in [*ids, made.eos_token_id]:
            answer.add(token)
            shown += answer.take()
        assert shown == answer.text == made.decode(ids, skip_special_tokens=True).strip()


def test_speed_says_what_was_measured_alone():
    speed = Speed()
    assert str(speed) == "0 tokens"
    speed.begin()
    speed.add(1)
    assert "tokens/s" not in str(speed)
    assert str(speed).endswith("1 token")
    speed.add(2)
    assert (speed.tokens, speed.later_tokens, len(speed.first_s)) == (3, 2, 1)
    assert "first token after" in str(speed)
    assert "tokens/s" in str(speed)
