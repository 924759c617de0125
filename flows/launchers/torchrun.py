"""Run stages that train as several processes, one a device, on this host or on several (see stages/launch.py); others run
as local does.

Several hosts (cluster.nodes, this one first) share the file system that the state directory and this checkout lie on, at
the same paths, and are reached by a command as ssh is (cluster.shell).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from flows.launchers import local
from stages.launch import BY_SIGNAL, LOST, SAVE_SECONDS
from stages.run import AGAIN, OK, REFUSED
from stages.stage import ROOT, ConfigError
from stages.worker import end_tree

CANCEL_SECONDS = 30.0
TERMINATED = BY_SIGNAL + signal.SIGTERM


class Job(local.Job):
    """One attempt at a stage by several processes; nodes: the other hosts."""

    def __init__(self, spec: Path, log: Path, threads: int, cluster: Any, nodes: list[str]):
        super().__init__(log)
        self.cancelled = False
        share = max(1, threads * len(nodes) // json.loads(spec.read_text())["processes"])
        wanted = {"OMP_NUM_THREADS": str(share), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS), "CUVEE_STDIN": "1"}
        if len(nodes) > 1:
            wanted |= {"CUVEE_HOSTS": str(len(nodes)), "CUVEE_RUN": uuid.uuid4().hex,
                       "CUVEE_RENDEZVOUS": f"{nodes[0]}:{cluster.port}"}  # fmt: skip
        command = [sys.executable, "-m", "stages.launch", str(spec)]
        with open(log, "a") as file:
            self._processes = [
                _start(command, wanted | {"CUVEE_HOST": str(at), "CUVEE_ADDRESS": node}, [*cluster.shell, node] if at else [], file)
                for at, node in enumerate(nodes)
            ]
        self.pid = self._processes[0].pid
        self.started.set()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        statuses: list[int] = []
        waiting = [threading.Thread(target=self._wait, args=(process, statuses)) for process in self._processes]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        status = explaining(statuses)
        if self.cancelled:  # who ended it may have taken its status too
            status = TERMINATED
        self.end(BY_SIGNAL - status if status > BY_SIGNAL else status)

    def _wait(self, process: subprocess.Popen, statuses: list[int]) -> None:
        status = process.wait()
        statuses.append(BY_SIGNAL - status if status < 0 else status)
        if status not in (OK, AGAIN):  # the others may never notice
            for other in self._processes:
                other.stdin.close()

    def cancel(self) -> None:
        if not self.ended.is_set():
            self.cancelled = True
            for process in self._processes:
                process.stdin.close()
                end_tree(process.pid, CANCEL_SECONDS)


def _start(command: list[str], environment: dict[str, str], shell: list[str], log: Any) -> subprocess.Popen:
    """A host's share, here or through `shell`; it ends when its standard input does."""
    if shell:
        words = ["cd", str(ROOT.parent), "&&", "exec", "env"]
        given = [*(f"{key}={value}" for key, value in environment.items()), *command]
        command = [*shell, " ".join([*words, *map(shlex.quote, given)])]  # what ssh gives to the other host's shell
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                            env=os.environ | environment)  # fmt: skip


def explaining(statuses: list[int]) -> int:
    """The status that explains the others'."""
    if REFUSED in statuses:
        return REFUSED
    causes = [status for status in statuses if status not in (OK, AGAIN, LOST, TERMINATED)]
    return max(causes or statuses)


class Launcher(local.Launcher):
    """Raises ConfigError for a cluster of several hosts that are not named."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.nodes = cluster, list(getattr(cluster, "nodes", [])) or ["localhost"]
        if cluster.hosts != len(self.nodes):
            raise ConfigError(
                f"cluster.nodes: {len(self.nodes)} named, but cluster={cluster.name} has {cluster.hosts} hosts; name each, this "
                "one first, set cluster.hosts to how many there are, or use cluster=kubernetes"
            )
        super().__init__(cluster)

    def launch(self, spec: Path, log: Path, threads: int) -> local.Job:
        if json.loads(spec.read_text())["processes"] == 1:
            return super().launch(spec, log, threads)
        return Job(spec, log, threads, self.cluster, self.nodes)
