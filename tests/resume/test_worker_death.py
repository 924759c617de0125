"""Processes that are killed from outside (out of memory, an eviction) are noticed and started again at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from flows.launchers import local
from flows.launchers.local import KILLED, Launcher
from tests.unit.test_step import documents, maker, node  # noqa: F401 (fixtures)

NOTICED_SECONDS = 120.0


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")  # its threads, unlike others', end before a fork
        yield launcher
        launcher.close()


def test_a_killed_worker_is_replaced_and_its_stage_made(maker, documents, launcher):  # noqa: F811
    launcher.warm()
    launcher._worker.kill()  # one that nobody uses yet, too
    killed, told = [], []

    class Dying:
        """The first stage that runs waits for its spec when its worker is killed."""

        REMOTE = False

        def launch(self, spec, log, threads):
            if killed:
                return launcher.launch(spec, log, threads)
            pipe = spec.with_name("pipe")
            if not pipe.exists():
                os.mkfifo(pipe)
            job = launcher.launch(pipe, log, threads)
            assert job.started.wait(300)
            if job.pid is not None:  # not one that the first worker, dead already, was asked for
                killed.append((time.monotonic(), psutil.Process(launcher._worker.pid).children()))
                launcher._worker.kill()
            return job

    maker.launcher = Dying()
    record = maker.make(node([documents]), True, 0, lambda line: told.append((time.monotonic(), line)))
    (at, children), = killed
    assert record["files"] and children and psutil.wait_procs(children, timeout=60)[1] == []
    (noticed, line) = [one for one in told if "starting again" in one[1]][-1]
    assert f"ended with status {KILLED}" in line and noticed - at < NOTICED_SECONDS


def test_deaths_count_only_until_the_stage_gets_on(maker, documents, launcher):  # noqa: F811
    class Preempted:
        """Dies five times, each time after another checkpoint."""

        REMOTE, starts = False, 0

        def launch(self, spec, log, threads):
            self.starts += 1
            log.touch()
            if self.starts > 5:
                return launcher.launch(spec, log, threads)
            mark = spec.parent / f"scratch/checkpoints/{self.starts:010d}/commit.json"
            mark.parent.mkdir(parents=True)
            mark.write_text("{}")
            return self

        def wait(self, on_line):
            return -9

    maker.launcher = Preempted()
    assert maker.make(node([documents]), True, 0, print)["files"] and maker.launcher.starts == 6


def test_the_worker_forks_without_threads(maker, documents, launcher):  # noqa: F811
    assert maker.make(node([documents]), True, 0, print)["files"]
    assert len(psutil.Process(launcher._worker.pid).threads()) == 1


FRESH = """
import os
from stages import worker

def told(*arguments):
    print("fresh:", *arguments, flush=True)
    start(*arguments)

start, os.execv = os.execv, told
worker.PRELOAD = ("json", "no_such_library")
worker.serve("cpu")
"""


def test_a_worker_whose_forks_would_lack_something_starts_fresh_processes(maker, documents, monkeypatch):  # noqa: F811
    """Where a library starts CUDA when it is imported, or is broken: what needs it says so in the stage's own log."""
    start = subprocess.Popen
    monkeypatch.setattr(local.subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", FRESH], **how))
    maker.launcher, lines = Launcher(), []
    try:
        assert maker.make(node([documents]), True, 0, lines.append)["files"]
    finally:
        maker.launcher.close()
    assert len([line for line in lines if line.startswith("fresh:") and "stages.run" in line]) == 1, lines


def test_what_a_stage_left_behind_keeps_nobody_waiting(tmp_path, monkeypatch):
    """Its own children may hold the worker's pipe open when all else is dead."""
    monkeypatch.setattr(local, "LISTEN_SECONDS", 0.2)
    code = "import os, time\nif os.fork() == 0: time.sleep(30)\nos._exit(9)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    job, started = local.Job(tmp_path / "log"), time.monotonic()
    local._watch(process, {"a": job})
    assert job.status == KILLED and time.monotonic() - started < 29
