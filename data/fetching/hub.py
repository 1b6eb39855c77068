"""Files of data sets on the Hugging Face hub: asked for first, then fetched at one revision, and checked against it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data.fetching.places import Places, put_json, read_json

CHUNK_BYTES = 8 * 2**20
WAITS_S = (5.0, 30.0)  # before the second try and the third


class HubError(Exception):
    """The hub does not give what is asked for, in one sentence. again: whether another try may help."""

    def __init__(self, words: str, again: bool = False):
        super().__init__(words)
        self.again = again


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision."""

    path: str
    size: int  # bytes
    sha256: str  # "" for small files, of which the hub knows git's hash alone


@dataclass(frozen=True)
class Remote:
    """A data set at one revision, as the hub has it."""

    repo: str
    revision: str  # a commit
    licence: str  # "" where the page names none
    files: tuple[RemoteFile, ...]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def locked(places: Places) -> Remote | None:
    """What the first download wrote; None before it. Raises ValueError where the file is damaged."""
    found = read_json(places.lock)
    if not found:
        return None
    try:
        return Remote(**(found | {"files": tuple(RemoteFile(**file) for file in found["files"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{places.lock} cannot be read ({error}): delete it, and the download continues") from None


def ask(places: Places, endpoint: str | None = None) -> Remote:
    """The data set's files and licence at its pinned or locked revision, else at the newest.

    endpoint: the address of the hub; by default HF_ENDPOINT. Raises HubError.
    """
    from huggingface_hub import HfApi

    one, before = places.one, locked(places)
    revision = one.revision or (before.revision if before else None)
    with _one_sentence(one.repo, revision):
        info = HfApi(endpoint=endpoint).dataset_info(one.repo, revision=revision, files_metadata=True, timeout=30)
    card: Any = info.card_data or {}
    licence = card.get("license") or card.get("license_name") or ""
    files = [
        RemoteFile(file.rfilename, file.size or 0, (file.lfs and file.lfs.sha256) or "")
        for file in info.siblings or []
        if not one.files or any(fnmatch(file.rfilename, pattern) for pattern in one.files)
    ]
    if not files:
        raise HubError(f"{one.repo}: holds no file that is wanted ({', '.join(one.files) or 'any'})")
    for file in files:
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise HubError(f"{one.repo}: the name of its file {file.path} leads elsewhere")
    words = ", ".join(licence) if isinstance(licence, list) else str(licence)
    return Remote(one.repo, str(info.sha), words, tuple(files))


def fetch(
    places: Places, remote: Remote, endpoint: str | None = None, cache_dir: str | None = None, again: bool = False
) -> None:
    """Fetch the files that are not there, or all of them again, and write the lock file. Raises HubError, ValueError.

    Files of the revision before that this one has not are removed, and rows made of them. A file that breaks off is
    continued by huggingface_hub; what has come is compared with the hub's hashes.
    """
    missing = _missing(places, remote)
    for file in missing:  # else huggingface_hub takes a damaged one for what it wrote there
        (places.hub / file.path).unlink(missing_ok=True)
    _remove_former(places, remote)
    put_json(places.lock, asdict(remote))
    for wait_s in (*WAITS_S, None):
        try:
            with _one_sentence(remote.repo, remote.revision):
                _snapshot(places, remote, endpoint, cache_dir, again)
            break
        except HubError as error:
            if wait_s is None or not error.again:
                raise
            time.sleep(wait_s)
    new = replace(remote, files=remote.files if again else tuple(missing))
    found = list(damage(places, remote)) or list(damage(places, new, hashes=True))
    for path, _ in found:
        path.unlink(missing_ok=True)
    if found:
        raise HubError(f"{remote.repo}: {len(found)} files are not as the hub has them, the first: {found[0][1]}")


def _remove_former(places: Places, remote: Remote) -> None:
    """Else both revisions would be trained on: the folder itself is read as a data set."""
    before, names = locked(places), {file.path for file in remote.files}
    for file in before.files if before else ():
        if file.path not in names:
            for folder in (places.hub, places.folder):
                (folder / file.path).unlink(missing_ok=True)


def _snapshot(places: Places, remote: Remote, endpoint: str | None, cache_dir: str | None, again: bool) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(
        remote.repo,
        repo_type="dataset",
        revision=remote.revision,
        local_dir=places.hub,
        allow_patterns=list(places.one.files) or None,
        endpoint=endpoint,
        cache_dir=cache_dir,
        force_download=again,
    )


def _missing(places: Places, remote: Remote) -> list[RemoteFile]:
    return [file for file in remote.files if _size(places.hub / file.path) != file.size]


def missing_bytes(places: Places, remote: Remote) -> int:
    """Of the files that are not there in their size."""
    return sum(file.size for file in _missing(places, remote))


def damage(places: Places, remote: Remote, hashes: bool = False) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong with it in one sentence) of those on disk. hashes: read them all."""
    for file in remote.files:
        path = places.hub / file.path
        size = _size(path)
        if size is None:
            yield path, f"{path} is not there"
        elif size != file.size:
            yield path, f"{path} has {size:,} bytes, not {file.size:,}"
        elif hashes and file.sha256 and (found := _sha256(path)) != file.sha256:
            yield path, f"{path} has the SHA-256 {found}, not {file.sha256}"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _sha256(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            made.update(data)
    return made.hexdigest()


@contextlib.contextmanager
def _one_sentence(repo: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    again = False
    try:
        yield
    except GatedRepoError:
        said = "its owners ask for consent: accept on its page, then run `hf auth login`"
    except RepositoryNotFoundError:
        said = "the hub has no such data set, or it is private"
    except RevisionNotFoundError:
        said = "the hub has no such revision"
    except Exception as error:  # of the network, of the disk, of the library
        lines = str(error).strip().splitlines() or ["no reason given"]
        said, again = f"{type(error).__name__}: {lines[0]}", True
    else:
        return
    raise HubError(f"{repo} at {revision}: {said}" if revision else f"{repo}: {said}", again)
