"""Run stages that train as several processes on this machine, one a device, as torchrun does; others as local does.

`python -m flows.launchers.torchrun spec.json` is the agent: torch's own (torch.distributed.launcher) on a standalone
rendezvous, with the stage's exit status where `torchrun` itself would have 1 for any failure.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

from flows.launchers import local
from stages.run import OK, PR_SET_PDEATHSIG
from stages.stage import ConfigError
from stages.worker import end_tree

CANCEL_SECONDS = 30.0
SAVE_SECONDS = 600  # that a stage has to save and leave after SIGTERM
BY_SIGNAL = 128  # the agent's exit status where signal s ended a rank is 128 + s


class Job(local.Job):
    """One attempt at a stage by several processes."""

    def __init__(self, spec: Path, log: Path, threads: int):
        super().__init__(log)
        wanted = json.loads(spec.read_text())
        self._result = Path(wanted["result"])
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, threads // wanted["processes"])),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS),
        }
        with open(log, "a") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.launchers.torchrun", str(spec)], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip
        self.pid = self._process.pid
        self.started.set()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = self._process.wait()
        if status == OK:  # or asked to be started again: to the agent that is no failure
            status = json.loads(self._result.read_text())["status"]
        self.status = BY_SIGNAL - status if status > BY_SIGNAL else status
        self.ended.set()

    def cancel(self) -> None:
        if not self.ended.is_set():
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


def main(spec: str) -> int:
    """Run the spec's stage in as many processes as it says; the exit status of the one that explains the others'."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.launcher.api import ChildFailedError, LaunchConfig, elastic_launch

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # kill -9 of the run must not leave a stage that goes on
    wanted = json.loads(Path(spec).read_text())
    Path(wanted["result"]).unlink(missing_ok=True)  # an earlier attempt's
    config = LaunchConfig(
        1, 1, wanted["processes"], run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="localhost", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "stages.run", spec)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        codes = [code for code in codes if code != -signal.SIGTERM] or codes  # which ends the others
        killed = [code for code in codes if code < 0]  # at whose silence the others fail
        return BY_SIGNAL - killed[0] if killed else max(codes)
    except SignalException as stop:
        return OK if Path(wanted["result"]).exists() else BY_SIGNAL + stop.sigval
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
