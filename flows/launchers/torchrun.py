"""Run stages that train as several processes on this machine, one a device (see stages/launch.py); others as local does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from flows.launchers import local
from stages.launch import BY_SIGNAL
from stages.stage import ConfigError
from stages.worker import end_tree

CANCEL_SECONDS = 30.0
SAVE_SECONDS = 600  # that a stage has to save and leave after SIGTERM


class Job(local.Job):
    """One attempt at a stage by several processes."""

    def __init__(self, spec: Path, log: Path, threads: int):
        super().__init__(log)
        self.cancelled = False
        wanted = json.loads(spec.read_text())
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, threads // wanted["processes"])),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS),
        }
        with open(log, "a") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stages.launch", str(spec)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip
        self.pid = self._process.pid
        self.started.set()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = self._process.wait()
        if self.cancelled:  # who ended it may have taken its status too
            status = BY_SIGNAL + signal.SIGTERM
        self.status = BY_SIGNAL - status if status > BY_SIGNAL else status
        self.ended.set()

    def cancel(self) -> None:
        if not self.ended.is_set():
            self.cancelled = True
            end_tree(self.pid, CANCEL_SECONDS)


class Launcher(local.Launcher):
    """Raises ConfigError for a cluster of several hosts: processes start on this one alone."""

    def __init__(self, cluster: Any) -> None:
        if cluster.hosts > 1:
            raise ConfigError(
                f"cluster.launcher: torchrun starts processes on this host only, but cluster={cluster.name} has "
                f"{cluster.hosts} hosts; choose a cluster of one"
            )
        super().__init__(cluster)

    def launch(self, spec: Path, log: Path, threads: int) -> local.Job:
        if json.loads(spec.read_text())["processes"] == 1:
            return super().launch(spec, log, threads)
        return Job(spec, log, threads)
