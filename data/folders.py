"""Which files of a folder hold rows, and of which split they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data.packed_files import file_type
from data.text_files import DELIMITERS, TYPES

FILE_TYPES = (".parquet", *TYPES, ".tar")
ARROW = ".arrow"  # what save_to_disk writes
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of data sets: no rows
# Those of Hugging Face datasets. COCO's test-dev is of its test images.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test-dev", "test", "testing", "eval", "evaluation"), "test"),
}
LETTER = r"[^\W\d_]"
SPLIT_WORD = re.compile(rf"(?<!{LETTER})(?:{'|'.join(SPLIT_WORDS)})(?!{LETTER})")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def data_files(folder: Path) -> list[Path]:
    """The files below the folder that hold rows, those of an unfinished `save_to_disk` among them.

    A table of text beside others of them, and a tar file where there is anything else, is something else: a list of
    results, or the images that the rows are about.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file_type(file) in (*FILE_TYPES, ARROW)
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    if any(file_type(file) != ".tar" for file in files):
        files = [file for file in files if file_type(file) != ".tar"]
    with_rows = {file.parent for file in files if file_type(file) not in (*DELIMITERS, ".tar")}
    return [file for file in files if file_type(file) not in DELIMITERS or file.parent not in with_rows]


def of_split(
    files: list[Path],
    folder: Path,
    split: str,
    flag: str,
    names_of: Callable[[Path], Sequence[str]] | None = None,
) -> list[Path]:
    """All files; where names hold the word of a split ("my_train-00.parquet", "test/a.csv", "captions_val2017.json"),
    those of this one, the others being of train.

    names_of: which names may name a file's split, from the outermost: else its own and those of its folders.
    """
    if not files:
        raise FileNotFoundError(
            f"--{flag} {folder}: holds no {', '.join(FILE_TYPES)} file and no data set written by save_to_disk"
        )
    splits: dict[str, list[Path]] = {}  # under "" those that name none
    for file in files:
        names = names_of(file) if names_of else file.relative_to(folder).parts
        splits.setdefault(_named_split(names, f"--{flag} {file}"), []).append(file)
    if set(splits) == {""}:
        return files
    splits["train"] = sorted(splits.get("train", []) + splits.pop("", []))
    if not (wanted := splits.get(SPLIT_WORDS.get(split, split))):
        there = ", ".join(sorted(name for name, found in splits.items() if found))
        raise ValueError(f"--{flag} {folder}: no split {split}; there are {there}")
    return wanted


def _named_split(names: Sequence[str], what: str) -> str:
    """The split in the innermost name that holds the word of one; "" where none does."""
    for name in reversed(names):
        found = sorted({SPLIT_WORDS[word] for word in SPLIT_WORD.findall(name.lower())})
        if len(found) > 1:
            raise ValueError(f"{what}: the name {name} must hold one split, not {' and '.join(found)}; rename it")
        if found:
            return found[0]
    return ""
