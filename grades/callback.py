"""GradES for transformers.Trainer and what is built on it (TRL, Unsloth): callbacks that drive a GradESMonitor."""

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grades.callback_config import GradEarlyStoppingConfig, VLMGradEarlyStoppingConfig
from grades.config import ROLLBACK, GradESConfig
from grades.files import written_beside
from grades.held_out import HeldOut
from grades.monitor import GradESMonitor
from grades.report import HISTORY_NAME
from grades.watched import empty_towers

logger = logging.getLogger("grades")


class VLMGradEarlyStoppingCallback(TrainerCallback, ExportableState):
    """Freezes each projection matrix, or its adapter, when it has converged; ends the run when enough is frozen.

        Trainer(..., callbacks=[VLMGradEarlyStoppingCallback(VLMGradEarlyStoppingConfig(vision_tau=3.3))])

    Works on one device, with DataParallel, DDP and FSDP2. Training raises ValueError with DeepSpeed and FSDP1, which
    take the weights apart. `monitor` is the GradESMonitor of the latest run. After training requires_grad is again what
    it was before.
    """

    config_class: type[VLMGradEarlyStoppingConfig] = VLMGradEarlyStoppingConfig
    expected_towers: tuple[str, ...] = ("vision", "language")

    def __init__(self, config: GradESConfig | Mapping[str, Any] | None = None) -> None:
        """config: settings, or their `as_arguments()`. Raises ValueError on impossible ones."""
        given: Any = config or {}
        if isinstance(given, Mapping):
            given = self.config_class(**given)
        elif type(given) is GradESConfig:
            given = VLMGradEarlyStoppingConfig(**vars(given))
        self.config: Any = dataclasses.replace(given)  # a copy, as the caller may change theirs later
        self.config.check()
        if ignored := self.config.without_effect():
            warnings.warn("options without effect: " + "; ".join(ignored), stacklevel=2)
        self.monitor: GradESMonitor | None = None
        self.saved_state: dict[str, Any] | None = None  # from the checkpoint, where the trainer restores callbacks
        self.trainer: Any = None  # set during training
        self.held_out: HeldOut | None = None  # with the metric rollback
        self.shown_step = 0  # the last step whose gradients the monitor has read
        self.has_ended = False  # the checkpoint is of a run that had ended

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Make the monitor. The model is wrapped now, and on a resume holds the checkpoint's weights and optimizer."""
        self._hand_back()
        trainer, checkpoint = find_trainer()
        accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
        ddp = find_ddp(wrapped)
        check_parallelism(accelerator, ddp)
        optimizer = kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        rewrap = None if ddp is None else lambda: rebuild_ddp(ddp, accelerator.ddp_handler)
        self.held_out = held_out = HeldOut(trainer, self.config) if self.config.metric == ROLLBACK else None
        monitor = GradESMonitor(
            self.config, wrapped, optimizer, state.max_steps, logger.info, detail=logger.debug, rewrap=rewrap,
            averages=held_out.averages if held_out else None, evaluate=held_out.losses if held_out else None,
        )  # fmt: skip
        self.trainer, self.monitor, self.shown_step, self.has_ended = trainer, monitor, state.global_step, False
        for tower in empty_towers(monitor.components, self.expected_towers):
            logger.warning(
                f"{type(self).__name__}: no trainable projection matrix in the {tower} tower, so {tower}_tau has no "
                "effect; for a model of one tower take GradEarlyStoppingCallback"
            )
        if self._is_sharded:
            monitor.freezer.optimizer = None  # keep its state: torch cannot load a part of a sharded optimizer
        if state.global_step > 0:
            self._resume(args, state, Path(checkpoint or ""))
        if monitor.enough_frozen():
            # Trainer makes one more step before it checks whether to stop; that step must change nothing.
            self._say_why(state, "the run of the checkpoint had ended")
            self._unfreeze_all()
            self.has_ended = control.should_training_stop = True
        accelerator.unscale_gradients = self._unscale_gradients
        trainer.log = self._log
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer has clipped. Without clipping, or clipping without accelerate, gradients are unscaled here first."""
        if self.shown_step > state.global_step:
            return
        if args.max_grad_norm and self._running.metric.reads_gradients:
            raise ValueError(
                f"metric {self.config.metric}: this trainer clips before the callback can read the gradients; set "
                "max_grad_norm=0, or use metric weight_change"
            )
        self.trainer.accelerator.unscale_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure and freeze. Trainer has stepped and cleared the gradients."""
        if self.held_out is not None and not self.has_ended:
            self.held_out.averages.update()
        if not self.has_ended and self._running.after_step(state.global_step):
            self._say_why(state, f"the run ends at step {state.global_step:,} of {state.max_steps:,}")
            control.should_training_stop = control.should_log = True
            # As Trainer does at its last step.
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"
            control.should_save = control.should_save or args.save_strategy == "steps"
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the monitor's state, tensors included, and the history so far into the checkpoint."""
        run_folder = self.trainer._get_output_dir(trial=self.trainer._trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero or self._is_sharded:
            folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self._state_path(args, folder)) as path:
                averages = {} if self.held_out is None else {"averages": self.held_out.state_dict()}
                torch.save(self._running.state_dict() | averages, path)
        if state.is_world_process_zero:
            self._running.save_history(folder / HISTORY_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the history and the pictures, and leave model and trainer as they were. With the metric rollback the
        model gets the averaged weights where they are better (not where the trainer loads the best checkpoint).
        """
        if self.held_out is not None and not args.load_best_model_at_end and not self.has_ended:
            self.held_out.take_better()
        if self.config.save_stats and self.config.save_freezing_history and state.is_world_process_zero:
            folder = Path(self.config.output_dir or args.output_dir or "")
            folder.mkdir(parents=True, exist_ok=True)
            self._running.save_history(folder / HISTORY_NAME)
            draw_pictures(folder / HISTORY_NAME)
        self._hand_back()

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the settings and what is frozen, without tensors and the values of all checks."""
        saved = self.saved_state
        if self.monitor is not None:
            saved = {k: v for k, v in self.monitor.state_dict().items() if k not in ("metric", "checks")}
        return {"args": {"config": self.config.as_arguments()}, "attributes": {"saved_state": saved}}

    @property
    def _running(self) -> GradESMonitor:
        assert self.monitor is not None, "training has begun"
        return self.monitor

    @property
    def _is_sharded(self) -> bool:
        return any(hasattr(component.weights[0], "placements") for component in self._running.components)

    def _state_path(self, args: TrainingArguments, folder: Path) -> Path:
        """The file of the monitor's state; one per rank where weights are sharded."""
        rank = f"-{args.process_index}-of-{args.world_size}" if self._is_sharded else ""
        return folder / f"grades_state{rank}.pt"

    def _say_why(self, state: TrainerState, what: str) -> None:
        """Explain why training ends early: as a warning, which is shown even where logging is not set up."""
        if state.is_world_process_zero:
            frozen, total = len(self._running.frozen), len(self._running.components)
            logger.warning(f"GradES: {what}, as {frozen} of {total} matrices are frozen")

    def _resume(self, args: TrainingArguments, state: TrainerState, checkpoint: Path) -> None:
        """Load the monitor's state from the checkpoint."""
        path = self._state_path(args, checkpoint)
        states: Any = state.stateful_callbacks or {}
        exported = states.get(type(self).__name__)
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if self.held_out is not None and "averages" in saved:
                self.held_out.load_state_dict(saved["averages"])
            self._running.load_state_dict(saved)
        elif exported and exported["attributes"]["saved_state"]:
            logger.warning(f"{path} is missing: what is frozen stays frozen, the rest is measured from the beginning")
            new = self._running.state_dict()
            self._running.load_state_dict(new | exported["attributes"]["saved_state"])
        else:
            logger.warning(f"the checkpoint {checkpoint} holds no state of {type(self).__name__}: nothing is frozen")

    def _unscale_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the accelerator's method, with which clipping begins: after it gradients are whole and unscaled."""
        accelerator = self.trainer.accelerator
        type(accelerator).unscale_gradients(accelerator, *args, **kwargs)
        step = self.trainer.state.global_step + 1
        if self.has_ended:
            self.trainer.model.zero_grad()
        elif step > self.shown_step:
            self._running.after_backward(step)
        self.shown_step = step

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Replaces the trainer's method: training logs get the frozen shares and the metric."""
        if "loss" in logs or "train_loss" in logs:
            logs = logs | self._running.scalars()
        type(self.trainer).log(self.trainer, logs, *args, **kwargs)

    def _unfreeze_all(self) -> None:
        """Set requires_grad of what was frozen; the record of it stays."""
        freezer = self._running.freezer
        freezer.prefix = False
        freezer.unfreeze(freezer.applied)

    def _hand_back(self) -> None:
        """Leave no trace in model and trainer. After training that ended in an error, before the next training."""
        if self.trainer is not None:
            vars(self.trainer).pop("log", None)
            vars(self.trainer.accelerator).pop("unscale_gradients", None)
            self._running.freezer.rewrap = None
            self._unfreeze_all()
            self.trainer = None


class GradEarlyStoppingCallback(VLMGradEarlyStoppingCallback):
    """VLMGradEarlyStoppingCallback with one tau for all components: for models of one tower."""

    config_class = GradEarlyStoppingConfig
    expected_towers = ()


def find_trainer() -> tuple[Any, str | None]:
    """The calling Trainer and the checkpoint that it resumes from, found on the stack: it passes a callback neither."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise ValueError("this callback works in the training loop of transformers.Trainer only")


def find_ddp(wrapped: torch.nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper in Trainer's wrapped model, which may be compiled; None without DDP."""
    inner = getattr(wrapped, "_orig_mod", wrapped)
    return inner if isinstance(inner, DistributedDataParallel) else None


def check_parallelism(accelerator: Any, ddp: DistributedDataParallel | None) -> None:
    """Raise ValueError where weights or gradients are not in the parameters, or parameters cannot freeze."""
    kind = accelerator.distributed_type
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(
            f"{kind.value}: GradES needs whole parameters with their gradients; use DDP, or FSDP version 2"
        )
    if ddp is not None and ddp.static_graph:
        raise ValueError("ddp_static_graph True: must be False, as every freeze changes what trains")


def rebuild_ddp(ddp: Any, handler: Any) -> None:
    """Wrap again: DDP waits for the gradients of all that trained when it was made. In place, as Trainer holds it too.

    handler: accelerate's, with the arguments that DDP was made with.
    """
    if not any(parameter.requires_grad for parameter in ddp.parameters()):
        return  # everything is frozen and the run ends; DDP refuses a model that does not train
    arguments = handler.to_kwargs() if handler is not None else {}
    ddp.reducer = ddp.logger = None  # takes the old reducer's hooks off the parameters
    DistributedDataParallel.__init__(
        ddp, ddp.module, device_ids=ddp.device_ids, output_device=ddp.output_device, init_sync=False, **arguments
    )
    if handler is not None:
        handler.register_comm_hook(ddp)


def draw_pictures(history: Path) -> None:
    """Draw the pictures beside the history; without matplotlib only a warning."""
    from grades.plots import draw

    try:
        draw(history)
    except ImportError:
        logger.warning(f"no pictures without matplotlib; install it, then: python -m grades report {history.parent}")
