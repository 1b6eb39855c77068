"""URLs in the order in which they are asked for: many hosts at once, none of them often."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterable
from urllib.parse import urlsplit

GIVEN_UP = "host given up"
FAILURES = 20  # in a row, without one answer, after which a host is not asked any more
PAUSE_S = 30.0  # of a host that is still busy after all tries


def host_of(url: str) -> str:
    """The host of a URL in lower case; "" where there is none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


class HostQueue:
    """URLs by their hosts: of each at most `per_host` are with workers at a time, and its pauses are kept."""

    def __init__(self, urls: Iterable[str], per_host: int, seed: int = 0):
        """The order is drawn by the seed: hosts take turns, so that none gets all the requests at once."""
        self.per_host = per_host
        self.changed = threading.Condition()
        self.waiting: dict[str, deque[str]] = {}
        shuffled = list(urls)
        random.Random(seed).shuffle(shuffled)
        for url in shuffled:
            self.waiting.setdefault(host_of(url), deque()).append(url)
        self.turns = deque(self.waiting)  # hosts that have URLs left
        self.asked: dict[str, int] = {}  # requests under way
        self.failures: dict[str, int] = {}
        self.not_before: dict[str, float] = {}
        self.is_stopped = False

    def take(self) -> tuple[str, bool] | None:
        """(URL, whether its host is given up), as soon as a host may be asked; None where no URL is left."""
        with self.changed:
            while self.turns and not self.is_stopped:
                found, wait_s = self._take_now()
                if found:
                    return found
                self.changed.wait(wait_s)
            return None

    def _take_now(self) -> tuple[tuple[str, bool] | None, float | None]:
        """(what `take` returns, None) or (None, seconds until a pause ends; None: until a request does)."""
        now, pauses = time.monotonic(), []
        for _ in range(len(self.turns)):
            host = self.turns[0]
            self.turns.rotate(-1)
            given_up = self.failures.get(host, 0) >= FAILURES
            pause = 0.0 if given_up else self.not_before.get(host, 0.0) - now
            if pause > 0:
                pauses.append(pause)
            elif self.asked.get(host, 0) < self.per_host:
                url = self.waiting[host].popleft()
                if not self.waiting[host]:
                    self.turns.pop()  # it has just been put last
                self.asked[host] = self.asked.get(host, 0) + 1
                return (url, given_up), None
        return None, min(pauses, default=None)

    def done(self, url: str, answered: bool, pause_s: float = 0.0) -> None:
        """A request has ended. answered: whether the host said anything of use; pause_s: before the next one."""
        host = host_of(url)
        with self.changed:
            self.asked[host] -= 1
            self.failures[host] = 0 if answered else self.failures.get(host, 0) + 1
            if pause_s:
                self.not_before[host] = time.monotonic() + pause_s
            self.changed.notify_all()

    def stop(self) -> None:
        """No more URLs."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()
