"""The monitor: what it finds, measures, freezes and remembers."""

import copy
import json
import math

import pytest
import torch
import torch.nn as nn

from grades import GradESConfig, GradESMonitor, find_components
from grades.metrics import WeightChange, _change_and_update
from grades.policy import converged, enough_frozen, grace_steps
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel

TINY = {
    "vit_hidden_dim": 16, "vit_inter_dim": 32, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "vit_n_blocks": 2, "lm_hidden_dim": 24, "lm_inter_dim": 48, "lm_n_heads": 3, "lm_n_kv_heads": 1, "lm_n_blocks": 2,
    "lm_base_vocab_size": 30,
    "extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"}, "mp_pixel_shuffle_factor": 2,
    "mp_image_token_length": 4, "max_img_size": 16, "lm_max_length": 32,
}  # fmt: skip


def make_model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(VLMConfig(**TINY))


@pytest.fixture
def model():
    return make_model()


def batch(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30, (2, 10), generator=generator)
    ids[:, 2:6] = 30
    targets = torch.randint(0, 30, (2, 10), generator=generator)
    return {"input_ids": ids, "images": torch.randn(2, 3, 16, 16, generator=generator), "targets": targets}


def run(model, config: GradESConfig | None, steps: int, accumulation: int = 1, on_step=None, weight_decay=0.1):
    """A plain training loop; returns the monitor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    monitor = GradESMonitor(config, model, optimizer, steps, log=lambda line: None) if config else None
    for step in range(1, steps + 1):
        for micro in range(accumulation):
            model(**batch(step * 10 + micro))[1].backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop = monitor.after_step(step) if monitor else False
        if on_step:
            on_step(step, optimizer, monitor)
        if stop:
            break
    return monitor


def test_components_are_the_projection_matrices_of_both_towers(model):
    components = find_components(model)
    names = {component.name for component in components}
    vision = {
        f"vision_encoder.blocks.{i}.{m}"
        for i in (0, 1)
        for m in ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2")
    }
    language = {f"decoder.blocks.{i}.attn.{m}_proj" for i in (0, 1) for m in ("q", "k", "v", "out")}
    language |= {f"decoder.blocks.{i}.mlp.{m}_proj" for i in (0, 1) for m in ("gate", "up", "down")}
    assert names == vision | language
    assert {c.name for c in components if c.tower == "vision"} == vision
    assert all(len(c.parameters) == (2 if c.tower == "vision" else 1) for c in components)


def test_wrappers_do_not_change_the_names(model):
    plain = [component.name for component in find_components(model)]
    for block in model.decoder.blocks:
        block.compile()
    assert [component.name for component in find_components(nn.ModuleDict({"module": model}))] == plain


def test_target_components_and_frozen_towers_narrow_the_choice(model):
    assert {c.kind for c in find_components(model, ["fc1", "q_proj"])} == {"fc1", "q_proj"}
    model.vision_encoder.requires_grad_(False)
    assert {c.tower for c in find_components(model)} == {"language"}


def test_a_model_without_components_is_an_error_that_lists_its_linears():
    with pytest.raises(ValueError, match="linear modules are: only_one"):
        find_components(nn.ModuleDict({"only_one": nn.Linear(2, 2)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_change_is_the_l1_sum_since_the_previous_check(dtype):
    torch.manual_seed(0)
    weight = torch.randn(70, 1500).to(dtype)  # more than one chunk
    snapshot = weight.clone()
    weight += torch.randn_like(weight) * 0.1
    expected = sum(abs(a - b) for a, b in zip(weight.double().flatten(), snapshot.double().flatten(), strict=True))
    assert _change_and_update(weight, snapshot).item() == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(snapshot, weight)


def test_values_over_a_run_match_a_slow_computation(model):
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step, optimizer, monitor):
        kept[step] = {c.name: c.weight.detach().clone() for c in monitor.components}

    monitor = run(model, GradESConfig(compute_interval=3, alpha=0.9), 12, accumulation=2, on_step=keep)
    assert [check["step"] for check in monitor.checks] == [3, 6, 9, 12]
    assert all(value is None for value in monitor.checks[0]["values"])
    for check in monitor.checks[1:]:
        for component, value in zip(monitor.components, check["values"], strict=True):
            before, now = kept[check["step"] - 3][component.name], kept[check["step"]][component.name]
            assert value == pytest.approx((now - before).abs().double().sum().item(), rel=1e-5)


def test_a_check_without_an_earlier_snapshot_freezes_nothing(model):
    config = GradESConfig(vision_tau=1e9, language_tau=1e9, alpha=0.5, compute_interval=6, max_frozen_ratio=1.0)
    monitor = run(model, config, 10)
    assert [check["step"] for check in monitor.checks] == [6]  # the first check lies after the grace period
    assert not monitor.frozen
    assert WeightChange().measure(find_components(model)) == [None] * 22


def test_nothing_freezes_in_the_grace_period_and_everything_below_tau_right_after_it(model):
    monitor = run(model, GradESConfig(vision_tau=1e9, language_tau=1e-9, alpha=0.41), 10)
    assert monitor.grace_steps == math.ceil(0.41 * 10) == 5
    assert {event["step"] for event in monitor.events} == {6}
    assert {monitor.by_name[name].tower for name in monitor.frozen} == {"vision"}
    assert monitor.frozen_share("vision") == 1.0
    assert monitor.frozen_share("language") == 0.0
    assert monitor.frozen_share() == 8 / 22


def test_frozen_weights_never_move_again(model):
    at_freeze: dict[str, list[torch.Tensor]] = {}

    def keep(step, optimizer, monitor):
        for name in monitor.frozen:
            component = monitor.by_name[name]
            copies = at_freeze.setdefault(name, [p.detach().clone() for p in component.parameters])
            assert all(torch.equal(p, c) for p, c in zip(component.parameters, copies, strict=True))
            assert all(
                p.grad is None and not p.requires_grad and p not in optimizer.state for p in component.parameters
            )
            assert name not in monitor.metric.snapshots or step == monitor.frozen[name]

    config = GradESConfig(vision_tau=1.0, language_tau=1.5, alpha=0.2)
    monitor = run(model, config, 30, accumulation=2, on_step=keep)
    assert 3 <= len(monitor.frozen) < 22
    assert monitor.freed_bytes > 0
    live = set(monitor.by_name) - set(monitor.frozen)
    assert set(monitor.metric.snapshots) == live


def test_momentum_does_not_move_a_frozen_weight():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    monitor = GradESMonitor(
        GradESConfig(vision_tau=1e9, language_tau=1e9, alpha=0), model, optimizer, 5, log=lambda line: None
    )
    for step in (1, 2, 3):
        loss = model(**batch(step))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.after_step(step)
        if step == 2:
            kept = [c.weight.detach().clone() for c in monitor.components]
            assert len(monitor.frozen) == 22
    assert all(torch.equal(c.weight, k) for c, k in zip(monitor.components, kept, strict=True))


def test_a_run_that_freezes_nothing_is_bit_for_bit_the_run_without(model):
    twin = copy.deepcopy(model)
    run(model, None, 6)
    run(twin, GradESConfig(vision_tau=1e-9, language_tau=1e-9, alpha=0), 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_run_stops_at_max_frozen_ratio(model):
    monitor = run(model, GradESConfig(vision_tau=1e9, language_tau=1e9, alpha=0.2, max_frozen_ratio=0.5), 10)
    assert monitor.last_step == 3
    assert monitor.enough_frozen()
    never = run(make_model(), GradESConfig(vision_tau=1e9, language_tau=1e9, freeze_vision=False, alpha=0), 5)
    assert never.last_step == 5
    assert never.frozen_share("vision") == 0


def test_policy():
    assert [grace_steps(0.28, 1500), grace_steps(0, 10), grace_steps(0.3, 7)] == [420, 0, 3]
    values = {"a": 0.1, "b": 1.0, "c": None, "d": math.nan, "e": 0.0}
    taus = dict.fromkeys(values, 1.0)
    assert converged(values, taus, step=10, grace=10) == []
    assert converged(values, taus, step=11, grace=10) == ["a", "e"]
    assert [enough_frozen(0, 4, 0.1), enough_frozen(1, 4, 0.5), enough_frozen(2, 4, 0.5), enough_frozen(4, 4, 1.0)] == [
        False, False, True, True,
    ]  # fmt: skip


def test_config_reports_every_impossible_value():
    config = GradESConfig(vision_tau=0, language_tau=-1, alpha=1, max_frozen_ratio=0, compute_interval=0, metric="l2")
    with pytest.raises(ValueError, match=r"--metric l2") as error:
        config.validate()
    assert len(str(error.value).splitlines()) == 6


def test_total_steps_may_come_after_the_monitor_but_not_after_the_first_check(model):
    monitor = GradESMonitor(GradESConfig(alpha=0.3), model)
    with pytest.raises(ValueError, match="total_steps"):
        monitor.after_step(1)
    monitor.total_steps = 10
    assert monitor.after_step(1) is False
    assert monitor.grace_steps == 3


def test_a_resumed_run_freezes_as_the_uninterrupted_one(model):
    config = GradESConfig(vision_tau=3.0, language_tau=4.0, alpha=0.2, compute_interval=4)
    saved = {}

    def save(step, optimizer, monitor):
        if step == 10:  # between two checks
            saved.update(
                copy.deepcopy(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "grades": monitor.state_dict()}
                )
            )

    whole = run(model, config, 24, on_step=save)
    assert any(step > 10 for step in whole.frozen.values())
    assert any(step < 10 for step in whole.frozen.values())

    torch.manual_seed(1)
    resumed = VisionLanguageModel(VLMConfig(**TINY))
    resumed.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    monitor = GradESMonitor(config, resumed, optimizer, 24, log=lambda line: None)
    monitor.load_state_dict(saved["grades"])
    for step in range(11, 25):
        resumed(**batch(step * 10))[1].backward()
        nn.utils.clip_grad_norm_([p for p in resumed.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.after_step(step)
    assert monitor.history() == whole.history()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_state_of_another_model_is_refused(model):
    monitor = GradESMonitor(GradESConfig(alpha=0), model)
    state = monitor.state_dict() | {"components": ["decoder.blocks.9.attn.q_proj"]}
    with pytest.raises(ValueError, match="other components"):
        monitor.load_state_dict(state)


def test_a_weight_that_no_update_reached_was_not_measured(model):
    """Steps without an image leave the vision tower alone: that is not convergence."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = GradESConfig(vision_tau=1e9, language_tau=1e-9, alpha=0)
    monitor = GradESMonitor(config, model, optimizer, 10, log=lambda line: None)
    for step in (1, 2, 3):
        text = batch(step)
        model(text["input_ids"].clamp(max=29), targets=text["targets"])[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.after_step(step)
    assert not monitor.frozen
    values = dict(zip(monitor.by_name, monitor.checks[-1]["values"], strict=True))
    assert all((values[name] is None) == name.startswith("vision") for name in values)


def test_one_host_synchronisation_a_check(model, monkeypatch):
    metric, components = WeightChange(), find_components(model)
    metric.measure(components)
    calls = []
    for name in ("item", "tolist", "__float__", "cpu", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, o=original, n=name: (calls.append(n), o(self, *a))[1])
    metric.measure(components)
    assert calls == ["tolist"]


def test_pictures_are_drawn_from_the_history_alone(model, tmp_path):
    from PIL import Image

    from grades.plots import draw

    monitor = run(model, GradESConfig(vision_tau=3.0, language_tau=4.0, alpha=0.2), 30)
    monitor.save_history(tmp_path / "grades_history.json")
    history = json.loads((tmp_path / "grades_history.json").read_text())
    assert history == json.loads(json.dumps(monitor.history()))
    for path in draw(tmp_path / "grades_history.json"):
        colours = Image.open(path).convert("RGB").getcolors(maxcolors=10**6)
        assert len(colours) > 50
    untouched = run(make_model(), GradESConfig(alpha=0.2, freeze_vision=False, freeze_language=False), 2)
    untouched.save_history(tmp_path / "grades_history.json")
    assert [path.name for path in draw(tmp_path / "grades_history.json")] == ["convergence.png", "freezing.png"]
