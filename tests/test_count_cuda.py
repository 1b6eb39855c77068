"""The counts of count_cuda.py: every table is there, and what can be worked out by hand agrees."""

import pytest
import torch
from tiny.grades import make_model
from tiny.tables import read_table

from scripts import bench_data, count_cuda
from scripts.cuda_kernels import count_kernels, kernel_choices, sdpa_kernel
from training.arguments import parse_arguments
from training.plan import META

TINY = {"tiny": (2, 128, 2, 1)}


@pytest.fixture
def tiny(monkeypatch):
    """The quickstart in place of the recipes."""
    make = count_cuda.settings_of
    monkeypatch.setattr(count_cuda, "SHAPES", TINY)
    monkeypatch.setattr(count_cuda, "MEMORY_RECIPES", ("quickstart",))
    monkeypatch.setattr(count_cuda, "MICRO_BATCHES", 3)
    flags = ["--turns_per_image=1", "--feature_cache_gib=0", "--no_cache_rows", "--gradient_accumulation_steps=1"]
    monkeypatch.setattr(count_cuda, "settings_of", lambda recipe, *given: make("quickstart", *flags, *given))


@pytest.mark.parametrize("table", [name for name in count_cuda.TABLES if name not in ("padding", "memory_by_batch")])
def test_every_table(table, tiny, capsys):
    count_cuda.main(["--only", table])
    rows = read_table(capsys.readouterr().out)
    assert len(rows) >= 1
    if table == "flops":
        parts = [float(rows[0][name]) for name in ("vision", "language", "pairs of positions", "head")]
        assert float(rows[0]["in all"]) == pytest.approx(sum(parts), abs=0.2)


def test_memory_grows_with_the_batch(tiny, monkeypatch):
    monkeypatch.setattr(count_cuda, "PUBLISHED_GB", {1: 0.0, 64: 0.0, 512: 0.0})
    counted = [float(row[1]) for row in count_cuda.memory_by_batch()[1]]
    assert counted[0] < counted[1] < counted[2]


def test_kernels_of_a_linear_layer_are_those_that_run():
    model, data = make_model(), {"input_ids": torch.zeros(2, 12, dtype=torch.long, device=META)}
    data["images"] = torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device=META)
    for name, size in (("image_slots", 8), ("label_positions", 5)):
        data[name] = torch.zeros(size, dtype=torch.long, device=META)
    data["targets"] = data["input_ids"]
    separate, fused = (count_kernels(make_model().to(META), data, fused) for fused in (False, True))
    # A language block has seven products, fused four; each product has two more in the backward pass.
    assert separate.kernels > fused.kernels > 0
    matrices = sum(p.numel() for p in model.decoder.blocks.parameters())
    assert separate.product_bytes > fused.product_bytes > 2 * matrices


def test_no_case_of_the_project_falls_back_to_the_kernel_that_keeps_all_scores():
    kernels = {(case, dtype): kernel for case, _, _, dtype, kernel in kernel_choices()}
    assert len(kernels) == 6
    assert kernels["vision tower", "bfloat16"] == kernels["language model, padded on the right", "bfloat16"] == "flash"
    assert "MATH" not in kernels.values()
    grouped = torch.empty(1, 4, 8, 8), torch.empty(1, 2, 8, 8)
    assert sdpa_kernel(*grouped, None) == "MATH"


def test_packed_images_count_tiles_of_whole_micro_batches(monkeypatch):
    flags = "--packing --turns_per_image 1 --lm_max_length 128 --batch_size 2 --no_cache_rows"
    settings = parse_arguments(flags.split())
    rows = bench_data.random_rows(bench_data.argparse.Namespace(random_rows=40, image_size=(24, 16)))
    counts = bench_data.packed_images(settings, rows, 5)
    assert len(counts) == 5
    assert all(count >= 0 for count in counts)
    assert sum(counts) > 0
