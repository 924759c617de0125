"""Two pods train one model with torchrun: evicted in the middle, then one killed, and not a step is lost or done twice."""

from __future__ import annotations

import signal
import socket

from flows.launchers import kubernetes
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


def test_two_pods_train_through_an_eviction_and_a_death(place):
    root = place.volume / "0123456789abcdef"
    spec = write_spec(root, corpus(place.volume / "tokens"), 2, steps=STEPS, save_every=5)
    launcher = place.launcher(port=free_port(), restarts=3, grace_seconds=60)
    run = start(launcher, spec)

    def steps() -> int:
        assert run.thread.is_alive(), run.lines
        metrics = root / "scratch/metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    until(lambda: steps() >= 3, 180)

    def second() -> str:
        """The running pod of index 1."""
        pods = launcher.api.list("Pod", labelSelector=f"cuvee.dev/run={run.job.stage.name}")["items"]
        return next(p["metadata"]["name"] for p in pods if p["metadata"]["annotations"][kubernetes.manifests.INDEX] == "1"
                    and p["status"].get("phase") == "Running")  # fmt: skip

    place.evict(second())
    until(lambda: steps() and run.said("resumed after step"), 180)
    assert run.said("stopped on request") and run.said("asks to be started again"), run.lines
    if place.local:
        done = steps()
        until(lambda: steps() > done, 180)
        kill(place.local.processes[second()], signal.SIGKILL)  # out of memory, say
    assert run.end(300) == OK, run.lines
    assert [step for step, _ in series(root / "scratch")["loss"]] == list(range(1, STEPS + 1))
    assert sum("resumed after step" in line for line in run.lines) == (2 if place.local else 1), run.lines
    assert (root / "out/model.safetensors").exists()
