"""Run stages on this machine, as forks of one warm worker process (see stages/worker.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.stage import ConfigError
from stages.worker import end_tree

KILLED = -9
LISTEN_SECONDS = 5.0  # for the last answers of a worker that has ended


class Job:
    """One attempt at a stage. `wait` returns its exit status; negative means the signal that ended it."""

    def __init__(self, log: Path):
        self.log = log
        self.started, self.ended = threading.Event(), threading.Event()
        self.pid: int | None = None
        self.status: int | None = None

    def wait(self, on_line: Callable[[str], None]) -> int:
        """Pass every line of the log on as it is written, until the stage ends."""
        self.log.touch()
        with open(self.log, errors="replace") as file:
            last = False
            pending = ""
            while True:
                pending += file.read()
                *lines, pending = pending.split("\n")
                for line in lines:
                    on_line(line)
                if last:
                    return self.status
                last = self.ended.wait(0.1)

    def end(self, status: int) -> None:
        """Take note that it has ended."""
        if not self.ended.is_set():
            self.status = status
            self.started.set()
            self.ended.set()

    def cancel(self) -> None:
        """End the stage and everything that it started."""
        self.started.wait()  # a worker that still imports would start it afterwards; one that dies ends it
        if not self.ended.is_set():
            end_tree(self.pid)


class Launcher:
    """Starts the worker on the first job; `close` ends it and all that runs in it."""

    REMOTE = False  # whether every stage has cores of its own, elsewhere

    def __init__(self, cluster: Any = None) -> None:
        if cluster is not None and cluster.devices > 1 and type(self) is Launcher:
            raise ConfigError(
                f"cluster.devices: {cluster.devices}, but launcher local starts one process a stage; set "
                "cluster.launcher to torchrun"
            )
        self._device = "cpu" if cluster is None else cluster.device
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._worker: subprocess.Popen | None = None

    def warm(self) -> None:
        """Start importing now, so that the first stage need not wait for it."""
        with self._lock:
            if self._worker is None or self._worker.poll() is not None:
                self._worker = subprocess.Popen([sys.executable, "-m", "stages.worker", self._device], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, text=True, bufsize=1)
                self._jobs = {}
                threading.Thread(target=_watch, args=(self._worker, self._jobs), daemon=True).start()

    def launch(self, spec: Path, log: Path, threads: int) -> Job:
        self.warm()
        name, job = uuid.uuid4().hex, Job(log)
        request = {"job": name, "spec": str(spec), "log": str(log), "threads": threads}
        with self._lock:
            self._jobs[name] = job
            try:
                self._worker.stdin.write(json.dumps(request) + "\n")
            except BrokenPipeError:  # it died this moment
                job.end(KILLED)
        return job

    def close(self) -> None:
        with self._lock:
            if self._worker and self._worker.poll() is None:
                self._worker.stdin.close()
                try:
                    self._worker.wait(15)
                except subprocess.TimeoutExpired:
                    end_tree(self._worker.pid)


def _watch(worker: subprocess.Popen, jobs: dict[str, Job]) -> None:
    """Pass on what the worker answers; when it dies (out of memory, say), its children have died with it."""
    listener = threading.Thread(target=_listen, args=(worker, jobs), daemon=True)
    listener.start()
    worker.wait()  # not the end of its output: what a stage started may hold that open
    listener.join(LISTEN_SECONDS)
    for job in list(jobs.values()):
        job.end(KILLED)


def _listen(worker: subprocess.Popen, jobs: dict[str, Job]) -> None:
    for line in worker.stdout:
        answer = json.loads(line)
        job = jobs.get(answer.get("job", ""))
        if job and "pid" in answer:
            job.pid = answer["pid"]
            job.started.set()
        elif job:
            job.end(answer["status"])
