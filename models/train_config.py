"""TrainConfig: data, optimisation, evaluation and output of a run. See models/config.py, which exports it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grades.fields import Checked, Relation, doc


@dataclass
class TrainConfig(Checked):
    """Data, optimisation, evaluation and output of one run."""

    enable_grades: bool = doc("watch every projection matrix and freeze it when it has converged", False)

    train_dataset_path: str = doc(
        "easy-vqa (embedded), a local file or folder of a format in docs/data.md, or a hub id",
        "HuggingFaceM4/FineVision_concat_shuffled_2",
        section="Data",
    )
    train_dataset_name: list[str] = doc(
        "configurations (subsets) of the data set, for easy-vqa kinds of question: all, or several names", ["all"]
    )
    mixture: list[dict[str, Any]] = doc(
        "train on several data sets in place of train_dataset_path: a YAML file of groups with shares, none for none, "
        "or the groups themselves in a recipe. Inside a group a set's share goes with sqrt(rows); see docs/data.md",
        [],
    )
    test_dataset_path: str | None = doc("rows for the exact match at the end; easy-vqa brings its own test split", None)
    columns: dict[str, str] = doc(
        "columns of one's own under the keys of docs/data.md, as question=frage,answer=antwort,image=bild", {}
    )
    row_function: str | None = doc(
        "file.py:name, a function that gets each row as a dict and returns one of docs/data.md, or None to skip it",
        None,
    )
    image_root: str | None = doc("folder of relative image paths; by default that of the file with the rows", None)
    fetch_images: bool = doc("fetch images of http and https URLs into the cache of datasets", False)
    truncated_images: str = doc(
        "an image or video whose file breaks off: drop its row, or use what is there and count it",
        "drop",
        choices=("drop", "use"),
    )
    stream_dataset: bool = doc("stream a hub data set instead of downloading it", True)
    val_size: int | float = doc(
        "validation rows, held out from the training rows: a count, or below 1 a share of them", 50_000, ge=0
    )
    split_by: str = doc(
        "how val_size rows are held out: row; image, with all rows of an image on one side; auto, by image where rows "
        "share images",
        "auto",
        choices=("auto", "image", "row"),
    )
    val_dataset_path: str | None = doc(
        "validation rows of their own: a file, a folder (of which the validation split), or a hub id; val_size has no "
        "effect then",
        None,
    )
    turns_per_image: int | None = doc(
        "draw this many turns of a row at each visit, each one a conversation of its own; by default a row is one "
        "conversation of all its turns",
        None,
        ge=1,
    )
    message_tree: bool = doc(
        "take the turns of a row with images as questions that do not know of each other, in one sequence that has the "
        "images once: each turn sees the images and itself alone; conversations and chains of questions stay whole",
        False,
    )
    train_on: str = doc(
        "the tokens that are learned: answers (each with its end), last_answer of a conversation, or all of its text",
        "answers",
        choices=("answers", "last_answer", "all"),
    )
    loss_weighting: str = doc(
        "how much a learned token counts: none, each the same; sqrt_answer, 2 / sqrt(tokens of its answer) / sqrt("
        "answers of the row). Sets of a mixture with a loss_weight have that instead",
        "none",
        choices=("none", "sqrt_answer"),
    )
    source_weights: dict[str, float] = doc(
        "with turns_per_image: how often to draw the `source`s of a row's turns, as a=2,b=0.5; 1 for those not named",
        {},
        gt=0,
    )
    balance_answers: bool = doc(
        "with turns_per_image: draw the answers of a question equally often, so that it cannot be answered unseen",
        False,
    )
    flip_images: bool = doc("mirror half of the training images left to right", False)
    mixture_weights: dict[str, float] = doc(
        "how often the rows of a subset come in an epoch, as a=2,b=0.5; 1 for the subsets not named", {}, gt=0
    )
    max_bad_rows: int | float = doc(
        "end the run when so many training rows cannot be used: below 1 a share of its first 1,000 rows, else a count "
        "in its first epoch. Rows that other flags leave out (too long, too many images, ratings) do not count",
        0.1,
        ge=0,
    )
    strict: bool = doc("end the run at the first row that cannot be used, in training or validation", False)
    skip_bad_subsets: bool = doc("skip subsets that cannot be loaded, and name them; off: they are an error", False)
    packing: bool = doc(
        "fill rows of lm_max_length tokens with several samples. None sees another; batch_size counts such rows",
        False,
    )
    max_tiles_per_batch: int | str = doc(
        "images or tiles in a micro-batch at most, which bounds its memory: each of the batch_size rows has an equal "
        "share, and a sample with more than a share is dropped. 0: no limit; auto: as many as fit into the CUDA "
        "device's memory, by --dry_run's count",
        0,
        ge=0,
        choices=("auto",),
    )
    max_images_per_knapsack: int = doc("packing: images in one row; a sample with more has a row of its own", 18, gt=0)
    max_images_per_example: int = doc("rows with more images and videos are dropped", 4, ge=0)
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
    lr_schedule: str = doc(
        "learning rate after the warm-up: cosine, linear, constant, or wsd (constant, then a cooldown)",
        "cosine",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    warmup_ratio: float = doc("share of the steps with linear warm-up", 0.03, ge=0, lt=1)
    warmup_ratio_mp: float | None = doc("the same of the projector, where it differs (Molmo2)", None, ge=0, lt=1)
    min_lr_ratio: float = doc(
        "the schedule ends at this share of the peak; constant stays at the peak", 0.1, ge=0, le=1
    )
    cooldown_ratio: float = doc(
        "wsd: share of the steps in which the rate falls; with on_converged cooldown: of the steps made until then",
        0.15,
        gt=0,
        lt=1,
    )
    cooldown_shape: str = doc(
        "how the rate falls in the cooldown, from the peak to min_lr_ratio: with x from 0 to 1 as 1 - sqrt(x), linear "
        "as 1 - x",
        "sqrt",
        choices=("sqrt", "linear"),
    )
    average_weights: float = doc(
        "evaluate an average of the weights too, and save it where it is better: a decay per step (0.99), or from 2 on "
        "a window of steps; 0: off",
        0.0,
        ge=0,
    )
    weight_decay: float = doc("AdamW's decoupled weight decay", 0.01, ge=0)
    z_loss: float = doc(
        "this much of log(sum(exp(logits)))^2 is added to the training loss of each learned token; Molmo2: 1e-4",
        0.0,
        ge=0,
    )
    response_dropout: float = doc(
        "dropout of what each block of the language model adds at positions that have a label; Molmo2: 0.1",
        0.0,
        ge=0,
        lt=1,
    )
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
    compile: bool | str = doc(
        "torch.compile: on, off, or auto (on CUDA with Triton and a compiler). Blocks and the loss are compiled",
        "auto",
        choices=("auto", True, False),
        alone="on",
    )
    activation_checkpointing: bool = doc(
        "less memory, about a third more work. Of each block only the input is kept for the backward pass, which "
        "computes the block again",
        False,
    )
    feature_cache_gib: float = doc(
        "once the vision tower is frozen, keep its output for images that are read again, up to this many GiB, and "
        "do not compute it again; 0: off. Without effect where the tower has dropout",
        0.0,
        ge=0,
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
    eval_tasks: str | None = doc(
        "benchmarks that are answered and scored during training, as by evaluate.py: mmstar:200,my.jsonl asks 200 "
        "drawn rows of mmstar and all of my.jsonl",
        None,
    )
    eval_tasks_interval: int | None = doc(
        "optimizer steps between two evaluations of eval_tasks, which are also made at the end; by default those of "
        "eval_interval",
        None,
        gt=0,
    )
    data_root: str | None = doc("folder with the data of eval_tasks, as in evaluate.py; without it, the hub", None)
    metric_for_best_model: str = doc(
        "which checkpoint is checkpoints/best: that of the lowest (validation) loss, or of the highest exact_match or "
        "number of eval_tasks, as mmstar/average",
        "loss",
    )
    sample_questions: int = doc(
        "validation questions whose answers over time stand in samples.html of the run folder; 0: none", 8, ge=0
    )
    rollback_rows: int = doc(
        "with --metric rollback: validation rows on which the rollback gain is measured", 200, gt=1
    )
    max_new_tokens: int = doc("longest generated answer in evaluation, in tokens", 16, gt=0)
    early_stopping: bool = doc("stop when the validation loss has stopped falling: the baseline to GradES", False)
    es_interval: float = doc("early stopping: share of the run between two validation losses", 0.05, gt=0, lt=1)
    es_delta: float = doc("early stopping: the loss must fall by more than this below the best, in nats", 0.0005, ge=0)
    es_patience: int = doc("early stopping: stop after this many validations in a row without such a fall", 3, ge=1)
    es_weights: str = doc(
        "early stopping: whose validation loss, the last weights' or with average_weights the averaged ones'",
        "last",
        choices=("last", "averaged"),
    )

    dry_run: bool = doc(
        "print what the run takes (FLOPs, memory), look at some rows, and end. Nothing is downloaded or written",
        False,
        section="Output",
    )
    gpu_gib: float | None = doc(
        "with dry_run: say how long rows may be on a GPU with this much memory; by default the GPU found", None, gt=0
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
    resume_weights: str | None = doc(
        "start from the weights of a run folder (of its last checkpoint), of a checkpoint or of a hub id", None
    )
    resume_from_vlm_checkpoint: bool = doc(
        "start from the weights of --vlm_checkpoint_path. Of a run folder it takes the best checkpoint", False
    )
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

    @property
    def tiles_per_row(self) -> int:
        """The share of each row in max_tiles_per_batch; 0: no limit."""
        return 0 if isinstance(self.max_tiles_per_batch, str) else self.max_tiles_per_batch // self.batch_size

    @property
    def train_data(self) -> list[str]:
        """The path of the training data set, or those of all sets of the mixture."""
        paths = [one["path"] for group in self.mixture for one in group["sets"]]
        return list(dict.fromkeys(paths)) or [self.train_dataset_path]

    @property
    def validates(self) -> bool:
        """Whether there are validation rows."""
        return self.val_size != 0 or self.val_dataset_path is not None

    @property
    def tasks_interval(self) -> int:
        """Steps between two evaluations of eval_tasks."""
        return self.eval_tasks_interval or self.eval_interval

    @property
    def best_metric(self) -> str:
        """metric_for_best_model, without the prefix that it has in metrics.jsonl or summary.json."""
        name = self.metric_for_best_model
        return next(
            (name.removeprefix(one) for one in ("val/", "val_", "eval/", "eval_") if name.startswith(one)), name
        )

    def relations(self) -> Iterable[Relation]:
        draws_turns, has_tasks = self.turns_per_image is not None, self.eval_tasks is not None
        warmup_ratio = max(self.warmup_ratio, self.warmup_ratio_mp or 0)
        peak_lr = max(self.lr_mp, self.lr_vision_backbone, self.lr_language_backbone)
        return [
            (peak_lr > 0, "lr_mp", "> 0 where both towers' learning rates are 0: nothing would train"),
            (self.max_bad_rows < 1 or self.max_bad_rows % 1 == 0, "max_bad_rows", "a share below 1 or a whole number"),
            (self.val_size < 1 or self.val_size % 1 == 0, "val_size", "a share below 1 or a whole number of rows"),
            (self.validates or not self.early_stopping, "val_size", "> 0 with early_stopping"),
            (self.es_weights == "last" or self.average_weights > 0, "es_weights", "last without average_weights"),
            (not self.mixture or not self.mixture_weights, "mixture_weights", "empty with a mixture, which has rates"),
            (not self.message_tree or self.train_on != "all", "message_tree", "off with train_on all"),
            (
                self.loss_weighting == "none" or self.train_on != "all",
                "loss_weighting",
                "none with train_on all, which has no answers",
            ),
            (draws_turns or not self.source_weights, "source_weights", "empty without turns_per_image"),
            (draws_turns or not self.balance_answers, "balance_answers", "off without turns_per_image"),
            (not self.log_wandb or self.log_with in (None, "wandb"), "log_with", "left out with --log_wandb"),
            (self.resume != "auto" or self.run_name is not None, "resume", "given with --run_name"),
            (self.run_name is None or Path(self.run_name).name == self.run_name, "run_name", "a plain folder name"),
            (
                self.max_tiles_per_batch in ("auto", 0) or self.tiles_per_row > 0,
                "max_tiles_per_batch",
                "0, auto, or at least batch_size",
            ),
            (
                has_tasks or self.best_metric in ("loss", "exact_match"),
                "metric_for_best_model",
                "loss or exact_match without eval_tasks",
            ),
            (self.validates or self.best_metric != "exact_match", "val_size", "> 0 for exact_match of the best model"),
            (has_tasks or self.eval_tasks_interval is None, "eval_tasks", "given with eval_tasks_interval"),
            (
                self.lr_schedule != "wsd" or warmup_ratio + self.cooldown_ratio <= 1,
                "cooldown_ratio",
                "at most 1 less the longest warm-up with lr_schedule wsd",
            ),
            (
                self.resume_weights is None or not self.resume_from_vlm_checkpoint,
                "resume_weights",
                "left out with --resume_from_vlm_checkpoint",
            ),
            (not 1 <= self.average_weights < 2, "average_weights", "a decay below 1, or a window of 2 steps or more"),
            (self.feature_cache_gib == 0 or self.parallel == "ddp", "feature_cache_gib", "0 with --parallel fsdp"),
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
