"""Ctrl-C and SIGTERM: a run saves and ends after the step under way."""

import itertools
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from training.parallel import Parallel

SAME_S = 1.0  # within which a signal that comes again is the same one: `uv run` passes on what its group got already

T = TypeVar("T")


class StopSignal:
    """Within this context Ctrl-C and SIGTERM only ask for the end; a second one, later, ends the program at once.

    With several processes any of them may get the signal, and `share` tells all of them. A second signal does
    nothing there, as the terminal and torchrun both pass on the same one.
    """

    def __init__(self, say: Callable[[str], None], parallel: Parallel | None = None):
        """say: takes a line for the console."""
        self.say, self.parallel = say, parallel or Parallel()
        self.signal = 0  # the number of the signal that came
        self.came_s = 0.0  # when
        self.shared = False
        self.previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to end; under several processes it changes in `share` alone."""
        return self.shared or (self.signal != 0 and self.parallel.is_alone)

    def share(self) -> None:
        """Tell all processes of a signal. Every process must call it at the same places."""
        if not self.shared and self.parallel.any(self.signal != 0):
            self.shared, self.signal = True, self.signal or signal.SIGTERM

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to the signal; where the weights are sharded all processes end at the same item."""
        return itertools.takewhile(lambda _: not self._came(), items)

    def _came(self) -> bool:
        if self.parallel.sharded is not None:
            self.share()
            return self.requested
        return self.signal != 0

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self.signal:
            again = "; a second one ends at once" if self.parallel.is_alone else ""
            self.signal, self.came_s = number, time.monotonic()
            self.say(f"{signal.Signals(number).name}: saving and ending after this step{again}")
        elif self.parallel.is_alone and time.monotonic() - self.came_s > SAME_S:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            # torch raises the death of a data worker from this signal, wherever the program then is: in the middle of
            # a step or of a checkpoint. Without it the error comes where the worker's batch is awaited.
            self.previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
