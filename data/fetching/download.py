"""One public data set after the other: asked for, shown, fetched, written as rows, checked."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from data.fetching import archives, hub
from data.fetching.hub import HubError, Remote
from data.fetching.linked_rows import links_of, row_files, write_rows
from data.fetching.pictures import Fetcher, check_picture, known_failures
from data.fetching.places import STATUS, Places, read_json, set_status
from data.fetching.rows_here import rows_here
from data.molmo2_sets import IMAGE_BYTES, PublicSet
from data.web_images import FetchError, place_of

DONE, PARTIAL, FAILED = "done", "partial", "failed"


@dataclass
class Options:
    """How data sets are fetched."""

    output: Path
    workers: int = 32
    per_host: int = 4
    max_pictures: int | None = None  # of each set, the same ones each time
    again: bool = False
    cache_dir: str | None = None
    endpoint: str | None = None  # of the hub
    is_allowed: Callable[[str], bool] | None = None  # IP addresses of pictures; None: public ones
    say: Callable[[str], None] = print


@dataclass
class Outcome:
    """What became of a data set."""

    name: str
    state: str
    words: str  # one sentence
    reasons: Counter[str] = field(default_factory=Counter)  # of pictures that were not fetched


def describe(one: PublicSet, remote: Remote | None) -> str:
    """A line about a data set before it is fetched. remote: None where the hub was not asked."""
    licence = (remote and remote.licence) or one.licence or "not named: look at its page"
    size = f"{remote.total_bytes / 1e9:.2f} GB" if remote else one.about_size
    revision = f", revision {remote.revision[:12]}" if remote else f", revision {one.revision or 'the newest'}"
    return (
        f"{one.name}: {one.repo}{revision}, {size} on the hub, rows: {one.about_rows}, pictures: {one.pictures}, "
        f"licence: {licence}"
    )


def check_disk(places: Places, needed: int, what: str) -> None:
    """Raise ValueError where the disk has not that many bytes left."""
    places.output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(places.output).free
    if free < needed:
        raise ValueError(
            f"{places.one.name}: {what} need about {needed / 1e9:.1f} GB, and {places.output} has {free / 1e9:.1f} GB "
            "left; --max_images N fetches N pictures of each data set, --output_dir another disk"
        )


def download(one: PublicSet, remote: Remote, options: Options) -> Outcome:
    """Fetch a data set, or what is not there of it, and note in the state file what became of it."""
    places = Places(options.output, one)
    try:
        check_disk(places, hub.missing_bytes(places, remote), "its files")
        hub.fetch(places, remote, options.endpoint, options.cache_dir, options.again)
        outcome = (
            _linked(places, remote, options) if one.kind == "url" else Outcome(one.name, DONE, "its files are there")
        )
        if one.kind == "archive":
            outcome.words += f", {archives.unpack(places)} archives unpacked"
    except (HubError, ValueError, OSError) as error:
        outcome = Outcome(one.name, FAILED, str(error))
    note(places, outcome, remote, options.max_pictures)
    return outcome


def note(places: Places, outcome: Outcome, remote: Remote | None = None, max_pictures: int | None = None) -> None:
    """Into the state file."""
    facts: dict[str, Any] = {"state": outcome.state, "words": outcome.words, "reasons": dict(outcome.reasons)}
    if remote is not None:
        facts |= {"revision": remote.revision, "licence": remote.licence, "bytes": remote.total_bytes}
        facts["max_images"] = max_pictures
    set_status(places.output, places.one.name, facts | {"time": time.strftime("%Y-%m-%d %H:%M:%S")})


def _files(places: Places, remote: Remote) -> list[Path]:
    """The parquet files of the revision."""
    names = {places.hub / file.path for file in remote.files}
    return [path for path in row_files(places.hub) if path in names]


def _linked(places: Places, remote: Remote, options: Options) -> Outcome:
    """Fetch the pictures of the rows, and write the rows that have theirs."""
    files = _files(places, remote)
    if not files:
        raise ValueError(f"{places.one.repo}: holds no parquet file")
    links = links_of(files, places.one)
    wanted = chosen(links, options.max_pictures)
    missing = sum(not place_of(places.pictures, url).exists() for url in wanted)
    check_disk(places, missing * IMAGE_BYTES, f"{missing:,} pictures")
    options.say(f"  {places.one.name}: {len(links):,} pictures, {missing:,} to fetch")
    fetcher = Fetcher(
        places.pictures, places.failures, options.workers, options.per_host, options.is_allowed, options.say
    )
    fetched = fetcher.fetch(wanted, options.again)
    written = left_out = 0
    for file in files:
        target = places.folder / file.relative_to(places.hub)
        one_written, one_left = write_rows(file, target, places.one, places.pictures)
        written, left_out = written + one_written, left_out + one_left
    words = (
        f"{written:,} rows with their pictures, {left_out:,} left out; pictures: {fetched.there + fetched.new:,} there "
        f"({fetched.new:,} new), {fetched.failed:,} failed"
    )
    if fetched.stopped:
        return Outcome(places.one.name, FAILED, f"{words}; stopped: {fetched.stopped}", fetched.reasons)
    return Outcome(places.one.name, PARTIAL if fetched.failed else DONE, words, fetched.reasons)


def chosen(links: dict[str, str], count: int | None) -> dict[str, str]:
    """`count` of the links, drawn by their names: the same ones each time, whatever was fetched before."""
    if count is None or count >= len(links):
        return links
    order = sorted(links, key=lambda url: sha256(url.encode("utf-8", "surrogatepass")).digest())
    return {url: links[url] for url in order[:count]}


def is_done(one: PublicSet, remote: Remote, options: Options) -> bool:
    """Whether the state file and the sizes of the files say that nothing is left to fetch."""
    places = Places(options.output, one)
    found = read_json(options.output / STATUS).get(one.name, {})
    if options.again or found.get("state") != DONE or found.get("revision") != remote.revision:
        return False
    return one.kind != "url" and not hub.missing_bytes(places, remote)


def problems_of(one: PublicSet, options: Options) -> Iterator[str]:
    """What is wrong with a downloaded data set, by reading all of it; the hub is not asked."""
    places = Places(options.output, one)
    try:
        remote = hub.locked(places)
        if remote is None:
            yield f"{one.name}: not downloaded to {places.folder}"
            return
        if one.revision and one.revision != remote.revision:
            yield f"{one.name}: is of revision {remote.revision}, not {one.revision}"
        yield from (f"{one.name}: {found}" for _, found in hub.damage(places, remote, hashes=True))
        if one.kind == "url":
            facts = read_json(options.output / STATUS).get(one.name, {})
            wanted = facts.get("max_images")
            yield from (f"{one.name}: {found}" for found in _picture_problems(places, remote, wanted))
        elif one.kind == "archive":
            yield from (f"{one.name}: {path} is not unpacked" for path in archives.packed(places))
        if one.kind != "archive":  # which may hold parquet files
            names = {places.folder / file.path for file in remote.files}
            strays = [path for path in row_files(places.folder) if path not in names]
            yield from (f"{one.name}: {path} is not of this revision, and is trained on too" for path in strays)
        yield from (f"{one.name}: {found}" for found in _row_problems(places))
    except (ValueError, OSError) as error:
        yield f"{one.name}: {error}"


def _picture_problems(places: Places, remote: Remote, max_pictures: int | None) -> Iterator[str]:
    """Pictures that are not there though nothing says why, and such as are not what they should be."""
    files, known = _files(places, remote), known_failures(places.failures)
    absent = failed = 0
    for url, wanted in chosen(links_of(files, places.one), max_pictures).items():
        path = place_of(places.pictures, url)
        if not path.exists():
            absent, failed = absent + (url not in known), failed + (url in known)
            continue
        data = path.read_bytes()
        try:
            check_picture(data)
        except FetchError as error:
            yield f"{path} ({url}): {error}"
        if wanted and sha256(data).hexdigest() != wanted.lower():
            yield f"{path} ({url}): its SHA-256 is not {wanted}"
    if absent:
        yield f"{absent:,} pictures were never asked for"
    if failed:
        yield f"{failed:,} pictures could not be fetched: {places.failures}"


def _row_problems(places: Places) -> Iterator[str]:
    """Whether a hundred of the rows, spread over all, can be trained on."""
    try:
        _, rows = rows_here(places.folder)
    except (ValueError, FileNotFoundError) as error:
        yield str(error)
        return
    numbers = range(0, len(rows), max(1, len(rows) // 100))
    bad = Counter(str(rows[number]["bad"]) for number in numbers if "bad" in rows[number])
    yield from (f"{count} of {len(numbers)} rows: {reason}" for reason, count in bad.items())
