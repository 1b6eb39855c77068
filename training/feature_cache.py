"""Features of images that a frozen vision tower has seen before: kept, and not computed again."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from models.vision_language_model import VisionLanguageModel


class FeatureCache:
    """The vision tower's output by image, on the device, up to a budget; what came first stays.

    It serves only while nothing in the tower trains; when something does (a thaw) it is emptied. A resumed run starts
    with an empty one. With bfloat16 products the features are bfloat16, as the tower gives them.
    """

    def __init__(self, model: VisionLanguageModel, gib: float):
        self.model, self.budget_bytes = model, int(gib * 2**30)
        self.features: dict[Hashable, torch.Tensor] = {}
        self.held_bytes = 0
        self.hits = self.lookups = 0  # images, in the whole run
        self.parameters = list(model.vision_encoder.parameters())

    @property
    def is_active(self) -> bool:
        """Whether the whole vision tower is frozen."""
        return self.budget_bytes > 0 and not any(parameter.requires_grad for parameter in self.parameters)

    @torch.no_grad()
    def complete(self, inputs: dict[str, Any], keys: Sequence[Hashable]) -> tuple[dict[str, Any], int]:
        """The inputs of a micro-batch with image_features in place of images, and how many of these were held.

        keys: of the N images in order. To be called in the autocast of the forward pass.
        """
        images = inputs.get("images")
        if not self.is_active:
            self.features, self.held_bytes = {}, 0
            return inputs, 0
        if images is None or len(keys) != len(images):  # without images, or with a blank one
            return inputs, 0
        missing = [i for i, key in enumerate(keys) if key not in self.features]
        self.lookups += len(keys)
        self.hits += len(keys) - len(missing)
        found: list[Any] = [self.features.get(key) for key in keys]
        if missing:
            computed = self.model.vision_encoder(images[missing] if len(missing) < len(keys) else images)
            for i, features in zip(missing, computed, strict=True):
                found[i] = features
                if self.held_bytes + features.nbytes <= self.budget_bytes and keys[i] not in self.features:
                    self.features[keys[i]] = features.clone()
                    self.held_bytes += features.nbytes
        rest = {name: value for name, value in inputs.items() if name != "images"}
        return rest | {"image_features": torch.stack(found)}, len(keys) - len(missing)

    def state_dict(self) -> dict[str, int]:
        """The counts; features are computed again."""
        return {"hits": self.hits, "lookups": self.lookups}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.hits, self.lookups = state["hits"], state["lookups"]
