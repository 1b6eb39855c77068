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
from grades.config import GradESConfig
from grades.monitor import GradESMonitor
from grades.report import HISTORY_NAME

logger = logging.getLogger("grades")


class VLMGradEarlyStoppingCallback(TrainerCallback, ExportableState):
    """Freezes each projection matrix, or its adapter, when it has converged; ends the run when enough is frozen.

        Trainer(..., callbacks=[VLMGradEarlyStoppingCallback(VLMGradEarlyStoppingConfig(vision_tau=3.3))])

    On one device, with DataParallel, DDP and FSDP2; with DeepSpeed and FSDP1, which take the weights apart, training
    raises ValueError. `monitor` is the GradESMonitor of the latest run. At the end of training requires_grad is again
    what it was at its beginning.
    """

    config_class: type[VLMGradEarlyStoppingConfig] = VLMGradEarlyStoppingConfig

    def __init__(self, config: GradESConfig | Mapping[str, Any] | None = None) -> None:
        """config: settings, or their `as_arguments()`. Raises ValueError on impossible ones."""
        given: Any = config or {}
        if isinstance(given, Mapping):
            given = self.config_class(**given)
        elif type(given) is GradESConfig:
            given = VLMGradEarlyStoppingConfig(**vars(given))
        self.config: Any = dataclasses.replace(given)  # what they do to theirs later is not ours
        self.config.check()
        if ignored := self.config.without_effect():
            warnings.warn("options without effect: " + "; ".join(ignored), stacklevel=2)
        self.monitor: GradESMonitor | None = None
        self.saved_state: dict[str, Any] | None = None  # of the checkpoint, where the trainer restores callbacks
        self.trainer: Any = None  # while it trains
        self.shown_step = 0  # the last step whose gradients the monitor was shown
        self.has_ended = False  # in the run that the checkpoint is of

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """The model is wrapped, and weights and optimizer are those of the checkpoint where there is one."""
        self._hand_back()
        trainer, checkpoint = find_trainer()
        accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
        ddp = find_ddp(wrapped)
        check_parallelism(accelerator, ddp)
        optimizer = kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        on_round = None if ddp is None else lambda: rebuild_ddp(ddp, accelerator.ddp_handler)
        monitor = GradESMonitor(self.config, wrapped, optimizer, state.max_steps, logger.info, on_round)
        self.trainer, self.monitor, self.shown_step, self.has_ended = trainer, monitor, state.global_step, False
        if self._is_sharded:
            monitor.freezer.optimizer = None  # its state stays: torch loads a sharded optimizer whole or not at all
        if state.global_step > 0:
            self._resume(args, state, Path(checkpoint or ""))
        if monitor.enough_frozen():
            # Trainer makes one more step before it looks whether to stop; that step is to change nothing.
            self._say_why(state, "the run of the checkpoint had ended")
            self._thaw()
            self.has_ended = control.should_training_stop = True
        accelerator.unscale_gradients = self._unscale_gradients
        trainer.log = self._log
        return control

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer has clipped; where it does not clip, or not through accelerate, nobody has unscaled yet."""
        if self.shown_step > state.global_step:
            return
        if args.max_grad_norm and self._running.metric.reads_gradients:
            raise ValueError(
                f"metric {self.config.metric}: this trainer's clipping hides the gradient before it; set "
                "max_grad_norm=0, or take metric weight_change"
            )
        self.trainer.accelerator.unscale_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Trainer has stepped and cleared the gradients."""
        if not self.has_ended and self._running.after_step(state.global_step):
            self._say_why(state, f"the run ends at step {state.global_step:,} of {state.max_steps:,}")
            control.should_training_stop = control.should_log = True
            # What Trainer does besides at its last step.
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"
            control.should_save = control.should_save or args.save_strategy == "steps"
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write into the checkpoint the monitor's state, snapshots included, and the history so far."""
        run_folder = self.trainer._get_output_dir(trial=self.trainer._trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if state.is_world_process_zero or self._is_sharded:
            folder.mkdir(parents=True, exist_ok=True)
            path = self._state_path(args, folder)
            beside = path.with_suffix(".tmp")
            torch.save(self._running.state_dict(), beside)
            beside.replace(path)
        if state.is_world_process_zero:
            self._running.save_history(folder / HISTORY_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.config.save_stats and self.config.save_freezing_history and state.is_world_process_zero:
            folder = Path(self.config.output_dir or args.output_dir or "")
            folder.mkdir(parents=True, exist_ok=True)
            self._running.save_history(folder / HISTORY_NAME)
            draw_pictures(folder / HISTORY_NAME)
        self._hand_back()

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the settings and what is frozen; no tensors, and not the values of all checks."""
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
        """The file of the monitor's state; each rank has one where its snapshots are of its shards."""
        rank = f"-{args.process_index}-of-{args.world_size}" if self._is_sharded else ""
        return folder / f"grades_state{rank}.pt"

    def _say_why(self, state: TrainerState, what: str) -> None:
        """As a warning, which is shown where nobody has set up logging: the progress bar stops short of its end."""
        if state.is_world_process_zero:
            frozen, total = len(self._running.frozen), len(self._running.components)
            logger.warning(f"GradES: {what}, as {frozen} of {total} matrices are frozen")

    def _resume(self, args: TrainingArguments, state: TrainerState, checkpoint: Path) -> None:
        """Take up the run where the checkpoint left it."""
        path = self._state_path(args, checkpoint)
        states: Any = state.stateful_callbacks or {}
        exported = states.get(type(self).__name__)
        if path.is_file():
            self._running.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        elif exported and exported["attributes"]["saved_state"]:
            logger.warning(f"{path} is missing: what is frozen stays frozen, the rest is measured anew")
            fresh = self._running.state_dict()
            self._running.load_state_dict(fresh | exported["attributes"]["saved_state"])
        else:
            logger.warning(f"the checkpoint {checkpoint} holds no state of {type(self).__name__}: nothing is frozen")

    def _unscale_gradients(self, *args: Any, **kwargs: Any) -> None:
        """In place of the accelerator's, with which clipping begins: the gradients are whole, averaged and unscaled."""
        accelerator = self.trainer.accelerator
        type(accelerator).unscale_gradients(accelerator, *args, **kwargs)
        step = self.trainer.state.global_step + 1
        if self.has_ended:
            self.trainer.model.zero_grad()
        elif step > self.shown_step:
            self._running.after_backward(step)
        self.shown_step = step

    def _log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """In place of the trainer's: training logs get the frozen shares and the metric."""
        if "loss" in logs or "train_loss" in logs:
            logs = logs | self._running.scalars()
        type(self.trainer).log(self.trainer, logs, *args, **kwargs)

    def _thaw(self) -> None:
        """Let train again what was frozen; the record of it stays."""
        freezer = self._running.freezer
        freezer.prefix = False
        freezer.thaw(freezer.applied)

    def _hand_back(self) -> None:
        """Leave no trace in model and trainer; where training ended in an error, before the next one."""
        if self.trainer is not None:
            vars(self.trainer).pop("log", None)
            vars(self.trainer.accelerator).pop("unscale_gradients", None)
            self._running.freezer.on_round = None
            self._thaw()
            self.trainer = None


class GradEarlyStoppingCallback(VLMGradEarlyStoppingCallback):
    """The same with one tau for all components: for language models."""

    config_class = GradEarlyStoppingConfig


def find_trainer() -> tuple[Any, str | None]:
    """The Trainer that is calling, and the checkpoint that it resumes from: it tells a callback neither."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise ValueError("this callback works in the training loop of transformers.Trainer only")


def find_ddp(wrapped: torch.nn.Module) -> DistributedDataParallel | None:
    """The wrapper of a distributed model, which may be compiled."""
    inner = getattr(wrapped, "_orig_mod", wrapped)
    return inner if isinstance(inner, DistributedDataParallel) else None


def check_parallelism(accelerator: Any, ddp: DistributedDataParallel | None) -> None:
    """Raise ValueError for what takes weights or gradients out of their parameters, or cannot freeze."""
    kind = accelerator.distributed_type
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(
            f"{kind.value}: GradES needs whole parameters with their gradients; use DDP, or FSDP version 2"
        )
    if ddp is not None and ddp.static_graph:
        raise ValueError("ddp_static_graph True: must be False, as what trains changes with every freeze")


def rebuild_ddp(ddp: Any, handler: Any) -> None:
    """Make the wrapper anew in place, as the training loop holds it too: its reducer knows what trained at its making.

    handler: accelerate's, with the arguments that it was made with.
    """
    if not any(parameter.requires_grad for parameter in ddp.parameters()):
        return  # the run ends here
    arguments = handler.to_kwargs() if handler is not None else {}
    ddp.reducer = ddp.logger = None  # takes the old reducer's hooks off the parameters
    DistributedDataParallel.__init__(
        ddp, ddp.module, device_ids=ddp.device_ids, output_device=ddp.output_device, init_sync=False, **arguments
    )
    if handler is not None:
        handler.register_comm_hook(ddp)


def draw_pictures(history: Path) -> None:
    from grades.plots import draw

    try:
        draw(history)
    except ImportError:
        logger.warning(f"no pictures without matplotlib; once it is there: python -m grades report {history.parent}")
