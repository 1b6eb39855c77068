"""VLMConfig and TrainConfig: flat dataclasses; a field's `help` is its documentation and the flag's --help.

Imports nothing heavy, so that `train.py --help` and a configuration error answer at once. The defaults of VLMConfig
are nanoVLM-450M's, those of TrainConfig are upstream nanoVLM's; recipes live in configs/*.yaml.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from grades.config import GradESConfig, doc

SCRATCH = "scratch"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EXTRA_TOKENS = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"} | {
    f"r{row}c{col}": f"<row_{row}_col_{col}>" for row in range(1, 9) for col in range(1, 9)
}


@dataclass
class VLMConfig:
    """The shape of the model and of what it is fed. Saved beside the weights as config.json."""

    vit_hidden_dim: int = doc("width of the vision tower", 768)
    vit_inter_dim: int = doc("width of its MLP", 3072)
    vit_patch_size: int = doc("pixels a side of one patch", 16)
    vit_img_size: int = doc("pixels a side of the square image (or tile) that the vision tower sees", 512)
    vit_n_heads: int = doc("attention heads of the vision tower", 12)
    vit_dropout: float = doc("dropout in the vision tower", 0.0)
    vit_n_blocks: int = doc("blocks of the vision tower", 12)
    vit_ln_eps: float = doc("epsilon of its LayerNorms", 1e-6)
    vit_cls_flag: bool = doc("prepend a CLS token and return it alone", False)
    vit_model_type: str = doc(
        "pretrained vision backbone: hub id, local folder, or scratch for random weights",
        "google/siglip2-base-patch16-512",
    )

    lm_hidden_dim: int = doc("width of the language model", 960)
    lm_inter_dim: int = doc("width of its MLP", 2560)
    lm_rms_eps: float = doc("epsilon of its RMSNorms", 1e-5)
    lm_re_base: int = doc("base of the rotary frequencies (rope theta)", 100_000)
    lm_max_position_embeddings: int = doc("positions beyond this scale the rotary frequencies down", 8192)
    lm_base_vocab_size: int = doc("tokens of the tokenizer; the extra tokens follow, the image token first", 49_152)
    extra_token_amount: int = doc("tokens of vlm_extra_tokens", 66)
    lm_vocab_size: int | None = doc("rows of the embedding; by default lm_base_vocab_size + extra_token_amount", None)
    lm_n_heads: int = doc("query heads", 15)
    lm_n_kv_heads: int = doc("key and value heads", 5)
    lm_dropout: float = doc("dropout in the language model", 0.0)
    lm_n_blocks: int = doc("blocks of the language model", 32)
    lm_attn_scaling: float = doc("factor on the rotary embedding's cos and sin", 1.0)
    lm_max_length: int = doc("tokens of the longest sequence", 4096)
    lm_use_tokens: bool = doc("the language model alone takes token ids and returns logits, not embeddings", False)
    lm_tie_weights: bool = doc("the head is the token embedding", True)
    lm_model_type: str = doc(
        "pretrained language backbone: hub id, local folder, FILE.gguf, package:NAME/FILE.gguf for a file inside an "
        "installed package, or scratch for random weights",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
    )
    lm_tokenizer: str | None = doc(
        "tokenizer: what lm_model_type takes, or easy-vqa for the embedded one; by default that of lm_model_type", None
    )
    lm_chat_template: str = doc("Jinja chat template", CHATML)
    lm_eos_token_id: int | None = doc("generation stops at this token; by default the tokenizer's <|im_end|>", None)

    mp_pixel_shuffle_factor: int = doc("patches a side that the projector merges into one image token", 4)
    mp_image_token_length: int = doc("image tokens of one image (or tile)", 64)

    max_img_size: int = doc("the longer side of an image is resized to at most this many pixels", 2048)
    resize_to_max_side_len: bool = doc("also enlarge: the longer side becomes exactly max_img_size", True)
    image_mean: float = doc("subtracted from pixels in [0, 1]; SigLIP: 0.5, published nanoVLM checkpoints: 0", 0.5)
    image_std: float = doc("pixels are divided by this; SigLIP: 0.5, published nanoVLM checkpoints: 1", 0.5)

    vlm_extra_tokens: dict[str, str] = doc("tokens added to the tokenizer (JSON), the image token first", EXTRA_TOKENS)
    vlm_load_backbone_weights: bool = doc("start from the pretrained backbones; off: from random weights", True)
    vlm_checkpoint_path: str = doc("checkpoint folder or hub id that --resume_from_vlm_checkpoint loads", "checkpoints")
    hf_repo_name: str = doc("repository name for push_to_hub", "nanoVLM")

    def __post_init__(self):
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
    def from_dict(cls, stored: dict) -> VLMConfig:
        """The config of a checkpoint, which may be older or newer than this class.

        Unknown fields are ignored with a warning; a missing field gets the value that the code had when checkpoints
        were written without it: no pixel normalisation, no tiles, one image token.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(stored) - known):
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
        return cls.from_dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    def problems(self) -> list[str]:
        """Every impossible value: flag, value, what is allowed."""
        found = _not_positive(
            self,
            "vit_hidden_dim vit_inter_dim vit_patch_size vit_img_size vit_n_heads vit_n_blocks lm_hidden_dim "
            "lm_inter_dim lm_base_vocab_size lm_n_heads lm_n_kv_heads lm_n_blocks lm_max_length "
            "lm_max_position_embeddings mp_pixel_shuffle_factor mp_image_token_length max_img_size "
            "image_std lm_rms_eps vit_ln_eps",
        )
        return found or _failed(self, self._shape_checks() + self._token_checks())  # these divide by the above

    def _shape_checks(self) -> list[tuple[bool, str, str]]:
        vit_dim, vit_heads, image = self.vit_hidden_dim, self.vit_n_heads, self.vit_img_size
        lm_dim, lm_heads, grid, factor = (
            self.lm_hidden_dim,
            self.lm_n_heads,
            self.vit_grid,
            self.mp_pixel_shuffle_factor,
        )
        odd_head = lm_dim % lm_heads == 0 and lm_dim // lm_heads % 2
        return [
            (vit_dim % vit_heads == 0, "vit_n_heads", f"a divisor of vit_hidden_dim {vit_dim}"),
            (lm_dim % lm_heads == 0, "lm_n_heads", f"a divisor of lm_hidden_dim {lm_dim}"),
            (not odd_head, "lm_n_heads", f"such that lm_hidden_dim {lm_dim} / lm_n_heads is even (rotary embedding)"),
            (lm_heads % self.lm_n_kv_heads == 0, "lm_n_kv_heads", f"a divisor of lm_n_heads {lm_heads}"),
            (image % self.vit_patch_size == 0, "vit_patch_size", f"a divisor of vit_img_size {image}"),
            (self.max_img_size % image == 0, "max_img_size", f"a multiple of vit_img_size {image}"),
            (grid % factor == 0, "mp_pixel_shuffle_factor", f"a divisor of the {grid} patches a side"),
            (0 <= self.vit_dropout < 1, "vit_dropout", "in [0, 1)"),
            (0 <= self.lm_dropout < 1, "lm_dropout", "in [0, 1)"),
        ]

    def _token_checks(self) -> list[tuple[bool, str, str]]:
        image_tokens = (self.vit_grid // self.mp_pixel_shuffle_factor) ** 2
        tiles = self.max_img_size // self.vit_img_size
        tile_tokens = {f"r{row}c{col}" for row in range(1, tiles + 1) for col in range(1, tiles + 1)}
        extra, vocabulary = self.vlm_extra_tokens, self.lm_base_vocab_size + self.extra_token_amount
        return [
            (
                self.vit_grid % self.mp_pixel_shuffle_factor != 0 or self.mp_image_token_length == image_tokens,
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
                f"lm_base_vocab_size + extra_token_amount {vocabulary}",
            ),
        ]


@dataclass
class TrainConfig:
    """Data, optimisation, evaluation and output of one run."""

    enable_grades: bool = doc("watch every projection matrix and freeze it when it has converged", False)

    train_dataset_path: str = doc(
        "easy-vqa (embedded), a local folder / .parquet / .jsonl / save_to_disk, or a hub id",
        "HuggingFaceM4/FineVision_concat_shuffled_2",
    )
    train_dataset_name: list[str] = doc("configurations (subsets) of the data set; 'all' or several names", ["all"])
    test_dataset_path: str | None = doc("rows for the exact match at the end; easy-vqa brings its own test split", None)
    stream_dataset: bool = doc("stream a hub data set instead of downloading it", True)
    val_size: int = doc("rows held out from the training rows for validation", 50_000)
    turns_per_image: int | None = doc(
        "draw so many turns of a row at each visit, each one a conversation of its own; by default a row is one "
        "conversation of all its turns",
        None,
    )
    source_weights: dict[str, float] = doc(
        "with turns_per_image: how often to draw the `source`s of a row's turns, as JSON; 1 for those not named", {}
    )
    balance_answers: bool = doc(
        "with turns_per_image: draw the answers of a question equally often, so that it cannot be answered unseen",
        False,
    )
    flip_images: bool = doc("mirror half of the training images left to right", False)
    mixture_weights: dict[str, float] = doc(
        "how often the rows of a subset come in an epoch, as JSON; 1 for the subsets not named", {}
    )
    skip_bad_subsets: bool = doc("leave out subsets that cannot be loaded, and say so; off: they are an error", False)
    packing: bool = doc(
        "fill rows of lm_max_length tokens with several samples, none of which sees another; batch_size counts such "
        "rows",
        False,
    )
    max_images_per_knapsack: int = doc("packing: images in one row; a sample with more has a row of its own", 18)
    max_images_per_example: int = doc("rows with more images are dropped", 4)
    max_sample_length: int = doc("samples with more tokens are dropped", 4096)
    relevance_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    image_correspondence_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    visual_dependency_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    formatting_min_rating: int = doc("FineVision: drop turns rated lower", 1)
    cache_rows: bool = doc("keep prepared rows (decoded images, token ids) in memory; for small data sets", False)
    num_workers: int = doc("processes that prepare batches; 0: in the training process", 0)

    lr_mp: float = doc("peak learning rate of the modality projector", 0.00512)
    lr_vision_backbone: float = doc("peak learning rate of the vision tower; 0 freezes it", 5e-5)
    lr_language_backbone: float = doc("peak learning rate of the language model; 0 freezes it", 5e-5)
    lora_rank: int = doc(
        "rank of LoRA adapters, which then train in place of the towers' weights (the projector trains in full, all "
        "else is frozen; checkpoints hold the merged weights); 0: full fine-tuning",
        0,
    )
    lora_alpha: float = doc("LoRA: an adapter's output is scaled by lora_alpha / lora_rank", 16.0)
    lora_dropout: float = doc("LoRA: dropout of what goes into an adapter", 0.0)
    lora_targets: list[str] = doc(
        "LoRA: adapt the matrices that one of these names, a whole part of the dotted name (q_proj, mlp, blocks.0, "
        "*_proj); empty: every projection matrix of both towers",
        [],
    )
    lora_vision: bool = doc("LoRA: adapt the vision tower too; off: it trains in full (as one from scratch must)", True)
    batch_size: int = doc("rows (images, with turns_per_image) in a micro-batch", 2)
    gradient_accumulation_steps: int = doc("micro-batches in an optimizer step", 8)
    max_grad_norm: float = doc("clip the gradient to this L2 norm; 0: no clipping", 1.0)
    max_training_steps: int = doc("optimizer steps", 40_000)
    warmup_ratio: float = doc("share of the steps with linear warm-up, in [0, 1)", 0.03)
    min_lr_ratio: float = doc("the cosine ends at this share of the peak, in [0, 1]", 0.1)
    weight_decay: float = doc("AdamW's decoupled weight decay", 0.01)
    adam_beta1: float = doc("AdamW: decay of the first moment", 0.9)
    adam_beta2: float = doc("AdamW: decay of the second moment", 0.999)
    dtype: str = doc("autocast: auto (bfloat16 where the device has it), bfloat16 or float32", "auto")
    compile: bool = doc("torch.compile every block", False)
    activation_checkpointing: bool = doc(
        "keep only what goes into each block for the backward pass and compute the block again there: less memory, "
        "about a third more work",
        False,
    )
    loss_chunk_size: int = doc(
        "label positions whose logits are held at a time, which are computed again in the backward pass: less memory, "
        "one more product of the head; 0: all at once",
        0,
    )
    parallel: str = doc(
        "with several processes (torchrun): ddp, each holds all weights; fsdp, weights, gradients and optimizer state "
        "are divided among them",
        "ddp",
    )
    seed: int = doc("seed of weights, order of the data and dropout", 0)

    eval_interval: int = doc("optimizer steps between two evaluations, each of which ends with a checkpoint", 500)
    eval_batch_size: int = doc("conversations in an evaluation batch", 64)
    max_new_tokens: int = doc("longest generated answer in evaluation, in tokens", 16)
    log_interval: int = doc("optimizer steps between two lines of metrics.jsonl", 10)
    early_stopping: bool = doc("stop when the validation loss has stopped falling: the baseline to GradES", False)
    es_interval: float = doc("early stopping: share of the run between two validation losses, in (0, 1)", 0.05)
    es_delta: float = doc("early stopping: the loss must fall by more than this below the best, in nats", 0.0005)
    es_patience: int = doc("early stopping: stop after so many validations in a row without such a fall", 3)

    dry_run: bool = doc(
        "print what the run will take (parameters, tokens, FLOPs, memory) and end; nothing is downloaded or written",
        False,
    )
    profile: int = doc(
        "profile so many steps (5 where no number is given), from the sixth of this process on: the operators that "
        "took most time are printed, trace.json in the run folder shows all; 0: off",
        0,
    )
    checkpoint_interval: int = doc("optimizer steps between two more checkpoints; 0: none but those of evaluations", 0)
    keep_checkpoints: int = doc("keep so many of the latest checkpoints, and the best besides", 2)
    resume: str | None = doc(
        "continue a run where it ended: auto (the run of --run_name, from its newest whole checkpoint; from the start "
        "where there is none yet), a run folder, or a checkpoint; with another --run_name as a new run from there",
        None,
    )
    resume_override: bool = doc("resume although settings differ from the run's; each is named", False)
    run_name: str | None = doc("folder of the run; by default made from the config and the time", None)
    output_dir: str = doc("where run folders go", "grades_output")
    log_with: str | None = doc(
        "record to wandb (Weights & Biases; offline where there is no account), tensorboard or trackio as well", None
    )
    log_wandb: bool = doc("the same as --log_with wandb", False)
    wandb_project: str = doc("project in Weights & Biases or trackio", "nanovlm-grades")
    wandb_entity: str | None = doc("account or team in Weights & Biases", None)
    resume_from_vlm_checkpoint: bool = doc("start from the weights of --vlm_checkpoint_path", False)

    def problems(self) -> list[str]:
        """Every impossible value: flag, value, what is allowed."""
        checks = [
            (self.lr_mp >= 0, "lr_mp", ">= 0"),
            (self.lr_vision_backbone >= 0, "lr_vision_backbone", ">= 0"),
            (self.lr_language_backbone >= 0, "lr_language_backbone", ">= 0"),
            *self._lora_checks(),
            (self.max_grad_norm >= 0, "max_grad_norm", ">= 0"),
            (0 <= self.warmup_ratio < 1, "warmup_ratio", "in [0, 1)"),
            (0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "in [0, 1]"),
            (self.weight_decay >= 0, "weight_decay", ">= 0"),
            (0 <= self.adam_beta1 < 1, "adam_beta1", "in [0, 1)"),
            (0 <= self.adam_beta2 < 1, "adam_beta2", "in [0, 1)"),
            (self.dtype in ("auto", "bfloat16", "float32"), "dtype", "auto, bfloat16 or float32"),
            (self.loss_chunk_size >= 0, "loss_chunk_size", ">= 0"),
            (self.parallel in ("ddp", "fsdp"), "parallel", "ddp or fsdp"),
            (self.val_size >= 0, "val_size", ">= 0"),
            (self.val_size != 0 or not self.early_stopping, "val_size", "> 0 with early_stopping"),
            (0 < self.es_interval < 1, "es_interval", "in (0, 1)"),
            (self.es_delta >= 0, "es_delta", ">= 0"),
            (self.es_patience >= 1, "es_patience", ">= 1"),
            (self.num_workers >= 0, "num_workers", ">= 0"),
            (self.turns_per_image is None or self.turns_per_image >= 1, "turns_per_image", ">= 1"),
            (
                self.turns_per_image is not None or not self.source_weights,
                "source_weights",
                "empty without turns_per_image",
            ),
            (
                self.turns_per_image is not None or not self.balance_answers,
                "balance_answers",
                "off without turns_per_image",
            ),
            (all(weight > 0 for weight in self.source_weights.values()), "source_weights", "> 0 each"),
            (all(weight > 0 for weight in self.mixture_weights.values()), "mixture_weights", "> 0 each"),
            (self.max_images_per_example >= 0, "max_images_per_example", ">= 0"),
            (self.checkpoint_interval >= 0, "checkpoint_interval", ">= 0"),
            (self.profile >= 0, "profile", ">= 0"),
            (self.log_with in (None, "wandb", "tensorboard", "trackio"), "log_with", "wandb, tensorboard or trackio"),
            (not self.log_wandb or self.log_with in (None, "wandb"), "log_with", "left out with --log_wandb"),
            (self.resume != "auto" or self.run_name is not None, "resume", "given with --run_name"),
            (self.run_name is None or Path(self.run_name).name == self.run_name, "run_name", "a plain folder name"),
            (
                max(self.lr_mp, self.lr_vision_backbone, self.lr_language_backbone) > 0,
                "lr_mp",
                "> 0 where both towers' learning rates are 0: nothing would train",
            ),
        ]
        positive = (
            "batch_size gradient_accumulation_steps max_training_steps eval_interval eval_batch_size max_new_tokens "
            "log_interval max_sample_length max_images_per_knapsack keep_checkpoints"
        )
        return _not_positive(self, positive) + _failed(self, checks)

    def _lora_checks(self) -> list[tuple[bool, str, str]]:
        full = self.lora_rank == 0
        adapted = self.lr_language_backbone > 0 or (self.lora_vision and self.lr_vision_backbone > 0)
        return [
            (self.lora_rank >= 0, "lora_rank", ">= 0"),
            (full or adapted, "lora_rank", "0 where no tower is adapted (learning rates of 0, lora_vision off)"),
            (self.lora_alpha > 0, "lora_alpha", "> 0"),
            (0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)"),
            (not full or self.lora_dropout == 0, "lora_dropout", "0 without lora_rank"),
            (not full or not self.lora_targets, "lora_targets", "empty without lora_rank"),
            (not full or self.lora_vision, "lora_vision", "on without lora_rank"),
        ]


def _not_positive(config, names: str) -> list[str]:
    return [f"--{name} {getattr(config, name)}: must be > 0" for name in names.split() if not getattr(config, name) > 0]


def _failed(config, checks: list[tuple[bool, str, str]]) -> list[str]:
    return [f"--{name} {getattr(config, name)}: must be {allowed}" for ok, name, allowed in checks if not ok]


def validate(vlm: VLMConfig, train: TrainConfig, grades: GradESConfig) -> None:
    """Raise ValueError that names every impossible value of the three configs at once."""
    found = vlm.problems() + train.problems() + grades.problems()
    if vlm.vit_cls_flag:
        found.append("--vit_cls_flag True: must be False; the projector takes the patches, not one CLS token")
    if vlm.lm_use_tokens:
        found.append("--lm_use_tokens True: must be False; the language model takes embeddings here")
    if train.compile and train.enable_grades and grades.unfreeze_factor is not None:
        found.append(
            f"--unfreeze_factor {grades.unfreeze_factor:g}: must be left out with --compile: compiled blocks cannot be "
            "probed"
        )
    if train.packing and vlm.lm_max_length > vlm.lm_max_position_embeddings:
        found.append(
            f"--packing True: must be off where lm_max_length {vlm.lm_max_length} is more than "
            f"lm_max_position_embeddings {vlm.lm_max_position_embeddings}: the row would scale its samples' positions"
        )
    if train.max_sample_length > vlm.lm_max_length:
        found.append(
            f"--max_sample_length {train.max_sample_length}: must be at most lm_max_length {vlm.lm_max_length}"
        )
    if found:
        raise ValueError("\n".join(found))
