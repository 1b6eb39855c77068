"""The metrics: what each measures, what a sample of it is worth, and what is held for it."""

import pytest
import torch
import torch.nn as nn
from tiny.grades import ALWAYS, NEVER, Loop, make_model, same_weights, train

from grades import GradESConfig, GradESMonitor, sampling
from grades.config import METRICS
from grades.sampling import Exact, Sampled


class LoRALinear(nn.Module):
    """A linear with an adapter, built as peft builds it."""

    def __init__(self, base: nn.Linear, rank: int = 3):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Recorder:
    """Keeps a float64 copy of every component's weights and whole, unclipped gradients of each step."""

    def __init__(self, loop: Loop):
        self.components = loop.monitor.components
        self.clip_norms = loop.clip_norms
        self.gradients = {}
        self.weights = {0: self._copy(lambda weight: weight)}
        loop.on_backward = lambda step: self.gradients.update({step: self._copy(lambda weight: weight.grad)})
        loop.on_step = lambda step: self.weights.update({step: self._copy(lambda weight: weight)})

    def _copy(self, get) -> dict[str, torch.Tensor]:
        return {
            c.name: torch.cat([get(weight).detach().double().flatten() for weight in c.weights])
            for c in self.components
        }

    def value(self, metric: str, name: str, step: int, interval: int) -> float | None:
        """What a metric is, by its definition; None at checks that are too early."""
        if metric == "gradient_rms":
            mean, beta2 = torch.zeros_like(self.gradients[1][name]), 0.999
            for now in range(1, step + 1):
                clipped = self.gradients[now][name] * min(1, 0.5 / (self.clip_norms[now - 1] + 1e-6))
                mean = beta2 * mean + (1 - beta2) * clipped**2
            return (mean / (1 - beta2**step)).sqrt().sum().item()
        series = self.weights if metric == "weight_change" else self.gradients
        now = series[step][name]
        if metric != "gradient_norm":
            before = step - (interval if metric == "weight_change" else 1)
            if before == 0:  # the first look at the weights, or the first gradient
                return None
            now = now - series[before][name]
        return now.abs().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_is_what_its_definition_says(metric, interval, dtype):
    """Over accumulated gradients before they are clipped; components of one weight and adapters of two."""
    model = make_model()
    for block in model.decoder.blocks:
        block.attn.q_proj = LoRALinear(block.attn.q_proj)
    steps = interval * 3
    config = GradESConfig(metric=metric, compute_interval=interval, alpha=0.9)
    loop = Loop(model.to(dtype), config, steps, accumulation=2)
    recorder = Recorder(loop)
    tolerance = 0.02 if (metric, dtype) == ("gradient_rms", torch.bfloat16) else 2e-5  # Adam rounds its state itself
    monitor = loop.run().monitor
    assert max(loop.clip_norms) > 0.5  # they were clipped
    assert sum(len(component.weights) == 2 for component in monitor.components) == 2
    assert [check["step"] for check in monitor.checks] == list(range(interval, steps + 1, interval))
    for check in monitor.checks:
        for component, value in zip(monitor.components, check["values"], strict=True):
            expected = recorder.value(metric, component.name, check["step"], interval)
            assert value == (expected if expected is None else pytest.approx(expected, rel=tolerance))
    assert None not in monitor.checks[-1]["values"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_more_than_one_chunk(dtype, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", {"cpu": 1000, "cuda": 1000})
    generator = torch.Generator().manual_seed(0)
    weight, before = (torch.randn(70, 130, generator=generator).to(dtype) for _ in range(2))
    snapshot = before.clone()
    expected = (weight.double() - before.double()).abs().sum().item()
    assert Exact().change([weight], [snapshot]).tolist() == pytest.approx([expected], rel=1e-5)
    assert torch.equal(snapshot, weight)
    assert Exact().norm([weight.T]).tolist() == pytest.approx([weight.double().abs().sum().item()], rel=1e-5)


STRUCTURES = {
    "random": lambda x: x,
    "columns": lambda x: x * torch.linspace(0, 3, x.shape[1]).exp(),
    "rows": lambda x: x * torch.linspace(0, 3, x.shape[0]).exp()[:, None],
    "few columns": lambda x: x * (0.1 + (torch.arange(x.shape[1]) < 16)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("columns", [24, 64, 100, 512])  # 24 and 512 are the stretches of n runs
@pytest.mark.parametrize("n", [3, 64])
def test_a_sample_is_unbiased_and_as_exact_as_its_size_allows(structure, columns, n):
    """Its errors, in units of those of as many runs of 8 elements drawn at random, over matrices of many sizes."""
    errors = []
    for trial in range(32):
        generator = torch.Generator().manual_seed(trial)
        rows = -(-6000 // columns) + trial
        x = STRUCTURES[structure](torch.randn(rows, columns, generator=generator))
        runs = x.abs().flatten()[: x.numel() // 8 * 8].view(-1, 8).sum(dim=1)
        drawn = max(512, -(-len(runs) // n))
        expected = runs.std() / drawn**0.5 * len(runs)
        errors.append((Sampled(n).norm([x])[0] - x.abs().sum()) / expected)
    assert max(map(abs, errors)) < 4
    assert abs(sum(errors)) / len(errors) ** 0.5 < 4


def test_a_sample_of_all_elements_and_of_a_small_matrix_is_exact():
    generator = torch.Generator().manual_seed(0)
    for rows, columns, n in [(63, 65, 64), (3, 5, 64), (1, 1, 2), (64, 64, 64), (400, 48, 1)]:
        x, before = torch.randn(2, rows, columns, generator=generator)
        kept = Sampled(n).copy([before])
        assert torch.equal(torch.cat([part.flatten() for part in kept]), before.flatten())  # none of them twice
        assert Sampled(n).norm([x]).tolist() == pytest.approx(Exact().norm([x]).tolist(), rel=1e-5)
        assert Sampled(n).change([x], kept).tolist() == pytest.approx(Exact().change([x], [before]).tolist(), rel=1e-5)


def test_an_empty_shard_of_a_sampled_matrix_has_the_sum_0():
    """A rank's part of an adapter with fewer rows than there are ranks."""
    shards, sampled = [torch.empty(0, 64), torch.ones(2, 64)], Sampled(16)
    assert sampled.norm(shards).tolist() == [0, 128]
    assert sampled.change([shard * 2 for shard in shards], sampled.copy(shards)).tolist() == [0, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampled_change_is_scaled_up_and_the_next_one_starts_from_it(dtype):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampled = Sampled(16)
    kept = sampled.copy([x])
    assert kept[0].numel() == 4096
    assert sampled.change([x + 1], kept).tolist() == pytest.approx([60_000], rel=0.01)
    assert sampled.change([x + 1], kept).tolist() == [0]


def test_the_sample_of_a_matrix_is_the_same_in_every_process():
    """Else a resumed run would compare other elements than it kept."""
    x = torch.arange(70_000.0).view(700, 100)
    torch.manual_seed(1)
    first = Sampled(16).copy([x])[0]
    torch.manual_seed(2)
    assert torch.equal(Sampled(16).copy([x])[0], first)
    assert first[0, 0].item() % 8 == 0
    assert torch.equal(first - first[:, :1], torch.arange(8.0).expand_as(first))


@pytest.mark.parametrize("metric", METRICS)
def test_a_sampled_metric_estimates_the_exact_one(metric, small_scale):
    """Over the whole model; each of its matrices is of 384 elements or more, of which a sixth is looked at."""
    exact, sampled = (train({"metric": metric, "alpha": 0.9, "monitor_sample": n}, 6).monitor for n in (1, 6))
    assert [None in check["values"] for check in sampled.checks] == [None in check["values"] for check in exact.checks]
    values, estimates = (torch.tensor(monitor.checks[-1]["values"]) for monitor in (exact, sampled))
    assert not torch.equal(values, estimates)
    assert (estimates / values - 1).abs().mean() < 0.2
    held = [sum(t.numel() for kept in monitor.metric.kept.values() for t in kept) for monitor in (exact, sampled)]
    assert held[1] <= held[0] * 0.2


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_held_for_what_is_frozen(metric):
    taus = {"vision_tau": ALWAYS, "language_tau": NEVER}
    monitor = train({"metric": metric, **taus, "alpha": 0.5, "compute_interval": 2}, 12).monitor
    assert monitor.frozen_share("vision") == 1
    live = {component.name for component in monitor.components if component.tower == "language"}
    assert set(monitor.metric.kept) <= live
    assert set(monitor.state_dict()["metric"].get("steps", {})) <= live
    assert set(monitor.latest) == live


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_held_or_measured_in_the_grace_period_without_monitor_grace(metric):
    config = GradESConfig(metric=metric, alpha=0.5, monitor_grace=False)
    loop = Loop(make_model(), config, 10)
    held = {}
    loop.on_step = lambda step: held.update({step: bool(loop.monitor.metric.kept)})
    loop.run()
    assert [check["step"] for check in loop.monitor.checks] == list(range(6, 11))
    # The change of the gradient at step 6 is from step 5.
    assert [step for step, holds in held.items() if holds] == {
        "gradient_norm": [], "gradient_rms": [], "gradient_change": list(range(5, 11)),
    }.get(metric, list(range(6, 11)))  # fmt: skip


def test_gradients_are_copied_in_the_step_before_a_check_alone_into_the_same_memory():
    loop = Loop(make_model(), GradESConfig(metric="gradient_change", compute_interval=4), 12)
    copied, places = [], set()

    def look(step):
        metric = loop.monitor.metric
        copied.append(len(metric.copied))
        places.add(tuple(kept.data_ptr() for parts in metric.kept.values() for kept in parts))

    loop.on_step = look
    loop.run()
    assert copied == [0, 0, 22, 0] * 3
    assert len(places - {()}) == 1


@pytest.mark.parametrize("sample", [1, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_one_host_synchronisation_a_check(metric, sample, monkeypatch, small_scale):
    loop = Loop(make_model(), GradESConfig(metric=metric, alpha=0.9, monitor_sample=sample), 8).run(until=6)
    components, measured = loop.monitor.components, loop.monitor.metric
    for component in components:
        for weight in component.weights:
            weight.grad = torch.ones_like(weight)
    calls = []
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__index__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, o=original, n=name: (calls.append(n), o(self, *a))[1])
    measured.after_backward(components, check=True, check_is_next=True)
    loop.optimizer.step()
    assert None not in measured.measure(components).values()
    assert calls == ["tolist"]


@pytest.mark.parametrize("metric", METRICS)
def test_a_run_that_freezes_nothing_is_bit_for_bit_the_run_without(metric):
    plain = Loop(make_model(), None, 6, accumulation=2).run()
    watched = train({"metric": metric, "vision_tau": NEVER, "language_tau": NEVER, "alpha": 0}, 6, accumulation=2)
    assert not watched.monitor.frozen
    assert watched.clip_norms == plain.clip_norms
    assert same_weights(plain.model, watched.model)


@pytest.mark.parametrize("metric", METRICS)
def test_a_weight_that_no_update_reached_was_not_measured(metric):
    """Steps without an image leave the vision tower alone: that is not convergence."""
    model = make_model()
    plain_forward = model.forward
    model.forward = lambda input_ids, images, targets: plain_forward(input_ids.clamp(max=29), targets=targets)
    monitor = train({"metric": metric, "vision_tau": ALWAYS, "language_tau": NEVER, "alpha": 0}, 7, model).monitor
    assert not monitor.frozen
    values = dict(zip(monitor.by_name, monitor.checks[-1]["values"], strict=True))
    assert all((values[name] is None) == name.startswith("vision") for name in values)


def test_gradient_rms_of_a_weight_that_was_not_updated_since_the_last_check_is_not_known():
    loop = Loop(make_model(), GradESConfig(metric="gradient_rms", alpha=0.9), 4).run(until=3)
    assert None not in loop.monitor.latest.values()
    rested = [name for name in loop.monitor.by_name if name.startswith("vision")]
    for name in rested:
        for weight in loop.monitor.by_name[name].weights:
            weight.requires_grad_(False)
    loop.run()
    assert {name for name, value in loop.monitor.latest.items() if value is None} == set(rested)


def test_gradient_rms_needs_adam():
    model = make_model()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for optimizer in (None, momentum):
        with pytest.raises(ValueError, match="metric gradient_rms"):
            GradESMonitor(GradESConfig(metric="gradient_rms", alpha=0), model, optimizer)
    with pytest.raises(ValueError, match=r"exp_avg_sq.* step, exp_avg, exp_inf"):
        train({"metric": "gradient_rms", "alpha": 0.9}, 2, model, optimizer=torch.optim.Adamax(model.parameters()))


@pytest.mark.parametrize(
    ("metric", "interval", "needed"),
    [
        ("gradient_norm", 4, 1),
        ("gradient_change", 4, 1),  # of the step before the check
        ("gradient_change", 1, 2),
        ("weight_change", 4, 2),
    ],
)
def test_a_tau_of_auto_needs_a_grace_period_with_a_number(metric, interval, needed):
    def run(checks: int) -> Loop:
        config = {"metric": metric, "compute_interval": interval, "vision_tau": "auto", "language_tau": "auto"}
        return train(config | {"alpha": ((checks + 1) * interval - 1) / 32}, 32)

    assert all(tau > 0 for tau in run(needed).monitor.taus.values())
    with pytest.raises(ValueError, match=f"it must hold {needed} or more"):
        run(needed - 1)
