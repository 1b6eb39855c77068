"""What a monitor watches of a model: the components of the towers that have a tau."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import torch.nn as nn

from grades.components import Component, find_components
from grades.config import GradESConfig


def watched_components(model: nn.Module, config: GradESConfig) -> tuple[list[Component], int]:
    """(the components to watch, the number of projection matrices whose freezing would end the run).

    What trains unwatched, as target_components or a tower without a tau leave it out, counts for the end of the run.
    Warns of towers that are left alone and of taus of towers that the model does not have. Raises ValueError where
    nothing is left to watch.
    """
    found = find_components(model, config.target_components, config.watch_connector)
    watched = [component for component in found if config.tower_tau(component.tower) is not None]
    alone = Counter(component.tower for component in found if config.tower_tau(component.tower) is None)
    advice = ", ".join(f'"{tower}": ...' for tower in alone)
    counts = " and ".join(f"{count} matrices of the {tower} tower" for tower, count in alone.items())
    if not watched:
        raise ValueError(f"no tower with a tau: the model's are {counts}; give taus={{{advice}}}")
    if alone:
        warnings.warn(f"{counts} train on unwatched; taus={{{advice}}} watches them too", stacklevel=3)
    if nothing := empty_towers(watched, config.taus):
        warnings.warn(f"taus: no trainable projection matrix in the tower {', '.join(nothing)}", stacklevel=3)
    return watched, len(find_components(model, (), config.watch_connector) if config.target_components else found)


def empty_towers(components: Sequence[Component], towers: Iterable[str]) -> list[str]:
    """Those of the towers that no component is in."""
    return [tower for tower in towers if all(component.tower != tower for component in components)]
