"""Features of images that a frozen vision tower has seen before: kept, and not computed again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from grades.marks import marked
from models.attention import compute_dtype
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel

COUNTS = ("hits", "lookups", "served", "batches")


class FeatureCache:
    """The vision tower's output by what it sees, on the device, up to a budget; what came first stays.

    It serves only while nothing in the tower trains; when something does (a thaw), and where matrix products have
    another dtype than before, it is emptied. A resumed run starts with an empty one. With bfloat16 products the
    features are bfloat16, as the tower gives them. While nothing in the projector trains either, its output is held
    in place of the tower's, unless windows of patches (pool_index) go into it.
    """

    def __init__(self, model: VisionLanguageModel, gib: float):
        self.model, self.budget_bytes = model, int(gib * 2**30)
        self.features: dict[bytes, torch.Tensor] = {}
        self.held_bytes = 0
        self.kind: tuple[torch.dtype, str] | None = None  # of what is held: of the products, and the model's argument
        self.hits = self.lookups = 0  # images, in the whole run
        self.served = self.batches = 0  # micro-batches with images while it was active, and all with images
        self.parameters = list(model.vision_encoder.parameters())
        self.projector = list(model.MP.parameters())

    @classmethod
    def of_run(cls, model: VisionLanguageModel, cfg: TrainConfig, say: Callable[[str], None]) -> "FeatureCache | None":
        """The cache of --feature_cache_gib; None without it, and where dropout makes the tower's output another each
        time, which is said."""
        if not cfg.feature_cache_gib:
            return None
        # Adapters have a module for theirs.
        adapters = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.vision_encoder.modules())
        dropout = {"vit_dropout": model.cfg.vit_dropout > 0, "lora_dropout": adapters}
        if names := [name for name, is_on in dropout.items() if is_on]:
            say(f"--feature_cache_gib has no effect with --{' and --'.join(names)}: the features differ each time")
            return None
        return cls(model, cfg.feature_cache_gib)

    @property
    def is_active(self) -> bool:
        """Whether the whole vision tower is frozen."""
        return self.budget_bytes > 0 and not any(parameter.requires_grad for parameter in self.parameters)

    def _moves(self) -> bool:
        """Whether something in the tower trains, other than what --unfreeze_factor probes: that has a gradient then,
        but gets no update."""
        if self.is_active or not self.features:
            return not self.is_active
        frozen = marked(self.model.vision_encoder)
        return any(parameter.requires_grad and parameter not in frozen for parameter in self.parameters)

    @torch.no_grad()
    def complete(self, inputs: dict[str, Any], keys: Sequence[bytes]) -> tuple[dict[str, Any], int]:
        """The inputs of a micro-batch with image_features, or image_embeddings, in place of images, and how many of
        these were not computed: they were held, or come twice in the micro-batch.

        keys: of the N images in order, see data.collators.image_keys. To be called in the autocast of the forward pass.
        """
        images = inputs.get("images")
        known = images is not None and len(keys) == len(images)  # else without images, or with a blank one
        trains = any(parameter.requires_grad for parameter in self.projector)
        name = "image_features" if trains or inputs.get("pool_index") is not None else "image_embeddings"
        kind = compute_dtype(self.parameters[0]), name
        if self._moves() or (known and kind != self.kind):
            self.features, self.held_bytes, self.kind = {}, 0, kind
        self.batches += known
        if not self.is_active or not known:
            return inputs, 0
        assert images is not None
        places: dict[bytes, int] = {}  # of each image to compute, the first one that shows it
        for place, key in enumerate(keys):
            if key not in self.features:
                places.setdefault(key, place)
        spared = len(keys) - len(places)
        self.served += 1
        self.lookups += len(keys)
        self.hits += spared
        features = self._compute(images, places, name)
        if spared:
            new = dict(zip(places, features, strict=True))
            features = torch.stack([new[key] if key in new else self.features[key] for key in keys])
        rest = {name: value for name, value in inputs.items() if name != "images"}
        return rest | {name: features}, spared

    def _compute(self, images: torch.Tensor, places: dict[bytes, int], name: str) -> torch.Tensor:
        """The features, or embeddings, of the images at these places, of which the budget's share is kept."""
        if not places:
            return images.new_empty(0)
        some = len(places) < len(images)
        computed = self.model.vision_encoder(images[list(places.values())] if some else images)
        if name == "image_embeddings":
            computed = self.model.MP(computed)
        for key, features in zip(places, computed, strict=True):
            if self.held_bytes + features.nbytes > self.budget_bytes:
                break
            self.features[key] = features.clone()
            self.held_bytes += features.nbytes
        return computed

    def state_dict(self) -> dict[str, int]:
        """The counts; features are computed again."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name in COUNTS:  # of which older checkpoints have two
            setattr(self, name, state.get(name, 0))
        self.features, self.held_bytes = {}, 0
