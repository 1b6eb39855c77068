"""The monitor: what it watches, when it freezes, what it records, and that a resumed run equals the whole one."""

import dataclasses
import io
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn as nn
from tiny.grades import ALWAYS, NEVER, Loop, make_model, same_weights, train, unfreezing_loop
from tiny.runs import same

from grades import GradESConfig, GradESMonitor, find_components
from grades.config import METRICS
from grades.plots import convergence, freezing

MODES = [(metric, mode) for metric in METRICS for mode in ("absolute", "relative")]
BOTH_ALWAYS = {"vision_tau": ALWAYS, "language_tau": ALWAYS}
BOTH_AUTO = {"vision_tau": "auto", "language_tau": "auto"}


@pytest.fixture
def model():
    return make_model()


def test_components_are_the_projection_matrices_of_both_towers(model):
    vision = [f"attn.{m}_proj" for m in ("qkv", "out")] + ["mlp.fc1", "mlp.fc2"]
    language = [f"attn.{m}_proj" for m in ("q", "k", "v", "out")] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    assert {(c.tower, c.name, len(c.parameters)) for c in find_components(model)} == {
        *(("vision", f"vision_encoder.blocks.{i}.{name}", 2) for i in (0, 1) for name in vision),
        *(("language", f"decoder.blocks.{i}.{name}", 1) for i in (0, 1) for name in language),
    }


def test_target_components_and_frozen_towers_narrow_the_choice(model):
    assert {c.kind for c in find_components(model, ["fc1", "q_proj"])} == {"fc1", "q_proj"}  # and no qkv_proj
    assert {c.kind for c in find_components(model, ["attn.?_proj"])} == {"q_proj", "k_proj", "v_proj"}
    first = find_components(model, ["vision_encoder.blocks.0"])
    assert [(c.tower, c.layer) for c in first] == [("vision", 0)] * 4
    model.vision_encoder.requires_grad_(False)
    assert {c.tower for c in find_components(model)} == {"language"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"vision_tau": 0, "language_tau": -1, "alpha": 1, "max_frozen_ratio": 0, "metric": "l2"},
         ["metric l2", "vision_tau 0", "language_tau -1", "alpha 1", "max_frozen_ratio 0"]),
        ({"unfreeze_factor": 1.0, "metric": "gradient_norm"}, ["unfreeze_factor"]),
        ({"unfreeze_factor": 2.0}, ["unfreeze_factor"]),
        ({"unfreeze_factor": 2.0, "metric": "gradient_norm", "tau_mode": "relative"}, ["unfreeze_factor"]),
        ({"unfreeze_factor": 2.0, "metric": "gradient_norm", "replay_history": __file__}, ["unfreeze_factor"]),
        ({"replay_history": "no/such/file.json"}, ["replay_history"]),
        ({"patience": 0, "monitor_sample": 0, "probe_interval": 0}, ["patience", "monitor_sample", "probe_interval"]),
        ({"tau_mode": "relative", "language_tau": 6.0}, ["tau_mode relative"]),
        ({"tau_mode": "relative", "vision_mlp_tau": 1.5}, ["tau_mode relative"]),
        ({"tau_mode": "relative", "monitor_grace": False}, ["monitor_grace"]),
        ({"vision_tau": "auto", "monitor_grace": False}, ["monitor_grace"]),
        ({"language_tau": "auto", "alpha": 0.0}, ["alpha"]),
        ({"vision_tau": "0.3"}, ["vision_tau"]),
        ({"tau_mode": "share"}, ["tau_mode"]),
        # A tower that does not freeze may have any tau.
        ({"tau_mode": "relative", "vision_tau": 0.5, "language_tau": 6.0, "freeze_language": False}, []),
    ],
)  # fmt: skip
def test_impossible_settings_are_all_reported_at_once(flags, named):
    problems = sorted(GradESConfig(**flags).problems())
    assert len(problems) == len(named)
    for problem, name in zip(problems, sorted(named), strict=True):
        assert problem.startswith(name)


@pytest.mark.parametrize(("interval", "patience", "frozen_at"), [(1, 1, 6), (2, 1, 6), (2, 3, 10)])
def test_what_is_below_tau_freezes_after_the_grace_period_and_patience(interval, patience, frozen_at):
    config = {"alpha": 0.41, "compute_interval": interval, "patience": patience}
    monitor = train({"vision_tau": ALWAYS, "language_tau": NEVER, **config}, 12).monitor
    assert monitor.grace_steps == math.ceil(0.41 * 12) == 5
    assert {event["step"] for event in monitor.events} == {frozen_at}
    assert {monitor.by_name[name].tower for name in monitor.frozen} == {"vision"}
    assert [monitor.frozen_share(tower) for tower in ("vision", "language", None)] == [1, 0, 8 / 22]


@pytest.mark.parametrize("metric", METRICS)
def test_a_check_that_measured_nothing_freezes_nothing(metric):
    """Nor stops the run. The first look at a weight, or the first gradient, is no measurement."""
    monitor = train({"metric": metric, **BOTH_ALWAYS, "alpha": 0, "monitor_grace": False}, 8).monitor
    first = 1 if metric in ("gradient_norm", "gradient_rms") else 2
    assert monitor.last_step == first
    assert set(monitor.frozen.values()) == {first}


def test_a_tower_that_may_not_freeze_is_measured_and_trains_on():
    monitor = train({**BOTH_ALWAYS, "freeze_vision": False, "alpha": 0}, 5).monitor
    assert monitor.last_step == 5
    assert [monitor.frozen_share(tower) for tower in ("vision", "language")] == [0, 1]
    values = zip(monitor.components, monitor.checks[-1]["values"], strict=True)
    assert all((value is None) == (component.tower == "language") for component, value in values)
    names = ("frozen_share", "frozen_share_vision", "frozen_share_language")
    names += ("weight_change_vision", "weight_change_vision_mean")
    assert monitor.scalars().keys() == {f"grades/{name}" for name in names}


@pytest.mark.parametrize(
    ("config", "end", "frozen"),
    [
        ({"max_frozen_ratio": 0.5}, 3, 22),
        ({"target_components": ["fc1"]}, 8, 2),  # the rest of the matrices trains
        ({"target_components": ["fc1"], "max_frozen_ratio": 0.09}, 3, 2),
    ],
)
def test_the_run_stops_at_max_frozen_ratio_of_all_matrices(config, end, frozen):
    monitor = train({**BOTH_ALWAYS, "alpha": 0.2, **config}, 8).monitor
    assert (monitor.last_step, len(monitor.frozen)) == (end, frozen)
    assert monitor.enough_frozen() == monitor.history()["stopped_early"] == (end == 3)


def test_total_steps_may_come_after_the_monitor_but_not_after_the_first_step(model):
    monitor = GradESMonitor(GradESConfig(alpha=0.3), model)
    with pytest.raises(ValueError, match="total_steps"):
        monitor.after_step(1)
    monitor.total_steps = 10
    assert monitor.after_step(1) is False
    assert monitor.grace_steps == 3


def test_a_metric_of_gradients_must_be_shown_them(model):
    monitor = GradESMonitor(GradESConfig(metric="gradient_norm", alpha=0), model)
    with pytest.raises(ValueError, match=r"gradient_norm .*after_backward"):
        monitor.after_step(1)


def test_the_history_is_the_run_as_json(model, tmp_path):
    config = GradESConfig(vision_tau=0.5, language_tau=NEVER, alpha=0.2, compute_interval=2)
    loop = Loop(model, config, 20).run()
    loop.monitor.save_history(tmp_path / "grades_history.json")
    assert [path.name for path in tmp_path.iterdir()] == ["grades_history.json"]
    history = json.loads((tmp_path / "grades_history.json").read_text())
    assert history == loop.monitor.history()
    assert history["config"] == dataclasses.asdict(config)
    assert [history["total_steps"], history["grace_steps"], history["last_step"]] == [20, 4, 20]
    assert {c["tau"] for c in history["components"] if c["tower"] == "vision"} == {0.5}
    assert 0 < len(history["events"]) <= 8
    names = [component["name"] for component in history["components"]]
    for event in history["events"]:
        values = {check["step"]: check["values"][names.index(event["name"])] for check in history["checks"]}
        assert values[event["step"]] == event["value"] < event["tau"] == 0.5
        assert {value for step, value in values.items() if step > event["step"]} <= {None}


def test_the_log_gets_a_line_per_check_and_tower_the_details_a_line_per_component():
    config = {"vision_tau": 0.8, "language_attention_tau": 0.3, "language_mlp_tau": 0.4, "alpha": 0.2}
    loop = train(config, 16)
    monitor, lines = loop.monitor, []
    checks = Counter((e["step"], monitor.by_name[e["name"]].tower) for e in monitor.events)
    assert max(checks.values()) > 1
    counts = Counter()
    for (step, tower), count in checks.items():
        counts[tower] += count
        total = 8 if tower == "vision" else 14
        lines.append(f"step {step}: froze {count} of {total} {tower} matrices ({counts[tower]} frozen): tau ")
    assert len(loop.lines) == len(lines)
    assert all(line.startswith(start) for line, start in zip(loop.lines, lines, strict=True))
    assert {line.rpartition(": ")[2] for line in loop.lines} <= {
        f"tau {t}" for t in ("0.8", "0.3", "0.4", "0.3 to 0.4")
    }
    assert loop.details == [
        f"step {e['step']}: froze {e['name']}, {e['value']:.4g} < tau {e['tau']:.4g}" for e in monitor.events
    ]


def test_a_long_history_is_thinned_and_decides_nothing():
    whole, short = (train({**BOTH_AUTO, "alpha": 0.5, "history_maxlen": n}, 24).monitor for n in (1000, 3))
    assert len(short.checks) <= 3
    assert all(check in whole.checks for check in short.checks)
    assert whole.events
    assert (short.taus, short.events) == (whole.taus, whole.events)


@pytest.fixture
def replayed(tmp_path):
    """A run with the file of its history, and what makes a run that freezes at random what that one froze."""
    original = train({"vision_tau": 0.8, "language_tau": 0.2, "alpha": 0.2}, 16).monitor
    path = tmp_path / "grades_history.json"
    original.save_history(path)
    config = {"vision_tau": ALWAYS, "language_tau": "auto", "alpha": 0.02, "replay_history": str(path)}
    return original, path, lambda seed: train(config | {"replay_seed": seed}, 16)


def test_replay_freezes_as_many_at_the_same_steps_but_others(replayed):
    original, _, replay = replayed
    first, second = replay(0), replay(1)
    control = first.monitor
    assert 8 < len(original.frozen) < 22
    assert set(control.frozen) not in (set(original.frozen), set(second.monitor.frozen))
    counts = [
        Counter((step, monitor.by_name[name].tower) for name, step in monitor.frozen.items())
        for monitor in (original, control)
    ]
    assert counts[0] == counts[1]
    assert control.frozen == replay(0).monitor.frozen
    assert all(line.endswith("drawn at random") for line in first.lines + first.details)
    figures = json.loads(json.dumps(control.history()))
    assert convergence(figures)
    assert freezing(figures)


def test_the_history_of_another_model_cannot_be_replayed(replayed, model):
    original, path, _ = replayed
    events = [event | {"name": "decoder.blocks.7.attn.q_proj"} for event in original.events]
    path.write_text(json.dumps({"events": events}))
    with pytest.raises(ValueError, match=rf"replay_history .*{path.name}: .*decoder.blocks.7.attn.q_proj"):
        GradESMonitor(GradESConfig(replay_history=str(path)), model, None, 10)
    path.write_text("{}")
    with pytest.raises(ValueError, match=rf"replay_history .*{path.name}: is no whole history"):
        GradESMonitor(GradESConfig(replay_history=str(path)), model, None, 10)


def resumable_loop(metric: str, mode: str) -> Loop:
    """The vision tower freezes whole at step 18, language matrices one by one around it."""
    config = GradESConfig(
        metric=metric, tau_mode=mode, vision_tau=1.0 if mode == "relative" else ALWAYS, language_tau="auto", alpha=0.5,
        compute_interval=2, patience=2, monitor_sample=4 if mode == "relative" else 1,
    )  # fmt: skip
    model = make_model()
    # v forgets soon, and no gradient is clipped, so that each metric falls to half in these few steps.
    loop = Loop(model, config, 28, torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.8)))
    loop.loss_scale = lambda step: 0.1 * (1 - step / 30)
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
    assert steps[-1] > 19, "some freeze after the last checkpoint"
    assert whole.freezer.prefix_parameters
    for checkpoint in saved.values():
        again = resumable_loop(metric, mode)
        nn.init.ones_(again.model.MP.proj.weight)
        again.load(checkpoint).run()
        assert again.monitor.history() == whole.history()
        assert same_weights(again.model, loop.model)
        assert again.monitor.freed_bytes == whole.freed_bytes
        assert [p.requires_grad for p in again.model.parameters()] == [p.requires_grad for p in loop.model.parameters()]
        assert same(again.optimizer.state_dict(), loop.optimizer.state_dict())
        assert same(again.monitor.state_dict(), whole.state_dict())


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


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        ({"components": ["decoder.blocks.9.attn.q_proj"]}, {}, "decoder.blocks.9.attn.q_proj"),
        ({}, {"metric": "gradient_norm"}, "metric gradient_norm: .* weight_change"),
        ({}, {"tau_mode": "relative"}, "tau_mode relative: .* absolute"),
        ({}, {"monitor_sample": 4}, "monitor_sample 4: .* 1"),
    ],
)
def test_a_state_of_another_model_or_another_measure_is_refused(model, change, config, named):
    state = GradESMonitor(GradESConfig(alpha=0), model).state_dict() | change
    monitor = GradESMonitor(GradESConfig(alpha=0, **config), model)
    with pytest.raises(ValueError, match=named):
        monitor.load_state_dict(state)


def test_a_tau_that_is_given_overrides_the_saved_one_and_auto_keeps_it(model):
    loop = Loop(model, GradESConfig(**BOTH_AUTO, alpha=0.5), 8).run(5)
    found = loop.monitor.taus
    again = Loop(make_model(), GradESConfig(vision_tau="auto", language_tau=3.0, alpha=0.5), 8)
    taus = again.load(loop.save()).monitor.taus
    assert len(found) == len(taus) == 22
    for component in again.monitor.components:
        assert taus[component.name] == (3.0 if component.tower == "language" else found[component.name])


def test_auto_after_a_number_is_refused(model):
    state = Loop(model, GradESConfig(alpha=0.5, vision_tau="auto"), 8).run(5).save()
    again = Loop(make_model(), GradESConfig(**BOTH_AUTO, alpha=0.5), 8)
    with pytest.raises(ValueError, match="language_tau auto"):
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
@pytest.mark.parametrize(("metric", "mode"), MODES[::3])  # each metric and each mode
def test_pictures_of_every_metric_and_every_unit(metric, mode):
    """From what JSON keeps; with taus that were found, some of which let nothing freeze."""
    history = json.loads(json.dumps(resumable_loop(metric, mode).run(until=22).monitor.history()))
    for component in history["components"][10:12]:
        component["tau"] = 0.0
    assert any(event["step"] == 18 for event in history["events"])
    figure = convergence(history)
    assert ("own peak" in figure.axes[0].get_ylabel()) == (mode == "relative")
    figure.savefig(io.BytesIO(), dpi=20)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [0, 2])
def test_pictures_of_a_run_that_hardly_began(steps, model):
    """Nothing measured, or nothing frozen; one tower alone; a grace period to the end."""
    model.vision_encoder.requires_grad_(False)
    loop = Loop(model, GradESConfig(alpha=0.9), 2)
    if steps:
        loop.run()
    for figure in (convergence(loop.monitor.history()), freezing(loop.monitor.history())):
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=20)  # a warning of matplotlib is an error here
        assert drawn.tell() > 1000


def test_pictures_show_what_was_unfrozen():
    history = unfreezing_loop().run().monitor.history()
    vision = convergence(history).axes[0]
    lines = {line.get_label(): line for line in vision.get_lines()}
    assert set(lines["matrix frozen (8 of 8)"].get_xdata()) == {5, 13}
    assert set(lines["trains again"].get_xdata()) == {9}
    median = lines["median of its unfrozen matrices"]
    gap = [step for step, value in zip(median.get_xdata(), median.get_ydata(), strict=True) if math.isnan(value)]
    assert gap == [6, 7, 8, 9, 14, 15, 16]
    share = freezing(history).axes[0].get_lines()[0]
    assert share.get_label() == "vision: 8 of 8 frozen (100 %)"
    at_step = dict(zip(share.get_xdata(), share.get_ydata(), strict=True))  # the last of each step
    assert at_step == {0: 0, 5: 100, 9: 0, 13: 100, 16: 100}
