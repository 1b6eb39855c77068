"""What the monitor measures against the reference in tiny.reference: in a plain loop, two processes and Trainer."""

import numpy as np
import pytest
import torch
from tiny import reference
from tiny.processes import run_two_ranks

from grades.config import METRICS


def check(metric: str, run: dict, sample: int, gradients: dict | None = None) -> None:
    """Every number of every check. gradients: the whole ones, where the run knows a part of them."""
    run = run | ({} if gradients is None else {"gradients": gradients})
    assert [check["step"] for check in run["checks"]] == [2, 4, 6]
    measured = 0
    for check in run["checks"]:
        for name, value in zip(run["names"], check["values"], strict=True):
            known = reference.expected(metric, run, name, check["step"], sample)
            assert value == (known if known is None else pytest.approx(known, rel=1e-4)), (name, check["step"])
            measured += value is not None
    assert measured >= len(run["names"]) * (2 if metric == "weight_change" else 3)


@pytest.mark.parametrize("sample", [1, 7])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(4))
def test_of_random_models(metric, sample, seed):
    record = reference.Record(seed, metric, sample)
    assert {len(c.weights) for c in record.components} == {1, 2}
    assert {w.dim() for c in record.components for w in c.weights} == {2, 3}
    assert max(record.clips.values()) < 1
    check(metric, record.plain(), sample)


def test_the_sample_leaves_something_out():
    sizes = [w.numel() for seed in range(4) for w in reference.Random(seed).parameters() if w.dim() == 3]
    assert max(sizes) > 2 * reference.LEAST
    taken, factor = reference.looked_at(np.ones(max(sizes)), 7)
    assert taken.size < max(sizes) / 2
    assert factor == pytest.approx(max(sizes) / taken.size)


def test_of_two_processes(tmp_path, monkeypatch):
    """Each has half of the rows; the reference averages the gradients that they have alone."""
    run_two_ranks(monkeypatch, "tiny.reference", reference.one_rank, str(tmp_path), 1, 7)
    runs = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for metric in METRICS:
        first, second = (run[metric] for run in runs)
        assert first["checks"] == second["checks"]
        gradients = {
            step: {
                name: [(a + b) / 2 for a, b in zip(parts, second["gradients"][step][name], strict=True)]
                for name, parts in of_step.items()
            }
            for step, of_step in first["gradients"].items()
        }
        check(metric, first, 7, gradients)


@pytest.mark.parametrize("metric", ["weight_change", "gradient_norm", "gradient_change"])
@pytest.mark.parametrize("lora", [False, True])
def test_of_a_mixture_of_experts_in_trainer(hf, tmp_path, metric, lora):
    """Two micro-batches a step, clipped; stacks of experts, or adapters of them."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    ))  # fmt: skip
    if lora:
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks))
    watcher, sample = hf.Weights(), 3
    trainer, callback = hf.run(
        tmp_path, hf.never(metric=metric, compute_interval=2, monitor_sample=sample), model, [watcher], hf.SlowTrainer,
        max_steps=6, gradient_accumulation_steps=2, max_grad_norm=0.01,
    )  # fmt: skip
    components = callback.monitor.components
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert {weight.dim() for c in components for weight in c.weights} == ({2} if lora else {2, 3})

    def of(series: dict) -> dict[int, reference.Arrays]:
        return {
            step: {c.name: [at[names[w]].double().numpy() for w in c.weights] for c in components}
            for step, at in series.items()
        }

    run = {
        "checks": callback.monitor.checks, "names": [c.name for c in components], "weights": of(watcher.at),
        "gradients": of(trainer.seen), "clips": {},
    }  # fmt: skip
    check(metric, run, sample)
