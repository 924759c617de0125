"""The servers beside a run: Prefect's API and MLflow, on loopback, with their state below `.cuvee/`."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from flows.config import state_dir
from stages.stage import CuveeError

START_SECONDS = 300
CLOSING_SECONDS = 10.0
WATCHER = "import sys; sys.stdin.read(); from flows.services import close_after_death; close_after_death()"
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


def experiment_page(server: str, name: str) -> str:
    """The page of an experiment's runs, which that of all experiments opens in the other view; the latter where there is
    no experiment of that name."""
    query = urllib.parse.urlencode({"experiment_name": name})
    try:
        with urllib.request.urlopen(f"{server}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=5) as response:
            return mlflow_page(server, f"/experiments/{json.load(response)['experiment']['experiment_id']}")
    except (OSError, HTTPException, ValueError, KeyError):
        return mlflow_page(server)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except (OSError, HTTPException):  # nobody listens, or somebody who speaks no HTTP
        return False


def start_prefect(port: int, log: Path, private: bool = False) -> subprocess.Popen:
    """Prefect's API and UI on loopback. Ends with this process, however this process ends. private: for one run of
    the command line, which it outlives to note its death, without the services that schedule runs and watch workers."""
    url = f"http://127.0.0.1:{port}"
    extra = {"PREFECT_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}
    if private:
        extra |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED_SERVICES}
    factory = "flows.services:private_prefect" if private else "prefect.server.api.server:create_app"
    return start([sys.executable, "-m", "uvicorn", "--factory", factory, "--host", "127.0.0.1", "--port", str(port),
                  "--log-level", "warning", "--timeout-keep-alive", "30"], log, extra, private)


def private_prefect() -> Any:
    """Prefect's application in a process that ends when its standard input does."""
    from prefect.server.api.server import create_app

    def end_with_input() -> None:
        try:
            while os.read(0, 4096):
                pass
            close_after_death()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(CLOSING_SECONDS)
            os._exit(1)

    threading.Thread(target=end_with_input, daemon=True).start()
    return create_app()


def start_mlflow(port: int, log: Path) -> subprocess.Popen:
    from flows._mlflow import make_database
    from flows.tracking import tracking_uri

    make_database()
    return start([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers",
                   "1", "--backend-store-uri", tracking_uri(), "--default-artifact-root",
                   (state_dir() / "mlruns").as_uri()], log, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


def start(command: list[str], log: Path, extra: dict[str, str], watches: bool = False) -> subprocess.Popen:
    """A process that gets SIGTERM when this one dies, or, if it watches for that, the end of its standard input."""
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None)  # loaded before the fork: the child must not import
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.PIPE if watches else subprocess.DEVNULL,
                                env=os.environ | environment() | extra, start_new_session=True,
                                preexec_fn=None if watches else lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))


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


def check_port(option: str, port: int) -> None:
    """Raises CuveeError where no server can listen at a port of loopback."""
    if not 0 < port < 65536:
        raise CuveeError(f"{option}={port} is no port; give one from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise CuveeError(f"{option}={port} can't be used ({error.strerror}); choose another port") from None


def stop(process: subprocess.Popen) -> None:
    """End a server and what it started: MLflow's is a child, which a SIGKILL of its parent alone would leave."""
    from stages.worker import end_tree

    if process.poll() is None:
        end_tree(process.pid)
        process.wait()


@contextmanager
def prefect_api() -> Iterator[None]:
    """A Prefect API for one run: $PREFECT_API_URL, the one of `cuvee up`, or a private one that ends with the run. The run
    is closed there soon after this process dies, however it dies.

    Sets the environment before Prefect is imported; its database is that of `cuvee up`, so that its UI shows the run.
    """
    os.environ.update(environment())
    log = state_dir() / "logs" / "prefect.log"
    if not os.environ.get("PREFECT_API_URL") and (running := address("prefect")):
        os.environ["PREFECT_API_URL"] = f"{running}/api"
    if os.environ.get("PREFECT_API_URL"):
        watcher = start([sys.executable, "-c", WATCHER], log, {}, watches=True)
        try:
            yield
        finally:
            watcher.kill()
            watcher.wait()
        return
    port = free_port()
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    with ExitStack() as stack:
        with starting():
            server = stack.enter_context(_kept(lambda: start_prefect(port, log, private=True)))
            wait_for(server, f"http://127.0.0.1:{port}/api/health", log, "the Prefect server")
        yield


@contextmanager
def starting() -> Iterator[None]:
    """One Prefect server of a state directory starts at a time: two that make the same database break each other's."""
    path = state_dir() / "prefect.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def close_after_death() -> None:
    """Set the run of the process whose end was just noticed to Crashed in Prefect, unless it did that itself."""
    from flows.reconcile import close_dead

    time.sleep(1.0)  # a process's pipes end before itself
    close_dead()


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
