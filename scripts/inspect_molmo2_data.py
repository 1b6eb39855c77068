"""Look at downloaded data sets: a few of their rows as training reads them; with a recipe, inspect_data.py.

    python scripts/inspect_molmo2_data.py                        # every set that is downloaded
    python scripts/inspect_molmo2_data.py pixmo-cap --num_samples 5
    python scripts/inspect_molmo2_data.py --stage 1 --config configs/smollm2_local.yaml

Flags that this script does not have are those of inspect_data.py, which then runs on each set, on as many rows as
--num_samples says. The exit code is 1 where one of the sets that were asked for is not there or cannot be read.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.fetching.places import Places
from data.fetching.rows_here import rows_here
from data.molmo2_sets import SETS, STAGES, PublicSet, named, of_stage

DATA = "./data/molmo2_datasets"
SHOWN_LETTERS = 400  # of a text


def parser() -> ArgumentParser:
    """Of the flags that inspect_data.py does not have."""
    found = ArgumentParser(
        usage="inspect_molmo2_data.py [DATASET] [--stage STAGE] [--data_dir DIR] [--num_samples N] [flags of "
        "inspect_data.py]",
        description=f"{__doc__}\nDATASET is one set, by its name or hub id.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--stage", choices=[*STAGES, "all"], help="the sets of a stage")
    names = ("--data_dir", "--data-dir", "--output_dir", "--output-dir")
    found.add_argument(*names, default=DATA, metavar="DIR", help=f"where they were downloaded to [{DATA}]")
    found.add_argument("--num_samples", "--num-samples", type=int, default=3, metavar="N", help="rows of each set [3]")
    return found


def wanted(name: str | None, flags: Namespace) -> list[PublicSet]:
    """The set of the name, or those of the stage, or without both those that are there. Raises ValueError."""
    if flags.num_samples < 1:
        raise ValueError(f"--num_samples {flags.num_samples}: must be 1 or more")
    if name:
        return [named(name)]
    if flags.stage:
        return of_stage(flags.stage)
    found = [one for one in SETS if Places(Path(flags.data_dir), one).folder.is_dir()]
    if not found:
        raise ValueError(f"--data_dir {flags.data_dir}: holds no data set; scripts/download_datasets.py fetches them")
    return found


def samples(folder: Path, count: int) -> list[str]:
    """Rows of a set, spread over all, in words. Raises ValueError or FileNotFoundError."""
    split, rows = rows_here(folder)
    numbers = range(0, len(rows), max(1, len(rows) // count))[:count]
    return [
        f"{len(rows):,} rows of the split {split}",
        *(line for number in numbers for line in row_lines(rows[number])),
    ]


def row_lines(row: dict[str, Any]) -> list[str]:
    """A row: what it shows, then its turns."""
    if "bad" in row:
        return [f"- {row['id']}: cannot be used: {row['bad']}: {row['bad'].found}"]
    shown = [picture(one) for one in row["images"]] + [f"video {one}" for one in row.get("videos", [])]
    clip = [f"{key} {row[key]:g} s" for key in ("clip_start", "clip_end") if key in row]
    subtitles = [f"{len(row['subtitles'])} subtitles"] if "subtitles" in row else []
    lines = [f"- {row['id']} ({row['format']}): {', '.join([*shown, *clip, *subtitles]) or 'text alone'}"]
    for turn in row["texts"]:
        lines += [f"    user       {short(turn['user'])}", f"    assistant  {short(turn['assistant'])}"]
    return lines


def picture(image: Any) -> str:
    """Its size, or why it has none."""
    from data.images import ImageDecodeError, image_size

    try:
        width, height = image_size(image)
    except ImageDecodeError as error:
        return f"image: {error.kind}: {error}"
    return f"image {width} x {height}"


def short(text: str | None) -> str:
    """On one line."""
    words = " ".join((text or "").split())
    return words if len(words) <= SHOWN_LETTERS else f"{words[:SHOWN_LETTERS]}... ({len(words):,} letters)"


def main(argv: list[str]) -> int:
    """The exit code."""
    # A name stands first: anywhere else it may be the value of a flag of inspect_data.py.
    name = argv[0] if argv and not argv[0].startswith("-") else None
    flags, others = parser().parse_known_args(argv[1:] if name else argv)
    failed = []
    try:
        sets = wanted(name, flags)
    except ValueError as error:
        print(f"inspect_molmo2_data.py: error: {error}", file=sys.stderr)
        return 2
    for one in sets:
        folder = Places(Path(flags.data_dir), one).folder
        print(f"\n{one.name} ({one.repo}, licence {one.licence or 'not seen'})")
        try:
            if not folder.is_dir():
                raise FileNotFoundError(f"not downloaded to {folder}")
            print("\n".join(samples(folder, flags.num_samples)))
        except (ValueError, OSError) as error:
            print(error)
            failed.append(one.name)
            continue
        if others:
            import inspect_data

            rows = ["--rows", str(flags.num_samples)]
            code = inspect_data.main([str(folder), *rows, "--mixture", "none", *others])
            failed += [one.name] if code else []
    if failed:
        print(f"\ninspect_molmo2_data.py: not shown: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
