"""The API reference of the library, built from its docstrings: python scripts/build_api_reference.py [FOLDER].

Pages of plain HTML, site/index.html first. Needs pdoc (in the group dev) and transformers, no network.
"""

import argparse
import sys
from pathlib import Path

import pdoc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grades

MODULES = (
    "monitor", "config", "callback", "callback_config", "compat", "components", "metrics", "policy", "paper", "plots",
    "report",
)  # fmt: skip


def build(folder: Path) -> None:
    """Write a page for the package and each of MODULES."""
    for name in grades.__all__:
        getattr(grades, name)  # pdoc lists what has been loaded
    pdoc.render.configure(show_source=False, search=False)
    pdoc.pdoc("grades", *(f"grades.{name}" for name in MODULES), output_directory=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("site"), help="where the pages go (default: site)")
    folder = parser.parse_args().folder
    build(folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
