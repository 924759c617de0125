"""Shards on this machine: one process a worker, forked, so that it starts at once and shares what is imported."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from stages.stage import CuveeError

PR_SET_PDEATHSIG = 1
Work = Callable[[int, int], Any]  # (pass, shard)
_work: Work | None = None


def _begin(work: Work) -> None:
    global _work
    _work = work
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed stage must not leave workers that write on


def _one(number: int, shard: int) -> int:
    _work(number, shard)
    return shard


@contextmanager
def start(work: Work, workers: int) -> Iterator[Callable[[int, list[int]], Iterator[int]]]:
    """A function (pass, shards) -> each shard as it is done. One worker runs in this process."""
    if workers <= 1:
        yield lambda number, shards: (work(number, shard) or shard for shard in shards)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (work,)) as pool:
        yield lambda number, shards: _map(pool, number, shards)


def _map(pool: ProcessPoolExecutor, number: int, shards: list[int]) -> Iterator[int]:
    from concurrent.futures.process import BrokenProcessPool

    left: set[Any] = {pool.submit(_one, number, shard) for shard in shards}
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
