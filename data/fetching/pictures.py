"""Pictures behind many URLs, fetched into a folder by threads; each failure is a line of a file, with its reason.

What is there is not fetched again, so that an interrupted run continues. A failure that another try will not mend is
remembered too: such a URL is asked for again with `again` alone.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.fetching.hosts import GIVEN_UP, PAUSE_S, HostQueue, host_of
from data.web_images import BROKEN_OFF, NO_CONNECTION, NO_HOST, NOT_WRITTEN, SILENT, FetchError, fetch_into, place_of
from grades.files import written_beside

DECODING = threading.Semaphore(4)  # the largest picture takes more than 1 GB
NO_PICTURE, UNEXPECTED = "no picture that decodes", "unexpected error"
# What says of a host that it may not be there at all; any other failure is an answer.
HOST_PROBLEMS = (NO_CONNECTION, NO_HOST, SILENT, BROKEN_OFF, GIVEN_UP)


@dataclass
class Fetched:
    """What became of the URLs."""

    there: int = 0  # before
    new: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of those that are not there, with old failures
    stopped: str = ""  # why no more were asked for

    @property
    def failed(self) -> int:
        return self.reasons.total()


def check_picture(data: bytes) -> None:
    """Raise FetchError unless the bytes are a whole picture for training: all of it is decoded.

    Of threads within images.pil_limits.
    """
    # torch, which takes long to import and is not needed to list data sets
    from data.images import CUT_OFF, NOT_DECODED, TOO_MANY_PIXELS, ImageDecodeError, check_whole

    try:
        with DECODING:
            check_whole(data)
    except ImageDecodeError as error:
        lacks_package = error.kind not in (CUT_OFF, NOT_DECODED, TOO_MANY_PIXELS)
        raise FetchError(str(error), error.kind if lacks_package else NO_PICTURE, again=lacks_package) from None


def known_failures(path: Path) -> dict[str, dict[str, Any]]:
    """The last failure of each URL by the file; a line that breaks off counts for nothing."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                one = json.loads(line)
                found[one["url"]] = one
            except (ValueError, KeyError, TypeError):
                continue
    return found


class Fetcher:
    """Fetches the pictures of one data set."""

    def __init__(
        self,
        folder: Path,
        failures: Path,
        workers: int = 32,
        per_host: int = 4,
        is_allowed: Callable[[str], bool] | None = None,
        say: Callable[[str], None] = print,
    ):
        """folder: of the pictures, see web_images.place_of. failures: the file of them.

        is_allowed: which IP addresses may be asked; by default those that are public.
        """
        self.folder, self.failures = folder, failures
        self.workers, self.per_host, self.is_allowed, self.say = workers, per_host, is_allowed, say

    def fetch(self, urls: Mapping[str, str], again: bool = False) -> Fetched:
        """urls: each with the SHA-256 of its bytes, or "". again: also those that failed for good before."""
        from data.images import pil_limits

        result, known = Fetched(), known_failures(self.failures)
        wanted, kept = [], {}
        for url in urls:
            if place_of(self.folder, url).exists():
                result.there += 1
            elif not again and url in known and not known[url]["again"]:
                kept[url] = known[url]
            else:
                wanted.append(url)
        self.failures.parent.mkdir(parents=True, exist_ok=True)
        with self.failures.open("a", encoding="utf-8") as file:
            run = _Run(self, urls, HostQueue(wanted, self.per_host), result, len(wanted), file)
            with pil_limits(), ThreadPoolExecutor(self.workers) as pool:
                working = [pool.submit(run.work) for _ in range(min(self.workers, len(wanted)))]
                try:
                    for one in working:
                        one.result()
                except BaseException:  # Ctrl-C
                    run.queue.stop()
                    raise
        result.stopped = run.stopped
        # Also of URLs that were not asked for now: of a larger run, or because this one was stopped.
        before = {url: one for url, one in known.items() if not place_of(self.folder, url).exists()}
        self._rewrite({**before, **run.failed})
        result.reasons = Counter(one["reason"] for one in (*kept.values(), *run.failed.values()))
        return result

    def _rewrite(self, failed: Mapping[str, dict[str, Any]]) -> None:
        with written_beside(self.failures) as path, path.open("w", encoding="utf-8") as file:
            for one in failed.values():
                file.write(json.dumps(one) + "\n")


@dataclass
class _Run:
    """What the threads of a fetch share."""

    fetcher: Fetcher
    hashes: Mapping[str, str]
    queue: HostQueue
    result: Fetched
    total: int
    file: Any
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """Fetch until no URL is left."""
        while taken := self.queue.take():
            url, given_up = taken
            answered, pause_s = not given_up, 0.0
            try:
                if given_up:
                    raise FetchError(f"{url}: {host_of(url)} did not answer many times in a row", GIVEN_UP, again=True)
                fetch_into(self.fetcher.folder, url, self.hashes[url], check_picture, self.fetcher.is_allowed)
                self._count(url, None)
            except FetchError as error:
                answered = error.reason not in HOST_PROBLEMS
                pause_s = (error.wait_s or PAUSE_S) if error.reason == "HTTP 429" else 0.0
                self._count(url, error)
            except Exception as error:  # one URL in a million is of a kind that nobody has thought of
                self._count(url, FetchError(f"{url}: {type(error).__name__}: {error}", UNEXPECTED))
            except BaseException:
                self.queue.stop()
                raise
            finally:
                self.queue.done(url, answered, pause_s)

    def _count(self, url: str, error: FetchError | None) -> None:
        with self.lock:
            if error is None:
                self.result.new += 1
            else:
                one = {"url": url, "host": host_of(url), "reason": error.reason, "again": error.again,
                       "found": str(error)}  # fmt: skip
                self.failed[url] = one
                self.file.write(json.dumps(one) + "\n")
                self.file.flush()
                if error.reason == NOT_WRITTEN:  # a full disk: none of the others would be written either
                    self.stopped = str(error)
                    self.queue.stop()
            done = self.result.new + len(self.failed)
            if done % 1000 == 0 or done == self.total:
                self.fetcher.say(f"    {done:,} of {self.total:,} pictures asked for, {len(self.failed):,} failed")
