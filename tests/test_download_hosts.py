"""Which host of a download is asked next."""

import threading
from types import SimpleNamespace

from data.fetching import hosts
from data.fetching.hosts import HostQueue


def test_hosts_take_turns_and_have_their_limits():
    queue = HostQueue([f"http://big/{i}" for i in range(6)] + ["http://small/0", "http://small/1"], per_host=2)
    taken = [queue.take()[0] for _ in range(4)]
    assert sorted(map(hosts.host_of, taken)) == ["big", "big", "small", "small"]
    assert [hosts.host_of(url) for url in taken[:2]] != ["big", "big"] or taken[2:] != taken[:2]
    waited = []
    thread = threading.Thread(target=lambda: waited.append(queue.take()))
    thread.start()
    thread.join(0.05)
    assert waited == []  # both requests of big are under way
    queue.done(next(url for url in taken if "big" in url), answered=True)
    thread.join(5)
    assert waited[0][0].startswith("http://big/")


def test_a_busy_host_rests_while_others_are_asked(monkeypatch):
    """By a clock of its own, as this machine may be so busy that a short pause ends before the next line."""
    queue, now = HostQueue(["http://busy/0", "http://busy/1", "http://other/0"], per_host=1), [5.0]
    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(queue.changed, "wait", lambda seconds: now.append(now.pop() + seconds))
    first = queue.take()[0]
    while hosts.host_of(first) != "busy":
        first = queue.take()[0]
    queue.done(first, answered=True, pause_s=0.1)
    rest = [taken[0] for taken in iter(queue.take, None)]
    assert hosts.host_of(rest[-1]) == "busy"
    assert now == [5.1]
