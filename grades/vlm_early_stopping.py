"""The authors' module for vision-language models: its names, so that imports from it work. See `grades.compat`."""

from grades.callback import VLMGradEarlyStoppingCallback
from grades.callback_config import VLMGradEarlyStoppingConfig
from grades.compat import (
    LANGUAGE_ATTENTION_COMPONENTS,
    LANGUAGE_MLP_COMPONENTS,
    VISION_COMPONENTS,
    VLMComponentStats,
    create_vlm_freeze_config,
)

__all__ = [
    "LANGUAGE_ATTENTION_COMPONENTS",
    "LANGUAGE_MLP_COMPONENTS",
    "VISION_COMPONENTS",
    "VLMComponentStats",
    "VLMGradEarlyStoppingCallback",
    "VLMGradEarlyStoppingConfig",
    "create_vlm_freeze_config",
]
