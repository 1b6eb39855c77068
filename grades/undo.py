"""What a callback changes in a Trainer, and how all of it is undone whatever ends the training.

Trainer tells its callbacks nothing when an exception (an interrupt, out of memory, a pruned trial) ends `train()`, and
no attribute of one trainer can be prepared for that by a callback that is added after it was made. So the one method
through which every training runs is replaced, for all trainers, as long as a LoopCallback exists. It does nothing but
tell the trainer's own LoopCallbacks.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback

LOOP = "_inner_training_loop"
_MISSING = object()
_replaced: list[Any] = []  # [our loop, the one that it replaces], while it does
_told: list[Trainer] = []  # whose loops run within ours
_callbacks = 0  # how many there are


class LoopCallback(TrainerCallback):
    """A callback that also learns when the training loop begins, before the optimizer is made, and when it is over."""

    def __init__(self) -> None:
        self._count()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or of a pickle in another process."""
        vars(self).update(state)
        self._count()

    def _count(self) -> None:
        global _callbacks
        _callbacks += 1
        weakref.finalize(self, _let_go).atexit = False
        _replace_loop()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A trainer was made: another library may have replaced the loop since this callback was."""
        _replace_loop()

    def before_loop(self, trainer: Any) -> None:
        """The loop begins. With auto_find_batch_size each of its trials is a loop."""

    def after_loop(self) -> None:
        """The loop is over; an exception may be on its way."""


def _replace_loop() -> None:
    """Let Trainer's loop tell its LoopCallbacks; once more where another library has replaced it since."""
    loop = getattr(Trainer, LOOP)
    if loop in _replaced[:1]:
        return

    @functools.wraps(loop)
    def told(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        callbacks = loop_callbacks(self)
        _told.append(self)
        try:
            for callback in callbacks:
                callback.before_loop(self)
            return loop(self, *args, **kwargs)
        finally:
            _told.remove(self)
            with contextlib.ExitStack() as stack:  # on a resume others may have taken their place
                for callback in dict.fromkeys([*callbacks, *loop_callbacks(self)]):
                    stack.callback(callback.after_loop)

    _replaced[:] = [told, loop]
    setattr(Trainer, LOOP, told)


def is_told(trainer: Trainer) -> bool:
    """Whether this trainer, whose loop runs, tells its LoopCallbacks when that is over. Where it does not, as another
    library has replaced the loop in the meantime, its next loop will.
    """
    _replace_loop()
    return any(trainer is other for other in _told)


def loop_callbacks(trainer: Trainer) -> list[LoopCallback]:
    """Those of the trainer's callbacks that are to be told."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LoopCallback)]


def _let_go() -> None:
    """With the last LoopCallback Trainer is as it came, unless another library has wrapped its loop since."""
    global _callbacks
    _callbacks -= 1
    if not _callbacks and getattr(Trainer, LOOP) in _replaced[:1]:
        setattr(Trainer, LOOP, _replaced[1])
        _replaced.clear()


class Patch:
    """A method of one object replaced by another."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """make: gets the method, returns what takes its place."""
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name, _MISSING)
        self.new = make(getattr(owner, name))
        setattr(owner, name, self.new)

    def undo(self) -> None:
        """Put back what was there; where it has been replaced again since, that stays."""
        if vars(self.owner).get(self.name) is self.new:
            if self.before is _MISSING:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.before)
