"""Look at a stage's batches, or train one stage or all: a door to scripts/train_stages.py under nanoMolmo2's names.

    python scripts/make_shapes.py --output shapes_rows
    python examples/train_with_stage_dataloaders.py --stage 1 --inspect    # the batches; trains nothing
    python examples/train_with_stage_dataloaders.py --stage 2              # one stage, from the one before
    python examples/train_with_stage_dataloaders.py --all-stages

By default with the tiny recipes; --prefix configs/nanomolmo2 takes those of the full size. Flags after -- are those of
train.py. Runs stand in grades_output under the names of their recipes; the same command continues.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.train_stages import Stage, check_flags, find_stages, train_stages


def inspect(stage: Stage, flags: list[str]) -> None:
    """Print how many batches an epoch has, and of the first one each key with shape and type. Raises ValueError,
    OSError."""
    from data.mixture_rows import load_training_rows
    from data.pipeline import load_data
    from training.arguments import parse_arguments
    from training.preflight import check_paths

    settings = check_paths(parse_arguments(["--config", str(stage.recipe), *flags]))
    cfg = settings.train
    data = load_data(load_training_rows(cfg), settings.vlm, cfg, None)
    data.start_reading()
    print(f"stage {stage.number}: {stage.recipe}")
    print(
        f"{len(data.train_dataset) // cfg.batch_size:,} batches an epoch, batch size {cfg.batch_size}; the first one:"
    )
    for name, value in next(data).items():
        print(f"  {name:<16} {described(value)}")


def described(value: Any) -> str:
    """Shape and type of a tensor, length of a list, else the value."""
    if hasattr(value, "shape"):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else str(value)


def data_flags(root: str, stage: Stage) -> list[str]:
    """Those that read the rows of scripts/make_shapes.py from another folder, where a file gets the recipe's mixture
    with that folder's paths. Raises ValueError, OSError."""
    import yaml

    if not Path(root).is_dir():
        raise ValueError(f"--data-root {root}: no such folder; scripts/make_shapes.py --output {root} makes it")
    groups = yaml.safe_load(stage.recipe.read_text(encoding="utf-8")).get("mixture", [])
    for one in (one for group in groups for one in group["sets"]):
        one["path"] = str(Path(root) / Path(one["path"]).name)
    mixture = Path(root) / f"stage{stage.number}_mixture.yaml"
    mixture.write_text(yaml.safe_dump(groups, sort_keys=False), encoding="utf-8")
    val, tokenizer = Path(root) / f"stage{stage.number}_val.jsonl", Path(root) / "tokenizer"
    return ["--mixture", str(mixture), "--val_dataset_path", str(val), "--lm_tokenizer", str(tokenizer)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                   epilog="Flags after -- are those of train.py.")  # fmt: skip
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--stage", type=int, help="1, 2 or 3")
    which.add_argument("--all-stages", "--all_stages", action="store_true", help="one after the other")
    made.add_argument("--inspect", action="store_true", help="show the batches and end")
    made.add_argument("--prefix", default="configs/nanomolmo2_tiny", help="of the recipes [configs/nanomolmo2_tiny]")
    made.add_argument("--data-root", "--data_root", help="folder that scripts/make_shapes.py wrote [the recipe's]")
    made.add_argument("--output-dir", "--output_dir", type=Path, default=Path("grades_output"), help="of the runs")
    made.add_argument("--batch-size", "--batch_size", type=int, help="rows in a batch [the recipe's]")
    made.add_argument("--num-workers", "--num_workers", type=int, help="processes that prepare batches [the recipe's]")
    return made


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    given, flags = parser().parse_args(argv[:cut]), argv[cut + 1 :]
    for name in ("batch_size", "num_workers"):
        if (value := getattr(given, name)) is not None:
            flags += [f"--{name}", str(value)]
    try:
        check_flags(flags)
        stages = find_stages(given.prefix, given.output_dir)
        wanted = [one for one in stages if given.all_stages or one.number == given.stage]
        if not wanted:
            raise ValueError(f"--stage {given.stage}: must be one of {', '.join(str(one.number) for one in stages)}")
        for stage in wanted:
            own = [*flags, *(data_flags(given.data_root, stage) if given.data_root else [])]
            if given.inspect:
                inspect(stage, own)
            elif code := train_stages([stage], own):
                return code
    except (ValueError, OSError) as error:
        print(f"train_with_stage_dataloaders.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
