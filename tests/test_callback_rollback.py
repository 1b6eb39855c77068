"""The metric rollback in transformers.Trainer: held-out losses, how a run ends, resume, the weights it leaves."""

import json
import os

import pytest
import torch
from tiny.grades import ALWAYS, NEVER
from tiny.processes import SHARDED, claim_gpus, run_two_ranks

from grades.held_out import HeldOut, row_losses

FLAGS = {"metric": "rollback", "compute_interval": 2, "alpha": 0.0, "average_weights": 0.5, "rollback_rows": 4}


def run(hf, folder, tau=NEVER, lora=None, **others):
    taus = {"language_attention_tau": tau, "language_mlp_tau": tau}
    return hf.run(folder, hf.settings(**FLAGS | taus), hf.llama(lora), held_out=hf.rows()[:6], **others)


def test_row_losses_are_what_the_model_says(hf):
    model = hf.llama()
    ids = torch.randint(0, 30, (3, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        found = row_losses(model(input_ids=ids).logits, labels, is_aligned=False)
        for i, (total, count) in enumerate(found):
            assert count == (labels[i, 1:] != -100).sum()
            assert total / count == pytest.approx(float(model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss))


@pytest.mark.parametrize("lora", [None, {}])
def test_it_measures_gains_and_ends_the_run_when_they_are_small(hf, tmp_path, lora):
    trainer, callback = run(hf, tmp_path / "never", lora=lora, max_steps=6)
    checks = callback.monitor.checks
    assert [set(check.get("gains", ())) for check in checks] == [set(), {"language"}, {"language"}]
    assert all(check["loss"] > 0 for check in checks[1:])
    trainer, callback = run(hf, tmp_path / "always", tau=ALWAYS, lora=lora, max_steps=6)
    assert trainer.state.global_step == 4
    assert len(callback.monitor.frozen) == hf.MATRICES
    assert any(parameter.requires_grad for parameter in trainer.model.parameters())  # again as before


def test_training_is_the_same_up_to_the_weights_it_ends_with(hf, tmp_path):
    """load_best_model_at_end or not: without a freeze the last weights are those of a run without the callback."""
    watched, plain = hf.Weights(), hf.Weights()
    run(hf, tmp_path / "a", watchers=[watched], max_steps=6)
    hf.run(tmp_path / "b", None, hf.llama(), [plain], max_steps=6)
    for step in (1, 4, 6):
        assert all(torch.equal(watched.at[step][name], plain.at[step][name]) for name in plain.at[step])


def test_a_resumed_run_is_the_whole_run(hf, tmp_path):
    flags = {"max_steps": 8, "save_steps": 4, "save_strategy": "steps"}
    whole, measured = run(hf, tmp_path / "whole", **flags)
    again, callback = run(hf, tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-4"), **flags)
    assert hf.same(whole.model, again.model)
    assert callback.monitor.checks == measured.monitor.checks


def test_a_run_that_had_ended_leaves_the_same_weights_when_it_is_resumed(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(HeldOut, "mean_loss", lambda self: 1.0 if self.averages.is_swapped else 2.0)
    flags = {"max_steps": 8, "save_steps": 2, "save_strategy": "steps"}
    ended, _ = run(hf, tmp_path / "run", tau=ALWAYS, **flags)
    assert ended.state.global_step == 4
    again, _ = run(hf, tmp_path / "run", tau=ALWAYS, resume=str(tmp_path / "run" / "checkpoint-4"), **flags)
    assert hf.same(ended.model, again.model)


def test_of_few_batches_none_stands_for_all(hf, tmp_path):
    arguments = hf.TrainingArguments(**hf.arguments(tmp_path) | {"per_device_eval_batch_size": 2})
    rows = hf.rows()[:12]
    for count, shares in ((4, (0, 4)), (6, (0, 6)), (8, (2, 6)), (10, (2, 8))):
        trainer = hf.Trainer(hf.llama(), arguments, train_dataset=rows, eval_dataset=rows)
        held_out = HeldOut(trainer, hf.settings(**FLAGS | {"rollback_rows": count}))
        assert tuple(len(held_out.losses(False, first)) for first in (True, False)) == shares


def test_it_asks_for_held_out_rows(hf, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        hf.run(tmp_path, hf.settings(**FLAGS), hf.llama(), max_steps=2)


@pytest.mark.parametrize(
    ("held_out", "problem"),
    [
        ([{"input_ids": [1, 2, 3]}] * 4, "no labels of tokens .* but input_ids"),
        ([{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 4, "the 4 rows of eval_dataset .* no label but -100"),
    ],
)
def test_rows_that_it_cannot_compare_are_named_before_the_first_step(hf, tmp_path, held_out, problem):
    watcher = hf.Weights()
    with pytest.raises(ValueError, match=problem):
        hf.run(tmp_path, hf.settings(**FLAGS), hf.llama(), [watcher], held_out=held_out, max_steps=4)
    assert not watcher.at


def test_of_several_sets_it_takes_the_first(hf, tmp_path):
    sets = {"a": hf.rows()[:6], "b": hf.rows()[6:9]}
    _, callback = hf.run(tmp_path, hf.settings(**FLAGS), hf.llama(), held_out=sets, max_steps=4)
    _, alone = run(hf, tmp_path / "alone", tau=ALWAYS, max_steps=4)
    assert callback.monitor.checks[1]["loss"] == alone.monitor.checks[1]["loss"]


def test_a_run_that_goes_on_with_other_rows_compares_with_these(hf, tmp_path):
    """Half of the matrices are frozen, so that each check looks whether the loss has risen since."""
    flags = FLAGS | {"language_attention_tau": ALWAYS, "language_mlp_tau": NEVER}
    others = {"held_out": hf.rows()[:6], "max_steps": 10, "save_steps": 5, "save_strategy": "steps"}
    hf.run(tmp_path, hf.settings(**flags), hf.llama(), **others)
    flags |= {"rollback_rows": 3}
    others |= {"resume": str(tmp_path / "checkpoint-5"), "per_device_eval_batch_size": 2}
    _, callback = hf.run(tmp_path, hf.settings(**flags), hf.llama(), **others)
    assert [check["rows"] for check in callback.monitor.checks[1:]] == [6, 4, 4, 4]
    assert 0 < len(callback.monitor.frozen) < hf.MATRICES


def test_masked_language_models_are_not_shifted(hf, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertForMaskedLM(config).eval()
    arguments = hf.TrainingArguments(**hf.arguments(tmp_path))
    trainer = hf.Trainer(model, arguments, train_dataset=hf.rows(), eval_dataset=hf.rows()[:4])
    [(total, count), *_] = HeldOut(trainer, hf.settings(**FLAGS)).losses(False, first=False)
    ids = torch.tensor([hf.rows()[0]["input_ids"]])
    with torch.no_grad():
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)


def one_rank(rank, port, folder):
    """In a process of its own: a run with sharded weights, two rows on each rank."""
    from tiny import trainer as hf

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    claim_gpus()
    others = SHARDED | {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "per_device_eval_batch_size": 2}
    others["fsdp"] = "full_shard" if hf.OLDEST else True
    trainer, callback = run(hf, folder, max_steps=8, **others)
    weights = hf.weights(trainer.model)  # of all ranks together
    if rank == 0:
        (folder / "checks.json").write_text(json.dumps(callback.monitor.checks))
        torch.save(weights, folder / "weights.pt")


@pytest.mark.slow
def test_sharded_weights_gain_and_train_as_whole_ones_do(hf, tmp_path, monkeypatch):
    run_two_ranks(monkeypatch, "tiny.trainer", one_rank, tmp_path)
    trainer, callback = run(hf, tmp_path / "alone", max_steps=8, per_device_eval_batch_size=2)
    theirs = json.loads((tmp_path / "checks.json").read_text())
    for ours, found in zip(callback.monitor.checks[1:], theirs[1:], strict=True):
        assert found["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert found["gains"]["language"] == pytest.approx(ours["gains"]["language"], rel=0.05)
    weights = torch.load(tmp_path / "weights.pt")
    for name, weight in hf.weights(trainer.model).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-3, msg=name)
