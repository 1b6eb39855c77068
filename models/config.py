"""VLMConfig and TrainConfig: flat dataclasses; a field carries its help, its bounds and its choices.

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

SCRATCH = "scratch"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EXTRA_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | {
    f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)
}
# Settings of nanoVLM that mean nothing here: files that hold them are read, and must hold this value.
RETIRED = {
    "vit_cls_flag": (False, "the projector takes the patches, not one CLS token"),
    "lm_use_tokens": (False, "the language model takes embeddings"),
}


@dataclass
class VLMConfig(Checked):
    """The shape of the model and of its inputs. Saved beside the weights as config.json."""

    vit_hidden_dim: int = doc("width of the vision tower", 768, gt=0, section="Vision tower")
    vit_inter_dim: int = doc("width of its MLP", 3072, gt=0)
    vit_patch_size: int = doc("side of a patch, in pixels", 16, gt=0)
    vit_img_size: int = doc("side of the square image (or tile) that the vision tower sees, in pixels", 512, gt=0)
    vit_n_heads: int = doc("attention heads of the vision tower", 12, gt=0)
    vit_dropout: float = doc("dropout in the vision tower", 0.0, ge=0, lt=1)
    vit_n_blocks: int = doc("blocks of the vision tower", 12, gt=0)
    vit_ln_eps: float = doc("epsilon of its LayerNorms", 1e-6, gt=0)
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
    lm_vocab_size: int | None = doc("rows of the embedding; by default lm_base_vocab_size + extra_token_amount", None)
    lm_n_heads: int = doc("query heads", 15, gt=0)
    lm_n_kv_heads: int = doc("key and value heads", 5, gt=0)
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
    lm_eos_token_id: int | None = doc("generation stops at this token; by default the tokenizer's <|im_end|>", None)

    mp_pixel_shuffle_factor: int = doc(
        "side of the square of patches that becomes one image token", 4, gt=0, section="Projector, images and tokens"
    )
    mp_image_token_length: int = doc("image tokens of one image (or tile)", 64, gt=0)

    max_img_size: int = doc("the longer side of an image is resized to at most this many pixels", 2048, gt=0)
    resize_to_max_side_len: bool = doc("also enlarge: the longer side becomes exactly max_img_size", True)
    image_mean: float = doc("subtracted from pixels in [0, 1]; SigLIP: 0.5, published nanoVLM checkpoints: 0", 0.5)
    image_std: float = doc("pixels are divided by this; SigLIP: 0.5, published nanoVLM checkpoints: 1", 0.5, gt=0)

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
        values["lm_vocab_size"] = (
            values.get("lm_base_vocab_size", cls.lm_base_vocab_size) + values["extra_token_amount"]
        )
        config = cls(**values)
        if "mp_image_token_length" not in stored:
            config.mp_image_token_length = (config.vit_grid // config.mp_pixel_shuffle_factor) ** 2
        return config

    @classmethod
    def load(cls, folder: str | Path) -> VLMConfig:
        """The config.json of a checkpoint folder; errors as of from_dict, and OSError."""
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    def relations(self) -> Iterable[Relation]:
        sizes = (
            self.vit_img_size, self.vit_patch_size, self.vit_n_heads, self.lm_n_heads, self.lm_n_kv_heads,
            self.mp_pixel_shuffle_factor,
        )  # fmt: skip
        if min(sizes) <= 0:  # reported already; the relations divide by them
            return []
        return self._shape_relations() + self._token_relations()

    def _shape_relations(self) -> list[Relation]:
        vit_dim, lm_dim, lm_heads, image = self.vit_hidden_dim, self.lm_hidden_dim, self.lm_n_heads, self.vit_img_size
        grid, factor = self.vit_grid, self.mp_pixel_shuffle_factor
        odd_head = lm_dim % lm_heads == 0 and lm_dim // lm_heads % 2
        return [
            (vit_dim % self.vit_n_heads == 0, "vit_n_heads", f"a divisor of vit_hidden_dim {vit_dim}"),
            (lm_dim % lm_heads == 0, "lm_n_heads", f"a divisor of lm_hidden_dim {lm_dim}"),
            (not odd_head, "lm_n_heads", f"such that lm_hidden_dim {lm_dim} / lm_n_heads is even (rotary embedding)"),
            (lm_heads % self.lm_n_kv_heads == 0, "lm_n_kv_heads", f"a divisor of lm_n_heads {lm_heads}"),
            (image % self.vit_patch_size == 0, "vit_patch_size", f"a divisor of vit_img_size {image}"),
            (self.max_img_size % image == 0, "max_img_size", f"a multiple of vit_img_size {image}"),
            (grid % factor == 0, "mp_pixel_shuffle_factor", f"a divisor of the {grid} patches a side"),
        ]

    def _token_relations(self) -> list[Relation]:
        factor = self.mp_pixel_shuffle_factor
        image_tokens = (self.vit_grid // factor) ** 2
        tiles = self.max_img_size // self.vit_img_size
        tile_tokens = {f"r{row}c{col}" for row in range(1, tiles + 1) for col in range(1, tiles + 1)}
        extra, vocabulary = self.vlm_extra_tokens, self.lm_base_vocab_size + self.extra_token_amount
        return [
            (
                self.vit_grid % factor != 0 or self.mp_image_token_length == image_tokens,
                "mp_image_token_length",
                f"{image_tokens} = (vit_img_size / vit_patch_size / mp_pixel_shuffle_factor)^2",
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
                self.lm_vocab_size == vocabulary,
                "lm_vocab_size",
                f"{vocabulary} = lm_base_vocab_size + extra_token_amount",
            ),
        ]


@dataclass
class TrainConfig(Checked):
    """Data, optimisation, evaluation and output of one run."""

    enable_grades: bool = doc("watch every projection matrix and freeze it when it has converged", False)

    train_dataset_path: str = doc(
        "easy-vqa (embedded), a local folder / .parquet / .jsonl / save_to_disk, or a hub id",
        "HuggingFaceM4/FineVision_concat_shuffled_2",
        section="Data",
    )
    train_dataset_name: list[str] = doc("configurations (subsets) of the data set: all, or several names", ["all"])
    test_dataset_path: str | None = doc("rows for the exact match at the end; easy-vqa brings its own test split", None)
    stream_dataset: bool = doc("stream a hub data set instead of downloading it", True)
    val_size: int | float = doc(
        "validation rows, held out from the training rows: a count, or below 1 a share of them", 50_000, ge=0
    )
    turns_per_image: int | None = doc(
        "draw this many turns of a row at each visit, each one a conversation of its own; by default a row is one "
        "conversation of all its turns",
        None,
        ge=1,
    )
    source_weights: dict[str, float] = doc(
        "with turns_per_image: how often to draw the `source`s of a row's turns, as JSON; 1 for those not named",
        {},
        gt=0,
    )
    balance_answers: bool = doc(
        "with turns_per_image: draw the answers of a question equally often, so that it cannot be answered unseen",
        False,
    )
    flip_images: bool = doc("mirror half of the training images left to right", False)
    mixture_weights: dict[str, float] = doc(
        "how often the rows of a subset come in an epoch, as JSON; 1 for the subsets not named", {}, gt=0
    )
    skip_bad_subsets: bool = doc("skip subsets that cannot be loaded, and name them; off: they are an error", False)
    packing: bool = doc(
        "fill rows of lm_max_length tokens with several samples. None sees another; batch_size counts such rows",
        False,
    )
    max_images_per_knapsack: int = doc("packing: images in one row; a sample with more has a row of its own", 18, gt=0)
    max_images_per_example: int = doc("rows with more images are dropped", 4, ge=0)
    max_sample_length: int = doc("samples with more tokens are dropped", 4096, gt=0)
    relevance_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    image_correspondence_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    visual_dependency_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    formatting_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    cache_rows: bool = doc("keep prepared rows (decoded images, token ids) in memory; for small data sets", False)
    num_workers: int = doc("processes that prepare batches; 0: in the training process", 0, ge=0)

    lr_mp: float = doc("peak learning rate of the modality projector", 0.00512, ge=0, section="Optimisation")
    lr_vision_backbone: float = doc("peak learning rate of the vision tower; 0 freezes it", 5e-5, ge=0)
    lr_language_backbone: float = doc("peak learning rate of the language model; 0 freezes it", 5e-5, ge=0)
    batch_size: int = doc("rows (images, with turns_per_image) in a micro-batch", 2, gt=0)
    gradient_accumulation_steps: int = doc("micro-batches in an optimizer step", 8, gt=0)
    max_grad_norm: float = doc("clip the gradient to this L2 norm; 0: no clipping", 1.0, ge=0)
    max_training_steps: int = doc("optimizer steps", 40_000, gt=0)
    warmup_ratio: float = doc("share of the steps with linear warm-up", 0.03, ge=0, lt=1)
    min_lr_ratio: float = doc("the cosine ends at this share of the peak", 0.1, ge=0, le=1)
    weight_decay: float = doc("AdamW's decoupled weight decay", 0.01, ge=0)
    adam_beta1: float = doc("AdamW: decay of the first moment", 0.9, ge=0, lt=1)
    adam_beta2: float = doc("AdamW: decay of the second moment", 0.999, ge=0, lt=1)
    seed: int = doc("seed of weights, order of the data and dropout", 0)

    lora_rank: int = doc(
        "rank of LoRA adapters, which then train in place of the towers' weights; 0: full fine-tuning. The projector "
        "trains in full, all else is frozen; checkpoints hold the merged weights",
        0,
        ge=0,
        section="LoRA",
    )
    lora_alpha: float = doc("an adapter's output is scaled by lora_alpha / lora_rank", 16.0, gt=0)
    lora_dropout: float = doc("dropout of an adapter's input", 0.0, ge=0, lt=1)
    lora_targets: list[str] = doc(
        "adapt the matrices that one of these names, a whole part of the dotted name (q_proj, mlp, blocks.0, *_proj); "
        "empty: every projection matrix of both towers",
        [],
    )
    lora_vision: bool = doc("adapt the vision tower too; off: it trains in full (as one from scratch must)", True)

    dtype: str = doc(
        "autocast: bfloat16, float32, or auto, which is bfloat16 where the device has it",
        "auto",
        choices=("auto", "bfloat16", "float32"),
        section="Hardware",
    )
    compile: bool = doc("torch.compile every block", False)
    activation_checkpointing: bool = doc(
        "less memory, about a third more work. Of each block only the input is kept for the backward pass, which "
        "computes the block again",
        False,
    )
    loss_chunk_size: int = doc(
        "label positions whose logits are held at a time, which are computed again in the backward pass: less memory, "
        "one more product of the head; 0: all at once",
        0,
        ge=0,
    )
    parallel: str = doc(
        "ddp or fsdp, for several processes (torchrun). ddp: each holds all weights; fsdp: weights, gradients and "
        "optimizer state are divided among them",
        "ddp",
        choices=("ddp", "fsdp"),
    )
    profile: int = doc(
        "profile this many steps (5 without a number), from the sixth of this process on: the slowest operators are "
        "printed, trace.json in the run folder shows all; 0: off",
        0,
        ge=0,
        alone=5,
    )

    eval_interval: int = doc(
        "optimizer steps between two evaluations, each of which ends with a checkpoint", 500, gt=0, section="Evaluation"
    )
    eval_batch_size: int = doc("conversations in an evaluation batch", 64, gt=0)
    max_new_tokens: int = doc("longest generated answer in evaluation, in tokens", 16, gt=0)
    early_stopping: bool = doc("stop when the validation loss has stopped falling: the baseline to GradES", False)
    es_interval: float = doc("early stopping: share of the run between two validation losses", 0.05, gt=0, lt=1)
    es_delta: float = doc("early stopping: the loss must fall by more than this below the best, in nats", 0.0005, ge=0)
    es_patience: int = doc("early stopping: stop after this many validations in a row without such a fall", 3, ge=1)

    dry_run: bool = doc(
        "print what the run will take (parameters, tokens, FLOPs, memory) and end. Nothing is downloaded or written",
        False,
        section="Output",
    )
    checkpoint_interval: int = doc(
        "optimizer steps between two more checkpoints; 0: none but those of evaluations", 0, ge=0
    )
    keep_checkpoints: int = doc("keep this many of the latest checkpoints, and the best one", 2, gt=0)
    resume: str | None = doc(
        "continue a run: auto (that of --run_name), a run folder, or a checkpoint. It continues from its newest whole "
        "checkpoint, with auto from the start where there is none yet; with another --run_name as a new run from there",
        None,
    )
    resume_override: bool = doc("resume although settings differ from the run's; each is named", False)
    resume_from_vlm_checkpoint: bool = doc("start from the weights of --vlm_checkpoint_path", False)
    run_name: str | None = doc("folder of the run; by default made from the recipe and the time", None)
    output_dir: str = doc("where run folders go", "grades_output")
    log_interval: int = doc("optimizer steps between two lines of metrics.jsonl", 10, gt=0)
    log_with: str | None = doc(
        "also record to wandb, tensorboard or trackio. wandb (Weights & Biases) is offline where there is no account",
        None,
        choices=("wandb", "tensorboard", "trackio"),
    )
    log_wandb: bool = doc("the same as --log_with wandb", False)
    wandb_project: str = doc("project in Weights & Biases or trackio", "nanovlm-grades")
    wandb_entity: str | None = doc("account or team in Weights & Biases", None)

    def relations(self) -> Iterable[Relation]:
        draws_turns = self.turns_per_image is not None
        peak_lr = max(self.lr_mp, self.lr_vision_backbone, self.lr_language_backbone)
        return [
            (peak_lr > 0, "lr_mp", "> 0 where both towers' learning rates are 0: nothing would train"),
            (self.val_size < 1 or self.val_size % 1 == 0, "val_size", "a share below 1 or a whole number of rows"),
            (self.val_size != 0 or not self.early_stopping, "val_size", "> 0 with early_stopping"),
            (draws_turns or not self.source_weights, "source_weights", "empty without turns_per_image"),
            (draws_turns or not self.balance_answers, "balance_answers", "off without turns_per_image"),
            (not self.log_wandb or self.log_with in (None, "wandb"), "log_with", "left out with --log_wandb"),
            (self.resume != "auto" or self.run_name is not None, "resume", "given with --run_name"),
            (self.run_name is None or Path(self.run_name).name == self.run_name, "run_name", "a plain folder name"),
            *self._lora_relations(),
        ]

    def _lora_relations(self) -> list[Relation]:
        full = self.lora_rank == 0
        adapted = self.lr_language_backbone > 0 or (self.lora_vision and self.lr_vision_backbone > 0)
        return [
            (full or adapted, "lora_rank", "0 where no tower is adapted (learning rates of 0, lora_vision off)"),
            (not full or self.lora_dropout == 0, "lora_dropout", "0 without lora_rank"),
            (not full or not self.lora_targets, "lora_targets", "empty without lora_rank"),
            (not full or self.lora_vision, "lora_vision", "on without lora_rank"),
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
    found = vlm.problems() + train.problems() + grades.problems()
    length = vlm.lm_max_length
    if train.compile and train.enable_grades and grades.unfreeze_factor is not None:
        allowed = "left out with --compile: compiled blocks cannot be probed"
        found.append(problem("unfreeze_factor", grades.unfreeze_factor, allowed))
    if train.packing and length > vlm.lm_max_position_embeddings:
        allowed = f"off where lm_max_length {length} is more than lm_max_position_embeddings "
        allowed += f"{vlm.lm_max_position_embeddings}: the row would scale its samples' positions"
        found.append(problem("packing", True, allowed))
    if train.max_sample_length > length:
        found.append(problem("max_sample_length", train.max_sample_length, f"at most lm_max_length {length}"))
    if found:
        raise ValueError("\n".join(found))
