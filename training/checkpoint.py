"""Checkpoints of a run: the model in nanoVLM's format, the optimizer, and the state of whatever has state."""

import contextlib
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from grades import GradESMonitor
from grades.averaging import AveragedWeights
from grades.files import write_text
from models.lora import lora_state_dict
from models.vision_language_model import VisionLanguageModel
from training.checkpoint_folder import (
    CARD,
    OPTIMIZER,
    SHARD,
    STATE,
    CheckpointError,
    begin,
    finishing,
    follow,
    point,
    prune,
    step_folder,
    unfinished,
)
from training.logging import RunLog
from training.model_card import ModelCard, is_edited
from training.parallel import Parallel
from training.resume import FORMAT, RunStart, load_file
from training.state import LoopState

LESS_MEMORY = (
    "A step takes less memory with a smaller --batch_size (and more --gradient_accumulation_steps), with "
    "--activation_checkpointing, --loss_chunk_size 1024 or a --max_tiles_per_batch; --dry_run tells how much. "
    "So the run continues: --resume FOLDER/checkpoints/crash (or FOLDER where there is none) --resume_override."
)


class Stateful(Protocol):
    """What a checkpoint can hold. Where each rank has a state of its own there is `load_rank_states(states)` in place
    of load_state_dict: it gets those of all ranks of the saved run, which may have had another number of ranks."""

    def state_dict(self) -> dict[str, Any]: ...


class MonitorState:
    """GradES in a checkpoint of sharded weights: what most metrics compare with is, on each rank, of its own shards."""

    def __init__(self, monitor: GradESMonitor):
        self.monitor = monitor

    def state_dict(self) -> dict[str, Any]:
        state = self.monitor.state_dict()
        return state | {"metric": None} if self.monitor.metric.is_of_shards else state

    def shard_state_dict(self) -> Any:
        """What this rank alone has; None where all have the same."""
        return self.monitor.state_dict()["metric"] if self.monitor.metric.is_of_shards else None

    def load_state_dict(self, state: dict[str, Any], shard: Any = None) -> None:
        """shard: None where the weights were sharded otherwise; then what is of shards is measured again first."""
        if shard is not None or self.monitor.metric.is_of_shards:
            state = state | {"metric": shard}
        self.monitor.load_state_dict(state)


class Checkpointer:
    """Saves and loads; knows nothing of what is inside the states.

    A checkpoint is one of a step, with the links `last` to the newest and `best` to the one with the lowest validation
    loss. Where the disk refuses, the run says so and continues: `error` holds the reason until the next one is saved.
    """

    def __init__(
        self,
        start: RunStart,
        model: VisionLanguageModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        stateful: dict[str, Any],
        keep: int,
        parallel: Parallel,
        say: Callable[[str], None],
        averages: AveragedWeights | None = None,
        card: ModelCard | None = None,
    ):
        """stateful: by name, what has a state; it is loaded in this order. keep: newest checkpoints that are kept.

        averages: saved as the model where they are the better weights; then the last ones are in the optimizer's state.
        card: says on rank 0 what the README.md of a checkpoint says.
        """
        self.card = card
        self.averages = averages
        self.saved_averages = False  # as the model of the latest checkpoint
        self.start, self.model, self.optimizer, self.tokenizer = start, model, optimizer, tokenizer
        self.stateful, self.keep, self.parallel, self.say = stateful, keep, parallel, say
        self.folder = start.folder
        self.saved_step: int | None = None
        self.refused_step: int | None = None  # of which the disk has taken no checkpoint
        self.best_there = LoopState().best  # of the steps that the disk has taken
        self.withheld = LoopState().best  # what would be best, had it taken that one
        self.error: str | None = None

    @contextlib.contextmanager
    def saved_on_error(self, state: LoopState, log: RunLog) -> Iterator[None]:
        """Within this context an error that ends the run leaves the checkpoint `crash` of what was trained."""
        workers = multiprocessing.active_children()
        try:
            yield
        except KeyboardInterrupt:  # a second Ctrl-C
            sys.exit(130)
        except Exception as error:
            log.close_bar()
            log.say(f"{type(error).__name__} after step {state.step:,}")
            if self.parallel.is_alone and self.saved_step != state.step:  # else the others are in the middle of a step
                log.say("saving what there is to checkpoints/crash")
                try:
                    self.save(state, "crash")
                except Exception as another:
                    log.say(f"NOT SAVED: {another}")
            if isinstance(error, torch.OutOfMemoryError):
                print(f"train.py: error: {str(error).splitlines()[0]}\n{LESS_MEMORY}", file=sys.stderr)
                sys.exit(1)
            if any(worker.exitcode for worker in workers):
                print(
                    "train.py: error: a process of --num_workers has died, as when memory runs out "
                    f"({type(error).__name__})",
                    file=sys.stderr,
                )
                sys.exit(1)
            if isinstance(error, ValueError | OSError):  # which, before the first step, are the user's
                raise RuntimeError(f"after step {state.step:,}") from error
            raise

    def last_saved(self) -> str:
        """Where the latest checkpoint is, in words."""
        last = self.folder / "checkpoints" / "last"
        return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved yet"

    def load(self) -> None:
        """Take up the state of the checkpoint that the run resumes from, whose weights the model has already.

        Raises ValueError where a state does not fit.
        """
        if not self.start.state:
            return
        saved, self.start.state = self.start.state, {}
        assert self.start.checkpoint is not None
        if self.card is not None:
            self.card.take(saved)
        if self.start.checkpoint.resolve().is_relative_to(self.folder.resolve()):
            self.saved_step = saved["step"]
            self.saved_averages = saved["states"].get("averages", {}).get("is_swapped", False)
        self._load_optimizer(saved)
        shards: dict[str, Any] = {}
        if (saved["kind"], saved["world_size"]) == ("fsdp", self.parallel.world_size) and self.parallel.kind == "fsdp":
            shards = load_file(self.start.checkpoint / SHARD.format(self.parallel.rank))
        for name, part in self.stateful.items():
            if (state := saved["states"].get(name)) is None:
                continue
            if hasattr(part, "load_rank_states"):
                part.load_rank_states(state)
            elif hasattr(part, "shard_state_dict"):
                part.load_state_dict(state, shards.get(name))
            else:
                part.load_state_dict(state)
        if self.averages is None and "averages" in saved["states"]:
            self._leave_averages(saved["states"]["averages"])

    def _leave_averages(self, averages: dict[str, Any]) -> None:
        """This run averages no more: train on from the last weights, and hold nothing of the averages."""
        former = AveragedWeights(self.model.parameters(), self.optimizer, 0)
        former.load_state_dict(averages)  # which swaps them back
        former.settle(former.parameters, to="last")
        self.stateful["loop"].averaged_is_better = False

    def _load_optimizer(self, saved: dict) -> None:
        """Take up the moments; peak learning rates and the like stay as the settings have them."""
        groups, state = saved["optimizer"]["param_groups"], saved["optimizer"].get("state")
        own = self.optimizer.state_dict()["param_groups"]
        if [(g["name"], g["params"]) for g in own] != [(g["name"], g["params"]) for g in groups]:
            raise ValueError(
                "--lr_mp, --lr_vision_backbone, --lr_language_backbone: must be 0 where the saved run has 0"
            )
        groups = [group | {"lr": other["lr"]} for group, other in zip(own, groups, strict=True)]
        if self.parallel.sharded is not None or state is None:
            from training.sharding import own_part, read_optimizer

            assert self.start.checkpoint is not None
            if state is None:
                folder = self.start.checkpoint / OPTIMIZER
                state = read_optimizer(folder, self.model, self.optimizer, self.parallel.hosts)
            else:
                state = own_part(self.optimizer, state)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def save_beginning(self, state: LoopState) -> None:
        """Where the run begins at a checkpoint of another run, save that step in its own folder too, before it is
        evaluated. All ranks must call it.

        The best step of the other run is not in this folder, so what `best` leads to is the best from here on.
        """
        if self.saved_step is not None or not state.resumed_at:
            return
        if state.best_step != state.step:
            state.best_step = state.best_value = None
        self.save(state)

    def save(self, state: LoopState, name: str | None = None) -> None:
        """Write the checkpoint of this step, or `name`. All ranks must call it; rank 0 writes, sharded ones their part.

        Raises what a state_dict raises, before anything is written: NonFiniteLossError.
        """
        averaged = self.averages is not None and state.averaged_is_better
        if state.step == self.refused_step == self.withheld[0]:
            state.best = self.withheld  # this time it may be there
        else:
            self._settle_best(state)
        with self.averages.applied() if averaged and self.averages is not None else contextlib.nullcontext():
            is_written = self._save(state, name)
        if is_written:
            self.saved_step, self.saved_averages, self.refused_step = state.step, averaged, None
            self.mark_best(state)
        elif self.saved_step != state.step:
            self.refused_step = state.step
            self._settle_best(state)

    def _save(self, state: LoopState, name: str | None) -> bool:
        """Whether the disk took it."""
        folder = step_folder(self.folder, state.step) if name is None else self.folder / "checkpoints" / name
        sharded, problem = self.parallel.sharded, None
        states = {}
        for key, part in self.stateful.items():
            states[key] = part.state_dict()
            if hasattr(part, "load_rank_states"):
                states[key] = self.parallel.gather(states[key])
        optimizer = self.optimizer.state_dict()
        if sharded is not None:
            problem = self._write_shards(folder)
            del optimizer["state"]
        model = self.model if sharded is None else sharded.whole(self.parallel.is_main)
        content = self.start.identity | {
            "format": FORMAT,
            "step": state.step,
            "best_step": state.best_step,
            "kind": self.parallel.kind,
            "world_size": self.parallel.world_size,
            "optimizer": optimizer,
            "lora": lora_state_dict(model),
            "states": states,
        }
        return self.parallel.from_main(lambda: self._write(folder, model, content, problem, state))

    def mark_best(self, state: LoopState) -> None:
        """Let `best` lead to the checkpoint of this step, if that was saved and is the best so far.

        Where an evaluation has found the other of last and averaged weights to be better, it is saved again with those.
        A step that the disk refused is not the best: nothing could lead to it.
        """
        self._settle_best(state)
        if self.saved_step == state.step and self.saved_averages != state.averaged_is_better:
            self.save(state)
            return
        if self.parallel.is_main:
            self._point_to_best(state)
        self.describe(state)

    def _settle_best(self, state: LoopState) -> None:
        """Let the state's best be one that is there, where the disk has refused the present step."""
        if state.best_step == state.step == self.refused_step:
            self.withheld, state.best = state.best, self.best_there
        elif state.best_step != state.step or self.saved_step == state.step:
            self.best_there = state.best

    def _point_to_best(self, state: LoopState) -> None:
        """Let `best` lead to the checkpoint of the best step, if it is there and `best` leads elsewhere."""
        if state.best_step is None:
            return
        folder = step_folder(self.folder, state.best_step)
        try:
            if folder.is_dir() and follow(folder.with_name("best")).name != folder.name:
                point(folder.with_name("best"), folder)
                prune(self.folder, self.keep)  # the one that was the best until now
        except OSError as error:
            self.say(f"checkpoints/best could not be brought up to date ({error}); the next checkpoint tries it again")

    def describe(self, state: LoopState, test: dict[str, float | None] | None = None) -> None:
        """Write the model card of the checkpoint of this step, if there is one, again: with what was measured since.

        test: the numbers of the test at the end. What a user has edited stays.
        """
        folder = step_folder(self.folder, state.step)
        if self.card is None or self.saved_step != state.step or not folder.is_dir():
            return
        if not is_edited(folder / CARD):
            self._write_card(folder, self.card, state, test)

    def _write_card(
        self, folder: Path, card: ModelCard, state: LoopState, test: dict[str, float | None] | None = None
    ) -> None:
        """A checkpoint without a card is one: what keeps a card from being written ends nothing."""
        try:
            write_text(folder / CARD, card.text(state, test))
        except (OSError, ValueError) as error:
            self.say(f"{folder / CARD} could not be written: {error}")

    def _write(
        self, folder: Path, model: VisionLanguageModel, content: dict, problem: str | None, state: LoopState
    ) -> bool:
        """Write the checkpoint; then the link `last`, and the oldest go. Whether it is there. problem: why the
        shards are not there."""
        is_written = False
        try:
            if problem is not None:
                shutil.rmtree(unfinished(folder), ignore_errors=True)
                raise CheckpointError(f"{folder.name} could not be written ({problem})")
            with finishing(folder, content["step"]) as beside:
                if self.parallel.sharded is None:
                    begin(folder)
                model.save_pretrained(beside)
                self.tokenizer.save_pretrained(beside)
                torch.save(content, beside / STATE)
                if is_edited(folder / CARD):  # of the checkpoint whose place it takes
                    shutil.copyfile(folder / CARD, beside / CARD)
                elif self.card is not None:
                    self.card.take(content)
                    self._write_card(beside, self.card, state)
            is_written = True
            if folder.name.startswith("step_"):
                point(folder.with_name("last"), folder)
                self._point_to_best(state)  # which the disk may have refused; what it leads to is not removed
                prune(self.folder, self.keep)
            self.error = None
        except (CheckpointError, OSError) as error:
            self.error = str(error)
            self.say(f"NOT SAVED: {error}; earlier checkpoints are as they were, the next one is tried as usual")
        return is_written

    def _write_shards(self, folder: Path) -> str | None:
        """Let each rank write its part of the optimizer and of the states. Returns on rank 0 why that has failed."""
        beside, problem, parallel = unfinished(folder), None, self.parallel
        assert parallel.sharded is not None

        def begin_folder() -> None:
            with contextlib.suppress(OSError):
                begin(folder)

        parallel.from_main(begin_folder)
        if parallel.any(not beside.is_dir()):
            problem = f"{beside} could not be made, or is not on a file system that all nodes share"
        else:
            try:
                parallel.sharded.write_optimizer(beside / OPTIMIZER, self.optimizer, parallel.hosts)
                parts = {k: v.shard_state_dict() for k, v in self.stateful.items() if hasattr(v, "shard_state_dict")}
                torch.save(parts, beside / SHARD.format(parallel.rank))
            except Exception as error:  # of a full disk each library has an exception of its own
                problem = str(error)
        return next(filter(None, parallel.gather(problem)), None)
