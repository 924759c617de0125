"""Training metrics for Prometheus, pushed to the gateway at $CUVEE_PUSHGATEWAY while a flow runs; nothing without it.

Pushed rather than scraped, so that a flow listens on no port. $CUVEE_PUSHGATEWAY_AUTH, "user:password", is its login. A
gateway that is down costs a warning, not a run.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, delete_from_gateway, push_to_gateway
from prometheus_client.exposition import basic_auth_handler

EVERY = 15.0  # seconds between two pushes
LABELS = ("recipe", "stage")
# Of a stage's metrics: name in its series, name here, what it is, what to multiply by.
SERIES = (
    ("step", "cuvee_step", "Steps done", 1.0),
    ("loss", "cuvee_loss", "Loss of the last step", 1.0),
    ("lr", "cuvee_learning_rate", "Learning rate of the last step", 1.0),
    ("grad_norm", "cuvee_gradient_norm", "Norm of the gradient before clipping", 1.0),
    ("tokens_per_second", "cuvee_tokens_per_second", "Tokens trained a second, all ranks", 1.0),
    ("tflops_per_gpu", "cuvee_tflops_per_gpu", "Model TFLOP/s a GPU", 1.0),
    ("data_wait", "cuvee_data_wait_ratio", "Share of the time that steps wait for data", 1.0),
    ("peak_memory_gib", "cuvee_peak_memory_bytes", "Most memory that rank 0's device held", 2.0**30),
    ("rollout/reward", "cuvee_rollout_reward", "Mean reward of the last rollout", 1.0),
    ("rollout/tokens_per_second", "cuvee_rollout_tokens_per_second", "Tokens generated a second", 1.0),
)
STAGES = "cuvee_stages"
logger = logging.getLogger("cuvee.pushgateway")


def pushing(tracker: Any, recipe: str, flow_run: str) -> Any:
    """The tracker, which also feeds $CUVEE_PUSHGATEWAY; the tracker itself when that is not set."""
    url = os.environ.get("CUVEE_PUSHGATEWAY")
    return Pushing(tracker, recipe, flow_run, url) if url else tracker


class Pushing:
    """A tracker that also keeps a gauge a metric for each running stage, and pushes them every EVERY seconds."""

    def __init__(self, tracker: Any, recipe: str, flow_run: str, url: str):
        self._tracker, self._recipe, self._url = tracker, recipe, url
        self._key = {"flow_run": flow_run}
        self._registry = CollectorRegistry()
        self._gauges = {key: (Gauge(name, about, LABELS, registry=self._registry), factor)
                        for key, name, about, factor in SERIES}
        self._stages = Gauge(STAGES, "Stages of this run", ("recipe", "state"), registry=self._registry)
        self._running: dict[Any, str] = {}  # a tracker's run -> the stage's name
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._push_often, name="pushgateway", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def start(self, node: Any, parents: dict[str, Any]) -> Any:
        run = self._tracker.start(node, parents)
        self._running[run] = node.name
        self._stages.labels(self._recipe, "running").inc()
        return run

    def progress(self, run: Any, points: list[dict[str, float]]) -> None:
        self._tracker.progress(run, points)
        for point in points:
            for key in point.keys() & self._gauges.keys():
                gauge, factor = self._gauges[key]
                gauge.labels(self._recipe, self._running[run]).set(point[key] * factor)

    def finish(self, run: Any, record: dict[str, Any]) -> None:
        self._tracker.finish(run, record)
        self._end(run, "made")

    def fail(self, run: Any) -> None:
        self._tracker.fail(run)
        self._end(run, "failed")

    def close(self, failed: bool) -> None:
        """Deliver what the tracker has, then take this run's gauges from the gateway: they would stand there forever."""
        self._tracker.close(failed)
        self._closed.set()
        self._thread.join()
        self._ask(delete_from_gateway)

    def _end(self, run: Any, state: str) -> None:
        name = self._running.pop(run)
        self._stages.labels(self._recipe, "running").dec()
        self._stages.labels(self._recipe, state).inc()
        for gauge, _ in self._gauges.values():
            gauge.remove_by_labels({"recipe": self._recipe, "stage": name})

    def _push_often(self) -> None:
        warned = False
        while not self._closed.wait(EVERY):
            error = self._ask(push_to_gateway, registry=self._registry)
            if error and not warned:
                logger.warning("the gateway at %s takes no metrics, the run goes on without: %s", self._url, error)
            warned = bool(error)

    def _ask(self, function: Any, **kwargs: Any) -> Exception | None:
        user, _, password = os.environ.get("CUVEE_PUSHGATEWAY_AUTH", "").partition(":")

        def handler(url: str, method: str, timeout: float, headers: list, data: bytes) -> Any:
            return basic_auth_handler(url, method, timeout, headers, data, user or None, password)

        try:
            function(self._url, job="cuvee", grouping_key=self._key, timeout=10, handler=handler, **kwargs)
        except Exception as error:
            return error
        return None
