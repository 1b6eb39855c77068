"""GradES for transformers.Trainer and what is built on it (TRL, Unsloth): callbacks that drive a GradESMonitor."""

import dataclasses
import inspect
import json
import logging
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grades.advice import advice
from grades.callback_config import GradEarlyStoppingConfig, VLMGradEarlyStoppingConfig
from grades.compat import AuthorsInterface
from grades.config import ROLLBACK, GradESConfig
from grades.files import write_text, written_beside
from grades.held_out import HeldOut
from grades.marks import thaw_leftovers
from grades.monitor import GradESMonitor
from grades.optimizers import check_optimizer
from grades.outputs import write_outputs
from grades.report import HISTORY_NAME
from grades.undo import LoopCallback, Patch, is_told
from grades.watched import empty_towers

logger = logging.getLogger("grades")


class VLMGradEarlyStoppingCallback(AuthorsInterface, LoopCallback, ExportableState):
    """Freezes each projection matrix, or its adapter, when it has converged; ends the run when enough is frozen.

        Trainer(..., callbacks=[VLMGradEarlyStoppingCallback(VLMGradEarlyStoppingConfig(vision_tau=3.3))])

    Works on one device, with DataParallel, DDP and FSDP2. Training raises ValueError with DeepSpeed and FSDP1, which
    take the weights apart. `monitor` is the GradESMonitor of the latest run. Whatever ends a training, an exception
    too, its history and pictures are written and model, optimizer, trainer and accelerator are as they were before.
    """

    config_class: type[VLMGradEarlyStoppingConfig] = VLMGradEarlyStoppingConfig
    expected_towers: tuple[str, ...] = ("vision", "language")

    def __init__(self, config: GradESConfig | Mapping[str, Any] | None = None) -> None:
        """config: settings, or a dictionary of them. Raises ValueError on impossible ones, TypeError on something else.

        What is set on the configuration until training begins holds for that training.
        """
        super().__init__()
        self.trainer: Any = None  # set during training
        self.monitor: GradESMonitor | None = None
        self.config = {} if config is None else config
        settings = self._config
        settings.check()
        if ignored := settings.without_effect():
            warnings.warn("options without effect: " + "; ".join(ignored), stacklevel=2)
        self.saved_state: dict[str, Any] | None = None  # from the checkpoint, where the trainer restores callbacks
        self.patches: list[Patch] = []  # of methods of the trainer and its accelerator, during training
        self.run = ""  # id of the latest run, which a resumed run keeps
        self.held_out: HeldOut | None = None  # with the metric rollback
        self.shown_step = 0  # the last step whose gradients the monitor has read
        self.has_ended = False  # the checkpoint is of a run that had ended

    @property
    def config(self) -> Any:
        """The settings: the object that was given, and during training a copy of it that refuses changes."""
        return self._config if self.trainer is None else self._running.config

    @config.setter
    def config(self, given: GradESConfig | Mapping[str, Any]) -> None:
        if self.trainer is not None:
            raise AttributeError("config: cannot be replaced during training; set it before")
        if isinstance(given, Mapping):
            given = self.config_class(**given)
        elif type(given) is GradESConfig:
            given = VLMGradEarlyStoppingConfig(**dataclasses.asdict(given))
        if not isinstance(given, VLMGradEarlyStoppingConfig):
            raise TypeError(
                f"config {given!r}: must be a {self.config_class.__name__}, as "
                f"{self.config_class.__name__}(alpha=0.5), or a dictionary of its settings"
            )
        self._config: VLMGradEarlyStoppingConfig = given

    def before_loop(self, trainer: Any) -> None:
        """Thaw what an earlier run left frozen, before the optimizer is made of what trains. Raises ValueError where
        weights are going to be taken apart.
        """
        self._end()
        check_parallelism(trainer.accelerator, None)
        thaw_leftovers(trainer.model, trainer.optimizer)

    def after_loop(self) -> None:
        """Whatever ended it: where that was an exception, on_train_end was not called."""
        self._end()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Make the monitor. The model is wrapped now, and on a resume holds the checkpoint's weights and optimizer."""
        self._end()
        trainer, checkpoint = find_trainer()
        if not is_told(trainer):
            logger.warning(
                "GradES: Trainer._inner_training_loop was replaced after this trainer was made. If an exception ends "
                "this training, what is frozen stays frozen until the next training with a GradES callback. To prevent "
                "this, make the trainer after whatever replaces the loop (with Unsloth, load the model first)"
            )
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
        self.run = uuid.uuid4().hex
        for tower in empty_towers(monitor.components, self.expected_towers):
            logger.warning(
                f"{type(self).__name__}: no trainable projection matrix in the {tower} tower, so {tower}_tau has no "
                "effect; for a model of one tower take GradEarlyStoppingCallback"
            )
        if state.global_step == 0:
            for line in advice(monitor, getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)):
                logger.warning(f"GradES: {line}")
        self.begin_record()
        check_optimizer(optimizer, monitor.metric.reads_gradients, monitor.freezer.waits)
        if self._is_sharded:
            monitor.freezer.optimizer = None  # keep its state: torch cannot load a part of a sharded optimizer
        if state.global_step > 0:
            self._resume(args, state, Path(checkpoint or ""))
        if monitor.enough_frozen():
            # Trainer makes one more step before it checks whether to stop; that step must change nothing.
            self._say_why(state, "the run of the checkpoint had ended")
            monitor.freezer.prefix = False
            monitor.freezer.unfreeze(monitor.freezer.applied)
            self.has_ended = control.should_training_stop = True
        self.patches = [
            Patch(accelerator, "unscale_gradients", self._watch_gradients), Patch(trainer, "log", self._add_to_logs)
        ]  # fmt: skip
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
        enough = not self.has_ended and self._running.after_step(state.global_step)
        self.log_to_wandb(state.global_step)
        if enough:
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
        if args.should_save or self._is_sharded:  # with save_on_each_node the first process of each
            folder.mkdir(parents=True, exist_ok=True)
            with written_beside(self._state_path(args, folder)) as path:
                averages = {} if self.held_out is None else {"averages": self.held_out.state_dict()}
                torch.save(self._running.state_dict() | averages | {"run": self.run}, path)
        if state.is_world_process_zero:
            write_text(folder / HISTORY_NAME, json.dumps(self._history()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave model and trainer as they were, and write the history and the pictures. With the metric rollback the
        model gets the averaged weights where they are better (not where the trainer loads the best checkpoint).
        """
        try:
            if self.held_out is not None and not args.load_best_model_at_end:
                self.held_out.take_better()
                self.held_out = None  # the weights that the model has now stay
        finally:
            self._end()

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: the settings and what is frozen, without tensors and the values of all checks."""
        saved = self.saved_state
        if self.monitor is not None:
            saved = {k: v for k, v in self.monitor.state_dict().items() if k not in ("metric", "checks")}
            saved["run"] = self.run
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
            self.run = saved.get("run") or self.run
        elif exported and exported["attributes"]["saved_state"]:
            logger.warning(f"{path} is missing: what is frozen stays frozen, the rest is measured from the beginning")
            saved = exported["attributes"]["saved_state"]
            self._running.load_state_dict(self._running.state_dict() | saved)
            self.run = saved.get("run") or self.run
        else:
            logger.warning(f"the checkpoint {checkpoint} holds no state of {type(self).__name__}: nothing is frozen")

    def _watch_gradients(self, unscale: Callable[..., Any]) -> Callable[..., Any]:
        """The accelerator's method with which clipping begins: after it gradients are whole and unscaled."""

        def watched(*args: Any, **kwargs: Any) -> None:
            unscale(*args, **kwargs)
            if self.trainer is None:
                return
            step = self.trainer.state.global_step + 1
            if self.has_ended:
                self.trainer.model.zero_grad()
            elif step > self.shown_step:
                self._running.after_backward(step)
            self.shown_step = step

        return watched

    def _add_to_logs(self, log: Callable[..., Any]) -> Callable[..., Any]:
        """The trainer's method: training logs get the frozen shares and the metric."""

        def added(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self.trainer is not None and ("loss" in logs or "train_loss" in logs):
                logs = logs | self._running.scalars()
            log(logs, *args, **kwargs)

        return added

    def _history(self) -> dict[str, Any]:
        return self._running.history() | {"run": self.run}

    def _end(self) -> None:
        """Leave no trace in model, trainer and accelerator, then write the history and the pictures. Once per run."""
        if (trainer := self.trainer) is None:
            return
        if self.held_out is not None and self.held_out.averages.is_swapped:
            self.held_out.averages.swap()
        for patch in self.patches:
            patch.undo()
        self._running.close()
        self.patches, self.held_out, self.trainer = [], None, None
        wanted = (self.config.save_stats or self.config.save_freezing_history) and self._running.last_step > 0
        if wanted and trainer.is_world_process_zero():
            folder = self.config.output_dir or trainer._get_output_dir(trial=trainer._trial) or ""
            write_outputs(
                self._history(), Path(folder), self.write_files if self.config.save_freezing_history else None
            )


class GradEarlyStoppingCallback(VLMGradEarlyStoppingCallback):
    """VLMGradEarlyStoppingCallback with one tau for all components: for models of one tower."""

    config_class = GradEarlyStoppingConfig
    expected_towers = ()
    names_towers = False


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
