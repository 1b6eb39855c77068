"""FLOPs from shapes against those that PyTorch counts while it runs the products."""

import pytest
import torch
from tiny import grades as tiny
from torch.utils.flop_counter import FlopCounterMode

from grades.components import find_components
from grades.marks import detach_output
from training.flops import FlopCounter, card_tflops, model_cost

LABELS = 7


@pytest.fixture(params=tiny.FAMILIES)
def model(request):
    return tiny.make_model(**tiny.FAMILIES[request.param])


def batch() -> dict:
    """Two rows of ten tokens with an image and a few labels, as the collator makes them."""
    found = tiny.batch(0)
    found["targets"].view(-1)[:-LABELS] = -100
    return found | {
        "image_slots": (found["input_ids"].flatten() == tiny.TINY["lm_base_vocab_size"]).nonzero().squeeze(1),
        "label_positions": (found["targets"].flatten() != -100).nonzero().squeeze(1),
        "num_labels": LABELS,
    }


def counted(model, data: dict) -> int:
    """By PyTorch, in bfloat16, in which attention on a CPU is plain products."""
    inputs = {name: value for name, value in data.items() if torch.is_tensor(value)}
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs)
        loss.backward()
    return counter.get_total_flops()


def add_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv_proj", "fc2"]), freeze(model))


def freeze(*parts):
    for part in parts:
        part.requires_grad_(False)
    return parts[0]


def freeze_prefix(model):
    """As GradES does, but for the head that a tied lookup shares its matrix with."""
    freeze(model.vision_encoder, model.MP, model.decoder.blocks[0])
    if model.decoder.head.weight is not model.decoder.token_embedding.weight:
        freeze(model.decoder.token_embedding)
    return model.decoder.token_embedding.register_forward_hook(detach_output)


FREEZES = {
    "nothing": lambda model: None,
    "language components": lambda model: freeze(
        *(p for c in find_components(model) if c.tower == "language" for p in c.parameters)
    ),
    "vision tower": lambda model: freeze(model.vision_encoder),
    "first blocks": lambda model: freeze(model.vision_encoder.patch_embedding, model.vision_encoder.blocks[0]),
    "all but the projector": lambda model: freeze(model).MP.requires_grad_(True),
    "all but one value projection": lambda model: freeze(model).decoder.blocks[0].attn.v_proj.requires_grad_(True),
    "the first blocks and all before them": freeze_prefix,
    "all but LoRA": add_lora,
}


@pytest.mark.parametrize("name", FREEZES)
def test_flops_are_what_pytorch_counts(model, name):
    FREEZES[name](model)
    data = batch()
    assert model_cost(model).of(data) == counted(model, data)


@pytest.mark.parametrize("name", ["nothing", "vision tower"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "molmo"])
def test_windows_of_any_size_count(kind, name):
    model = tiny.make_model(mp_type=kind, mp_image_token_length=16)
    FREEZES[name](model)
    data = batch() | {"pool_index": torch.tensor([[0, 1, 4], [5, 31, -1]]).repeat(4, 1)}
    assert model_cost(model).of(data) == counted(model, data)


def test_text_alone_costs_no_vision(model):
    data = batch() | {"images": None, "image_slots": None}
    assert model_cost(model).of(data) == counted(model, data)


@pytest.mark.parametrize("trains", [True, False])
def test_a_cache_is_no_saving_of_grades_where_the_vision_tower_never_trains(model, trains):
    model.vision_encoder.requires_grad_(trains)
    counter = FlopCounter(model)
    counter.add([batch() | {"cached_images": 2}])
    assert (counter.done < counter.unfrozen) == trains


def test_a_freeze_lowers_the_steps_after_it(model):
    data, counter = batch(), FlopCounter(model)
    counter.add([data, data])
    whole = 2 * model_cost(model).of(data)
    assert counter.state_dict() == {"done": whole, "measured": 0, "unfrozen": whole}
    model.vision_encoder.requires_grad_(False)
    counter.add([data])
    cheap = counter.done - whole
    assert cheap == model_cost(model).of(data) < whole / 2
    model.vision_encoder.requires_grad_(True)
    counter.add([data])
    assert counter.state_dict() == {"done": 3 * whole // 2 + cheap, "measured": 0, "unfrozen": 2 * whole}


def test_a_tied_lookup_that_is_cut_off_lowers_the_steps_after_it():
    model, data = tiny.make_model(lm_tie_weights=True, lm_n_blocks=2), batch()
    freeze_prefix(model).remove()
    counter, costs = FlopCounter(model), []
    for is_cut in (False, True, False):  # requires_grad stays as it is
        cut = freeze_prefix(model)
        if not is_cut:
            cut.remove()
        before = counter.done
        counter.add([data])
        costs.append(counter.done - before)
        assert costs[-1] == counted(model, data)
        cut.remove()
    assert costs[1] < costs[0] == costs[2]


@pytest.mark.parametrize(
    ("rank", "world_size", "done", "measured", "unfrozen"),
    [(0, 2, 3, 0, 5), (1, 2, 7, 2, 8), (0, 1, 10, 2, 13), (0, 3, 10, 2, 13), (2, 3, 0, 0, 0)],
)
def test_counts_of_all_ranks_are_taken_over(model, rank, world_size, done, measured, unfrozen):
    counter = FlopCounter(model, rank, world_size)
    counter.load_rank_states([{"done": 3, "unfrozen": 5}, {"done": 7, "measured": 2, "unfrozen": 8}])
    assert counter.state_dict() == {"done": done, "measured": measured, "unfrozen": unfrozen}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70),
     ("NVIDIA RTX A4000", None), ("NVIDIA L40S", 362)],
)  # fmt: skip
def test_what_a_card_can_do_is_known_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert card_tflops(torch.device("cuda")) == tflops
    assert card_tflops(torch.device("cpu")) is None
