"""Whatever ends a training of transformers.Trainer: nothing of the callback is left behind, and nothing is lost."""

import copy
import errno
import gc
import json
import pickle

import pytest
import torch
from tiny.grades import ALWAYS, NEVER

import grades
from grades.marks import MARK, thaw

STEPS = 7
FAILS_AT = 6  # when 8 of 14 matrices are frozen, since step 4


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Histories of which pictures were asked for; drawing takes seconds."""
    asked = []
    monkeypatch.setattr("grades.outputs.draw_pictures", asked.append)
    return asked


@pytest.fixture(scope="module")
def fresh(hf, tmp_path_factory):
    """By lora the run of a model that was never touched, its trainer and its callback, and what Trainer itself leaves
    behind where a run without GradES fails.
    """
    runs = {}

    def made(lora):
        if repr(lora) not in runs:
            folder = tmp_path_factory.mktemp("fresh")
            plain, error = make_failing(hf, "callback", hf.llama(lora), folder, None)
            run = hf.run(folder, hf.settings(), hf.llama(lora), max_steps=STEPS)
            runs[repr(lora)] = *run, left_behind(hf, plain, error)
        return runs[repr(lora)]

    return made


class Pruned(Exception):
    """As optuna's TrialPruned, before which Trainer tells the callbacks that training has ended."""


def make_failing(hf, cause, model, folder, callback, added_later=False):
    """A trainer that fails at step FAILS_AT, and the exception it ends with."""
    error = {
        "interrupt": KeyboardInterrupt(), "memory": torch.OutOfMemoryError("out of memory"),
        "callback": RuntimeError("another callback"), "loss": ZeroDivisionError(), "dataset": IndexError("row"),
        "collator": TypeError("ragged"), "pruned": Pruned(), "nan guard": FloatingPointError("nan"),
        "saving": OSError(errno.ENOSPC, "No space left on device"), "exit": SystemExit(3),
        "begin": RuntimeError("of a callback that begins after it"), "epoch": RuntimeError("at the second epoch"),
    }[cause]  # fmt: skip

    class Failing(hf.Trainer):
        def _fail(self, *causes):
            if cause in causes and self.state.global_step >= FAILS_AT - 1:
                raise error

        def compute_loss(self, *args, **kwargs):
            self._fail("interrupt", "memory", "loss")
            return super().compute_loss(*args, **kwargs)

        def _save(self, *args, **kwargs):
            self._fail("saving")
            return super()._save(*args, **kwargs)

    class Fails(hf.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if cause == "begin":
                raise error

        def on_epoch_begin(self, args, state, control, **kwargs):
            if cause == "epoch" and state.epoch:
                raise error

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == FAILS_AT and cause in ("callback", "nan guard", "exit", "pruned"):
                if cause == "pruned":
                    trainer.callback_handler.on_train_end(args, state, control)
                raise error

    class Rows(list):
        taken = 0

        def __getitem__(self, index):
            Rows.taken += 1
            if cause == "dataset" and Rows.taken > 4 * FAILS_AT:
                raise error
            return super().__getitem__(index)

    def collate(rows):
        if cause == "collator" and trainer.state.global_step == FAILS_AT:
            raise error
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}

    more = {"max_steps": STEPS}
    more |= {"save_strategy": "steps", "save_steps": FAILS_AT} if cause == "saving" else {}
    more |= {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 8} if cause == "epoch" else {}
    rows = Rows(hf.rows())
    trainer = Failing(
        model=model, args=hf.TrainingArguments(**hf.arguments(folder, **more)), train_dataset=rows,
        data_collator=collate, callbacks=[Fails()] if added_later or callback is None else [callback, Fails()],
    )  # fmt: skip
    if added_later:
        trainer.add_callback(callback)
    return trainer, type(error)


def left_behind(hf, trainer, error):
    """After a training that fails: flags, hooks, methods of objects, and what hangs at modules and parameters."""
    with pytest.raises(error):
        trainer.train()
    model = trainer.model
    return hf.left_on(trainer) | {
        "modules": [set(vars(m)) for m in model.modules()],
        "parameters": [set(vars(p)) for p in model.parameters()],
    }


CAUSES = [
    "interrupt", "memory", "callback", "loss", "dataset", "collator", "pruned", "nan guard", "saving", "exit", "begin",
    "epoch",
]  # fmt: skip


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("cause", CAUSES)
def test_whatever_ends_the_training_nothing_is_left_behind(hf, tmp_path, drawn, fresh, cause, lora):
    model = hf.llama(lora)
    before = copy.deepcopy(model.state_dict())
    callback = grades.GradEarlyStoppingCallback(hf.settings(save_stats=True, output_dir=str(tmp_path / "out")))
    trainer, error = make_failing(hf, cause, model, tmp_path, callback)
    untouched, third, trainers_own = fresh(lora)
    assert left_behind(hf, trainer, error) == trainers_own
    assert callback.held_out is callback.trainer is None
    if cause == "begin":
        assert not (tmp_path / "out").exists(), "nothing has happened"
    else:
        assert 0 < len(callback.monitor.frozen) < hf.MATRICES
        history = json.loads((tmp_path / "out" / "grades_history.json").read_text())
        assert history["last_step"] in (FAILS_AT, FAILS_AT - 1)
        assert len(history["events"]) == len(callback.monitor.frozen)
        assert drawn == [tmp_path / "out" / "grades_history.json"]

    # A new run on the same model, from the same weights, is the run of a model that was never touched.
    model.load_state_dict(before)
    again, second = hf.run(tmp_path / "again", hf.settings(), model, max_steps=STEPS)
    assert len(second.monitor.components) == hf.MATRICES
    assert second.monitor.history() == third.monitor.history()
    assert hf.same(again.model, untouched.model)


def test_it_holds_for_a_callback_that_is_added_later_and_for_its_next_runs(hf, tmp_path):
    model = hf.llama()
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer, error = make_failing(hf, "interrupt", model, tmp_path, callback, added_later=True)
    for _ in range(2):
        with pytest.raises(error):
            trainer.train()
        assert callback.monitor.frozen
        assert all(p.requires_grad for p in model.parameters())
        assert not {"log"} & set(vars(trainer))
        assert "unscale_gradients" not in vars(trainer.accelerator)


def test_trainer_is_as_it_came_once_the_last_callback_is_gone(hf):
    from grades import undo

    gc.collect()
    first = grades.GradEarlyStoppingCallback(hf.settings())
    replaced = hf.Trainer._inner_training_loop
    second = grades.GradEarlyStoppingCallback(hf.settings())
    assert hf.Trainer._inner_training_loop is replaced
    others = undo._callbacks - 2
    del first, second
    gc.collect()
    assert undo._callbacks == others
    if not others:
        assert not hasattr(hf.Trainer._inner_training_loop, "__wrapped__")


def test_what_others_have_patched_stays_patched(hf, tmp_path):
    seen = []
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    given = hf.TrainingArguments(**hf.arguments(tmp_path))
    trainer = hf.Trainer(model=hf.llama(), args=given, train_dataset=hf.rows(), callbacks=[callback])

    def theirs(logs, *args, **kwargs):
        seen.append(logs)
        return type(trainer).log(trainer, logs, *args, **kwargs)

    trainer.log = theirs
    trainer.train()
    assert trainer.log is theirs
    assert any("grades/frozen_share" in logs for logs in seen)


def test_out_of_memory_that_makes_the_batch_smaller_begins_again_with_everything(hf, tmp_path):
    """The optimizer of the second try is made of what trains then."""
    tries = []

    class Large(hf.Trainer):
        def training_step(self, *args, **kwargs):
            if not self.state.global_step:
                tries.append(self._train_batch_size)
            if len(tries) == 1 and self.state.global_step == FAILS_AT:
                self.optimizer = None  # as where it did not fit either
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().training_step(*args, **kwargs)

    trainer, callback = hf.run(tmp_path, hf.settings(), trainer=Large, auto_find_batch_size=True)
    assert len(tries) == 2
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert held == len(list(trainer.model.parameters()))
    assert callback.monitor.frozen


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_what_a_lost_run_left_frozen_thaws_and_what_the_user_froze_does_not(hf, tmp_path, caplog, lora):
    """As where the loop was another library's, or in a process that died: nobody could undo."""
    model = hf.llama(lora)
    by_user = next(name for name, p in model.named_parameters() if p.requires_grad and "gate_proj" in name)
    model.get_parameter(by_user).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    fresh = copy.deepcopy(model)
    config = grades.GradESConfig(language_attention_tau=ALWAYS, language_mlp_tau=NEVER, alpha=0, metric="gradient_norm")
    lost = grades.GradESMonitor(config, model, None, 10)
    model(**{key: torch.tensor([hf.rows()[0][key]]) for key in ("input_ids", "labels")}).loss.backward()
    lost.after_backward(1)
    model.zero_grad()
    lost.after_step(1)
    assert len(lost.frozen) == 8
    assert any(MARK in vars(module) for module in model.modules())
    model = copy.deepcopy(model)  # a copy, as of a pickle, keeps the marks
    model.load_state_dict(before)
    left = {name for name, p in model.named_parameters() if p.requires_grad}

    trainer, callback = hf.run(tmp_path / "a", hf.settings(), model)
    warnings = [record for record in caplog.records if "an earlier run left" in record.message]
    assert len(warnings) == 1
    assert warnings[0].levelname == "WARNING"
    assert not model.get_parameter(by_user).requires_grad
    assert len(left) < len([p for p in model.parameters() if p.requires_grad])
    assert all(MARK not in vars(module) and not module._forward_hooks for module in model.modules())
    plain, untouched = hf.run(tmp_path / "b", hf.settings(), fresh)
    assert callback.monitor.history() == untouched.monitor.history()
    assert hf.same(trainer.model, plain.model)


def test_what_is_frozen_stays_so_when_adapters_are_switched(hf):
    """As TRL does around the reference. A copy of the model has its own switches."""
    model = hf.llama({})
    untouched = [set(vars(module)) for module in model.modules()]
    monitor = grades.GradESMonitor(hf.settings(alpha=0.0, metric="gradient_norm"), model, None, 10)
    frozen = {name for name, p in model.named_parameters() if "self_attn" in name and p.requires_grad}
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    model(**{key: torch.tensor([hf.rows()[0][key]]) for key in ("input_ids", "labels")}).loss.backward()
    monitor.after_backward(1)
    monitor.after_step(1)
    copied = pickle.loads(pickle.dumps(model))
    for one in (copy.deepcopy(model), copied, model):
        with one.disable_adapter():
            assert not any(p.requires_grad for p in one.parameters())
        one.set_adapter("default")
        assert {name for name, p in one.named_parameters() if p.requires_grad} == every - frozen
    monitor.close()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == every
    assert [set(vars(module)) for module in model.modules()] == untouched
    assert {name for name, p in copied.named_parameters() if p.requires_grad} == every - frozen
    thaw(copied)
    copied.set_adapter("default")
    assert {name for name, p in copied.named_parameters() if p.requires_grad} == every
    assert not hf.ours(copied)


def test_a_lost_run_and_an_optimizer_made_after_it_is_an_error(hf):
    model = hf.llama()
    weight = model.model.layers[0].mlp.up_proj
    vars(weight)[MARK] = {"weight"}
    weight.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="1 tensors"):
        grades.GradESMonitor(grades.GradESConfig(), model, optimizer, 10)


@pytest.mark.parametrize("when", ["held-out rows", "end"])
def test_rollback_gives_the_last_weights_back(hf, tmp_path, when):
    """An interrupt while the model holds averages, or older averages of a part."""
    config = {"metric": "rollback", "compute_interval": 2, "alpha": 0.0, "average_weights": 0.5, "rollback_rows": 4}
    watcher, calls = hf.Weights(), []

    class Interrupted(hf.Trainer):
        def compute_loss_context_manager(self):
            if not torch.is_grad_enabled():
                calls.append(self.state.global_step)
                if (calls.count(4) == 2) if when == "held-out rows" else (calls.count(6) == 3):
                    raise KeyboardInterrupt
            return super().compute_loss_context_manager()

    model = hf.llama()
    callback = grades.GradEarlyStoppingCallback(hf.settings(**config, language_attention_tau=NEVER))
    trainer = Interrupted(
        model=model, args=hf.TrainingArguments(**hf.arguments(tmp_path, max_steps=6)), train_dataset=hf.rows(),
        eval_dataset=hf.rows()[:4], callbacks=[watcher, callback],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.equal(weight, watcher.at[calls[-1]][name]) for name, weight in hf.weights(model).items())
    assert model.training
    assert callback.held_out is None


def test_a_full_disk_is_a_warning(hf, tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("grades.outputs.write_text", full)
    trainer, _ = hf.run(tmp_path, hf.settings(save_stats=True, output_dir=str(tmp_path / "out")))
    assert trainer.state.global_step == 12
    assert "No space left" in caplog.text
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_no_run_overwrites_the_history_of_another(hf, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": 7}
    _, first = hf.run(tmp_path / "a", hf.settings(save_stats=True), **saving)
    _, second = hf.run(tmp_path / "b", hf.settings(save_stats=True), max_steps=10, **saving)
    assert "run_2" in caplog.text

    def held(folder):
        return json.loads((tmp_path / "grades_output" / folder / "grades_history.json").read_text())

    assert (held(".")["last_step"], held("run_2")["last_step"]) == (12, 10)
    assert (held(".")["run"], held("run_2")["run"]) == (first.run, second.run)
    # A resumed run is the same run, whichever it was.
    for folder, place in (("b", "run_2"), ("a", ".")):
        resume = str(tmp_path / folder / "checkpoint-7")
        hf.run(tmp_path / folder, hf.settings(save_stats=True), resume=resume, max_steps=9, **saving)
        assert held(place)["last_step"] == 9
    assert not (tmp_path / "grades_output" / "run_3").exists()
    hf.run(tmp_path / "c", hf.settings(save_stats=True, output_dir=None))
    assert (tmp_path / "c" / "grades_history.json").exists()
