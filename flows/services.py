"""The servers beside a run: Prefect's API and MLflow, on loopback, with their state below `.cuvee/`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.config import state_dir
from stages.stage import CuveeError

START_SECONDS = 120
UNUSED_SERVICES = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "PAUSE_EXPIRATIONS", "CANCELLATION_CLEANUP", "REPOSSESSOR",
                   "CLEANUP_RECONCILER", "TRIGGERS")
PR_SET_PDEATHSIG = 1


def environment() -> dict[str, str]:
    """Settings of Prefect and MLflow for this state directory; telemetry is off. What the user has set stays."""
    defaults = {
        "PREFECT_HOME": str(state_dir() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    return {key: os.environ.get(key, value) for key, value in defaults.items()}


def address(service: str) -> str | None:
    """The address of a service that `cuvee up` started for this state directory and that answers, or None."""
    try:
        found = json.loads((state_dir() / "services.json").read_text())[service]
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return None
    return found if answers(found + ("/api/health" if service == "prefect" else "/health")) else None


def mlflow_page(server: str, path: str = "/experiments") -> str:
    """The address of a page in MLflow's UI, in its view for training; its own choice is the one for chat applications."""
    return f"{server}/#{path}?workflowType=machine_learning"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def start_prefect(port: int, log: Path, private: bool = False) -> subprocess.Popen:
    """Prefect's API and UI on loopback. Ends with this process, however this process ends. private: for one run of
    the command line, without the services that schedule runs and watch workers."""
    url = f"http://127.0.0.1:{port}"
    extra = {"PREFECT_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}
    if private:
        extra |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED_SERVICES}
    return start([sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
                   "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning",
                   "--timeout-keep-alive", "30"], log, extra)


def start_mlflow(port: int, log: Path) -> subprocess.Popen:
    from flows.tracking import tracking_uri

    return start([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers",
                   "1", "--backend-store-uri", tracking_uri(), "--default-artifact-root",
                   (state_dir() / "mlruns").as_uri()], log, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


def start(command: list[str], log: Path, extra: dict[str, str]) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)  # loaded before the fork: the child must not import
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                env=os.environ | environment() | extra, start_new_session=True,
                                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))


def wait_for(process: subprocess.Popen, url: str, log: Path, what: str) -> None:
    """Until `url` answers. Raises CuveeError when the process ends first or START_SECONDS pass."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n    ".join(log.read_text(errors="replace").splitlines()[-8:])
            raise CuveeError(f"{what} did not start; the end of {log}:\n    {tail}")
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def prefect_api() -> Iterator[str]:
    """A Prefect API for one run: $PREFECT_API_URL, the one of `cuvee up`, or a private one that ends with the run.

    Sets the environment before Prefect is imported; its database is that of `cuvee up`, so that its UI shows the run.
    """
    os.environ.update(environment())
    if given := os.environ.get("PREFECT_API_URL"):
        yield given
        return
    if running := address("prefect"):
        os.environ["PREFECT_API_URL"] = f"{running}/api"
        yield running
        return
    port, log = free_port(), state_dir() / "logs" / "prefect.log"
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    with _kept(lambda: start_prefect(port, log, private=True)) as server:
        wait_for(server, f"http://127.0.0.1:{port}/api/health", log, "the Prefect server")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _kept(start: Callable[[], subprocess.Popen]) -> Iterator[subprocess.Popen]:
    """A server that is started again when it dies while it is needed: Prefect's client waits about a minute for it."""
    server, ended = start(), threading.Event()

    def keep() -> None:
        nonlocal server
        while not ended.wait(1.0):
            if server.poll() is not None:
                server = start()

    first, keeper = server, threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield first
    finally:
        ended.set()
        keeper.join()
        stop(server)
