"""The sizes of a model, as a checkpoint or pretrained backbones have them; how many tiles fit into memory with them."""

import dataclasses
import math
from pathlib import Path

import torch

from models.backbones import configure_from_backbones
from models.config import VLMConfig
from models.hub import checkpoint_folder
from training import setup
from training.arguments import Settings
from training.checkpoint_folder import find_checkpoint


def take_over_sizes(settings: Settings, local_only: bool = False, resumed: Path | None = None) -> Path | None:
    """Let the checkpoint or the backbones say the model's sizes; returns the checkpoint.

    local_only: the hub is not asked; what is not on this machine leaves the sizes as the settings have them.
    resumed: the checkpoint of --resume, which goes before what else the settings name. Raises ValueError where a flag
    asks for another shape than the weights have.
    """
    if resumed is not None:
        settings.use_model_config(VLMConfig.load(resumed), f"--resume {resumed}")
        return resumed
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

    To be called with the model's sizes taken over. Raises ValueError where not even one tile for each row fits.
    """
    if settings.train.max_tiles_per_batch != "auto":
        return
    from training.plan import fitting_tiles

    device = setup.pick_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    settings.train.max_tiles_per_batch = fitting_tiles(settings, device, memory, processes)


def limit_tiles_of_run(settings: Settings, processes: int, resumed: Path | None = None) -> None:
    """limit_tiles with the sizes that the model will have; those of the settings stay as they were asked for.

    resumed: the checkpoint of --resume. Raises what take_over_sizes and limit_tiles raise.
    """
    if settings.train.max_tiles_per_batch != "auto":
        return
    sized = dataclasses.replace(settings)  # shares `train`, where the limit is set
    take_over_sizes(sized, resumed=resumed)
    limit_tiles(sized, processes)
