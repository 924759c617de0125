"""Shards, and what brings their keys in order, on a Ray cluster, a task each; `data.workers` limits how many run at once, 0 = as many as it has CPUs.

Needs `pip install cuvee[ray]`. Workers and the stage share the stage's scratch folder, as on one machine or through a
network file system; sources lie in a bucket or there. RAY_ADDRESS names the cluster; without it, Ray starts here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stages.stage import ConfigError, CuveeError

CLUSTER = True  # 0 workers are as many as there are CPUs, which are not this machine's


@contextmanager
def start(work: Callable[[Any, int], Any], workers: int) -> Iterator[Callable[[Any, list[int]], Iterator[int]]]:
    """A function (what, items) -> each item as it is done. Raises ConfigError without Ray."""
    try:
        import ray
    except ImportError:
        raise ConfigError("data.executor: 'ray' is not installed here; pip install cuvee[ray], or take local") from None
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, include_dashboard=False)
    shared = ray.put(work)
    task = ray.remote(num_cpus=1, max_retries=3)(lambda work, what, item: work(what, item) or item)

    def each(what: Any, items: list[int]) -> Iterator[int]:
        waiting, running = list(reversed(items)), []
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < most:
                running.append(task.remote(shared, what, waiting.pop()))
            done, running = ray.wait(running)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, CuveeError) else error) from None
            except ray.exceptions.RayError as error:
                raise CuveeError(f"data.executor: Ray lost a task ({str(error).splitlines()[0]}); run again to go on from the finished "
                                 "shards, with fewer data.workers if memory was short") from None

    try:
        yield each
    finally:
        if began:
            ray.shutdown()
