"""The servers beside a run: started again while they are needed, and told when the run has died."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import psutil
import pytest

from flows import flow, services
from flows.up import up
from stages.stage import CuveeError


def until(true, seconds):
    """What `true` gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_server_that_dies_is_started_again_until_it_is_no_longer_needed():
    started = []

    def start():
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]))
        return started[-1]

    with services._kept(start) as first:
        assert first is started[0]
        first.kill()
        until(lambda: len(started) == 2, 30)
        assert started[1].poll() is None
    assert all(process.poll() is not None for process in started)
    time.sleep(1.2)
    assert len(started) == 2


def test_stopping_a_server_ends_what_it_started():
    server = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(server.stdout.readline()))
    services.stop(server)
    assert server.poll() is not None and psutil.wait_procs([child], timeout=60)[1] == []


def test_whoever_speaks_no_http_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        greeter = threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0-x\r\n\r\n"), daemon=True)
        greeter.start()
        assert not services.answers(f"http://127.0.0.1:{port}/health")
        with pytest.raises(CuveeError, match=f"--port={port} can't be used .*; choose another port"):
            services.check_port("--port", port)
    services.check_port("--port", port)


def test_a_flow_may_run_beside_the_main_thread():
    """Another program's flow may start ours in a thread, where no signal's handler can be set."""
    ended = []

    def run():
        with flow._interruptible(None):
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    before = signal.getsignal(signal.SIGINT)
    with flow._interruptible(None):
        assert signal.getsignal(signal.SIGINT) is not before
    assert ended and signal.getsignal(signal.SIGINT) is before


def test_a_port_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CUVEE_STATE", str(tmp_path / "state"))
    with pytest.raises(CuveeError, match="--mlflow-port=70000 is no port; give one from 1 to 65535"):
        up(services.free_port(), 70000)
    assert not (tmp_path / "state").exists()


def test_a_killed_run_is_closed_in_its_own_server_and_leaves_no_process(tmp_path):
    (tmp_path / "docs").mkdir()
    for topic in sorted(topics)[:40]:
        (tmp_path / "docs" / f"{topic}.txt").write_text(topics[topic])
    state = tmp_path / "state"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CUVEE_"))}
    environment |= {"CUVEE_STATE": str(state), "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.Popen([sys.executable, "-m", "flows.cli", "run", "scale=micro", f"data.sources=[{tmp_path}/docs]",
                            "--until", "corpus"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)  # fmt: skip
    until(lambda: list(state.glob("runs/*.json")) or run.poll() is not None, 300)
    everything = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert psutil.wait_procs(everything, timeout=200)[1] == []
    with sqlite3.connect(state / "prefect" / "prefect.db") as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [("CRASHED",)]
    assert not list(state.glob("runs/*.json"))


def test_servers_of_one_state_directory_start_one_after_the_other(tmp_path, monkeypatch):
    """Two first runs at once: both servers would make the same database, and one would die of it."""
    monkeypatch.setenv("CUVEE_STATE", str(tmp_path / "state"))
    inside = threading.Event()

    def second():
        with services.starting():
            inside.set()

    other = threading.Thread(target=second)
    with services.starting():
        other.start()
        assert not inside.wait(0.3)
    other.join(30)
    assert inside.is_set()
