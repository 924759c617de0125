"""Processes that are killed from outside (out of memory, an eviction) are noticed and started again at once."""

from __future__ import annotations

import subprocess
import sys
import threading
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
    yield launcher
    launcher.close()


def stages_of(worker: int) -> list[psutil.Process]:
    try:
        return psutil.Process(worker).children()
    except psutil.NoSuchProcess:
        return []


def test_a_killed_worker_is_replaced_and_its_stage_made(maker, documents, launcher):  # noqa: F811
    launcher.warm()
    launcher._worker.kill()  # one that nobody uses yet, too
    killed = []

    def kill() -> None:
        while not (children := stages_of(launcher._worker.pid)):
            time.sleep(0.002)
        killed.append((time.monotonic(), children))
        launcher._worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    lines = []
    noticed = []

    def on_line(line: str) -> None:
        lines.append(line)
        if "starting again" in line:
            noticed.append(time.monotonic())

    record = maker.make(node([documents]), 1, 0, on_line)
    killer.join()
    assert record["files"] and any(f"ended with status {KILLED}; starting again" in line for line in lines)
    at, children = killed[0]
    assert noticed[0] - at < NOTICED_SECONDS and psutil.wait_procs(children, timeout=10)[1] == []


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
    assert maker.make(node([documents]), 1, 0, print)["files"] and maker.launcher.starts == 6


def test_what_a_stage_left_behind_keeps_nobody_waiting(tmp_path, monkeypatch):
    """Its own children may hold the worker's pipe open when all else is dead."""
    monkeypatch.setattr(local, "LISTEN_SECONDS", 0.2)
    code = "import os, time\nif os.fork() == 0: time.sleep(30)\nos._exit(9)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    job, started = local.Job(tmp_path / "log"), time.monotonic()
    local._watch(process, {"a": job})
    assert job.status == KILLED and time.monotonic() - started < 20
