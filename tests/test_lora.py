"""LoRA: what trains, what stays, what a checkpoint holds, and GradES on adapters."""

import copy
import functools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny.grades import FAMILIES, batch
from tiny.grades import make_model as make_any_model

from grades import find_components
from models.config import TrainConfig
from models.lora import inject_lora, load_lora_state_dict, lora_state_dict, merged_state
from models.vision_language_model import VisionLanguageModel
from training.arguments import parse_arguments
from training.setup import freeze_untrained, make_optimizer

VISION = dict.fromkeys(["qkv_proj", "out_proj", "fc1", "fc2"], 2)  # matrices in two blocks
ATTENTION = dict.fromkeys(["q_proj", "k_proj", "v_proj", "out_proj"], 2)
LANGUAGE = ATTENTION | dict.fromkeys(["gate_proj", "up_proj", "down_proj"], 2)


@pytest.fixture(params=FAMILIES, autouse=True)
def family(request, monkeypatch) -> str:
    """Every test here is one of both families; its name."""
    monkeypatch.setattr("test_lora.make_model", functools.partial(make_any_model, **FAMILIES[request.param]))
    return request.param


make_model = make_any_model


def config(**settings) -> TrainConfig:
    rates = dict.fromkeys(["lr_mp", "lr_vision_backbone", "lr_language_backbone"], 1e-2)
    return TrainConfig(**({"lora_rank": 4} | rates | settings))


def adapted(**settings) -> VisionLanguageModel:
    model = make_model()
    inject_lora(model, config(**settings))
    return model


def steps(model: VisionLanguageModel, number: int, first: int = 0, optimizer=None):
    """Train; returns the optimizer."""
    optimizer = optimizer or make_optimizer(model, config())
    for step in range(first, first + number):
        model(**batch(step))[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def stored_shapes(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(shape of each tensor of a checkpoint, its metadata: what is stored under another name)."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}, file.metadata()  # noqa: SIM118


def kinds(model: VisionLanguageModel) -> dict[str, dict[str, int]]:
    """How many components of which kind each tower has."""
    counts = Counter((c.tower, c.kind) for c in find_components(model))
    return {tower: {kind: n for (t, kind), n in counts.items() if t == tower} for tower in ("vision", "language")}


def test_adapters_change_nothing_at_first():
    plain, model = make_model(), adapted()
    assert torch.equal(model(**batch(0))[0], plain(**batch(0))[0])
    merged = merged_state(model)
    assert all(torch.equal(merged[name], value) for name, value in plain.state_dict().items())


def test_adapters_and_projector_alone_train_and_the_base_never_moves():
    plain, model = make_model().state_dict(), adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name or name.startswith("MP.")}
    before = copy.deepcopy(model.state_dict())
    optimizer = steps(model, 5)
    assert {group["name"] for group in optimizer.param_groups} == {"projector", "vision", "language"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trainable), name
        if ".lora_" not in name and name not in trainable:
            assert torch.equal(value, plain[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize(
    ("settings", "vision", "language"),
    [
        ({"lora_vision": False}, VISION, LANGUAGE),
        ({"lr_vision_backbone": 0.0}, {}, LANGUAGE),
        ({"lr_language_backbone": 0.0}, VISION, {}),
        ({"lora_targets": ["q_proj", "fc1"]}, {"fc1": 2}, {"q_proj": 2}),
        ({"lora_targets": ["blocks.1.attn"]}, {"qkv_proj": 1, "out_proj": 1}, dict.fromkeys(ATTENTION, 1)),
    ],
)
def test_what_gets_adapters_can_be_chosen(settings, vision, language):
    model = adapted(**settings)
    assert kinds(model) == {"vision": vision, "language": language}
    optimizer = make_optimizer(model, config(**settings))
    towers = [name for name, found in (("vision", vision), ("language", language)) if found]
    assert [group["name"] for group in optimizer.param_groups] == ["projector", *towers]
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])


def test_a_projector_whose_learning_rate_is_0_does_not_train():
    model = adapted()
    freeze_untrained(model, config(lr_mp=0.0))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_targets_that_name_nothing_are_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=r"--lora_targets o_proj x: .* down_proj, gate_proj, k_proj") as error:
        adapted(lora_targets=["o_proj", "x"], lora_vision=False)
    assert "fc1" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_dropout": 0.1, "lora_targets": ["q_proj"], "lora_vision": False}, []),
        ({"lora_rank": -1}, ["lora_rank -1"]),
        ({"lora_alpha": 0}, ["lora_alpha 0"]),
        ({"lora_dropout": 1.0}, ["lora_dropout 1"]),
        ({"lora_vision": False, "lr_language_backbone": 0.0}, ["lora_rank 4"]),
        ({"lr_vision_backbone": 0.0, "lr_language_backbone": 0.0}, ["lora_rank 4"]),
        (
            {"lora_rank": 0, "lora_dropout": 0.1, "lora_targets": ["q_proj"], "lora_vision": False},
            ["lora_dropout", "lora_targets", "lora_vision"],
        ),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    problems = config(**settings).problems()
    assert len(problems) == len(named)
    assert all(f"--{name}" in "\n".join(problems) for name in named)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_the_merged_plain_model_and_leaves_the_live_one_alone(tmp_path, tied):
    plain = make_model(lm_tie_weights=tied)
    model = copy.deepcopy(plain)
    inject_lora(model, config(lora_alpha=10.0))
    optimizer = steps(model, 5)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad == (".lora_" in name or name.startswith("MP.")) for name, p in model.named_parameters())
    plain.save_pretrained(tmp_path / "plain")
    assert stored_shapes(tmp_path / "merged") == stored_shapes(tmp_path / "plain")
    loaded = VisionLanguageModel.from_pretrained(tmp_path / "merged")
    logits = model(**batch(9))[0]
    torch.testing.assert_close(loaded(**batch(9))[0], logits, rtol=0, atol=1e-5)
    assert (logits - plain(**batch(9))[0]).abs().max() > 0.1
    steps(model, 1, optimizer=optimizer)  # it can still train


def test_a_state_of_other_adapters_is_refused():
    state = lora_state_dict(adapted(lora_rank=2))
    with pytest.raises(ValueError, match="--lora_rank"):
        load_lora_state_dict(adapted(), state)
    with pytest.raises(ValueError, match="--lora_targets"):
        load_lora_state_dict(adapted(lora_targets=["q_proj"]), lora_state_dict(adapted()))


def test_adapters_work_in_bfloat16_autocast_and_see_no_float32_copy():
    model = adapted()
    steps(model, 2)
    seen = []
    adapter = model.decoder.blocks[0].attn.q_proj.lora_A["default"]
    adapter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    logits = model(**batch(0))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, loss = model(**batch(0))
    assert seen == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(rounded.float(), logits, rtol=0.1, atol=0.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("metric", ["weight_change", "gradient_norm"])
def test_a_run_freezes_adapters_that_then_stop_moving(data, tmp_path, monkeypatch, family, metric):
    from tiny import families
    from tiny.runs import arguments

    import train

    real, models, states = train.forward_backward, [], []

    def forward_backward(model, *rest):
        models.append(model)
        states.append(copy.deepcopy(model.state_dict()))  # before each step
        return real(model, *rest)

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    flags = {"lora_rank": 4, "enable_grades": True, "alpha": 0.5, "metric": metric}
    flags |= {"vision_tau": 1e9, "language_tau": 1e-12} | families.FAMILIES[family]
    matrices = 4 * flags.get("vit_n_blocks", 1) + 7
    assert train.main(parse_arguments(arguments(data, tmp_path, "run", **flags))) == 0
    folder = tmp_path / "out" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["frozen_share_vision"], summary["frozen_share_language"]) == (1.0, 0.0)
    history = json.loads((folder / "grades_history.json").read_text())
    assert len(history["components"]) == matrices
    assert {event["step"] for event in history["events"]} == {5}

    states.append(models[-1].state_dict())
    for name, last in states[-1].items():
        moved = [step for step in range(1, 9) if not torch.equal(states[step][name], states[step - 1][name])]
        if ".lora_" not in name and not name.startswith("MP."):
            assert moved == [], name
        elif name.startswith("vision_encoder."):
            assert moved[-1] == 5, name  # as the freeze found it after step 5
        else:
            assert moved[-1] == 8, name
        assert last.isfinite().all()

    checkpoint = folder / "checkpoints" / "last"
    loaded = VisionLanguageModel.from_pretrained(checkpoint).state_dict()
    merged = merged_state(models[-1])
    assert all(torch.equal(loaded[name], value) for name, value in merged.items())
    kept = torch.load(checkpoint / "training_state.pt", weights_only=True)["lora"]
    assert all(torch.equal(states[-1][name], value) for name, value in kept.items())
    assert len(kept) == 3 * matrices
