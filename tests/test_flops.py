"""FLOPs from shapes against what PyTorch counts while it runs the products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grades.components import find_components
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from training.flops import FlopCounter, model_cost

ROWS, LENGTH, LABELS = 3, 24, 10
CONFIG = VLMConfig(
    vit_img_size=32, max_img_size=32, vit_patch_size=4, vit_hidden_dim=32, vit_inter_dim=96, vit_n_heads=2,
    vit_n_blocks=2, mp_pixel_shuffle_factor=2, mp_image_token_length=16, lm_hidden_dim=48, lm_inter_dim=80,
    lm_n_heads=4, lm_n_kv_heads=2, lm_n_blocks=2, lm_base_vocab_size=60, extra_token_amount=1,
    vlm_extra_tokens={"image_token": "<|image|>"}, lm_max_length=64,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionLanguageModel(CONFIG)


def batch() -> dict:
    ids = torch.randint(0, 60, (ROWS, LENGTH))
    ids[:, :16] = CONFIG.image_token_id
    targets = torch.full((ROWS, LENGTH), -100)
    targets.view(-1)[-LABELS:] = 1
    return {
        "input_ids": ids,
        "targets": targets,
        "images": torch.randn(ROWS, 3, 32, 32),
        "image_slots": (ids.flatten() == CONFIG.image_token_id).nonzero().squeeze(1),
        "label_positions": (targets.flatten() != -100).nonzero().squeeze(1),
        "num_labels": LABELS,
    }


def counted(model, data: dict) -> int:
    """By PyTorch, with attention as plain products, as bfloat16 takes it on a CPU."""
    inputs = {name: value for name, value in data.items() if torch.is_tensor(value)}
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs)
        loss.backward()
    return counter.get_total_flops()


def freeze_language_components(model):
    for component in find_components(model):
        if component.tower == "language":
            for parameter in component.parameters:
                parameter.requires_grad_(False)


def freeze_all_but_projector(model):
    model.requires_grad_(False)
    model.MP.requires_grad_(True)


def freeze_the_first_blocks(model):
    for part in (model.vision_encoder.patch_embedding, model.vision_encoder.blocks[0]):
        part.requires_grad_(False)


def add_lora(model):
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv_proj", "fc2"]), model)


FREEZES = {
    "nothing": lambda model: None,
    "language components": freeze_language_components,
    "vision tower": lambda model: model.vision_encoder.requires_grad_(False),
    "first blocks": freeze_the_first_blocks,
    "all but the projector": freeze_all_but_projector,
    "all but one value projection": lambda model: (
        model.requires_grad_(False).decoder.blocks[0].attn.v_proj.requires_grad_(True)
    ),
    "all but LoRA": add_lora,
}


@pytest.mark.parametrize("name", FREEZES)
def test_flops_are_what_pytorch_counts(model, name):
    FREEZES[name](model)
    data = batch()
    assert model_cost(model).of(data) == counted(model, data)


def test_text_alone_costs_no_vision(model):
    data = batch() | {"images": None, "image_slots": None, "input_ids": torch.randint(0, 60, (ROWS, LENGTH))}
    assert model_cost(model).of(data) == counted(model, data)


def test_a_freeze_lowers_the_steps_after_it(model):
    data, counter = batch(), FlopCounter(model)
    counter.add([data, data])
    assert counter.done == counter.unfrozen == 2 * model_cost(model).of(data)
    before = counter.done
    model.vision_encoder.requires_grad_(False)
    counter.add([data])
    cheap = counter.done - before
    assert cheap == model_cost(model).of(data) < before / 2
    model.vision_encoder.requires_grad_(True)
    counter.add([data])
    assert (counter.done, counter.unfrozen) == (1.5 * before + cheap, 2 * before)
    again = FlopCounter(model)
    again.load_state_dict(counter.state_dict())
    assert (again.done, again.unfrozen) == (counter.done, counter.unfrozen)
