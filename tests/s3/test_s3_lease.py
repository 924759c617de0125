"""Of those who would make one artifact of a bucket one holds its lease, whatever happens to requests and clocks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from stages.store import lease
from stages.store._bucket import Bucket
from stages.store.s3 import S3Store
from tests.s3.proxy import DOWN, ERROR, LOST_ANSWER, Proxy, every_second


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["", LOST_ANSWER, ERROR])
def test_of_rivals_for_a_lease_one_holds_it(uri, endpoint, tmp_path, fault):
    holding, most, order = [], [], threading.Lock()

    def hold(at):
        store = S3Store(uri, tmp_path / str(at), proxy.endpoint)
        right = store.lease("f" * 32)
        right.POLL_SECONDS = 0.05
        assert right.wait(threading.Event())
        with order:
            holding.append(at)
            most.append(len(holding))
        threading.Event().wait(0.1)
        with order:
            holding.remove(at)
        right.release()

    with Proxy(endpoint, every_second(fault, "PUT")) as proxy:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(hold, range(4)))
    assert most == [1] * 4


@pytest.mark.parametrize("fault", ["", LOST_ANSWER, ERROR])
def test_of_rivals_for_an_artifact_one_makes_it(uri, endpoint, tmp_path, fault):
    """Given up as done, the lease is removed, which may let in two at once: both find the artifact."""
    made, found = [], []

    def make(at):
        store = S3Store(uri, tmp_path / str(at), proxy.endpoint)
        right = store.lease("f" * 32)
        right.POLL_SECONDS = 0.01
        with right:
            if made:
                return found.append(at)
            threading.Event().wait(0.1)
            made.append(at)

    with Proxy(endpoint, every_second(fault, "PUT")) as proxy:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(4)))
    assert len(made) == 1 and len(found) == 3


def test_a_silent_holder_is_replaced_by_one_of_two_and_learns_of_it(store, monkeypatch):
    """By the waiters' own clock: what the holder's or the server's say does not matter. The heartbeat counts, and only
    while somebody could look."""
    now = [0.0]
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(lease, "is_gone", lambda holder: False)
    monkeypatch.setattr(lease.Lease, "_beat", lambda self: None)  # here it beats when it is told to
    holder, *waiters = (store.lease("f" * 32) for _ in range(3))
    assert holder.acquire()

    def looks(seconds):
        now[0] += seconds
        return [waiter.acquire() for waiter in waiters]

    for _ in range(20):  # a beating holder keeps it for longer than the expiry
        assert holder._still_mine() and looks(4) == [False, False]
    for _ in range(13):
        assert looks(4) == [False, False]
    assert looks(3600) == [False, False]  # an outage: nobody could see a heartbeat
    now[0] += 4
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(lambda waiter: waiter.acquire(), waiters))
    assert sorted(won) == [False, True]
    assert not holder._still_mine()
    holder.release(done=True)
    winner = waiters[won.index(True)]
    assert winner._still_mine()
    winner.release()
    assert store.lease("f" * 32).acquire()


def test_a_holder_beats_by_itself_also_after_an_outage(uri, endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    down = threading.Event()
    with Proxy(endpoint, lambda method, path: DOWN if down.is_set() else "") as proxy:
        holder = S3Store(uri, tmp_path / "cache", proxy.endpoint).lease("f" * 32)
        bucket = Bucket(uri, endpoint)
        with holder:
            for broken in (False, True):
                if broken:
                    down.set()
                    until(lambda: proxy.seen[-1][2] == DOWN)
                    down.clear()
                beat = bucket.get(holder.name)
                until(lambda beat=beat: bucket.get(holder.name) != beat)
