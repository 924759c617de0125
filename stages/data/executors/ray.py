"""Shards on a Ray cluster, a task each; `data.workers` limits how many run at once, 0 = as many as it has CPUs.

Needs `pip install cuvee[ray]`. Workers and the stage share the stage's scratch folder, as on one machine or through a
network file system; sources lie in a bucket or there. RAY_ADDRESS names the cluster; without it, Ray starts here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stages.stage import ConfigError

CLUSTER = True  # 0 workers are as many as there are CPUs, which are not this machine's


@contextmanager
def start(work: Callable[[int, int], Any], workers: int) -> Iterator[Callable[[int, list[int]], Iterator[int]]]:
    """A function (pass, shards) -> each shard as it is done. Raises ConfigError without Ray."""
    try:
        import ray
    except ImportError:
        raise ConfigError("data.executor: 'ray' is not installed here; pip install cuvee[ray], or take local") from None
    began = not ray.is_initialized()
    if began:
        ray.init(log_to_driver=False, include_dashboard=False, num_cpus=None)
    shared = ray.put(work)
    task = ray.remote(num_cpus=1, max_retries=3)(lambda work, number, shard: work(number, shard) or shard)

    def each(number: int, shards: list[int]) -> Iterator[int]:
        waiting, running = list(reversed(shards)), []
        most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < most:
                running.append(task.remote(shared, number, waiting.pop()))
            done, running = ray.wait(running)
            yield from ray.get(done)

    try:
        yield each
    finally:
        if began:
            ray.shutdown()
