"""GradESMonitor in a plain loop over a transformers model, with a gradient scaler."""

import itertools

import pytest
import torch
from tiny.grades import ALWAYS, NEVER

from grades import GradESConfig, GradESMonitor

STEPS = 12


def train(hf, scale, metric="gradient_norm", half=False, overflow=(), attention_tau=NEVER):
    """A run with gradients scaled by `scale`, None: without a scaler; overflow: steps with infinite gradients.

    Returns its monitor and the weights after each step.
    """
    model, rows = hf.llama(), torch.tensor([row["input_ids"] for row in hf.rows()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    config = GradESConfig(
        metric=metric, alpha=0.3, language_attention_tau=attention_tau, language_mlp_tau=NEVER, compute_interval=1
    )
    weights = []
    with GradESMonitor(config, model, optimizer, STEPS, lambda line: None) as monitor:
        for step in range(1, STEPS + 1):
            for half_batch in rows[4 * step - 4 : 4 * step].split(2):
                with torch.autocast("cpu", torch.float16, enabled=half):
                    loss = model(input_ids=half_batch, labels=half_batch).loss / 2
                scaler.scale(loss * (torch.inf if step in overflow else 1)).backward()
            scaler.unscale_(optimizer)
            monitor.after_backward(step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            monitor.after_step(step)
            weights.append(hf.weights(model))
    return monitor, weights


@pytest.mark.parametrize("metric", ["gradient_norm", "gradient_change"])
def test_what_is_measured_is_the_unscaled_gradient(hf, metric):
    plain, weights = train(hf, None, metric)
    scaled, same = train(hf, 2.0**12, metric)
    assert plain.checks == scaled.checks, "a power of two changes no digit"
    assert all(torch.equal(weights[-1][name], weight) for name, weight in same[-1].items())
    halved, _ = train(hf, 2.0**12, metric, half=True)
    for precise, rounded in zip(plain.checks[1:3], halved.checks[1:3], strict=True):
        assert rounded["values"] == pytest.approx(precise["values"], rel=0.05)


@pytest.mark.parametrize("metric", ["gradient_norm", "gradient_change", "weight_change"])
def test_a_step_that_the_scaler_skips_measures_nothing_and_freezes_nothing(hf, metric):
    """The first one after the grace period too."""
    monitor, weights = train(hf, 2.0**12, metric, half=True, overflow=(5, 8), attention_tau=ALWAYS)
    values = {check["step"]: set(check["values"]) for check in monitor.checks}
    assert values[5] == values[8] == {None}
    first = 7 if metric == "gradient_change" else 6  # which compares with the step before
    assert set(monitor.frozen.values()) == {first}
    assert len(monitor.frozen) == 8
    for step, following in itertools.pairwise(range(1, STEPS + 1)):
        for name, weight in weights[step - 1].items():
            stays = following in (5, 8) or (step >= first and "self_attn" in name)
            if "norm" not in name and "embed" not in name:
                assert torch.equal(weight, weights[following - 1][name]) == stays, (name, step)
