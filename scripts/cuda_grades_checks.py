"""Sections of check_cuda.py: whether freezing, GradES's metrics, resuming and several processes are right."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval.evaluation import row_losses
from grades import GradESConfig, GradESMonitor
from grades.averaging import AveragedWeights
from grades.config import METRICS, ROLLBACK
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel
from scripts.cuda_cases import (
    Case,
    attempt,
    distance,
    exact_products,
    leave_out,
    make_batch,
    run_section,
    tell,
)
from training import setup
from training.step import forward_backward

ROOT = Path(__file__).resolve().parent.parent
ALWAYS, NEVER = 1e12, 1e-12  # taus
STEPS, FROZEN_AT = 6, 4


def check_freezing(case: Case) -> None:
    """As GradES does it: the vision tower and the language tower's attention freeze in the middle of a short run."""
    exact_products()
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        with attempt(how):
            torch.compiler.reset()
            _check_freezing(case, compiled, how)


def _check_freezing(case: Case, compiled: bool, how: str) -> None:
    with_grades, monitor, optimizer = train_short(case, compiled, freezes=True)
    without, *_ = train_short(case, compiled, freezes=False)
    assert monitor is not None
    frozen = {p for name in monitor.frozen for p in monitor.by_name[name].parameters}
    frozen |= set(monitor.freezer.prefix_parameters)
    names = {name for name, p in with_grades.model.named_parameters() if p in frozen}
    expected = {c.name for c in monitor.components if c.tower == "vision" or "attn" in c.name}
    right = set(monitor.frozen) == expected and set(monitor.frozen.values()) == {FROZEN_AT}
    tell(f"{how}: frozen at step {FROZEN_AT}", f"{len(monitor.frozen)} components, {len(names)} parameters", right)
    moved = [n for n in names if not torch.equal(with_grades.at[FROZEN_AT][n], with_grades.at[STEPS][n])]
    tell(f"{how}: frozen parameters that moved", len(moved), not moved)
    updates = [
        {n: run.at[FROZEN_AT + 1][n] - run.at[FROZEN_AT][n] for n in run.at[0]} for run in (with_grades, without)
    ]
    ours, theirs = ({n: update for n, update in one.items() if n not in names} for one in updates)
    apart = distance(ours, theirs)  # without clipping, the gradients of the others are the same
    tell(f"{how}: updates of the others against a run without freezing", f"off by {apart:.1e}", apart < 2e-2)
    left = sum(bool(optimizer.state.get(p)) or p.grad is not None for p in frozen)
    tell(f"{how}: frozen parameters with gradient or optimizer state", left, left == 0)
    on = sum(p.requires_grad for p in frozen)
    tell(f"{how}: frozen parameters with requires_grad", on, on == 0)


class Short:
    """The weights of a short run after each step, on the CPU."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.at: dict[int, dict[str, torch.Tensor]] = {}
        self.keep(0)

    def keep(self, step: int) -> None:
        self.at[step] = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}


def train_short(case: Case, compiled: bool, freezes: bool) -> tuple[Short, GradESMonitor | None, torch.optim.Optimizer]:
    """STEPS steps on packed rows in float32, without clipping."""
    model = case.model().to(case.device)
    optimizer = setup.make_optimizer(model, TrainConfig())
    monitor = None
    if freezes:
        config = GradESConfig(
            vision_tau=ALWAYS, language_tau=NEVER, language_attention_tau=ALWAYS, alpha=0.5, compute_interval=1
        )
        monitor = GradESMonitor(config, model, optimizer, STEPS, log=lambda line: None)
    if compiled:
        setup.compile_blocks(model)
    run = Short(model)
    for step in range(1, STEPS + 1):
        _one_step(case.device, model, optimizer, monitor, step, case.in_blocks)
        run.keep(step)
    return run, monitor, optimizer


def _one_step(
    device: torch.device,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    monitor: GradESMonitor | None,
    step: int,
    length: int,
    before_check: Callable[[], None] = lambda: None,
) -> None:
    forward_backward(
        model, [make_batch(model.cfg, length, "packed", seed=step)], device, setup.autocast(device, "float32")
    )
    if monitor is not None:
        monitor.after_backward(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before_check()
    if monitor is not None:
        monitor.after_step(step)


def check_metrics(case: Case) -> None:
    """Each metric's numbers in the same short run on the device and on the CPU."""
    exact_products()
    for metric in (*METRICS, ROLLBACK):
        with attempt(metric):
            ours, theirs = (measure_short(case, metric, device) for device in (case.device, torch.device("cpu")))
            known = sum(value is not None for value in theirs.values())
            off = largest_error(ours, theirs)
            same = ours.keys() == theirs.keys() and all((ours[n] is None) == (theirs[n] is None) for n in theirs)
            # Adam makes a whole step of a gradient that is rounding alone.
            told = f"{known} components, off by {off:.1e} at most"
            tell(metric, told, same and known == len(theirs) and off < 0.03)


def largest_error(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> float:
    """Relative to theirs, over what both have measured; infinite where a value is not finite or theirs alone is 0."""
    largest = 0.0
    for name, value in theirs.items():
        own = ours.get(name)
        if value is not None and own is not None:
            off = abs(own - value) / abs(value) if value else math.inf if own else 0.0
            largest = max(largest, off if math.isfinite(off) else math.inf)
    return largest


def measure_short(case: Case, metric: str, device: torch.device) -> dict[str, float | None]:
    """The numbers of a second check, after step 4."""
    model = case.model().to(device)
    cfg = TrainConfig()
    cfg.lr_vision_backbone = cfg.lr_language_backbone = 1e-3  # so that a rollback costs more than rounding
    optimizer = setup.make_optimizer(model, cfg)
    held_out = [make_batch(model.cfg, 64, "plain", seed=99, rows=4)]
    evaluated = setup.autocast(device, "float32")
    averages = AveragedWeights(model.parameters(), optimizer, 0.5) if metric == ROLLBACK else None
    config = GradESConfig(metric=metric, alpha=0.0, freeze_vision=False, freeze_language=False, compute_interval=2)
    monitor = GradESMonitor(
        config, model, optimizer, 4, log=lambda line: None, averages=averages,
        evaluate=lambda vision, first: row_losses(model, held_out, device, evaluated)[0][0] if first else [],
    )  # fmt: skip
    for step in range(1, 5):
        _one_step(device, model, optimizer, monitor, step, 96, averages.update if averages else lambda: None)
    return monitor.latest


def check_resume(case: Case) -> None:
    """A run of train.py that is resumed in its middle ends like the whole run."""
    if not has_data():
        return
    steps = 6
    flags = ["--enable_grades", "--compute_interval", "2", "--rollback_rows", "8", "--checkpoint_interval", "3"]
    flags += ["--keep_checkpoints", "9"]
    whole = run_training(case, "whole", steps, *flags)
    middle = whole / "checkpoints" / "step_00000003"
    resumed = run_training(case, "resumed", steps, *flags, "--resume", str(middle))
    ours, theirs = state_of(resumed), state_of(whole)
    equal = all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    apart = distance(ours, theirs)
    tell(
        "weights and optimizer state", f"off by {apart:.1e}{', to the bit' if equal else ''}", _near(case, equal, apart)
    )
    ours_losses, theirs_losses = losses_of(resumed), losses_of(whole)
    told = f"steps {min(ours_losses)} to {max(ours_losses)}"
    tell("the resumed run has its own steps", told, max(ours_losses) == max(theirs_losses) == steps)


def _near(case: Case, equal: bool, apart: float) -> bool:
    """On CUDA sums come in another order each time, and Adam makes whole steps of tiny gradients."""
    return apart < 1e-2 if case.on_cuda else equal


def check_parallel(case: Case) -> None:
    """train.py under torchrun with one process, wrapped in DDP and in FSDP2."""
    if not has_data():
        return
    steps = 4
    plain = losses_of(run_training(case, "plain", steps, "--dtype", "float32"))
    for kind in ("ddp", "fsdp"):
        with attempt(kind):
            flags = ("--dtype", "float32", "--parallel", kind)
            found = losses_of(
                run_training(case, kind, steps, *flags, launcher=("torch.distributed.run", "--standalone"))
            )
            off = max(abs(found[step] / plain[step] - 1) for step in plain) if found.keys() == plain.keys() else None
            limit = 5e-3 if case.on_cuda else 1e-4
            tell(f"{kind}: losses of {len(found)} steps", f"off by {off}", off is not None and off < limit)


def has_data() -> bool:
    """Whether the rows of the quickstart are here; says so where they are not."""
    try:
        import easy_vqa  # noqa: F401
    except ImportError:
        leave_out("the package easy-vqa is not here")
        return False
    return True


def run_training(case: Case, name: str, steps: int, *flags: str, launcher: tuple[str, ...] = ()) -> Path:
    """A run of the quickstart recipe with a few steps; returns its folder. Raises RuntimeError where it fails."""
    settings: dict[str, Any] = {"max_training_steps": steps, "log_interval": 1, "eval_interval": steps, "val_size": 8}
    settings |= {"train_dataset_name": "shape", "num_workers": 0, "output_dir": case.folder, "run_name": name}
    settings |= {"batch_size": 4, "turns_per_image": 2} if case.tiny else {}
    start = ["-m", *launcher, "--nproc_per_node", "1"] if launcher else []
    command = [sys.executable, *start, "train.py", *(f"--{key}={value}" for key, value in settings.items()), *flags]
    for old in (case.folder / name, *case.folder.glob(f".{name}*")):
        remove(old)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:])
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing printed"]
        raise RuntimeError(f"train.py ended with {done.returncode}: {lines[-1]}")
    return case.folder / name


def remove(path: Path) -> None:
    """A run of an earlier call."""
    import shutil

    if path.is_dir():
        shutil.rmtree(path)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    from safetensors.torch import load_file

    from training.checkpoint_folder import STATE

    last = folder / "checkpoints" / "last"
    found = dict(load_file(last / "model.safetensors"))
    saved = torch.load(last / STATE, weights_only=True, map_location="cpu")["optimizer"]["state"]
    for index, state in saved.items():
        found |= {f"{index}.{key}": value.float() for key, value in state.items() if isinstance(value, torch.Tensor)}
    return found


def losses_of(folder: Path) -> dict[int, float]:
    """The training loss by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


if __name__ == "__main__":
    sys.exit(
        run_section(
            {
                "freezing": check_freezing,
                "metrics": check_metrics,
                "resume": check_resume,
                "parallel": check_parallel,
            }
        )
    )
