"""GradES: freeze each weight matrix of a transformer when it has converged (arXiv:2509.01842).

    from grades import GradESConfig, GradESMonitor

    monitor = GradESMonitor(GradESConfig(vision_tau=0.3, language_tau=6.0), model, optimizer, total_steps)
    for step in range(1, total_steps + 1):
        ...                           # forward, backward, clip, optimizer.step(), optimizer.zero_grad()
        if monitor.after_step(step):  # measures, freezes what has converged; True: enough is frozen
            break

With transformers' Trainer: `callbacks=[GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=0.02))]`.

Which matrices are watched, each with its tower and block:

    >>> import torch
    >>> from grades import find_components
    >>> block = torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 8), "norm": torch.nn.LayerNorm(8)})
    >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])})
    >>> [(c.name, c.tower, c.layer, c.elements) for c in find_components(model)]
    [('layers.0.fc1', 'language', 0, 32)]

Needs torch alone; pictures need matplotlib, the callbacks transformers.
"""

from typing import TYPE_CHECKING, Any

from grades.callback_config import GradEarlyStoppingConfig, VLMGradEarlyStoppingConfig
from grades.config import GradESConfig
from grades.paper import presets

__version__ = "0.2.0"

if TYPE_CHECKING:
    from grades.callback import GradEarlyStoppingCallback, VLMGradEarlyStoppingCallback
    from grades.compat import ComponentStats, VLMComponentStats
    from grades.components import Component, find_components
    from grades.monitor import GradESMonitor

__all__ = [
    "Component",
    "ComponentStats",
    "GradESConfig",
    "GradESMonitor",
    "GradEarlyStoppingCallback",
    "GradEarlyStoppingConfig",
    "VLMComponentStats",
    "VLMGradEarlyStoppingCallback",
    "VLMGradEarlyStoppingConfig",
    "find_components",
    "presets",
]

_HOMES = {
    "Component": "components",
    "ComponentStats": "compat",
    "VLMComponentStats": "compat",
    "find_components": "components",
    "GradESMonitor": "monitor",
    "GradEarlyStoppingCallback": "callback",
    "VLMGradEarlyStoppingCallback": "callback",
}


def __getattr__(name: str) -> Any:
    """Load what needs torch or transformers on first use, so that the configuration alone is quick to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grades' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(f"grades.{_HOMES[name]}"), name)
    return found
