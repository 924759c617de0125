"""Shards on this machine: one process a worker, forked, so that it starts at once and shares what is imported."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from stages.stage import CuveeError

PR_SET_PDEATHSIG = 1
Work = Callable[[Any, int], Any]  # (what is done, to which of its items)
_work: Work | None = None


def _begin(work: Work) -> None:
    global _work
    _work = work
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed stage must not leave workers that write on


def _one(what: Any, item: int) -> int:
    _work(what, item)
    return item


@contextmanager
def start(work: Work, workers: int) -> Iterator[Callable[[Any, list[int]], Iterator[int]]]:
    """A function (what, items) -> each item as it is done. One worker runs in this process."""
    if workers <= 1:
        yield lambda what, items: (work(what, item) or item for item in items)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (work,)) as pool:
        yield lambda what, items: _map(pool, what, items)


def _map(pool: ProcessPoolExecutor, what: Any, items: list[int]) -> Iterator[int]:
    left: set[Any] = {pool.submit(_one, what, item) for item in items}
    try:
        while left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise CuveeError("data.workers: a worker was killed, most likely for want of memory; run again to go on from the "
                         "finished shards, with fewer workers") from None
    finally:
        for future in left:
            future.cancel()
