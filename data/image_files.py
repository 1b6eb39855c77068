"""Folders of images by class, and tar files of images with texts beside them (webdataset), as tables."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.formats import NOT_UTF8
from data.text_files import json_object
from data.values import BadRow

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")


def image_files(folder: Path) -> list[Path]:
    """The images below the folder, without those that are hidden."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in IMAGE_ENDINGS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]


class ClassFolder:
    """One record per image: its label is the name of the folder that it lies in."""

    def __init__(self, files: Sequence[Path], folder: Path):
        """files: below the folder, but not in it."""
        self.files = [file.relative_to(folder).as_posix() for file in files]  # as text: a tenth of a Path's memory

    def __len__(self) -> int:
        return len(self.files)

    def record(self, number: int) -> dict[str, Any]:
        file = self.files[number]
        return {"image": file, "label": file.split("/")[-2]}

    def place(self, number: int) -> str:
        return self.files[number]


class TarFile:
    """One record per sample of a tar file: members that follow each other and have the same name up to its first dot.

    Images become the record's `images`, the keys of a .json its keys, .txt its text, .cls its label. Nothing is
    unpacked: the index holds where each member lies, about 500 bytes of memory per sample.
    """

    def __init__(self, path: Path):
        """Raises ValueError where it is no whole, unpacked tar file."""
        self.path = path
        self.names: list[str] = []
        self.members: list[tuple[tuple[str, int, int], ...]] = []  # of each sample: (ending, first byte, bytes)
        try:
            with tarfile.TarFile(path) as tar:
                for member in tar:
                    if member.isfile():
                        self._add(member.name, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                if 0 < path.stat().st_size - tar.offset < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it breaks off")
        except tarfile.TarError as error:
            last = f", behind sample {self.names[-1]}" if self.names else ""
            raise ValueError(f"is not a whole tar file{last}: {error}") from None

    def _add(self, name: str, offset: int, size: int) -> None:
        folder, slash, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem:  # hidden
            return
        sample, member = folder + slash + stem, (ending.lower(), offset, size)
        if self.names and self.names[-1] == sample:
            self.members[-1] = (*self.members[-1], member)
        else:
            self.names.append(sample)
            self.members.append((member,))

    def __len__(self) -> int:
        return len(self.names)

    def record(self, number: int) -> dict[str, Any]:
        """Raises BadRow."""
        images: list[bytes] = []
        texts: dict[str, Any] = {}
        with self.path.open("rb") as file:
            for ending, offset, size in self.members[number]:
                kind = "." + ending.split(".")[-1]
                if kind not in (*IMAGE_ENDINGS, ".json", ".txt", ".cls"):
                    continue
                file.seek(offset)
                data = file.read(size)
                if kind in IMAGE_ENDINGS:
                    images.append(data)
                elif kind == ".json":
                    texts = json_object(_decoded(data)) | texts
                else:
                    texts["text" if kind == ".txt" else "label"] = _decoded(data)
        return texts | {"images": images} if images else texts

    def place(self, number: int) -> str:
        return f"sample {self.names[number]}"


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = data[max(0, error.start - 20) : error.start + 20].decode("utf-8", "backslashreplace")
        raise BadRow(NOT_UTF8, f"byte {data[error.start]:#04x} in {wrong.strip()}") from None
