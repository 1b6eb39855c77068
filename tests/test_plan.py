"""--dry_run: the plan against what real models, monitors and steps hold; and nothing but the plan."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tiny.families import CROPS as CROP_SETTINGS
from tiny.families import words_of
from tiny.runs import arguments, state
from torch.autograd.graph import saved_tensors_hooks

import models.attention
from grades import GradESMonitor, find_components
from grades.averaging import AveragedWeights
from models.lora import inject_lora
from models.vision_language_model import VisionLanguageModel
from training import setup
from training.activations import saved_bytes
from training.arguments import parse_arguments
from training.flops import model_cost
from training.plan import (
    COUNTED_SHARE,
    TOKENS,
    fit_line,
    fitting_tiles,
    fitting_tokens,
    full_batch,
    make_plan,
    of_length,
    plan_lines,
    plan_of,
)
from training.step import forward_backward

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
CPU = torch.device("cpu")
SMALL = "--enable_grades --alpha 0 --compute_interval 1 --monitor_grace --batch_size 2 --max_sample_length 20 "
SMALL += "--dtype float32 --feature_cache_gib 0"
PACKING = "--packing --lm_max_length 120 --max_images_per_example 1 --max_images_per_knapsack"
MOLMO = (
    "--vit_architecture clip --vit_feature_layers -1 -2 --mp_type molmo --mp_pool_size 4 --lm_head_dim 32 --lm_qk_norm"
)
CROPS = " ".join([MOLMO, *words_of(CROP_SETTINGS), "--extra_token_amount 5 --max_crops 2"])
NAMES = ["image_token", "global_image_token", *(f"r{r}c{c}" for r in (1, 2) for c in (1, 2))]
EXTRA = json.dumps({name: name for name in NAMES}, separators=(",", ":"))
TILES = f"--max_img_size 96 --extra_token_amount 6 --vlm_extra_tokens {EXTRA} --max_sample_length"


def made(words: str = "", device: str = "cpu"):
    """(settings, model) of the default recipe, made smaller."""
    settings = parse_arguments(f"{SMALL} {words}".split())
    with torch.device(device):
        model = VisionLanguageModel(settings.vlm)
        if settings.train.lora_rank:
            inject_lora(model, settings.train)
    return settings, model


def plan(words: str = "", processes: int = 1):
    settings, model = made(words, "meta")
    return make_plan(model, settings, CPU, processes)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def really_saved(work, but) -> int:
    """Bytes that autograd saves on a CPU, by the addresses of their memory."""
    saved = []  # holds on to them, so that no address is used twice
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        work()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(sizes[address] for address in sizes.keys() - {t.untyped_storage().data_ptr() for t in but})


def test_saved_bytes_of_a_tiny_model_are_those_counted_by_hand():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2), nn.Flatten(0))
        x = torch.empty(7, 3)
        q, k = torch.empty(2, 4, 6, 8, requires_grad=True), torch.empty(2, 1, 6, 8, requires_grad=True)
    known = [x, *model.parameters()]
    assert saved_bytes(lambda: model(x), known) == 2 * 4 * 7 * 5  # what goes into GELU and what comes out
    assert saved_bytes(lambda: model(x), []) == 2 * 4 * 7 * 5 + 4 * 7 * 3 + 4 * 5 * 2  # input, weight of the second
    assert saved_bytes(lambda: model.requires_grad_(False)(x), []) == 0
    attend = torch.nn.functional.scaled_dot_product_attention
    queries, keys = 4 * 2 * 4 * 6 * 8, 4 * 2 * 6 * 8  # k is v; the result is as large as q
    assert saved_bytes(lambda: attend(q, k, k, enable_gqa=True), []) == 2 * queries + keys + 4 * 2 * 4 * 6


def really_held(settings, model) -> dict[str, int]:
    """Bytes by what they hold, after two steps on the CPU."""
    setup.freeze_untrained(model, settings.train)
    setup.apply_to_model(model, settings.train)
    optimizer, batch = setup.make_optimizer(model, settings.train), full_batch(settings, CPU)
    grades = dataclasses.replace(settings.grades, freeze_vision=False, freeze_language=False)
    averages = AveragedWeights(model.parameters(), optimizer, settings.train.average_weights or 0.9)
    evaluate = lambda *share: [(1.0, 1), (2.0, 1)]  # noqa: E731
    monitor = GradESMonitor(grades, model, optimizer, 10, log=lambda line: None, averages=averages, evaluate=evaluate)
    autocast = setup.autocast(CPU, settings.train.dtype)
    known, block_inputs = [*model.parameters(), *filter(torch.is_tensor, batch.values())], {}
    block = model.vision_encoder.blocks[0]  # which needs more than one of the decoder's
    block.register_forward_pre_hook(lambda _, args: block_inputs.update(x=args[0]))
    for step in (1, 2):
        activations = really_saved(lambda: forward_backward(model, [batch], CPU, autocast), known)
        monitor.after_backward(step)
        optimizer.step()
        if settings.train.average_weights:
            averages.update()
        monitor.after_step(step)
    if settings.train.activation_checkpointing:
        x = block_inputs["x"]
        activations += really_saved(lambda: type(block).forward(block, x), [*known, x])
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "weights": size([*model.parameters(), *model.buffers()]),
        "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": size(moments),
        "averages": size(t for state in optimizer.state.values() for key, t in state.items() if "average" in key),
        "GradES": size(tensor for kept in monitor.metric.kept.values() for tensor in kept),
        "batch": size(filter(torch.is_tensor, batch.values())),
        "activations": activations,
    }


@pytest.mark.parametrize(
    "words",
    [
        "", "--dtype bfloat16 --metric gradient_change", "--lora_rank 4 --lora_vision false --metric gradient_rms",
        "--activation_checkpointing --monitor_sample 4 --metric weight_change",
        "--loss_chunk_size 7 --metric gradient_norm", "--lr_vision_backbone 0", f"{PACKING} 3", MOLMO,
        f"{MOLMO} --activation_checkpointing", f"{MOLMO} --lr_vision_backbone 0", CROPS,
        f"{MOLMO} --max_video_frames 2 --max_sample_length 60",
    ],
)  # fmt: skip
def test_a_plan_says_what_real_steps_hold(words, monkeypatch):
    monkeypatch.setattr(models.attention, "MAX_PLAIN_LENGTH", 0)  # attention in a fused kernel, in bfloat16 too
    settings, model = made(words)
    planned, real = plan(words), really_held(settings, model)
    assert planned.memory.pop("activations") == pytest.approx(real.pop("activations"), rel=0.01)
    assert planned.memory == real
    for part, module in zip(planned.parts, (model.vision_encoder, model.MP, model.decoder), strict=True):
        assert part.parameters == sum(p.numel() for p in module.parameters())
        assert part.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert sum(part.components for part in planned.parts) == len(find_components(model))
    assert planned.step_flops == model_cost(model).of(full_batch(settings, CPU))


@pytest.mark.parametrize(
    ("words", "is_masked"),
    [
        ("--lm_max_length 256", False), ("--lm_max_length 200", True), ("--lm_max_length 256 --lm_dropout 0.1", True),
        ("--lm_max_length 256 --lm_head_dim 24", True), ("--lm_max_length 256 --lm_head_dim 32", False),
    ],
)  # fmt: skip
def test_packed_rows_on_a_gpu_have_a_mask_where_flex_attention_does_not_suit(words, is_masked):
    words = f"--packing --max_images_per_example 1 --dtype bfloat16 --compile off {words}"
    settings = made(words, "meta")[0]
    on_gpu, on_cpu = (plan_of(settings, torch.device(kind)) for kind in ("cuda", "cpu"))
    rows, length, blocks = on_gpu.rows, on_gpu.row_tokens, settings.vlm.lm_n_blocks
    ids, biases = 4 * rows * length, 2 * rows * length**2 * blocks
    assert on_cpu.held_bytes - on_gpu.held_bytes == (0 if is_masked else ids + biases)


def test_tokens_and_flops():
    once, twice = plan("--max_training_steps 5"), plan("--gradient_accumulation_steps 2")
    assert (once.rows, once.row_tokens, once.images, once.step_tokens) == (6, 20, 2, 120)
    assert (twice.step_flops, twice.step_tokens) == (2 * once.step_flops, 240)
    assert "120 a step, 600 in 5" in "\n".join(plan_lines(once))


@pytest.mark.parametrize(
    ("words", "rows", "images"),
    [
        ("", 6, 2),
        (f"{TILES} 60", 6, 2 * 5),  # four tiles and the whole
        (f"{TILES} 20", 6, 2 * 2),  # no more than a row has tokens for
        (f"{PACKING} 3", 2, 2 * 3),
        (f"{PACKING} 18", 2, 2 * 13),
        ("--max_video_frames 3", 6, 2 * 2),  # a video, whose frames the row has tokens for
        ("--max_video_frames 3 --max_sample_length 60", 6, 2 * 3),
        (f"{TILES} 60 --max_video_frames 3", 6, 2 * 5),  # a picture has more
        (f"{PACKING} 3 --max_video_frames 7", 2, 2 * 7),  # a video with more than a row's share has one of its own
        (f"{PACKING} 3 --max_video_frames 70", 2, 2 * 13),
    ],
)
def test_a_full_batch_holds_as_many_images_as_limits_and_tokens_allow(words, rows, images):
    batch = full_batch(made(words, "meta")[0], CPU)
    assert (len(batch["input_ids"]), len(batch["images"])) == (rows, images)
    assert len(batch["image_slots"]) == rows * images // 2 * 9


def test_fsdp_divides_what_is_held_among_the_processes():
    one, ddp, fsdp = plan(), plan(processes=4), plan("--parallel fsdp", processes=4)
    assert ddp.memory == one.memory == plan("--parallel fsdp").memory
    for name in ("weights", "gradients", "optimizer", "GradES"):
        assert fsdp.memory[name] == pytest.approx(one.memory[name] / 4, abs=1)
    assert fsdp.memory["activations"] == one.memory["activations"]
    assert ddp.step_tokens == fsdp.step_tokens == 4 * one.step_tokens
    assert ddp.step_flops == 4 * one.step_flops
    twice = plan("--parallel fsdp --gradient_accumulation_steps 2", processes=4)
    assert twice.memory["gradients"] == one.memory["gradients"]  # whole until the last micro-batch
    bfloat16 = [plan(f"--dtype bfloat16 --parallel {kind}", processes=4) for kind in ("ddp", "fsdp")]
    assert bfloat16[0].memory["activations"] > bfloat16[1].memory["activations"]  # no copies of the weights
    assert "4 processes" in "\n".join(plan_lines(fsdp))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan_without_network_data_or_files(name, tmp_path, monkeypatch, no_network, capsys):
    import train

    monkeypatch.setattr(train, "load_training_rows", None)
    out = tmp_path / "out"
    words = f"--config {ROOT / 'configs' / name}.yaml --enable_grades --dry_run --output_dir {out}"
    assert train.main(parse_arguments(words.split())) == 0
    printed = capsys.readouterr().out
    watched = {"quickstart": 26, "table10_quickstart": 26, "nlvr": 40, "smollm2_local": 222}
    # Their vision towers do not train, but in the first tiny stage.
    watched |= dict.fromkeys(("nanomolmo2_model", *(f"nanomolmo2_stage{n}" for n in (1, 2, 3))), 196)
    watched |= dict.fromkeys((f"molmo2_stage{n}" for n in (1, 2, 3)), 25 * 4 + 36 * 7)
    watched |= {"nanomolmo2_tiny_stage1": 33, "nanomolmo2_tiny_stage2": 21, "nanomolmo2_tiny_stage3": 21}
    watched |= dict.fromkeys(("nanovlm_222m", "nanovlm_222m_24gb"), 258)
    assert f"{watched.get(name, 272)} matrices" in printed
    assert "activations " in printed
    assert not out.exists()
    assert no_network == []


def test_a_plan_takes_its_sizes_from_what_is_on_this_machine(tmp_path, capsys):
    import train

    _, model = made("--lm_n_blocks 1")
    model.save_pretrained(tmp_path)
    words = f"{SMALL} --dry_run --resume_from_vlm_checkpoint --vlm_checkpoint_path"
    assert train.main(parse_arguments([*words.split(), str(tmp_path)])) == 0
    assert f"{sum(p.numel() for p in model.parameters()):,}" in capsys.readouterr().out
    assert train.main(parse_arguments([*words.split(), "somebody/on-the-hub"])) == 0
    assert "593,792" in capsys.readouterr().out


def test_as_many_tiles_as_fit_into_the_memory():
    settings = parse_arguments(f"{SMALL} {PACKING} 4 {TILES} 120".split())
    settings.train.max_tiles_per_batch = "auto"
    whole = plan(f"{PACKING} 4 {TILES} 120")
    memory = sum(whole.memory.values())
    assert fitting_tiles(settings, CPU, math.inf) == fitting_tiles(settings, CPU, 2 * memory) == 0
    tiles = fitting_tiles(settings, CPU, memory)
    assert 2 <= tiles < whole.images
    limited = plan(f"{PACKING} 4 {TILES} 120 --max_tiles_per_batch {tiles}")
    assert limited.images == tiles
    assert 0.7 * memory < sum(limited.memory.values()) <= 0.86 * memory
    with pytest.raises(ValueError, match="--batch_size 2: takes"):
        fitting_tiles(settings, CPU, memory / 100)


def test_tiles_are_counted_with_the_sizes_that_the_model_will_have(data, tmp_path, monkeypatch, capsys):
    """Those of the weights and of the checkpoint that is resumed, not the recipe's (rows of 128 tokens)."""
    import train

    def run(name: str, **flags) -> int:
        words = arguments(data, tmp_path, name, max_training_steps=4, **flags)
        return train.main(parse_arguments(words))

    def found(settings, *_):
        lengths.append(settings.vlm.lm_max_length)
        return 8

    lengths: list[int] = []
    monkeypatch.setattr("grades.plots.draw", lambda history: [])
    monkeypatch.setattr("training.plan.fitting_tiles", found)
    assert run("source", lm_max_length=150) == 0
    flags = {"resume_weights": tmp_path / "out" / "source", "max_tiles_per_batch": "auto", "resume": "auto"}
    assert run("run", **flags) == 0
    assert lengths == [150]
    saved = state(tmp_path / "out" / "run")["settings"]
    assert (saved["max_tiles_per_batch"], saved["lm_max_length"]) == (8, 128)  # what a resumed run is compared with
    assert run("run", **flags, checkpoint_interval=1) == 0
    longer = {"lm_max_length": 140, "resume_override": True}
    assert run("longer", **flags | {"resume": tmp_path / "out" / "run"}, **longer) == 0
    assert lengths == [150, 150, 140]
    monkeypatch.setattr("training.plan.fitting_tiles", lambda *_: 4)
    assert run("run", **flags) == 2  # a smaller device
    assert "--max_tiles_per_batch 4: the run that is resumed has 8" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "--max_video_frames 1", f"{PACKING} 3 --activation_checkpointing"])
def test_rows_as_long_as_fit_into_the_memory(words):
    """With videos full of frames, so that they are shorter than those with one picture."""
    settings = made(words, "meta")[0]
    memory = plan_of(of_length(settings, 640), CPU).held_bytes / COUNTED_SHARE
    tokens = fitting_tokens(settings, CPU, memory)
    assert 640 - TOKENS <= tokens <= 640
    assert plan_of(of_length(settings, tokens), CPU).held_bytes <= COUNTED_SHARE * memory
    assert fitting_tokens(settings, CPU, memory / 1000) == 0
    line = fit_line(settings, CPU, memory)
    assert f"rows of up to {tokens:,} tokens (--{'lm_max' if PACKING in words else 'max_sample'}_length)" in line
    assert ("frames" in line) == settings.shows_videos
    assert "no row of 128 tokens" in fit_line(settings, CPU, memory / 1000)


def test_a_dry_run_says_how_long_rows_may_be_on_a_card_that_is_not_here(capsys):
    import train

    assert train.main(parse_arguments(f"{SMALL} --dry_run --gpu_gib 8".split())) == 0
    assert "fits        in 85% of 8.0 GiB: rows of up to " in capsys.readouterr().out


def test_the_recipe_for_a_smaller_card_makes_the_same_steps():
    whole, smaller = (
        parse_arguments(["--config", str(ROOT / "configs" / f"{name}.yaml")]).as_dict()
        for name in ("nanovlm_222m", "nanovlm_222m_24gb")
    )
    assert {key for key in whole if whole[key] != smaller[key]} == {"batch_size", "gradient_accumulation_steps"}
    rows = [one["batch_size"] * one["gradient_accumulation_steps"] for one in (whole, smaller)]
    assert rows[0] == rows[1]
