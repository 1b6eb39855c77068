"""The files of a run under transformers.Trainer: written where they overwrite no other run's."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grades.files import write_text
from grades.report import HISTORY_NAME

logger = logging.getLogger("grades")


def write_outputs(history: dict[str, Any], folder: Path, more: Callable[[Path], None] | None = None) -> None:
    """Write the history and its pictures into the run's own folder. What fails is a warning: training is done.

    history: with the id of the run under "run". more: writes further files into that folder.
    """
    try:
        own = own_folder(folder, history["run"])
        own.mkdir(parents=True, exist_ok=True)
        write_text(own / HISTORY_NAME, json.dumps(history))
        if more is not None:
            more(own)
    except OSError as error:
        logger.warning(f"GradES: the history could not be written into {folder}: {error}")
        return
    if own != folder:
        logger.warning(f"GradES: {folder} holds the history of another run; this run's is in {own}")
    draw_pictures(own / HISTORY_NAME)


def own_folder(folder: Path, run: str) -> Path:
    """Where this run's history is; else the folder, if it holds none; else the first free run_2, run_3 ... in it.

    run: its id, which a resumed run keeps.
    """
    for history in (folder / HISTORY_NAME, *folder.glob(f"run_*/{HISTORY_NAME}")):
        if run_of(history) == run:
            return history.parent
    places = itertools.chain([folder], (folder / f"run_{number}" for number in itertools.count(2)))
    return next(place for place in places if not (place / HISTORY_NAME).exists())


def run_of(history: Path) -> str | None:
    """The id of the run that wrote the history; None where there is none or it cannot be read."""
    try:
        found: str | None = json.loads(history.read_text(encoding="utf-8")).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return found


def draw_pictures(history: Path) -> None:
    """Draw the pictures beside the history; what prevents it is a warning."""
    from grades.plots import draw

    again = f"python -m grades report {history.parent}"
    try:
        draw(history)
    except ImportError:
        logger.warning(f"no pictures without matplotlib; install it, then: {again}")
    except Exception as error:  # whatever it is, the weights are to be saved and the history is
        logger.warning(f"GradES: no pictures ({type(error).__name__}: {error}); try: {again}")
