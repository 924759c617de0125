"""Two pods train one model with torchrun, through the loss of one of them."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from flows.launchers import _kubernetes_manifests as manifests
from stages.run import OK, series
from tests.golden.test_pretrain import corpus
from tests.kubernetes.conftest import until
from tests.kubernetes.controllers import kill
from tests.kubernetes.test_launcher import start
from tests.resume.test_torchrun import write_spec

STEPS = 60


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


class Training:
    """Two pods that train one model."""

    def __init__(self, place):
        self.place, self.root = place, place.volume / "0123456789abcdef"
        spec = write_spec(self.root, corpus(place.volume / "tokens"), 2, steps=STEPS, save_every=5)
        self.launcher = place.launcher(port=free_port(), restarts=3, grace_seconds=60)
        self.run = start(self.launcher, spec)

    def steps(self) -> int:
        assert self.run.thread.is_alive(), self.run.lines
        metrics = self.root / "scratch/metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def pod(self, index: int) -> str:
        """The running pod of that index."""
        pods = self.launcher.api.list("Pod", labelSelector=f"cuvee.dev/run={self.run.job.stage.name}")["items"]
        return next(p["metadata"]["name"] for p in pods if p["metadata"]["annotations"][manifests.INDEX] == str(index)
                    and p["status"].get("phase") == "Running")  # fmt: skip

    def finished(self) -> None:
        """No step lost; those after the last checkpoint may have been done twice."""
        assert self.run.end(300) == OK, self.run.lines
        assert [step for step, _ in series(self.root / "scratch")["loss"]] == list(range(1, STEPS + 1))
        assert sum("resumed after step" in line for line in self.run.lines) == 1, self.run.lines
        assert (self.root / "out/model.safetensors").exists()


def test_two_pods_train_through_an_eviction(place):
    """The ranks of both save after the same step, and both pods are started again without counting."""
    training = Training(place)
    until(lambda: training.steps() >= 3, 180)
    place.evict(training.pod(1))
    training.finished()
    assert training.run.said("stopped on request") and training.run.said("asks to be started again")


@pytest.mark.skipif(not os.environ.get("CUVEE_TEST_DEATHS"), reason="a minute of CPU time; CUVEE_TEST_DEATHS=1 runs it")
@pytest.mark.parametrize("index", [0, 1])
def test_two_pods_train_through_a_death(place, index):
    """Out of memory, say: the other pod fails too, whether it was the first one's guest or its host."""
    place.only_local()
    training = Training(place)
    until(lambda: training.steps() >= 8, 180)
    kill(place.local.processes[training.pod(index)], signal.SIGKILL)
    training.finished()
