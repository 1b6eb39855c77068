"""What is measured of a component. A number that was not measured is None, never 0.0."""

from collections.abc import Iterable, Sequence

import torch

from grades.components import Component

# Elements that are worked on at a time: on a CPU so few that they stay in the cache from the first operation to the
# last, so that each weight and each snapshot comes from memory once; on a GPU so many that launches do not count.
CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**26}


class WeightChange:
    """sum |W_t - W_s| in float32, s the previous check: the metric of the authors' nanoVLM runs.

    Holds one copy of every watched weight; `forget` frees it.
    """

    def __init__(self) -> None:
        self.snapshots: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self, components: Sequence[Component]) -> list[float | None]:
        """One number a component, None where it is not known. Waits for the device once.

        None at the first visit, and where the weight is what it was to the last bit: no update reached it (steps
        without an image leave the vision tower alone), so nothing was measured of its convergence.
        """
        known = [component for component in components if component.name in self.snapshots]
        sums = [_change_and_update(component.weight, self.snapshots[component.name]) for component in known]
        for component in components:
            if component.name not in self.snapshots:
                self.snapshots[component.name] = component.weight.detach().clone()
        values = [value or None for value in torch.stack(sums).tolist()] if sums else []
        by_name = dict(zip((component.name for component in known), values, strict=True))
        return [by_name.get(component.name) for component in components]

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.snapshots.pop(name, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.snapshots)

    def load_state_dict(self, state: dict[str, torch.Tensor], components: Sequence[Component]) -> None:
        devices = {component.name: component.weight.device for component in components}
        self.snapshots = {name: tensor.to(devices[name], copy=True) for name, tensor in state.items()}


def _change_and_update(weight: torch.Tensor, snapshot: torch.Tensor) -> torch.Tensor:
    """The sum of |weight - snapshot|, a float32 scalar; then the snapshot is the weight."""
    chunk = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cuda"])
    total = torch.zeros((), device=weight.device)
    for new, old in zip(weight.detach().flatten().split(chunk), snapshot.view(-1).split(chunk), strict=True):
        total += (new.float() - old).abs_().sum()
        old.copy_(new)
    return total
