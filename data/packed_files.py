"""Files that are packed as a whole (gzip, Zstandard): unpacked once, into the cache of `datasets`."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 8 * 2**20
INNER = (".jsonl", ".json", ".csv", ".tsv", ".tar")
SHORT = {".tgz": ".tar"}  # an ending that stands for two


def file_type(path: Path) -> str:
    """The ending that says what is in a file, without .gz or .zst; in lower case."""
    packing = path.suffix.lower()
    inner = SHORT.get(packing) or (path.with_suffix("").suffix.lower() if packing in UNPACKERS else "")
    return inner if inner in INNER else packing


def is_packed(path: Path) -> bool:
    """Whether it has to be unpacked before it can be read."""
    return file_type(path) != path.suffix.lower()


def unpacked(path: Path) -> Path:
    """The file unpacked: none of the packings has a way to a record but through all before it.

    Raises ValueError where it is not whole, or a package is absent; OSError.
    """
    import datasets

    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()}/{facts.st_size}/{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    done = Path(datasets.config.HF_DATASETS_CACHE) / "unpacked" / f"{key}{file_type(path)}"
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        part = done.with_name(f"{done.name}.{os.getpid()}")
        packing = ".zst" if path.suffix.lower() == ".zst" else ".gz"
        try:
            with path.open("rb") as packed, part.open("wb") as file:
                for data in UNPACKERS[packing](packed):
                    file.write(data)
            part.replace(done)
        finally:
            part.unlink(missing_ok=True)
    return done


def _from_gzip(packed: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=packed) as file:
            while data := file.read(CHUNK_BYTES):
                yield data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"is not a whole gzip file: {error}") from None


def _from_zstd(packed: BinaryIO) -> Iterator[bytes]:
    """Of all frames, one after the other."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            "is packed by Zstandard: install the package zstandard (pip install zstandard, or uv sync --extra zstd), "
            "or unpack the file"
        ) from None
    frame, data, begun = zstandard.ZstdDecompressor().decompressobj(), b"", False
    try:
        while data := (frame.unused_data if frame.eof else b"") or packed.read(CHUNK_BYTES // 8):
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            begun = True
            yield frame.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"is not a whole Zstandard file: {error}") from None
    if not (begun and frame.eof):
        raise ValueError("is not a whole Zstandard file: it breaks off")


UNPACKERS = {".gz": _from_gzip, ".zst": _from_zstd}
