"""Packed files of a data set, unpacked beside themselves; nothing of them can land anywhere else."""

from __future__ import annotations

import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from data.fetching.places import Places, put_json, read_json

ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")
UNPACKED = "unpacked.json"
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def archives(folder: Path) -> list[Path]:
    """The packed files below the folder."""
    return [path for path in sorted(folder.rglob("*")) if path.name.lower().endswith(ENDINGS) and path.is_file()]


def packed(places: Places) -> list[Path]:
    """The packed files that are not unpacked yet."""
    done = read_json(places.own / UNPACKED)
    return [path for path in archives(places.folder) if done.get(_name(path, places)) != _facts(path)]


def unpack(places: Places) -> int:
    """Unpack what is not unpacked yet; how many that were. Raises ValueError that names one that cannot be, OSError."""
    found = packed(places)
    for path in found:
        size = path.stat().st_size
        if (free := shutil.disk_usage(path.parent).free) < size:
            raise ValueError(f"{path} cannot be unpacked: {free / 1e9:.1f} GB of the disk are free")
        try:
            _unpack(path)
        except tarfile.FilterError as error:
            raise ValueError(f"{path} is not unpacked: a name or a link in it leads elsewhere ({error})") from None
        except RuntimeError as error:  # encrypted, or packed in a way that zipfile does not know
            raise ValueError(f"{path} cannot be unpacked: {error}") from None
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it is fetched again") from None
        put_json(places.own / UNPACKED, read_json(places.own / UNPACKED) | {_name(path, places): _facts(path)})
    return len(found)


def _name(path: Path, places: Places) -> str:
    return path.relative_to(places.folder).as_posix()


def _facts(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _unpack(path: Path) -> None:
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as packed:
            packed.extractall(path.parent)  # it removes roots and ".." from names
    else:
        with tarfile.open(path) as tar:
            tar.extractall(path.parent, filter="data")  # refuses links and names that lead elsewhere
