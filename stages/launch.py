"""Run one stage in as many processes as its spec says: `python -m stages.launch spec.json`, on every host that takes part.

One host needs nothing else. Of several hosts each is told by its environment:

    CUVEE_HOSTS                            how many there are; each runs the same share of the spec's processes
    CUVEE_HOST or JOB_COMPLETION_INDEX     which of them this is, from 0
    CUVEE_RENDEZVOUS                       "name:port" at which host 0 keeps the meeting point
    CUVEE_ADDRESS                          where the others reach this host
    CUVEE_RUN                              a name that they share, and no other attempt has
    CUVEE_STDIN                            set where the end of standard input means that the run is gone

The processes are started and watched by torch's elastic agent. The exit status is that of stages/run.py for the stage as a
whole: OK, REFUSED, AGAIN on every host, FAILED; 128 + s where signal s ended a process; LOST where the other hosts are
gone. SIGTERM asks the processes to save and leave.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from stages.run import AGAIN, FAILED, OK

LOST = 69  # EX_UNAVAILABLE: only follows from what befell another host
BY_SIGNAL = 128
SAVE_SECONDS = 600  # that a stage has to save and leave after SIGTERM
ALONE_SECONDS = 90  # the same when the run is gone: other hosts, for which processes would wait for ever, may be gone too
ENDED_SECONDS = 15.0  # after its processes have ended the agent ends
WAIT_SECONDS = 7 * 24 * 3600  # that hosts wait for one another: a cluster may have no room for the last one for days


def main(spec_file: str) -> int:
    """Run this host's share of the stage; its exit status."""
    spec = json.loads(Path(spec_file).read_text())
    if _answer(spec) == OK:  # this host was lost after the stage had ended
        return OK
    run = _Processes(spec_file, spec) if spec["processes"] > 1 else _Process(spec_file)
    signal.signal(signal.SIGTERM, run.stop)
    if os.environ.get("CUVEE_STDIN"):
        threading.Thread(target=_end_with_input, daemon=True).start()
    status = run.wait()
    return AGAIN if status == OK and _answer(spec) == AGAIN else status


def _answer(spec: dict[str, Any]) -> int | None:
    """The status that the stage's first process has written, if it has."""
    try:
        return json.loads(Path(spec["result"]).read_text())["status"]
    except FileNotFoundError:
        return None


def _end_with_input() -> None:
    """Nothing else says, on every host and from the first moment on, that the run was killed."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ALONE_SECONDS)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(LOST)


class _Process:
    """A stage of one process. As a container's first process this one has to pass signals on."""

    def __init__(self, spec_file: str):
        self.process = subprocess.Popen([sys.executable, "-m", "stages.run", spec_file])

    def stop(self, *_: Any) -> None:
        self.process.terminate()

    def wait(self) -> int:
        status = self.process.wait()
        return BY_SIGNAL - status if status < 0 else status


class _Processes:
    """This host's processes of a stage that has several."""

    def __init__(self, spec_file: str, spec: dict[str, Any]):
        self.spec_file, self.spec = spec_file, spec
        self.status = FAILED

    def stop(self, *_: Any) -> None:
        """Ask the ranks, not their agent, which would not wait until the other hosts' ranks have saved too."""
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        if not ranks:  # they have just ended, or the other hosts are still waited for, and nothing is lost
            threading.Timer(ENDED_SECONDS, os._exit, (AGAIN,)).start()

    def wait(self) -> int:
        # Not in the main thread: there the agent would take the signals.
        agent = threading.Thread(target=self._run, daemon=True)
        agent.start()
        agent.join()
        return self.status

    def _run(self) -> None:
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import ChildFailedError, elastic_launch

        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
        try:
            elastic_launch(_config(self.spec), sys.executable)("-m", "stages.run", self.spec_file)
            self.status = OK
        except ChildFailedError as error:
            self.status = _explaining([failure.exitcode for failure in error.failures.values()])
        except RendezvousError as error:
            print(f"the other hosts are gone: {error}", file=sys.stderr, flush=True)
            self.status = LOST


def _explaining(codes: list[int]) -> int:
    """The exit status that explains the others."""
    codes = [code for code in codes if code != -signal.SIGTERM] or codes  # which ends the others
    killed = [code for code in codes if code < 0]  # at whose silence the others fail
    return BY_SIGNAL - killed[0] if killed else max(codes)


def _config(spec: dict[str, Any]) -> Any:
    """The agent's configuration. Waits for host 0's meeting point."""
    from torch.distributed.launcher.api import LaunchConfig

    hosts = int(os.environ.get("CUVEE_HOSTS", "1"))
    if hosts == 1:
        return LaunchConfig(
            1, 1, spec["processes"], run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            local_addr="localhost", max_restarts=0,
        )  # fmt: skip
    # A host that comes back would wait for ever in the meeting point's own store (seen with torch 2.13).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    first = int(os.environ.get("CUVEE_HOST") or os.environ["JOB_COMPLETION_INDEX"]) == 0
    meeting, own = os.environ["CUVEE_RENDEZVOUS"], os.environ["CUVEE_ADDRESS"]
    if first:  # which its name may not stand for yet
        meeting = f"{f'[{own}]' if ':' in own else own}:{meeting.rpartition(':')[2]}"
    else:
        _await(meeting)
    return LaunchConfig(
        hosts, hosts, spec["processes"] // hosts, run_id=os.environ["CUVEE_RUN"], rdzv_backend="c10d",
        rdzv_endpoint=meeting, rdzv_configs={"is_host": first, "join_timeout": WAIT_SECONDS},
        local_addr=own, max_restarts=0,
    )  # fmt: skip


def _await(meeting: str) -> None:
    """Return when something listens at `meeting`: its host may start much later, and its name be unknown until then."""
    host, _, port = meeting.rpartition(":")
    said = time.monotonic()
    while True:
        try:
            return socket.create_connection((host, int(port)), 5).close()
        except OSError as error:
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"waiting for the first host at {meeting}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
