"""GradES in PyTorch Lightning: a callback around GradESMonitor, for one device and one optimizer.

    from lightning_callback import GradESCallback
    trainer = Trainer(max_steps=1000, callbacks=[GradESCallback(GradESConfig(language_tau="auto"), part="model")])

Checkpoints of the trainer hold its state, so `trainer.fit(module, ckpt_path=...)` continues it.
"""

from typing import Any

from pytorch_lightning import Callback  # with the package lightning: from lightning.pytorch import Callback

from grades import GradESConfig, GradESMonitor


class GradESCallback(Callback):
    """Freezes each projection matrix when it has converged; ends the fit when enough is frozen."""

    def __init__(self, config: GradESConfig, part: str = "", history: str = "grades_history.json") -> None:
        """part: the module that training_step calls, by its name in the LightningModule; history: file to write."""
        config.check()
        self.config, self.part, self.history = config, part, history
        self.monitor: GradESMonitor | None = None
        self.saved: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1 or len(trainer.optimizers) != 1:
            raise ValueError(
                f"{trainer.world_size} processes and {len(trainer.optimizers)} optimizers: GradESCallback needs "
                "devices=1 and one optimizer"
            )
        model, steps = pl_module.get_submodule(self.part), int(trainer.estimated_stepping_batches)
        self.monitor = GradESMonitor(self.config, model, trainer.optimizers[0], steps)
        if self.saved is not None:
            self.monitor.load_state_dict(self.saved)
            self.saved = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Lightning has accumulated and unscaled the gradients, and has not clipped them yet."""
        assert self.monitor is not None
        self.monitor.after_backward(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.monitor is not None
        if trainer.global_step > self.monitor.last_step:  # not within an accumulation
            trainer.should_stop = self.monitor.after_step(trainer.global_step) or trainer.should_stop
            pl_module.log_dict(self.monitor.scalars())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict or None

    def _close(self) -> None:
        """Leave the model as it was, and write what happened."""
        if self.monitor is not None and not self.monitor.is_closed:
            self.monitor.close()
            self.monitor.save_history(self.history)
