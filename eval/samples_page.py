"""samples.html: sample questions, what they show, and the answers over time, in one file that opens offline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from data.html_page import page, text
from eval.page_pictures import STYLE as PICTURE_STYLE
from eval.page_pictures import PagePictures

PICTURES, FRAMES = 2, 8  # per question, and per video
SIDE, FRAME_SIDE = 112, 72  # pixels of the longer side of a picture, and of a frame
Freeze: TypeAlias = tuple[int, str, bool]  # (step, tower, whether a matrix trains again instead)
STYLE = """
.note { color: #555; font-size: .85em } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9em }
th, td { text-align: left; vertical-align: top; padding: .35em .7em; border-bottom: 1px solid #ddd }
thead th { vertical-align: bottom; white-space: nowrap }
thead small { font-weight: normal; color: #555; display: block }
td.question { min-width: 14em; max-width: 20em; overflow-wrap: anywhere; background: #fff; position: sticky; left: 0 }
td.question > img { float: left; margin: 0 .6em .2em 0; border: 1px solid #bbb } td.question small { color: #777 }
td.answer { min-width: 6em; max-width: 16em; overflow-wrap: anywhere; white-space: pre-wrap }
td.right { background: #e5f5ec } td.right::before { content: "✓\\00a0"; color: #187 }
td.wrong { background: #fbeaea } td.wrong::before { content: "✗\\00a0"; color: #b22 }
.froze { border-left: 3px solid #0072b2 }
"""


class Question(Protocol):
    """A question of the page: eval.samples.SampleQuestion."""

    text: str
    source: str
    images: list[Any]

    @property
    def truth(self) -> str:
        """The answers that are right."""


Answer: TypeAlias = Callable[[Any, int], tuple[str, bool] | None]  # of a question after a step, and whether it is right


def make_page(
    title: str, questions: Sequence[Question], steps: Sequence[int], answer: Answer, freezes: Sequence[Freeze]
) -> str:
    """The page. steps: after which the questions were asked. freezes: each matrix that froze, or that trains again."""
    words = {
        step: _froze([one for one in freezes if before < one[0] <= step])
        for before, step in zip([0, *steps], steps, strict=False)
    }
    heads = [_head(step, words[step]) for step in steps]
    pictures = PagePictures(SIDE, FRAME_SIDE, PICTURES, FRAMES)
    rows = [_row(one, answer, words, pictures) for one in questions]
    counts = [f"step {step:,}: {_right(questions, answer, step)}" for step in dict.fromkeys([*steps[:1], *steps[-1:]])]
    lines = " A blue line: something froze since the time before." if any(words.values()) else ""
    body = [
        f'<p class="note">{len(questions)} questions of the validation rows, asked at each evaluation; '
        f"right is an exact match ({text('; '.join(counts)) or 'not asked yet'}).{lines}</p>",
        '<div class="scroll"><table><thead><tr><th>question</th><th>expected</th>',
        *heads,
        "</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]
    return page(f"Sample answers of {title}", PICTURE_STYLE + STYLE, body)


def _right(questions: Sequence[Question], answer: Answer, step: int) -> str:
    given = [found for one in questions if (found := answer(one, step)) is not None]
    return f"{sum(right for _, right in given)} of {len(given)} right"


def _froze(freezes: Sequence[Freeze]) -> list[str]:
    """What froze, a line for each tower: "3 vision matrices froze, steps 640 to 700"."""
    found = []
    for (tower, again), count in Counter((tower, again) for _, tower, again in freezes).items():
        steps = [step for step, *what in freezes if what == [tower, again]]
        when = f"step {steps[0]:,}" if steps[0] == steps[-1] else f"steps {steps[0]:,} to {steps[-1]:,}"
        noun = "matrix" if count == 1 else "matrices"
        verb = ("trains again" if count == 1 else "train again") if again else "froze"
        found.append(f"{count} {tower} {noun} {verb}, {when}")
    return found


def _head(step: int, froze: Sequence[str]) -> str:
    small = "".join(f"<small>{text(line)}</small>" for line in froze)
    return f"<th{_line(froze)}>{small}step {step:,}</th>"


def _line(froze: Sequence[str]) -> str:
    return ' class="froze"' if froze else ""


def _row(question: Question, answer: Answer, words: dict[int, list[str]], pictures: PagePictures) -> str:
    """Its pictures have the points of the last answer."""
    source = f"<br><small>{text(question.source)}</small>" if question.source else ""
    given = [found[0] for step in words if (found := answer(question, step)) is not None]
    strips, shown = pictures.of(question.images, question.truth, *given[-1:])
    cells = [f'<td class="question">{strips}{shown}{text(question.text)}{source}</td>']
    cells.append(f'<td class="answer">{text(question.truth)}</td>')
    for step, froze in words.items():
        line = " froze" if froze else ""
        if (found := answer(question, step)) is None:
            cells.append(f'<td class="note{line}">–</td>')
        else:
            cells.append(f'<td class="answer {"right" if found[1] else "wrong"}{line}">{text(found[0])}</td>')
    return f"<tr>{''.join(cells)}</tr>"
