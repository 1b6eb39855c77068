"""The metric rollback in transformers.Trainer: held-out losses, how a run ends, resume, the weights it leaves."""

import pytest
import torch
from tiny.grades import ALWAYS, NEVER

from grades.held_out import row_losses

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


def test_it_asks_for_held_out_rows(hf, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        hf.run(tmp_path, hf.settings(**FLAGS), hf.llama(), max_steps=2)
