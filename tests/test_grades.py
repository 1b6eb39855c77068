"""The monitor: what it watches, when it freezes, what it remembers, and that it goes on where it stopped."""

import dataclasses
import io
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
from tiny.grades import Loop, make_model, same_weights

from grades import GradESConfig, GradESMonitor, find_components, sampling
from grades.config import METRICS
from grades.plots import convergence, draw, freezing

MODES = [(metric, mode) for metric in METRICS for mode in ("absolute", "relative")] + [
    ("weight_change", "per_element_lr")
]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def small_scale(monkeypatch):
    """Small matrices sampled too, where sampling is asked for."""
    monkeypatch.setattr(sampling, "MIN_SAMPLE_ELEMENTS", 64)


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


def test_target_components_and_frozen_towers_narrow_the_choice(model):
    assert {c.kind for c in find_components(model, ["fc1", "q_proj"])} == {"fc1", "q_proj"}  # and no qkv_proj
    assert {c.kind for c in find_components(model, ["attn.?_proj"])} == {"q_proj", "k_proj", "v_proj"}
    first = find_components(model, ["vision_encoder.blocks.0"])
    assert {c.name for c in first} == {c.name for c in find_components(model) if c.tower == "vision" and c.layer == 0}
    model.vision_encoder.requires_grad_(False)
    assert {c.tower for c in find_components(model)} == {"language"}


def test_config_reports_every_impossible_value():
    config = GradESConfig(vision_tau=0, language_tau=-1, alpha=1, max_frozen_ratio=0, compute_interval=0, metric="l2")
    with pytest.raises(ValueError, match=r"--metric l2") as error:
        config.check()
    assert len(str(error.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"unfreeze_factor": 1.0, "metric": "gradient_norm"}, "unfreeze_factor"),
        ({"unfreeze_factor": 2.0}, "unfreeze_factor"),
        ({"unfreeze_factor": 2.0, "metric": "gradient_norm", "tau_mode": "relative"}, "unfreeze_factor"),
        ({"unfreeze_factor": 2.0, "metric": "gradient_norm", "replay_history": __file__}, "unfreeze_factor"),
        ({"replay_history": "no/such/file.json"}, "replay_history"),
        ({"patience": 0}, "patience"),
        ({"monitor_sample": 0}, "monitor_sample"),
        ({"probe_interval": 0}, "probe_interval"),
    ],
)
def test_config_refuses_what_does_not_go_together(flags, flag):
    with pytest.raises(ValueError, match=f"^--{flag} ") as error:
        GradESConfig(**flags).check()
    assert len(str(error.value).splitlines()) == 1


def test_nothing_freezes_in_the_grace_period_and_everything_below_tau_right_after_it(model):
    monitor = Loop(model, GradESConfig(vision_tau=1e9, language_tau=1e-9, alpha=0.41), 10).run().monitor
    assert monitor.grace_steps == math.ceil(0.41 * 10) == 5
    assert {event["step"] for event in monitor.events} == {6}
    assert {monitor.by_name[name].tower for name in monitor.frozen} == {"vision"}
    assert monitor.frozen_share("vision") == 1.0
    assert monitor.frozen_share("language") == 0.0
    assert monitor.frozen_share() == 8 / 22


@pytest.mark.parametrize("metric", METRICS)
def test_a_check_that_measured_nothing_freezes_nothing(metric, model, small_scale):
    """Nor stops the run. The first look at a weight, or the first gradient, is no measurement."""
    config = GradESConfig(metric=metric, vision_tau=1e9, language_tau=1e9, alpha=0, monitor_grace=False)
    monitor = Loop(model, config, 8).run().monitor
    first = 1 if metric in ("gradient_norm", "gradient_rms") else 2
    assert monitor.last_step == first
    assert set(monitor.frozen.values()) == {first}


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_counts_checks(patience, model):
    config = GradESConfig(vision_tau=1e9, language_tau=1e-9, alpha=0.3, compute_interval=2, patience=patience)
    monitor = Loop(model, config, 20).run().monitor
    assert {event["step"] for event in monitor.events} == {6 + 2 * patience}


def test_a_tower_that_may_not_freeze_is_measured_and_trains_on(model):
    config = GradESConfig(vision_tau=1e9, language_tau=1e9, freeze_vision=False, alpha=0)
    monitor = Loop(model, config, 5).run().monitor
    assert monitor.last_step == 5
    assert monitor.frozen_share("vision") == 0
    assert monitor.frozen_share("language") == 1
    values = zip(monitor.components, monitor.checks[-1]["values"], strict=True)
    assert all((value is None) == (component.tower == "language") for component, value in values)
    assert {name.split("/")[1] for name in monitor.scalars()} == {
        "frozen_share", "frozen_share_vision", "frozen_share_language", "weight_change_vision",
        "weight_change_vision_mean",
    }  # fmt: skip


def test_the_run_stops_at_max_frozen_ratio(model):
    monitor = (
        Loop(model, GradESConfig(vision_tau=1e9, language_tau=1e9, alpha=0.2, max_frozen_ratio=0.5), 10).run().monitor
    )
    assert monitor.last_step == 3
    assert monitor.enough_frozen()
    assert monitor.history()["stopped_early"] is True


def test_a_run_goes_on_while_matrices_train_that_are_not_watched(model):
    settings = {"target_components": ["fc1"], "vision_tau": 1e9, "language_tau": 1e9, "alpha": 0.2}
    loop = Loop(model, GradESConfig(**settings), 8).run()
    assert (loop.step, loop.monitor.frozen_share()) == (8, 1.0)
    loop = Loop(make_model(), GradESConfig(max_frozen_ratio=0.09, **settings), 8).run()
    assert (loop.step, len(loop.monitor.frozen)) == (3, 2)


def test_total_steps_may_come_after_the_monitor_but_not_after_the_first_step(model):
    monitor = GradESMonitor(GradESConfig(alpha=0.3), model)
    with pytest.raises(ValueError, match="total_steps"):
        monitor.after_step(1)
    monitor.total_steps = 10
    assert monitor.after_step(1) is False
    assert monitor.grace_steps == 3


def test_a_metric_of_gradients_must_be_shown_them(model):
    monitor = GradESMonitor(GradESConfig(metric="gradient_norm", alpha=0), model)
    with pytest.raises(ValueError, match=r"gradient_norm needs after_backward"):
        monitor.after_step(1)


def test_the_history_is_the_run_as_json(model, tmp_path):
    config = GradESConfig(vision_tau=0.5, language_tau=1e-9, alpha=0.2, compute_interval=2)
    loop = Loop(model, config, 20).run()
    loop.monitor.save_history(tmp_path / "grades_history.json")
    assert [path.name for path in tmp_path.iterdir()] == ["grades_history.json"]
    history = json.loads((tmp_path / "grades_history.json").read_text())
    assert history == loop.monitor.history()
    assert history["config"] == dataclasses.asdict(config)
    assert [history["total_steps"], history["grace_steps"], history["last_step"]] == [20, 4, 20]
    assert {c["tau"] for c in history["components"] if c["tower"] == "vision"} == {0.5}
    columns = {c["name"]: i for i, c in enumerate(history["components"])}
    assert 0 < len(history["events"]) <= 8
    for event in history["events"]:
        (check,) = (check for check in history["checks"] if check["step"] == event["step"])
        assert check["values"][columns[event["name"]]] == event["value"] < event["tau"] == 0.5
        later = [
            check["values"][columns[event["name"]]] for check in history["checks"] if check["step"] > event["step"]
        ]
        assert set(later) <= {None}
    assert len(loop.lines) == len(history["events"])
    first = history["events"][0]
    assert loop.lines[0].startswith(
        f"step {first['step']}: froze {first['name']}, {first['value']:.4g} < tau 0.5 (vision "
    )


def test_a_long_history_is_thinned_and_decides_nothing(model):
    flags = {"vision_tau": "auto", "language_tau": "auto", "alpha": 0.5}
    whole = Loop(model, GradESConfig(**flags), 24).run().monitor
    short = Loop(make_model(), GradESConfig(**flags, history_maxlen=3), 24).run().monitor
    assert len(short.checks) <= 3
    assert all(check in whole.checks for check in short.checks)
    assert whole.events
    assert short.taus == whole.taus
    assert short.events == whole.events


def replaying(tmp_path, seed: int) -> tuple[GradESMonitor, GradESMonitor]:
    """A run, and one that freezes at random what that one froze."""
    original = Loop(make_model(), GradESConfig(vision_tau=0.8, language_tau=0.2, alpha=0.2), 16).run()
    path = tmp_path / "grades_history.json"
    original.monitor.save_history(path)
    config = GradESConfig(vision_tau=1e9, language_tau="auto", alpha=0.02, replay_history=str(path), replay_seed=seed)
    return original.monitor, Loop(make_model(), config, 16).run().monitor


def test_replay_freezes_as_many_at_the_same_steps_but_others(tmp_path):
    original, control = replaying(tmp_path, 0)
    assert len(original.frozen) > 8
    assert len(original.frozen) < 22
    assert set(control.frozen) != set(original.frozen)
    counts = [
        Counter((step, monitor.by_name[name].tower) for name, step in monitor.frozen.items())
        for monitor in (original, control)
    ]
    assert counts[0] == counts[1]
    assert control.frozen == replaying(tmp_path, 0)[1].frozen
    assert control.frozen != replaying(tmp_path, 1)[1].frozen
    control.save_history(tmp_path / "control.json")
    figures = json.loads((tmp_path / "control.json").read_text())
    assert convergence(figures)
    assert freezing(figures)


def test_the_history_of_another_model_cannot_be_replayed(tmp_path):
    original, _ = replaying(tmp_path, 0)
    events = [event | {"name": "decoder.blocks.7.attn.q_proj"} for event in original.events]
    (tmp_path / "other.json").write_text(json.dumps({"events": events}))
    with pytest.raises(ValueError, match=r"--replay_history .*other.json: .*decoder.blocks.7.attn.q_proj"):
        GradESMonitor(GradESConfig(replay_history=str(tmp_path / "other.json")), make_model(), None, 10)


def resumable_loop(metric: str, mode: str) -> Loop:
    """The vision tower freezes whole at step 18, language matrices one by one after it."""
    # What falls too little in so few steps for auto has taus of its own.
    language_tau = {"gradient_rms relative": 0.965, "gradient_rms absolute": 1.44, "weight_change per_element_lr": 0.2}
    config = GradESConfig(
        metric=metric, tau_mode=mode, vision_tau=1.0 if mode == "relative" else 1e9,
        language_tau=language_tau.get(f"{metric} {mode}", "auto"), alpha=0.5, compute_interval=2, patience=2,
        monitor_sample=4 if mode == "relative" else 1,
    )  # fmt: skip
    loop = Loop(make_model(), config, 28)
    loop.loss_scale = lambda step: 1 - step / 30
    return loop


@pytest.mark.parametrize(("metric", "mode"), MODES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(metric, mode, small_scale):
    """Saved before anything froze, and once the vision tower ran without autograd; always between two checks."""
    loop = resumable_loop(metric, mode)
    saved = {}
    loop.on_step = lambda step: saved.update({step: loop.save()} if step in (13, 19) else {})
    whole = loop.run().monitor
    steps = sorted(set(whole.frozen.values()))
    assert steps[0] == 18
    assert steps[-1] > 19
    assert whole.freezer.prefix_parameters
    for checkpoint in saved.values():
        again = resumable_loop(metric, mode)
        make_different(again.model)
        again.load(checkpoint).run()
        assert again.monitor.history() == whole.history()
        assert same_weights(again.model, loop.model)
        assert again.monitor.freed_bytes == whole.freed_bytes
        assert [p.requires_grad for p in again.model.parameters()] == [p.requires_grad for p in loop.model.parameters()]
        assert_equal(again.optimizer.state_dict(), loop.optimizer.state_dict())
        assert_equal(again.monitor.state_dict(), whole.state_dict())


def make_different(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def unfreezing_loop() -> Loop:
    """The vision tower freezes at step 5, trains again from step 9 on, and freezes once more at step 13."""
    config = GradESConfig(
        metric="gradient_norm", vision_tau=50.0, language_tau=1e-9, alpha=0.2, unfreeze_factor=3.0, probe_interval=3
    )
    loop = Loop(make_model(), config, 16)
    loop.loss_scale = lambda step: 1000.0 if 9 <= step < 13 else 1.0
    return loop


def test_a_run_that_was_saved_before_a_probe_still_makes_it():
    loop = unfreezing_loop()
    saved = {}
    loop.on_step = lambda step: saved.update({step: loop.save()} if step in (8, 10) else {})
    loop.run()
    assert {event["step"] for event in loop.monitor.events if event.get("unfrozen")} == {9}
    for checkpoint in saved.values():
        again = unfreezing_loop().load(checkpoint).run()
        assert again.monitor.history() == loop.monitor.history()
        assert same_weights(again.model, loop.model)


def test_a_state_of_another_model_is_refused(model):
    monitor = GradESMonitor(GradESConfig(alpha=0), model)
    state = monitor.state_dict() | {"components": ["decoder.blocks.9.attn.q_proj"]}
    with pytest.raises(ValueError, match="other components"):
        monitor.load_state_dict(state)


@pytest.mark.parametrize("other", [{"metric": "gradient_norm"}, {"tau_mode": "relative"}, {"monitor_sample": 4}])
def test_a_state_of_another_measure_is_refused(other, model):
    state = GradESMonitor(GradESConfig(alpha=0), model).state_dict()
    ((name, value),) = other.items()
    monitor = GradESMonitor(GradESConfig(alpha=0, vision_tau=0.5, language_tau=0.5, **other), model)
    with pytest.raises(ValueError, match=f"--{name} {value}: the saved GradES state was measured with"):
        monitor.load_state_dict(state)


def test_a_tau_that_is_given_goes_over_the_saved_one_and_auto_keeps_it(model):
    loop = Loop(model, GradESConfig(vision_tau="auto", language_tau="auto", alpha=0.5), 8).run(5)
    found = loop.monitor.taus
    again = Loop(make_model(), GradESConfig(vision_tau="auto", language_tau=3.0, alpha=0.5), 8)
    taus = again.load(loop.save()).monitor.taus
    assert len(found) == len(taus) == 22
    for component in again.monitor.components:
        assert taus[component.name] == (3.0 if component.tower == "language" else found[component.name])


def test_auto_after_a_number_is_refused(model):
    state = Loop(model, GradESConfig(alpha=0.5, vision_tau="auto"), 8).run(5).save()
    again = Loop(make_model(), GradESConfig(alpha=0.5, vision_tau="auto", language_tau="auto"), 8)
    with pytest.raises(ValueError, match="--language_tau auto: must be a number"):
        again.load(state)


def test_every_process_goes_by_the_numbers_of_the_first(model):
    """The second one's own would freeze everything at once."""
    seen = []
    second = Loop(model, GradESConfig(alpha=0, vision_tau=1.0, language_tau=1.0), 4)
    second.monitor.broadcast = lambda values: seen.append(values) or dict.fromkeys(values, 2.0)
    second.run()
    assert len(seen) == 4
    assert max(v for v in seen[-1].values() if v is not None) < 1.0
    assert not second.monitor.frozen
    assert set(second.monitor.latest.values()) == {2.0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("metric", "mode"), [*zip(METRICS, ("absolute", "relative") * 2, strict=True), ("weight_change", "per_element_lr")]
)
def test_pictures_of_every_metric_and_every_unit(metric, mode, small_scale):
    """From what JSON keeps; with taus that were found, some of which let nothing freeze."""
    loop = resumable_loop(metric, mode)
    loop.monitor.config.vision_tau = 1.0 if mode == "relative" else 1e3
    history = json.loads(json.dumps(loop.run(until=22).monitor.history()))
    for component in history["components"][10:12]:
        component["tau"] = 0.0
    assert any(event["step"] == 18 for event in history["events"])
    convergence(history).savefig(io.BytesIO(), dpi=20)


@pytest.mark.filterwarnings("error")
def test_pictures_are_drawn_from_the_history_file_alone(model, tmp_path):
    from PIL import Image

    path = tmp_path / "grades_history.json"
    Loop(model, GradESConfig(vision_tau=0.7, language_tau=0.4, alpha=0.2), 24).run().monitor.save_history(path)
    pictures = draw(path)
    assert [picture.name for picture in pictures] == ["convergence.png", "freezing.png"]
    for picture in pictures:
        assert len(Image.open(picture).convert("RGB").getcolors(maxcolors=10**6)) > 50
    assert {file.name for file in tmp_path.iterdir()} == {"grades_history.json", "convergence.png", "freezing.png"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [0, 2])
def test_pictures_of_a_run_that_hardly_began(steps):
    """Nothing measured, or nothing frozen, or one tower alone, or a grace period to the end."""
    model = make_model()
    model.vision_encoder.requires_grad_(False)
    loop = Loop(model, GradESConfig(alpha=0.9), 2)
    if steps:
        loop.run(until=steps)
    for figure in (convergence(loop.monitor.history()), freezing(loop.monitor.history())):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=20)  # a warning of matplotlib is an error here
        assert drawn.tell() > 1000


def test_pictures_show_what_was_let_train_again():
    history = unfreezing_loop().run().monitor.history()
    vision = convergence(history).axes[0]
    lines = {line.get_label(): line for line in vision.get_lines()}
    assert set(lines["matrix frozen (8 of 8)"].get_xdata()) == {5, 13}
    assert set(lines["trains again"].get_xdata()) == {9}
    median = lines["median of its live matrices"]
    gap = [step for step, value in zip(median.get_xdata(), median.get_ydata(), strict=True) if math.isnan(value)]
    assert gap == [6, 7, 8, 9, 14, 15, 16]
    share = freezing(history).axes[0].get_lines()[0]
    assert share.get_label() == "vision: 8 of 8 frozen (100 %)"
    at_step = dict(zip(share.get_xdata(), share.get_ydata(), strict=True))  # the last of each step
    assert at_step == {0: 0, 5: 100, 9: 0, 13: 100, 16: 100}
