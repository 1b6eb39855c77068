"""What people use beside Trainer and what they put into it: trackers, searches, other loops, patched models."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from tiny.grades import ALWAYS, NEVER, make_model

import grades

ROOT = Path(__file__).resolve().parent.parent


def make_trainer(hf, folder, callback, model=None, kind=None, **others):
    """others: arguments of TrainingArguments. model: or a function that makes it, as model_init."""
    made = {"model_init": model} if callable(model) and not isinstance(model, torch.nn.Module) else {}
    return (kind or hf.Trainer)(
        args=hf.TrainingArguments(**hf.arguments(folder, **others)), train_dataset=hf.rows(),
        eval_dataset=hf.rows()[:4], callbacks=[callback], **made or {"model": model or hf.llama()},
    )  # fmt: skip


# Trackers: how each is asked what it has recorded.


def of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "runs")).Reload()
    return {key: found.Scalars(key)[-1].value for key in found.Tags()["scalars"]}


def of_wandb(folder):
    import wandb

    recorded = dict(wandb.run.summary)
    wandb.finish()
    return recorded


def of_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("huggingface")
    logs = SQLiteStorage.get_logs("huggingface", run)
    return {key: value for log in logs for key, value in log.items()}


TRACKERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_trackers_get_the_shares_and_the_metric_without_network(hf, tmp_path, monkeypatch, no_network, tracker):
    pytest.importorskip(tracker)
    if tracker == "trackio":  # which reads the environment when it is imported
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true",
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "runs"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    hf.run(tmp_path, hf.settings(), report_to=[tracker], max_steps=8)
    recorded = TRACKERS[tracker](tmp_path)
    assert recorded["train/grades/frozen_share"] == pytest.approx(8 / 14)
    assert recorded["train/grades/weight_change_language"] > 0


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_the_best_checkpoint_is_loaded_though_it_is_of_before_the_freezes(hf, tmp_path, lora):
    class WorseAndWorse(hf.Trainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": float(self.state.global_step)}

    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer = make_trainer(
        hf, tmp_path, callback, hf.llama(lora), WorseAndWorse, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        max_steps=8,
    )  # fmt: skip
    watcher = hf.Weights()
    trainer.add_callback(watcher)
    trains = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert set(callback.monitor.frozen.values()) == {4}
    assert all(torch.equal(weight, watcher.at[2][name]) for name, weight in hf.weights(trainer.model).items())
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == trains
    assert not hf.ours(trainer.model)


def test_every_trial_of_optuna_starts_clean(hf, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    monkeypatch.setattr("grades.outputs.draw_pictures", lambda path: None)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    class PrunesTheSecond(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1 and trial.last_step >= 6

    made = []

    def model_init():
        made.append(hf.llama())
        return made[-1]

    callback = grades.GradEarlyStoppingCallback(hf.settings(save_stats=True, output_dir=None))
    trainer = make_trainer(
        hf, tmp_path, callback, model_init, eval_strategy="steps", eval_steps=3, max_steps=9
    )  # fmt: skip
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-2, 1e-2)},
        n_trials=3, backend="optuna", pruner=PrunesTheSecond(),
    )  # fmt: skip
    histories = [json.loads((tmp_path / f"run-{i}" / "grades_history.json").read_text()) for i in range(3)]
    assert [history["last_step"] for history in histories] == [9, 6, 9]
    assert len({history.pop("run") for history in histories}) == 3
    assert histories[0] == histories[2]
    _, alone = hf.run(tmp_path, hf.settings(), max_steps=9)
    for history in histories:
        assert history["events"] == alone.monitor.events
        assert history["checks"] == alone.monitor.checks[: history["last_step"]]
    for model in made:
        assert all(p.requires_grad for p in model.parameters())
        assert not hf.ours(model)


# As Unsloth does: forwards replaced by fused ones, checkpoints that are moved away, Trainer's loop rewritten.


class Fused(torch.autograd.Function):
    """A linear, with adapter matrices or without, whose backward computes the gradient of what is frozen too."""

    @staticmethod
    def forward(ctx, x, *matrices):
        ctx.save_for_backward(x, *matrices)
        return functools.reduce(lambda value, matrix: value @ matrix.T, matrices, x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            output = functools.reduce(lambda value, matrix: value @ matrix.T, inputs[1:], inputs[0])
            return torch.autograd.grad(output, inputs, gradient)


class Offloaded(torch.autograd.Function):
    """Checkpointing of a block's input in another memory; nothing of the block is seen in the graph."""

    @staticmethod
    def forward(ctx, run, hidden):
        ctx.run, ctx.hidden = run, hidden.detach().to("cpu", copy=True)
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx, gradient):
        hidden = ctx.hidden.to(gradient.device).requires_grad_()
        with torch.enable_grad():
            output = ctx.run(hidden)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad


def fused_forward(module, x):
    if not hasattr(module, "lora_A"):
        return Fused.apply(x, module.weight)
    pair = [side["default"].weight for side in (module.lora_A, module.lora_B)]
    return Fused.apply(x, module.base_layer.weight) + Fused.apply(x, *pair) * module.scaling["default"]


def as_unsloth_patches(model):
    """Replace the forward of every projection, and how every block is checkpointed."""
    offload_checkpoints(model).enable_input_require_grads()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.forward = functools.partial(fused_forward, module)
    return model


def offload_checkpoints(model):
    """Each block is recomputed in the backward pass from its input, which was moved away."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda run, hidden, *rest: Offloaded.apply(
                lambda hidden: run(hidden, *rest), hidden
            )
    return model


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_patched_forwards_and_offloaded_checkpoints(hf, tmp_path, lora):
    model = as_unsloth_patches(hf.llama(lora))
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    hf.train_and_check(make_trainer(hf, tmp_path, callback, model, max_steps=8), callback)
    assert callback.monitor.freezer.feeds.is_hidden
    plain, _ = hf.run(tmp_path, hf.settings(freeze_prefix=False), hf.llama(lora), max_steps=8)
    for name, weight in hf.weights(model).items():  # what was patched computes the same up to rounding
        torch.testing.assert_close(weight, plain.model.get_parameter(name).detach(), rtol=1e-2, atol=1e-3)


def test_what_offloaded_checkpoints_hide_trains_on(hf, tmp_path):
    """Without a gradient of its input such a block trains nothing, and nobody would notice."""
    watcher = hf.Weights()
    config = hf.settings(target_components=["layers.0"], language_mlp_tau=ALWAYS)
    _, callback = hf.run(tmp_path, config, offload_checkpoints(hf.llama()), [watcher], weight_decay=0.0, max_steps=8)
    assert len(callback.monitor.frozen) == hf.MATRICES / 2
    for name, weight in watcher.at[8].items():
        still = torch.equal(weight, watcher.at[7][name])
        assert still == (f"{name.removesuffix('.weight')}" in callback.monitor.frozen), name


@pytest.fixture
def own_loop(hf, monkeypatch):
    """Trainer's loop and what replaces it, as they were, after the test."""
    from grades import undo

    monkeypatch.setattr(undo, "_replaced", list(undo._replaced))
    monkeypatch.setattr(hf.Trainer, undo.LOOP, getattr(hf.Trainer, undo.LOOP))


def replace_loop(hf, monkeypatch):
    loop = hf.Trainer._inner_training_loop
    original = getattr(loop, "__wrapped__", loop)

    def fast_loop(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(hf.Trainer, "_inner_training_loop", fast_loop)
    return fast_loop


def interrupting(hf):
    class Interrupts(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    return Interrupts()


@pytest.mark.usefixtures("own_loop")
def test_a_loop_that_is_replaced_before_the_trainer_is_made_is_undone(hf, tmp_path, monkeypatch, caplog):
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    replace_loop(hf, monkeypatch)
    trainer = make_trainer(hf, tmp_path, callback)
    trainer.add_callback(interrupting(hf))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.monitor.frozen
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not hf.ours(trainer.model)
    assert "was replaced" not in caplog.text


@pytest.mark.usefixtures("own_loop")
def test_a_loop_that_is_replaced_later_is_said_and_the_next_training_is_clean(hf, tmp_path, monkeypatch, caplog):
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer = make_trainer(hf, tmp_path, callback)
    replaced = replace_loop(hf, monkeypatch)
    trainer.add_callback(interrupting(hf))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "_inner_training_loop was replaced" in caplog.text
    assert not all(p.requires_grad for p in trainer.model.parameters()), "nobody could undo it"
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()  # the same callback: its trace is gone, and the loop tells it again
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not hf.ours(trainer.model)
    assert "was replaced" not in caplog.text
    assert hf.Trainer._inner_training_loop.__wrapped__ is replaced


@pytest.mark.usefixtures("own_loop")
def test_a_library_that_wraps_the_loop_keeps_its_place(hf, tmp_path, monkeypatch):
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    ours = hf.Trainer._inner_training_loop
    calls = []

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        calls.append(self)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(hf.Trainer, "_inner_training_loop", theirs)
    trainer = make_trainer(hf, tmp_path, callback, max_steps=2)
    trainer.train()
    another = grades.GradEarlyStoppingCallback(hf.settings())
    assert calls == [trainer]
    assert hf.Trainer._inner_training_loop.__wrapped__ is theirs
    from grades import undo

    monkeypatch.setattr(undo, "_callbacks", 1)
    undo._let_go()
    assert hf.Trainer._inner_training_loop is theirs
    del another


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_weights_that_are_taken_apart_are_refused_before_anything_is_made(hf, tmp_path, monkeypatch, kind):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer = make_trainer(hf, tmp_path, callback)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match=f"^{kind}.*DDP, or FSDP version 2"):
        trainer.train()
    assert trainer.optimizer is None
    assert callback.monitor is None
    assert not hf.ours(trainer.model)


# Other loops.


def test_the_loop_of_the_docs_trains_and_freezes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "grades.md").read_text(encoding="utf-8").split("## In your own loop")[1]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    from tiny.grades import batch

    model = make_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = {"model": lambda step: model(**batch(step))[1]}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, step):
            return seen["model"](step)

    outer = Model()
    optimizer = torch.optim.AdamW(outer.parameters(), lr=1e-2)
    given = {"model": outer, "optimizer": optimizer, "total_steps": 10, "batches": range(1, 11)}
    code = code.replace("vision_tau=0.3", f"vision_tau={ALWAYS}").replace("language_tau=6.0", f"language_tau={NEVER}")
    exec(code, given)
    monitor = given["monitor"]
    assert monitor.is_closed
    history = json.loads((tmp_path / "grades_history.json").read_text())
    assert {event["step"] for event in history["events"]} == {4}
    assert {name.split(".")[1] for name in monitor.frozen} == {"vision_encoder"}
    assert all(p.requires_grad for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
