"""A look before training: inspect_data.py at the data, --dry_run at the plan of the run and some of the data."""

import contextlib
import dataclasses
import sys

import torch

from data.inspection import fact_lines, measure
from data.mixture_rows import load_training_rows
from data.pipeline import SOME_ROWS, Data, load_data
from data.text import NotHere
from data.tokenizer_checks import load_tokenizer
from data.values import printable
from training import setup
from training.arguments import Settings
from training.preflight import Source, data_sources
from training.sizes import limit_tiles, take_over_sizes

PAGE_ROWS = 8  # of a batch at most: a page needs no more, and no rank to share them with


def load_to_look(settings: Settings) -> Data:
    """The data as train.py loads it, read in this process and in smaller batches. Raises ValueError or OSError."""
    checkpoint = take_over_sizes(settings, local_only=True)
    cfg = settings.train
    rows = load_training_rows(cfg)
    # With packing a batch of one row: then the page can say which rows are in it.
    batch_size, tiles = 1 if cfg.packing else min(cfg.batch_size, PAGE_ROWS), cfg.tiles_per_row
    cfg = dataclasses.replace(
        cfg, batch_size=batch_size, max_tiles_per_batch=tiles * batch_size, cache_rows=False, num_workers=0
    )
    return load_data(rows, settings.vlm, cfg, None if "lm_tokenizer" in settings.given else checkpoint)


def dry_run_lines(settings: Settings, notes: list[str] | None) -> list[str]:
    """What is known of the data of a dry run: of a few rows, where data and tokenizer are on this machine.

    notes: on the tokenizer, None where it is not here.
    """
    vlm, cfg = settings.vlm, settings.train
    away = [source for source in data_sources(settings) if not source.is_here()]
    if notes is None:
        away.append(Source("lm_tokenizer", str(vlm.lm_tokenizer), "models"))
    if away:
        names = ", ".join(f"--{source.flag} {source.name}" for source in away)
        for note in notes or ():
            print(f"NOTE {note}", file=sys.stderr)
        return [f"data        not looked at: not on this machine: {names}"]
    try:
        return fact_lines(measure(load_to_look(settings), SOME_ROWS, cfg.num_workers))
    except (ValueError, OSError) as error:
        return [f"data        cannot be used: {error}"]


def dry_run(settings: Settings, processes: int) -> int:
    """Print the plan of the run, and what a few rows of its data are like where these are on this machine. No weights,
    no network; a backbone on the hub has the sizes of the recipe."""
    from training.plan import fit_line, plan_lines, plan_of

    checkpoint = take_over_sizes(settings, local_only=True)
    notes = None
    with contextlib.suppress(NotHere):  # the hub is not asked
        folder = None if "lm_tokenizer" in settings.given else checkpoint
        notes = load_tokenizer(settings.vlm, folder, local_only=True)[1]
    limit_tiles(settings, processes)
    device, gib = setup.pick_device(), settings.train.gpu_gib
    if gib:  # of a GPU that need not be here
        device = torch.device("cuda")
        if settings.train.dtype == "auto":
            settings.train.dtype = "bfloat16"
    elif device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    print("\n".join(plan_lines(plan_of(settings, device, processes))))
    if gib:
        print(fit_line(settings, device, gib * 2**30, processes))
    print(printable("\n".join(dry_run_lines(settings, notes))))
    return 0
