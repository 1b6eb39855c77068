"""The model of a run."""

from pathlib import Path

import torch

from models.lora import inject_lora, load_lora_state_dict
from models.vision_language_model import VisionLanguageModel, load_vlm_weights
from training import setup
from training.arguments import Settings
from training.resume import RunStart
from training.sizes import take_over_sizes


def build_model(settings: Settings, start: RunStart) -> tuple[VisionLanguageModel, Path | None]:
    """The model on the CPU, with its adapters; and the checkpoint folder that its weights are from, if they are.

    Weights come from the checkpoint that is resumed, from that of --resume_weights or --vlm_checkpoint_path, from the
    pretrained backbones or from the seed. What does not train is frozen. Raises ValueError where a flag asks for
    another shape than they have.
    """
    cfg = settings.train
    checkpoint = take_over_sizes(settings, resumed=start.checkpoint)
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


def compile_model(model: VisionLanguageModel, settings: Settings, device: torch.device) -> bool:
    """Compile the model where the run does; on CUDA its inputs are padded to few sizes. Returns whether it does."""
    if not setup.compiles(settings, device):
        return False
    from training.plan import META, full_batch

    most = len(full_batch(settings, META)["images"]) if device.type == "cuda" else None
    setup.compile_blocks(model, most)
    return True
