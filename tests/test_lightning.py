"""The example for PyTorch Lightning: it freezes, resumes and leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from tiny.grades import ALWAYS, NEVER

import grades

package = pytest.importorskip("pytorch_lightning")
hf = pytest.importorskip("tiny.trainer")

STEPS, FREEZES_AT = 8, 4


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """Trains for eight steps; returns the trainer, the module and the callback."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    from lightning_callback import GradESCallback

    class Module(package.LightningModule):
        def __init__(self, fails_at):
            super().__init__()
            self.model, self.at, self.fails_at = hf.llama(), {}, fails_at

        def training_step(self, batch, index):
            if self.global_step == self.fails_at:
                raise KeyError
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)

        def on_train_batch_end(self, *args):  # after the callback
            self.at[self.global_step] = hf.weights(self.model)

    def fitted(fails_at=None, accumulation=2, resume=None, **config):
        taus = {"language_attention_tau": ALWAYS, "language_mlp_tau": NEVER, "alpha": 0.3}
        callback = GradESCallback(
            grades.GradESConfig(**taus | config), part="model", history=str(tmp_path / "grades_history.json")
        )
        module = Module(fails_at)
        saving = package.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = package.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=accumulation, gradient_clip_val=1.0, callbacks=[saving, callback],
            default_root_dir=tmp_path,
        )  # fmt: skip
        row = {key: torch.tensor(value) for key, value in hf.rows()[0].items()}
        loader = torch.utils.data.DataLoader([row] * 64, batch_size=2)  # a resumed loader begins with its first row
        trainer.fit(module, loader, ckpt_path=resume and tmp_path / resume)
        return trainer, module, callback

    return fitted


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_freezes_for_good_and_gives_the_model_back(fit, tmp_path, accumulation):
    trainer, module, callback = fit(accumulation=accumulation)
    monitor = callback.monitor
    assert set(monitor.frozen.values()) == {FREEZES_AT}
    assert {name.split(".")[-2] for name in monitor.frozen} == {"self_attn"}
    for step in range(FREEZES_AT, STEPS):
        for name, weight in module.at[step].items():
            still = torch.equal(weight, module.at[step + 1][name])
            assert still == (name.removesuffix(".weight") in monitor.frozen), (name, step)
    assert trainer.callback_metrics["grades/frozen_share"] == pytest.approx(8 / 14)
    assert all(p.requires_grad for p in module.parameters())
    assert not hf.ours(module)
    assert json.loads((tmp_path / "grades_history.json").read_text()) == monitor.history()


def test_it_continues_from_a_checkpoint_and_ends_the_fit(fit, tmp_path):
    _, whole, first = fit()
    _, resumed, second = fit(resume="step=4.ckpt")
    assert min(resumed.at) >= FREEZES_AT
    assert second.monitor.history() == first.monitor.history()
    assert hf.same(resumed.model, whole.model)
    trainer, _, _ = fit(max_frozen_ratio=0.5)
    assert trainer.global_step == FREEZES_AT


def test_an_exception_leaves_nothing_behind(fit, tmp_path):
    with pytest.raises(KeyError):
        fit(fails_at=6)
    assert json.loads((tmp_path / "grades_history.json").read_text())["last_step"] == 6
