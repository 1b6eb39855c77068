"""A conversation with a model at the terminal: answers appear as they come, and later questions know the earlier."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data.images import ImageDecodeError
from eval.answer_text import Speed
from eval.asking import Asker, Shown
from eval.prompt_cache import PromptCache

HELP = """\
/image PATH ...  show the model these images: before your next question, or where it says <image>
/video PATH ...  the same with videos, and <video>
/reset           forget the conversation and its images
/help            this
/quit            end, as Ctrl-D does; Ctrl-C ends an answer"""


class Chat:
    """What was said so far, and how the model is asked."""

    def __init__(
        self,
        asker: Asker,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: dict[str, Any] | None = None,
        show: Callable[[str], Any] = sys.stdout.write,
        note: Callable[[str], Any] = print,
    ):
        """sampling: as Asker.stream takes it. show: takes each piece of an answer; note: a line about the chat."""
        self.asker, self.max_new_tokens, self.stop, self.sampling = asker, max_new_tokens, stop, sampling or {}
        self.show, self.note = show, note
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.contents: list[str] = []  # what user and assistant have said, with the images' tokens
        self.pictures: list[Shown] = []  # in it
        self.waiting: list[Shown] = []  # with the next question
        self.known = PromptCache()  # what the model has read of it

    def add(self, kind: str, path: Path) -> None:
        """Show an "image" or a "video" with the next question. Raises ValueError where it is none."""
        try:
            self.waiting.append(getattr(self.asker.reader, kind)(path))
        except ImageDecodeError as error:
            raise ValueError(f"{shlex.quote(str(path))}: {error.kind}: {error}") from None

    def ask(self, text: str) -> None:
        """Show the answer, and keep both. What Ctrl-C has ended counts as the answer, unless it had not begun.

        Raises ValueError for a question that cannot be asked; it is not kept, and its images wait for the next.
        """
        content, new = self.asker.reader.spoken(text, self.waiting)
        contents, shown = [*self.contents, content], [*self.pictures, *new]
        question = self.asker.reader.conversation(contents, shown)
        if problem := self.asker.reader.too_long(question, self.max_new_tokens):
            raise ValueError(f"{problem}; /reset begins a new conversation")
        answer = self._answer(question)
        if answer is None:
            self.note("stopped before the answer began: the question is not kept")
            return
        # A token that only the template may write is not text of a conversation that it is to write.
        self.contents = [*contents, self.asker.reader.control_tokens.without(answer)]
        self.pictures, self.waiting = shown, []

    def _answer(self, question: Any) -> str | None:
        """What was shown of the answer; None where it was stopped before the first token."""
        self.asker.speed = Speed()
        pieces, stopped = [], False
        try:
            options = self.sampling | {"stop": self.stop}
            answer = self.asker.stream(question, self.max_new_tokens, known=self.known, **options)
            with contextlib.closing(answer) as stream:
                for piece in stream:
                    pieces.append(piece)
                    self.show(piece)
        except KeyboardInterrupt:
            stopped = True
        except torch.OutOfMemoryError:
            self.known = PromptCache()
            raise ValueError("out of memory; /reset begins a new conversation") from None
        self.show("\n")
        self.note(f"({self.asker.speed}{', stopped' if stopped else ''})")
        return None if stopped and not self.asker.speed.tokens else "".join(pieces)

    def handle(self, line: str) -> bool:
        """Do what a line says; False where it ends the chat. Raises ValueError for one that cannot be done."""
        command, _, rest = line.rstrip().partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            self.note(HELP)
        elif command == "/reset":
            self.reset()
            self.note("a new conversation")
        elif command in ("/image", "/video"):
            if not rest.strip():
                raise ValueError(f"{command} needs a path: {command} PATH")
            for path in paths_of(rest.strip()):
                self.add(command[1:], path)
                self.note(f"{path}: with your next question")
        elif command.startswith("/"):
            raise ValueError(f"no command {command}; /help names them, and with a space before it it is a question")
        elif line.strip() or self.waiting:
            self.ask(line)
        return True

    def run(self, lines: Iterator[str] | None = None) -> None:
        """Handle lines, by default those typed, until one of them or their end ends the chat."""
        lines = TypedLines() if lines is None else lines
        going = True
        while going:
            try:
                line = next(lines, None)
                going = line is not None and self.handle(line)
            except ValueError as error:
                self.note(str(error))
            except KeyboardInterrupt:
                self.note("/quit or Ctrl-D ends the chat")


def paths_of(text: str) -> list[Path]:
    """The paths that a text names: one as it stands, or several as a shell reads them."""
    whole = Path(text).expanduser()
    if whole.is_file():
        return [whole]
    try:
        return [Path(one).expanduser() for one in shlex.split(text)]
    except ValueError:  # a quote that does not end
        return [whole]


class TypedLines:
    """The lines of standard input, with a sign at a terminal that one is awaited; Ctrl-C leaves it usable."""

    def __init__(self) -> None:
        self.sign = "> " if sys.stdin.isatty() else ""
        if self.sign:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  # arrow keys and history in input()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return input(self.sign)
        except EOFError:
            if self.sign:
                print()
            raise StopIteration from None
