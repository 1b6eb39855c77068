"""The training step of every recipe on the meta device. Tensors have no values there, so each wait for one is an error.

Only at a check GradES may read: once.
"""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from tiny.families import FAMILIES, words_of
from torch.overrides import TorchFunctionMode

from grades import GradESMonitor
from grades.config import METRICS
from models.lora import inject_lora
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.arguments import parse_arguments
from training.plan import full_batch
from training.step import clip_gradients, forward_backward

META = torch.device("meta")
# They have the shapes of table10_nanovlm and of molmo2_stage1.
ALIKE = {"table10_nanovlm_alt", "molmo2_stage2", "molmo2_stage3"}
RECIPES = sorted({path.stem for path in Path(__file__).parents[1].glob("configs/*.yaml")} - ALIKE)
CHECKS = (2, 4)
# Read as ones, all sums of the vision tower are below their tau.
GRADES = (
    f"--enable_grades --alpha 0 --compute_interval {CHECKS[0]} --tau_mode absolute --vision_tau 99 --language_tau 1e-9 "
    "--patience 1 --freeze_order any --monitor_grace"
)
READS = (torch.Tensor.tolist, torch.Tensor.cpu)


class Reads(TorchFunctionMode):
    """Within this context a meta tensor can be read, as ones, and each time counts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS and args[0].is_meta:
            self.count += 1
            return func(torch.ones(args[0].shape))
        return func(*args, **(kwargs or {}))


class ForeachAdamW(torch.optim.AdamW):
    """In place of the fused one, which the meta device does not have."""

    def __init__(self, groups, fused, **kwargs):
        super().__init__(groups, foreach=True, **kwargs)


class Run:
    """A recipe with one block per tower, and its step."""

    def __init__(self, recipe: str, words: str, monkeypatch):
        settings = parse_arguments(f"--config configs/{recipe}.yaml {GRADES} {words}".split())
        self.cfg, vlm = settings.train, dataclasses.replace(settings.vlm, vit_n_blocks=1, lm_n_blocks=1)
        with META:
            self.model = VisionLanguageModel(vlm)
            if self.cfg.lora_rank:
                inject_lora(self.model, self.cfg)
        setup.freeze_untrained(self.model, self.cfg)
        setup.apply_to_model(self.model, self.cfg)
        monkeypatch.setattr(torch.optim, "AdamW", ForeachAdamW)
        self.optimizer = setup.make_optimizer(self.model, self.cfg)
        self.monitor = GradESMonitor(settings.grades, self.model, self.optimizer, 10, log=lambda line: None)
        self.micro_batches = [full_batch(settings, META)]

    def step(self, step: int) -> None:
        loss = forward_backward(self.model, self.micro_batches, META, contextlib.nullcontext())
        self.monitor.after_backward(step)
        norm = clip_gradients(self.model, self.cfg.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.monitor.after_step(step)
        assert (loss.device, norm.device) == (META, META)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    return lambda recipe, words="": Run(recipe, words, monkeypatch)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_does_not_wait_for_the_device(recipe, packing, metric, run):
    words = "--packing --turns_per_image 1" if packing else "--no_packing"
    run = run(recipe, f"{words} --metric {metric}")
    counts = []
    for step in range(1, 6):
        reads = Reads()
        with reads if step in CHECKS else contextlib.nullcontext():
            run.step(step)
        assert reads.count <= 1
        counts.append(reads.count)
    assert sum(counts) in (1, 2)  # weight_change has nothing to compare at its first check
    vision = {component.name for component in run.monitor.components if component.tower == "vision"}
    assert set(run.monitor.frozen) == vision  # so that there was a step with a frozen tower


def test_nor_does_one_of_two_micro_batches_that_computes_activations_again(run):
    run = run("quickstart", "--metric weight_change --activation_checkpointing --loss_chunk_size 7")
    run.micro_batches *= 2
    before = run.monitor.last_step
    run.step(1)
    assert run.monitor.last_step == before + 1


def test_nor_does_one_with_crops_and_the_windows_of_their_patches(run):
    sizes = {"vit_img_size": 16, "max_img_size": 16, "vit_patch_size": 4, "mp_image_token_length": 4}
    run = run("quickstart", " ".join(["--metric weight_change", *words_of(sizes | FAMILIES["molmo2"])]))
    assert run.micro_batches[0]["pool_index"].shape[1] == 4
    run.step(1)


WAITS = {
    "item": lambda loss: loss.item(),
    "float": lambda loss: float(loss.detach()),
    "bool": lambda loss: loss > 0 or None,
    "tolist": lambda loss: loss.tolist(),
    "cpu": lambda loss: loss.cpu(),
    "nonzero": lambda loss: loss.nonzero(),
    "mask": lambda loss: loss[loss > 0],
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_step_that_waits_is_found(wait, run):
    run = run("quickstart", "--metric weight_change")
    run.step(1)
    run.model.register_forward_hook(lambda model, inputs, loss: WAITS[wait](loss) and None)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        run.step(2)
