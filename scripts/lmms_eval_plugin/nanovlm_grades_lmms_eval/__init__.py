"""What lmms-eval's entry point group lmms_eval.models finds: see the pyproject.toml beside this package."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The ModelManifest of nanovlm_grades. lmms-eval takes the chat class, or the simple one with --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__name__}.model"
    return ModelManifest(
        model_id="nanovlm_grades",
        simple_class_path=f"{module}.NanoVLMGradesSimple",
        chat_class_path=f"{module}.NanoVLMGradesChat",
    )
