"""The families of models with which everything has to work, as settings of train.py beside the tiny ones.

nanovlm: SigLIP, SmolLM2 and pixel shuffle. nanomolmo2: CLIP, Qwen3 and a linear connector, one image token a patch.
molmo2: CLIP, Qwen3, features of two blocks and Molmo's connector over overlapping crops, whose windows of patches are a
pool_index in every batch.
"""

import json
from typing import Any

import pytest

from models.config import CROP_TOKENS

CROP_EXTRA = {"image_token": "<im_patch>"} | CROP_TOKENS
CLIP_QWEN3 = {"vit_architecture": "clip", "lm_head_dim": 16, "lm_qk_norm": True}
CROPS = {"image_layout": "molmo_crops", "vlm_extra_tokens": CROP_EXTRA, "mp_type": "molmo", "overlap_margin": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "nanovlm": {},
    "nanomolmo2": CLIP_QWEN3 | {"mp_type": "linear", "mp_image_token_length": 16},
    "molmo2": CLIP_QWEN3 | CROPS | {
        "vit_n_blocks": 2, "vit_feature_layers": [-1, -2], "max_crops": 4, "extra_token_amount": len(CROP_EXTRA),
    },
}  # fmt: skip
SIZES = ((16, 16), (40, 16), (20, 30))  # of pictures whose crops are not as many


def words_of(flags: dict[str, Any]) -> list[str]:
    """The command line of the flags, no word of which holds a blank."""
    words = []
    for key, value in flags.items():
        if isinstance(value, dict):
            value = json.dumps(value, separators=(",", ":"))
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def of_families(fixture: str) -> pytest.MarkDecorator:
    """Run a test with each family of the fixture, which asks `family_of` which one."""
    return pytest.mark.parametrize(fixture, FAMILIES, indirect=True)


def family_of(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of the family that a fixture is asked for; nanoVLM's where a test does not say."""
    return FAMILIES[getattr(request, "param", "nanovlm")]
