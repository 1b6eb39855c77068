"""The callback with the optimizers that people use: what is frozen stays, the rest trains, a resumed run is the run."""

import importlib

import pytest
import torch
from tiny import optimizers

from grades.optimizers import members, settle_average


def packaged(module, name, **others):
    """An optimizer of a package, for `optimizers=(...)`."""

    def make(model):
        trains = [p for p in model.parameters() if p.requires_grad]
        return getattr(importlib.import_module(module), name)(trains, lr=1e-2, **others)

    return make


def loraplus(model):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)


LOW_RANK = {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=4,update_proj_gap=3,scale=1.0"}
OF_TORCH = {
    "adamw": {"optim": "adamw_torch"},
    "adamw fused": {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 2},
    "adafactor": {"optim": "adafactor"},
    "sgd momentum": {"optimizer": packaged("torch.optim", "SGD", momentum=0.9, nesterov=True, weight_decay=0.1)},
    "muon": {"optimizer": optimizers.muon},
    "lion": {"optimizer": packaged("tiny.optimizers", "Lion")},
    "projected": {"optimizer": packaged("tiny.optimizers", "Projected")},
    "schedule-free": {"optimizer": packaged("tiny.optimizers", "ScheduleFree")},
    "loraplus": {"optimizer": loraplus, "lora": {}},
}
OF_PACKAGES = {
    "lion_pytorch": {"optimizer": packaged("lion_pytorch", "Lion")},
    "schedulefree adamw": {"optim": "schedule_free_adamw", "gradient_accumulation_steps": 2},
    "schedulefree sgd": {"optim": "schedule_free_sgd", "learning_rate": 0.1},
    "bitsandbytes adamw": {"optim": "adamw_bnb_8bit"},
    "bitsandbytes lion": {"optim": "lion_8bit"},
    "bitsandbytes paged": {"optim": "paged_adamw_32bit"},
    "galore_torch": {"optim": "galore_adamw"} | LOW_RANK,
    "galore_torch layerwise": {"optim": "galore_adamw_layerwise"} | LOW_RANK,
    "apollo_torch": {"optim": "apollo_adamw"} | LOW_RANK,
    "apollo_torch layerwise": {"optim": "apollo_adamw_layerwise"} | LOW_RANK,
}
AVERAGING = ("schedule-free", "schedulefree")


def given(name, case):
    """The arguments of a run for a case; skips where its package is missing."""
    if name in OF_PACKAGES:
        pytest.importorskip(name.split()[0])
        if "torch" in name and "lion" not in name:
            pytest.importorskip("bitsandbytes")
    return {key: value for key, value in case.items() if key != "lora"}, case.get("lora")


CASES = OF_TORCH | OF_PACKAGES


@pytest.mark.parametrize("name", CASES)
def test_what_is_frozen_stays_and_the_rest_trains(hf, tmp_path, name):
    others, lora = given(name, CASES[name])
    settles = name.startswith(AVERAGING)
    trainer, callback = hf.check_freezing(tmp_path, lambda: hf.llama(lora), settles=settles, **others)
    optimizer = trainer.optimizer.optimizer
    frozen = {p for component in callback.monitor.frozen for p in callback.monitor.by_name[component].parameters}
    assert callback.monitor.freed_bytes
    for member in members(optimizer):
        assert not any(member.state.get(parameter) for parameter in frozen), "its state is freed"


RESUMED = ("adafactor", "muon", "lion", "schedule-free", "lion_pytorch", "schedulefree adamw", "bitsandbytes adamw")


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_whole_run(hf, tmp_path, name):
    others, lora = given(name, CASES[name])
    others |= {"save_strategy": "steps", "save_steps": 7}
    whole, first = hf.run(tmp_path, hf.settings(), hf.llama(lora), **others)
    assert set(first.monitor.frozen.values()) == {5}
    resumed, second = hf.run(tmp_path, hf.settings(), hf.llama(lora), resume=str(tmp_path / "checkpoint-7"), **others)
    assert second.monitor.history() == first.monitor.history()
    assert hf.same(resumed.model, whole.model)


@pytest.mark.parametrize("name", ["schedule-free", "schedulefree adamw"])
def test_freezing_does_not_change_the_model_that_is_evaluated(hf, tmp_path, name):
    """A schedule-free optimizer trains at one point and evaluates at another: what freezes stays at the second."""
    others, _ = given(name, CASES[name])
    evaluated = {}

    class Evaluated(hf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            kept = hf.weights(model)
            optimizer.eval()
            evaluated[args.output_dir, state.global_step] = hf.weights(model)
            optimizer.train()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(kept[key])

    plain, _ = hf.run(tmp_path / "a", None, watchers=[Evaluated()], max_steps=5, **others)
    trainer, callback = hf.run(tmp_path / "b", hf.settings(), watchers=[Evaluated()], **others)
    theirs, ours = evaluated[str(tmp_path / "a"), 5], evaluated[str(tmp_path / "b"), 5]
    assert callback.monitor.frozen
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())
    weights = hf.weights(trainer.model)
    for component in callback.monitor.frozen:
        for key in hf.matrices(trainer.model, component):
            assert torch.equal(weights[key], theirs[key]), "also at the end"
            assert not torch.equal(weights[key], hf.weights(plain.model)[key])


def test_schedule_frees_wrapper_holds_its_mode_itself():
    """For plain loops: it is no optimizer of torch's."""
    schedulefree = pytest.importorskip("schedulefree")
    layer = torch.nn.Linear(4, 4)
    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), momentum=0.9)
    optimizer.train()
    for _ in range(3):
        layer(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer.eval()
    average = layer.weight.detach().clone()
    layer.load_state_dict(trained)
    optimizer.train_mode = True
    settle_average([layer.weight], optimizer)
    assert torch.equal(layer.weight, average)
    assert not torch.equal(average, trained["weight"])
    assert torch.equal(layer.bias, trained["bias"])
    assert optimizer.train_mode
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@pytest.mark.parametrize("kind", [optimizers.Coasting, optimizers.Decaying])
def test_an_optimizer_that_moves_what_has_no_gradient_is_an_error(hf, tmp_path, kind):
    def make(model):
        return kind(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)

    with pytest.raises(ValueError, match=f"{kind.__name__} moves weights"):
        hf.run(tmp_path, hf.settings(), optimizer=make)
    _, callback = hf.run(tmp_path, hf.never(), optimizer=make)
    assert not callback.monitor.frozen


@pytest.mark.parametrize(
    ("config", "others", "named"),
    [
        ({"metric": "gradient_norm"}, {}, "weight_change"),
        ({}, {"torch_compile": True, "torch_compile_backend": "eager"}, "torch.compile"),
    ],
)
def test_what_steps_in_the_backward_pass_is_refused_where_gradients_are_needed(hf, tmp_path, config, others, named):
    class InBackward(torch.optim.SGD):
        optimizer_dict = None  # as transformers' LayerWiseDummyOptimizer

    def make(model):
        return InBackward(model.parameters(), lr=1e-2)

    with pytest.raises(ValueError, match=f"InBackward.*{named}"):
        hf.run(tmp_path, hf.settings(**config), optimizer=make, max_steps=1, **others)


def test_adams_squared_gradients_are_not_taken_from_where_they_are_something_else(hf, tmp_path):
    class Other(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p] = self.made_of(p)

    cases = {
        "a projection": lambda p: {"step": torch.tensor(1.0), "exp_avg_sq": p.new_ones(3)},
        "reads step": lambda p: {"z": p.clone(), "exp_avg_sq": torch.ones_like(p)},
        "state1": lambda p: {"step": 1, "state1": p.clone()},
    }
    for named, Other.made_of in ((named, staticmethod(made)) for named, made in cases.items()):
        with pytest.raises(ValueError, match=f"gradient_rms.*{named}"):
            hf.run(tmp_path, hf.settings(metric="gradient_rms"), optimizer=lambda model: Other(model.parameters()))
    with pytest.raises(ValueError, match="Adam's kind"):
        hf.run(tmp_path, hf.settings(metric="gradient_rms"), optimizer=CASES["lion"]["optimizer"])
