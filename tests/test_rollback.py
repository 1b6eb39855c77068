"""Rollback gain: the numbers against a slow computation, what it decides, and that it leaves no trace."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from tiny.grades import Loop, batch, make_model, make_optimizer, same_weights

from grades import GradESConfig, GradESMonitor, policy
from grades.averaging import AVERAGE, AveragedWeights
from grades.components import tower_of
from grades.plots import convergence
from grades.rollback import find_parts, mean_and_error, paired_difference

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12


ROWS = range(100, 106)


def row_losses(model, first=None):
    with torch.no_grad():
        return [(float(model(**batch(row))[1]) * 20, 20) for row in cut(ROWS, first)]


def cut(rows, first):
    """Every fourth, the others, or all in the order in which they are evaluated."""
    return (
        [*cut(rows, True), *cut(rows, False)]
        if first is None
        else [r for r in rows if (rows.index(r) % 4 == 0) == first]
    )


def loop(config: dict, evaluate=None, **others) -> Loop:
    """A loop with averages; `averaged` holds the averages after each step."""
    model = make_model()
    optimizer = make_optimizer(model)
    averages = AveragedWeights(model.parameters(), optimizer, 0.5)
    made = Loop(model, None, STEPS, optimizer)
    given = {"metric": "rollback", "compute_interval": 3, "alpha": 0.0} | config
    made.monitor = GradESMonitor(
        GradESConfig(**given), model, optimizer, STEPS, made.lines.append, averages=averages,
        evaluate=evaluate or (lambda vision, first: row_losses(model, first)), **others,
    )  # fmt: skip
    made.averages, made.averaged = averages, {}
    after_step = made.monitor.after_step

    def updated(step):
        averages.update()
        made.averaged[step] = {
            name: averages.state[p][AVERAGE].clone() if AVERAGE in averages.state.get(p, ()) else p.detach().clone()
            for name, p in model.named_parameters()
        }
        return after_step(step)

    made.monitor.after_step = updated
    return made


NEVER = {"vision_tau": 1e-12, "language_tau": 1e-12}


@pytest.mark.parametrize("on_converged", ["stop", "cooldown"])
def test_the_loop_of_the_docs_freezes_by_rollback(on_converged):
    text = (ROOT / "docs" / "grades.md").read_text(encoding="utf-8").split("## In your own loop")[1]
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    settings = f'vision_tau=1e9, language_tau=1e9, alpha=0, on_converged="{on_converged}", compute_interval=3'
    inner = make_model()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, row):
            return self.inner(**batch(row))[1]

    model = Model()
    given = {
        "torch": torch, "GradESConfig": GradESConfig, "GradESMonitor": GradESMonitor, "model": model,
        "optimizer": make_optimizer(inner), "total_steps": STEPS, "batches": range(STEPS), "held_out": list(ROWS),
        "row_loss": lambda row: (float(model(row)) * 20, 20),
    }  # fmt: skip
    exec(code.replace("compute_interval=50, patience=2", settings), given)
    monitor, averages = given["monitor"], given["averages"]
    assert set(monitor.checks[-1]["gains"]) == {"vision", "language"}
    assert averages.is_swapped
    if on_converged == "stop":
        assert (monitor.last_step, monitor.converged_step, set(monitor.frozen.values())) == (6, None, {6})
    else:
        assert (monitor.last_step, monitor.converged_step, monitor.frozen) == (STEPS, 6, {})


def test_the_gain_is_what_a_slow_computation_says():
    run = loop(NEVER).run()
    other = copy.deepcopy(run.model)

    def losses(weights):
        other.load_state_dict(weights, strict=False)
        return row_losses(other)

    checks = {check["step"]: check for check in run.monitor.checks}
    assert set(checks) == {3, 6, 9, 12}
    assert all(value is None for value in checks[3]["values"])
    for step in (6, 9, 12):
        now, before = run.averaged[step], run.averaged[step - 3]
        base = losses(now)
        assert checks[step]["loss"] == pytest.approx(mean_and_error(base)[0], rel=1e-5)
        for tower in ("vision", "language"):
            mixed = {name: (before if tower_of(name) == tower else now)[name] for name in now}
            differences = [(b - a) / 20 for (a, _), (b, _) in zip(base, losses(mixed), strict=True)]
            gain = sum(differences) / len(differences)
            error = torch.tensor(differences).std().item() / math.sqrt(len(differences))
            assert checks[step]["gains"][tower] == pytest.approx([gain * 100 / 3, error * 100 / 3], rel=1e-3, abs=1e-4)


def test_measuring_changes_nothing():
    assert same_weights(loop(NEVER).run().model, Loop(make_model(), None, STEPS).run().model)


def test_the_error_is_that_of_a_ratio():
    rows = [(1.0, 1), (3.0, 2), (2.0, 4), (9.0, 3)]
    mean, error = mean_and_error(rows)
    assert mean == 1.5
    assert error == pytest.approx(math.sqrt(sum((s - 1.5 * n) ** 2 for s, n in rows) * 4 / 3) / 10)
    assert paired_difference(rows, [(s + n, n) for s, n in rows]) == pytest.approx((1.0, 0.0))
    assert all(math.isnan(value) for value in mean_and_error([]))
    assert mean_and_error([(3.0, 4)]) == mean_and_error([(3.0, 4), (0.0, 0)]) == (0.75, math.inf)


def test_one_held_out_row_freezes_nothing():
    """Its gain has no standard error."""
    run = loop({"vision_tau": 1e9, "language_tau": 1e9}, evaluate=lambda vision, first: [(2.0, 4)] if first else [])
    assert not run.run().monitor.frozen
    assert all(not check["gains"] for check in run.monitor.checks if "gains" in check)


def test_nothing_freezes_on_noise():
    """Gains of zero whose error is above tau."""
    calls = [0]

    def noisy(vision, first):
        if not first:
            return []
        calls.append(1)
        height = 2 * (len(calls) % 3)  # never the same for two evaluations of one check
        return [(20.0 + height, 20), (20.0 - height, 20)]

    run = loop({"vision_tau": 0.5, "language_tau": 0.5}, evaluate=noisy).run()
    gains = [check["gains"]["vision"] for check in run.monitor.checks[1:]]
    assert all(gain == pytest.approx(0) and error > 0.5 for gain, error in gains)
    assert not run.monitor.frozen
    small = iter(range(99))
    nearly = lambda *which: [(20.0 + next(small) / 1e6, 20), (21.0, 20)]  # noqa: E731
    still = loop({"vision_tau": 0.5, "language_tau": 0.5}, evaluate=nearly).run()
    assert still.step == 6  # the first check with a gain; everything is frozen, and the run ends
    assert still.monitor.enough_frozen()


def test_together_nothing_freezes_before_all_has_converged():
    alone = loop({"vision_tau": 1e9, "language_tau": 1e-12, "freeze_order": "together"}).run()
    assert (alone.step, alone.monitor.frozen) == (STEPS, {})
    both = loop({"vision_tau": 1e9, "language_tau": 1e9, "freeze_order": "together", "patience": 2}).run()
    assert (both.step, set(both.monitor.frozen.values())) == (9, {9})


def test_together_the_vision_tower_is_measured_only_where_it_decides():
    """Ends as without this saving: a tower that was not measured had no say."""

    def parts(**config) -> list[list[str]]:
        return [list(check.get("gains", {})) for check in loop(config).run().monitor.checks]

    never = {"vision_tau": 1e9, "language_tau": 1e-12}
    assert parts(**never, freeze_order="together") == [[]] + [["language"]] * (STEPS // 3 - 1)
    assert parts(**NEVER, freeze_order="any")[1:] == [["language", "vision"]] * (STEPS // 3 - 1)
    assert parts(vision_tau=1e-12, language_tau=1e9, freeze_order="together")[1:][0] == ["language", "vision"]
    assert parts(**never, freeze_order="together", freeze_language=False)[1] == ["language", "vision"]


def test_a_gain_far_above_its_limit_is_measured_on_a_share_of_the_rows():
    """Whatever its size, the run ends as if all rows had been evaluated at each check."""
    heights, asked = {}, []

    def losses(vision, first):
        asked.append(first)
        height = heights["now"] + (heights["gain"] if len(asked) % 2 == 0 else 0.0)  # the second of a check: put back
        return [(20 * (height + i % 3 / 100), 20) for i in cut(range(80), first)]

    def shares(gain, **config):
        heights.update(now=1.0, gain=gain)
        asked.clear()
        run = loop({"language_tau": 0.5, "vision_tau": 1e9, "freeze_order": "together"} | config, evaluate=losses)
        run.run()
        return asked, run.monitor.checks[1], run.step

    assert shares(1.0)[0] == [True, True] * 3
    assert [shares(1.0)[1][key] for key in ("rows", "loss")] == [20, pytest.approx(1.00975, abs=1e-3)]
    asked_of, check, step = shares(1e-6)
    assert (asked_of[:4], check["rows"], step) == ([True, True, False, False], 80, 6)
    assert shares(1.0, freeze_order="any")[1]["rows"] == 80


def test_the_picture_tells_losses_of_fewer_rows_apart():
    history = loop(NEVER).run().monitor.history()
    history["validation"] = [{"step": 3, "loss": 2.0, "loss_averaged": 1.0}]
    for check, is_whole in zip(history["checks"][1:], (False, True, True), strict=True):
        check["is_whole"] = is_whole
    lines = {line.get_label(): list(line.get_xdata()) for line in convergence(history).axes[0].get_lines()}
    sample = "averaged weights, on the sample of the gains"
    assert lines == {"last weights": [3], "averaged weights": [3], sample: [9, 12], f"{sample}: a quarter of it": [6]}
    alone = history | {"validation": []}  # as under transformers' Trainer
    assert {line.get_label() for line in convergence(alone).axes[0].get_lines()} == {
        sample,
        f"{sample}: a quarter of it",
    }


def test_the_picture_shows_where_a_cooldown_began_and_plain_numbers():
    run = loop({"vision_tau": 1e9, "language_tau": 1e9, "on_converged": "cooldown"}).run()
    history = run.monitor.history() | {"last_step": STEPS}
    history["validation"] = [{"step": step, "loss": loss, "loss_averaged": loss} for step, loss in ((3, 7.0), (9, 0.8))]
    figure = convergence(history)
    figure.canvas.draw()
    axis = figure.axes[0]
    assert "cooldown, step 6" in [line.get_label() for line in axis.get_lines()]
    assert {"1", "2", "5"} <= {label.get_text() for label in axis.get_yticklabels()}
    assert axis.get_xlim()[1] > STEPS


def test_few_rows_are_all_measured():
    run = loop({"language_tau": 1e-9, "vision_tau": 1e-9, "freeze_order": "together"}).run()
    assert [check.get("rows") for check in run.monitor.checks] == [None, 6, 6, 6]


def test_a_part_thaws_when_the_loss_has_risen_since_its_freeze():
    height, small = [0.0], (i / 1e6 for i in range(999))
    run = loop(
        {"vision_tau": 1e9, "language_tau": 1e-12},
        evaluate=lambda vision, first: [
            (20.0 + height[0] + i / 10 * height[0] + next(small), 20) for i in range(9) if first
        ],
    )
    run.on_step = lambda step: height.__setitem__(0, 5.0 if step == 8 else 0.0 if step == 9 else height[0])
    run.run()
    events = [(event["step"], bool(event.get("unfrozen"))) for event in run.monitor.events]
    assert set(events) == {(6, False), (9, True)}
    assert any("risen" in line for line in run.lines)


def test_a_rise_is_one_above_the_lowest_loss_since_the_freeze():
    """The language tower that trains on has lowered it by more than it rises then."""
    height, small = {6: 10.2, 9: 1.02, 12: 9.18}, (i / 1e6 for i in range(999))
    run = loop(
        {"vision_tau": 1e9, "language_tau": 1e-12},
        evaluate=lambda vision, first: [
            (20 * height[run.step] * (1 + i / 10) + next(small), 20) for i in cut(range(9), first)
        ],
    )
    run.run()
    events = [(event["step"], bool(event.get("unfrozen"))) for event in run.monitor.events]
    assert set(events) == {(6, False), (12, True)}


def test_the_last_part_trains_on_in_the_cooldown():
    run = loop({"vision_tau": 1e9, "language_tau": 1e9, "on_converged": "cooldown"})
    run.run()
    assert run.monitor.converged_step == 6
    assert not run.monitor.frozen
    assert run.step == STEPS  # whoever drives it ends the run
    assert run.monitor.checks[-1]["step"] == 6  # nothing is measured that decides nothing


@pytest.mark.parametrize(("level", "names"), [
    ("towers", ["vision", "language"]),
    ("prefixes", ["vision", "vision 0", "language", "language 0"]),
    ("blocks", ["vision", "vision 0", "vision 1", "language", "language 0", "language 1"]),
])  # fmt: skip
def test_the_parts(level, names):
    model = make_model()
    monitor = GradESMonitor(GradESConfig(), model, total_steps=10)
    parts = {part.name: part for part in find_parts(model, monitor.components, level)}
    assert list(parts) == names
    of_vision = {p for name, p in model.named_parameters() if name.startswith("vision_encoder.")}
    assert set(parts["vision"].parameters) == of_vision
    if "language 1" in parts:
        assert set(parts["language 1"].parameters) == set(model.decoder.blocks[1].parameters())
        assert all(name.startswith("decoder.blocks.1.") for name in parts["language 1"].components)


def test_it_says_what_it_needs():
    with pytest.raises(ValueError, match=r"--average_weights 0.99; .* averages and evaluate of GradESMonitor"):
        GradESMonitor(GradESConfig(metric="rollback"), make_model(), total_steps=10)
    with pytest.raises(ValueError, match="rollback"):
        GradESConfig(metric="rollback", tau_mode="relative").check()


def test_only_the_front_freezes():
    components = [(f"{tower}{layer}{kind}", tower, "", layer) for tower in ("language", "vision") for layer in (0, 1)
                  for kind in "ab"]  # fmt: skip
    names = [name for name, *_ in components]
    assert policy.front(names, [], components) == sorted(names, key=lambda name: name[0] != "v")
    assert policy.front(["vision0a", "vision1a"], [], components) == ["vision0a"]
    assert policy.front(["vision0a", "vision1a"], ["vision0b"], components) == ["vision0a", "vision1a"]
    assert policy.front(["language0a"], ["vision0a"], components) == []
    stacks = [(f"{stack}{layer}", "language", stack, layer) for stack in ("encoder", "decoder") for layer in (0, 1)]
    assert policy.front(["decoder0", "encoder0"], [], stacks) == ["encoder0"]
    assert policy.front(["decoder0"], ["encoder0", "encoder1"], stacks) == ["decoder0"]
