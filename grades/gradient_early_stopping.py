"""The authors' module for language models: its names, so that imports from it work. See `grades.compat`."""

from grades.callback import GradEarlyStoppingCallback
from grades.callback_config import GradEarlyStoppingConfig
from grades.compat import ATTENTION_COMPONENTS, MLP_COMPONENTS, ComponentStats

__all__ = [
    "ATTENTION_COMPONENTS",
    "MLP_COMPONENTS",
    "ComponentStats",
    "GradEarlyStoppingCallback",
    "GradEarlyStoppingConfig",
]
