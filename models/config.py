"""VLMConfig, and TrainConfig of models/train_config.py: flat dataclasses; a field carries help, bounds and choices.

Imports nothing heavy, so that `train.py --help` and a configuration error answer at once. The defaults of VLMConfig
are nanoVLM-450M's, those of TrainConfig are upstream nanoVLM's; recipes live in configs/*.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grades.config import GradESConfig
from grades.fields import Checked, Relation, doc, problem
from models.train_config import TrainConfig

SCRATCH = "scratch"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EXTRA_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | {
    f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)
}
# Beside the image token, what the layout molmo_crops writes: names in vlm_extra_tokens, and Molmo's own tokens.
CROP_TOKENS = {
    "low_res_im_start": "<low_res_im_start>", "im_start": "<im_start>", "im_end": "<im_end>", "im_col": "<im_col>",
}  # fmt: skip
# Of OpenAI's CLIP; see VLMConfig.image_mean.
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
MLP_HIDDEN_DIM = 2048
# Settings of nanoVLM that mean nothing here: files that hold them are read, and must hold this value.
RETIRED = {
    "vit_cls_flag": (False, "the projector takes the patches, not one CLS token"),
    "lm_use_tokens": (False, "the language model takes embeddings"),
}


@dataclass
class VLMConfig(Checked):
    """The shape of the model and of its inputs. Saved beside the weights as config.json."""

    vit_architecture: str = doc(
        "siglip (SigLIP2 too), or clip: class token, norm before the blocks, quick GELU; a pretrained tower says it",
        "siglip", choices=("siglip", "clip"), section="Vision tower",
    )  # fmt: skip
    vit_hidden_dim: int = doc("width of the vision tower", 768, gt=0)
    vit_inter_dim: int = doc("width of its MLP", 3072, gt=0)
    vit_patch_size: int = doc("side of a patch, in pixels", 16, gt=0)
    vit_img_size: int = doc("side of the square image (or tile) that the vision tower sees, in pixels", 512, gt=0)
    vit_n_heads: int = doc("attention heads of the vision tower", 12, gt=0)
    vit_dropout: float = doc("dropout in the vision tower", 0.0, ge=0, lt=1)
    vit_n_blocks: int = doc("blocks of the vision tower", 12, gt=0)
    vit_ln_eps: float = doc("epsilon of its LayerNorms", 1e-6, gt=0)
    vit_feature_layers: list[int] = doc(
        "blocks whose outputs, side by side, are the features: -1 the last, -2 -9 as Molmo; blocks above the last "
        "needed are not built; by default the end of the tower, SigLIP's with its last norm", [],
    )  # fmt: skip
    vit_model_type: str = doc(
        "pretrained vision tower: hub id, local folder, or scratch for random weights",
        "google/siglip2-base-patch16-512",
    )

    lm_hidden_dim: int = doc("width of the language model", 960, gt=0, section="Language model")
    lm_inter_dim: int = doc("width of its MLP", 2560, gt=0)
    lm_rms_eps: float = doc("epsilon of its RMSNorms", 1e-5, gt=0)
    lm_re_base: int = doc("base of the rotary frequencies (rope theta)", 100_000, gt=0)
    lm_max_position_embeddings: int = doc("positions beyond this scale the rotary frequencies down", 8192, gt=0)
    lm_base_vocab_size: int = doc("tokens of the tokenizer, which the extra tokens follow", 49_152, gt=0)
    extra_token_amount: int = doc("number of vlm_extra_tokens", 66)
    lm_vocab_size: int | None = doc(
        "rows of the embedding, at least (the default) lm_base_vocab_size + extra_token_amount; those above stand for "
        "no token", None,
    )  # fmt: skip
    lm_n_heads: int = doc("query heads", 15, gt=0)
    lm_n_kv_heads: int = doc("key and value heads", 5, gt=0)
    lm_head_dim: int | None = doc("width of a head; by default lm_hidden_dim / lm_n_heads (Qwen3: 128)", None, gt=0)
    lm_qk_norm: bool = doc("RMSNorm over each head's queries and keys (Qwen3)", False)
    lm_qkv_bias: bool = doc("queries, keys and values have a bias (Qwen2.5)", False)
    lm_dropout: float = doc("dropout in the language model", 0.0, ge=0, lt=1)
    lm_n_blocks: int = doc("blocks of the language model", 32, gt=0)
    lm_attn_scaling: float = doc("factor on the rotary embedding's cos and sin", 1.0)
    lm_max_length: int = doc("tokens of the longest sequence", 4096, gt=0)
    lm_tie_weights: bool = doc("the head is the token embedding", True)
    lm_model_type: str = doc(
        "pretrained language model: hub id, local folder (scripts/convert_gguf.py makes one of a GGUF file), or "
        "scratch for random weights",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
    )
    lm_tokenizer: str | None = doc("hub id, local folder or easy-vqa (embedded); by default lm_model_type's", None)
    lm_chat_template: str = doc("Jinja chat template", CHATML)
    lm_eos_token_id: int | None = doc("where model.generate(...) stops; training writes the tokenizer's here", None)

    mp_type: str = doc(
        "pixel_shuffle; linear or mlp (GELU), an image token for each patch; molmo: attention pooling of windows, then "
        "a SwiGLU MLP", "pixel_shuffle", choices=("pixel_shuffle", "linear", "mlp", "molmo"),
        section="Projector, images and tokens",
    )  # fmt: skip
    mp_pixel_shuffle_factor: int = doc("side of the square of patches that becomes one image token", 4, gt=0)
    mp_pool_size: int = doc("side of molmo's window of patches, which becomes one image token", 2, gt=0)
    mp_hidden_dim: int | None = doc(f"width of mlp ({MLP_HIDDEN_DIM}) and molmo (lm_inter_dim)", None, gt=0)
    mp_merge: str = doc(
        "image embeddings replace those of the image tokens, or are added to them (Molmo)",
        "replace", choices=("replace", "add"),
    )  # fmt: skip
    mp_video_pool_size: int = doc("side of molmo's window for frames of a video", 3, gt=0)
    mp_image_token_length: int = doc("image tokens of one image (or tile)", 64, gt=0)

    image_layout: str = doc(
        "tiles as nanoVLM's; resize: the whole image alone; molmo_crops: the whole image, then overlapping crops",
        "tiles", choices=("tiles", "resize", "molmo_crops"),
    )  # fmt: skip
    max_crops: int = doc("crops of an image in molmo_crops, the whole not counted (Molmo: 8, with CLIP 12)", 8, gt=0)
    overlap_margin: int = doc("patches at each side of a crop in which its neighbour shows them too", 4, ge=0)
    keep_aspect: bool = doc(
        "resize and molmo_crops keep an image's aspect and fill up with black (Molmo with CLIP)", False
    )
    max_video_frames: int = doc(
        "frames of a video at most: two a second and the last one, or as many evenly spread over a longer one", 16, gt=0
    )
    max_img_size: int = doc("tiles: the longer side is resized to at most this many pixels", 2048, gt=0)
    resize_to_max_side_len: bool = doc("also enlarge: the longer side becomes exactly max_img_size", True)
    image_mean: float | list[float] = doc(
        "subtracted from pixels in [0, 1], one number or three of red, green and blue; SigLIP: 0.5, published nanoVLM "
        "checkpoints: 0, a pretrained CLIP gets its own in place of 0.5", 0.5,
    )  # fmt: skip
    image_std: float | list[float] = doc(
        "pixels are divided by this; SigLIP: 0.5, published nanoVLM checkpoints: 1", 0.5, gt=0
    )

    vlm_extra_tokens: dict[str, str] = doc("tokens added to the tokenizer (JSON), the image token first", EXTRA_TOKENS)
    vlm_load_backbone_weights: bool = doc("start from the pretrained backbones; off: from random weights", True)
    vlm_checkpoint_path: str = doc("checkpoint folder or hub id that --resume_from_vlm_checkpoint loads", "checkpoints")
    hf_repo_name: str = doc("repository name for push_to_hub", "nanoVLM")

    def __post_init__(self) -> None:
        self.lm_tokenizer = self.lm_tokenizer or self.lm_model_type
        if self.lm_vocab_size is None:
            self.lm_vocab_size = self.lm_base_vocab_size + self.extra_token_amount

    @property
    def image_token_id(self) -> int:
        """The image token is the first of the extra tokens, which follow the base vocabulary."""
        return self.lm_base_vocab_size

    @property
    def vit_grid(self) -> int:
        """Patches a side."""
        return self.vit_img_size // self.vit_patch_size

    @property
    def vit_feature_blocks(self) -> list[int]:
        """Indices of the blocks whose outputs are the features; empty: the end of the tower."""
        return [layer % self.vit_n_blocks for layer in self.vit_feature_layers]

    @property
    def vit_feature_dim(self) -> int:
        """Channels of a patch's features."""
        return self.vit_hidden_dim * max(1, len(self.vit_feature_layers))

    @property
    def head_dim(self) -> int:
        """Width of a head of the language model."""
        return self.lm_head_dim or self.lm_hidden_dim // self.lm_n_heads

    @property
    def mp_window(self) -> int:
        """Side of the square of patches that becomes one image token."""
        return {"pixel_shuffle": self.mp_pixel_shuffle_factor, "molmo": self.mp_pool_size}.get(self.mp_type, 1)

    @property
    def image_tokens(self) -> int:
        """Image tokens that the projector makes of one image; windows at the edge of the grid may be partly empty."""
        return (-(-self.vit_grid // self.mp_window)) ** 2

    @property
    def connector_dim(self) -> int:
        """Width inside the projector, of mlp and molmo."""
        return self.mp_hidden_dim or (self.lm_inter_dim if self.mp_type == "molmo" else MLP_HIDDEN_DIM)

    @property
    def in_words(self) -> str:
        """The kinds of its three parts, for a reader."""
        tower = {"siglip": "SigLIP", "clip": "CLIP"}[self.vit_architecture]
        decoder = "Qwen3" if self.lm_qk_norm else "Qwen2.5" if self.lm_qkv_bias else "SmolLM2"
        return f"a vision tower as {tower}'s, a projector of the type {self.mp_type} and a decoder as {decoder}'s"

    def pixel_scaling(self) -> list[tuple[float, float]]:
        """(factor, what is then subtracted) for pixels of 0 to 255: one pair, or one for each colour."""
        mean, std = (value if isinstance(value, list) else [value] * 3 for value in (self.image_mean, self.image_std))
        pairs = [(1.0 / (255.0 * s), m / s) for m, s in zip(mean, std, strict=True)]
        return pairs if len(set(pairs)) > 1 else pairs[:1]

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> VLMConfig:
        """The config of a checkpoint, which may be older or newer than this class.

        Unknown fields are ignored with a warning; a missing field gets the value that the code had when checkpoints
        were written without it: no pixel normalisation, no tiles, one image token. Raises ValueError for a setting of
        nanoVLM that this model does not have.
        """
        if retired := retired_problems(stored):
            raise ValueError("config.json: " + "; ".join(retired))
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(stored) - known - set(RETIRED)):
            warnings.warn(f"config.json: ignoring unknown fields {', '.join(unknown)}", stacklevel=2)
        values = {name: value for name, value in stored.items() if name in known}
        values.setdefault("image_mean", 0.0)
        values.setdefault("image_std", 1.0)
        values.setdefault("resize_to_max_side_len", False)
        if "vit_img_size" in values:
            values.setdefault("max_img_size", values["vit_img_size"])
        if "lm_base_vocab_size" not in values and "lm_vocab_size" in values:
            values["lm_base_vocab_size"] = values["lm_vocab_size"] - values.get("extra_token_amount", 0)
        if "vlm_extra_tokens" not in values:
            values["vlm_extra_tokens"] = {"image_token": EXTRA_TOKENS["image_token"]}
        values.setdefault("extra_token_amount", len(values["vlm_extra_tokens"]))
        vocabulary = values.get("lm_base_vocab_size", cls.lm_base_vocab_size) + values["extra_token_amount"]
        values["lm_vocab_size"] = max(vocabulary, values.get("lm_vocab_size") or 0)  # a matrix may have spare rows
        config = cls(**values)
        if "mp_image_token_length" not in stored:
            config.mp_image_token_length = config.image_tokens
        return config

    @classmethod
    def load(cls, folder: str | Path) -> VLMConfig:
        """The config.json of a checkpoint folder; errors as of from_dict, and OSError."""
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    def relations(self) -> Iterable[Relation]:
        sizes = (
            self.vit_img_size, self.vit_patch_size, self.vit_n_heads, self.lm_n_heads, self.lm_n_kv_heads,
            self.mp_pixel_shuffle_factor, self.mp_pool_size, self.vit_n_blocks,
        )  # fmt: skip
        if min(sizes) <= 0:  # reported already; the relations divide by them
            return []
        return self._shape_relations() + self._token_relations()

    def _shape_relations(self) -> list[Relation]:
        vit_dim, lm_dim, lm_heads, image = self.vit_hidden_dim, self.lm_hidden_dim, self.lm_n_heads, self.vit_img_size
        grid, factor = self.vit_grid, self.mp_pixel_shuffle_factor
        own_head = self.lm_head_dim is not None
        odd_head = not own_head and lm_dim % lm_heads == 0 and lm_dim // lm_heads % 2
        blocks = self.vit_n_blocks
        return [
            (vit_dim % self.vit_n_heads == 0, "vit_n_heads", f"a divisor of vit_hidden_dim {vit_dim}"),
            (
                all(-blocks <= layer < blocks for layer in self.vit_feature_layers),
                "vit_feature_layers",
                f"from {-blocks} to {blocks - 1}, of the {blocks} of vit_n_blocks",
            ),
            (own_head or lm_dim % lm_heads == 0, "lm_n_heads", f"a divisor of lm_hidden_dim {lm_dim}"),
            (not odd_head, "lm_n_heads", f"such that lm_hidden_dim {lm_dim} / lm_n_heads is even (rotary embedding)"),
            (not own_head or self.head_dim % 2 == 0, "lm_head_dim", "even (rotary embedding)"),
            (lm_heads % self.lm_n_kv_heads == 0, "lm_n_kv_heads", f"a divisor of lm_n_heads {lm_heads}"),
            (image % self.vit_patch_size == 0, "vit_patch_size", f"a divisor of vit_img_size {image}"),
            *self._layout_relations(),
            (
                self.mp_type != "pixel_shuffle" or grid % factor == 0,
                "mp_pixel_shuffle_factor",
                f"a divisor of the {grid} patches a side",
            ),
            *(
                (not isinstance(value, list) or len(value) == 3, name, "one number or three")
                for name, value in (("image_mean", self.image_mean), ("image_std", self.image_std))
            ),
        ]

    def _layout_relations(self) -> list[Relation]:
        """What image_layout asks of the other fields."""
        image, margins = self.vit_img_size, 2 * self.overlap_margin
        if self.image_layout == "tiles":
            return [
                (self.max_img_size % image == 0, "max_img_size", f"a multiple of vit_img_size {image}"),
                (not self.keep_aspect, "keep_aspect", "off where --image_layout is tiles"),
            ]
        if self.image_layout != "molmo_crops":
            return []
        names = ", ".join(CROP_TOKENS)
        return [
            (margins < self.vit_grid, "overlap_margin", f"less than half of the {self.vit_grid} patches a side"),
            (set(CROP_TOKENS) <= set(self.vlm_extra_tokens), "vlm_extra_tokens", f"one with {names} for molmo_crops"),
        ]

    def _token_relations(self) -> list[Relation]:
        side = {"pixel_shuffle": "mp_pixel_shuffle_factor", "molmo": "mp_pool_size"}.get(self.mp_type)
        divides = self.mp_type != "pixel_shuffle" or self.vit_grid % self.mp_window == 0
        tiles = self.max_img_size // self.vit_img_size if self.image_layout == "tiles" else 1
        tile_tokens = {f"r{row}c{col}" for row in range(1, tiles + 1) for col in range(1, tiles + 1)}
        extra, vocabulary = self.vlm_extra_tokens, self.lm_base_vocab_size + self.extra_token_amount
        return [
            (
                not divides or self.mp_image_token_length == self.image_tokens,
                "mp_image_token_length",
                f"{self.image_tokens} = (vit_img_size / vit_patch_size{f' / {side}' if side else ''})^2",
            ),
            (self.mp_image_token_length < self.lm_max_length, "lm_max_length", "more than mp_image_token_length"),
            (next(iter(extra), None) == "image_token", "vlm_extra_tokens", "a mapping that begins with image_token"),
            (
                tiles <= 1 or tile_tokens <= set(extra),
                "vlm_extra_tokens",
                f"one with r1c1..r{tiles}c{tiles}, a token for each tile of max_img_size / vit_img_size",
            ),
            (self.lm_tokenizer != SCRATCH, "lm_tokenizer", "given where --lm_model_type is scratch"),
            (len(extra) == self.extra_token_amount, "extra_token_amount", f"{len(extra)}, as many as vlm_extra_tokens"),
            (
                self.lm_vocab_size is None or self.lm_vocab_size >= vocabulary,
                "lm_vocab_size",
                f"at least {vocabulary} = lm_base_vocab_size + extra_token_amount",
            ),
        ]


def retired_problems(stored: dict[str, Any]) -> list[str]:
    """What stored settings ask for that nanoVLM has and this model has not."""
    return [
        f"{name} {stored[name]}: must be {value}; {reason}"
        for name, (value, reason) in RETIRED.items()
        if stored.get(name, value) != value
    ]


def check_settings(vlm: VLMConfig, train: TrainConfig, grades: GradESConfig) -> None:
    """Raise ValueError that names every impossible value of the three configs at once."""
    found = vlm.problems() + train.problems() + grades.problems("--")
    length = vlm.lm_max_length
    if train.compile is True and train.enable_grades and grades.unfreeze_factor is not None:
        allowed = "left out with --compile: compiled blocks cannot be probed"
        found.append(problem("unfreeze_factor", grades.unfreeze_factor, allowed))
    if train.enable_grades and grades.metric == "rollback":
        if not train.average_weights:
            found.append(problem("average_weights", train.average_weights, "given (0.99) with --metric rollback"))
        if not train.validates:
            found.append(problem("val_size", train.val_size, "> 0 with --metric rollback, which needs held-out rows"))
    if grades.on_converged == "cooldown" and train.lr_schedule not in ("constant", "wsd"):
        found.append(problem("on_converged", "cooldown", "stop unless --lr_schedule is constant or wsd"))
    if train.packing and length > vlm.lm_max_position_embeddings:
        allowed = f"off where lm_max_length {length} is more than lm_max_position_embeddings "
        allowed += f"{vlm.lm_max_position_embeddings}: the row would scale its samples' positions"
        found.append(problem("packing", True, allowed))
    if train.max_sample_length > length:
        found.append(problem("max_sample_length", train.max_sample_length, f"at most lm_max_length {length}"))
    if found:
        raise ValueError("\n".join(found))
