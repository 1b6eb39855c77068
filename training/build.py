"""The model of a run."""

import dataclasses
import math
from pathlib import Path

import torch

from models.backbones import configure_from_backbones
from models.config import VLMConfig
from models.hub import checkpoint_folder
from models.lora import inject_lora, load_lora_state_dict
from models.vision_language_model import VisionLanguageModel, load_vlm_weights
from training import setup
from training.arguments import Settings
from training.checkpoint_folder import find_checkpoint
from training.resume import RunStart


def build_model(settings: Settings, start: RunStart) -> tuple[VisionLanguageModel, Path | None]:
    """The model on the CPU, with its adapters; and the checkpoint folder that its weights are from, if they are.

    Weights come from the checkpoint that is resumed, from that of --resume_weights or --vlm_checkpoint_path, from the
    pretrained backbones or from the seed. What does not train is frozen. Raises ValueError where a flag asks for
    another shape than they have.
    """
    cfg = settings.train
    checkpoint = start.checkpoint or take_over_sizes(settings)
    if start.checkpoint is not None:
        settings.use_model_config(VLMConfig.load(start.checkpoint), f"--resume {start.checkpoint}")
    if checkpoint is not None:
        model = load_vlm_weights(VisionLanguageModel(settings.vlm), checkpoint)
    else:
        model = VisionLanguageModel(settings.vlm, load_backbone=settings.vlm.vlm_load_backbone_weights)
    if cfg.lora_rank:
        inject_lora(model, cfg)
        if start.state:
            load_lora_state_dict(model, start.state["lora"])
    setup.freeze_untrained(model, cfg)
    setup.apply_to_model(model, cfg)
    return model, checkpoint


def take_over_sizes(settings: Settings, local_only: bool = False) -> Path | None:
    """Let the checkpoint or the backbones say the model's sizes; returns the checkpoint.

    local_only: the hub is not asked; what is not on this machine leaves the sizes as the settings have them.
    """
    if settings.weights is not None:
        flag, name = settings.weights
        found = find_checkpoint(name, newest=flag == "resume_weights")
        if local_only and not Path(found).is_dir():
            return None
        checkpoint = checkpoint_folder(found, flag=flag)
        settings.use_model_config(VLMConfig.load(checkpoint), f"--{flag} {checkpoint}")
        return checkpoint
    if settings.vlm.vlm_load_backbone_weights:
        vlm = dataclasses.replace(settings.vlm)
        configure_from_backbones(vlm, local_only)
        settings.use_model_config(vlm, "the pretrained backbones")
    return None


def limit_tiles(settings: Settings, processes: int = 1) -> None:
    """Set max_tiles_per_batch, where it is auto, to as many as fit into the CUDA device; to 0 where all do.

    Raises ValueError where not even one tile for each row fits.
    """
    if settings.train.max_tiles_per_batch != "auto":
        return
    from training.plan import fitting_tiles

    device = setup.pick_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    settings.train.max_tiles_per_batch = fitting_tiles(settings, device, memory, processes)


def compile_model(model: VisionLanguageModel, settings: Settings, device: torch.device) -> bool:
    """Compile the model where the run does; on CUDA its inputs are padded to few sizes. Returns whether it does."""
    if not setup.compiles(settings, device):
        return False
    from training.plan import META, full_batch

    most = len(full_batch(settings, META)["images"]) if device.type == "cuda" else None
    setup.compile_blocks(model, most)
    return True
