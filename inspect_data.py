"""Look at data before training on it: what it holds, what of it cannot be used, and how the model gets it.

    python inspect_data.py rows.jsonl --config configs/quickstart.yaml --html page.html

It reads the data as train.py does under the same recipe and flags, every one of which it takes.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path


def parser() -> ArgumentParser:
    """Of the flags that train.py does not have."""
    found = ArgumentParser(
        usage="inspect_data.py [DATA] [--rows N] [--html PAGE] [--page_rows N] [flags of train.py]",
        description=f"{__doc__}\nDATA is --train_dataset_path, by default the recipe's.",
        epilog="All other flags are those of train.py: python train.py --help",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--rows", type=int, default=500, metavar="N", help="rows to read, spread over all; 0: all [500]")
    found.add_argument("--html", metavar="PAGE", help="write a page of rows as the model gets them")
    found.add_argument("--page_rows", type=int, default=8, metavar="N", help="rows on the page [8]")
    return found


def main(argv: list[str]) -> int:
    """Print the facts, write the page; returns the exit code."""
    flags = parser()
    place = [] if not argv or argv[0].startswith("-") else argv[:1]
    given, others = flags.parse_known_args(argv[len(place) :])
    if given.rows < 0 or given.page_rows < 1:
        flags.error("--rows must be >= 0, --page_rows > 0")
    if given.html and not Path(given.html).parent.is_dir():
        flags.error(f"--html {given.html}: must be in a folder that exists")
    from training.arguments import parse_arguments

    settings = parse_arguments([*(["--train_dataset_path", *place] if place else []), *others])
    from data.inspection import fact_lines, measure
    from data.inspection_page import make_page
    from data.values import printable
    from training.look import load_to_look

    try:
        data = load_to_look(settings)
        lines = fact_lines(measure(data, given.rows or None, settings.train.num_workers))
        print(printable("\n".join(lines)))
        if given.html:
            data.start_reading()
            title = f"{', '.join(settings.train.train_data)} under {settings.recipe.name}"
            page = make_page(title, lines, data, data.tokenizer, settings.vlm, given.page_rows)
            Path(given.html).write_text(page, encoding="utf-8")
            print(f"written     {given.html}")
    except (ValueError, OSError) as error:
        print(f"inspect_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
