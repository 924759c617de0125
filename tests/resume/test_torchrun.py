"""The torchrun launcher: a stage in two processes gives what one gives, stops on request, and refuses in a sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.launchers.torchrun import Launcher
from stages.run import AGAIN, OK, REFUSED
from stages.stage import ConfigError, Kind
from tests.golden.test_pretrain import BASE, corpus
from tests.unit.tiny import artifact

HOST = SimpleNamespace(name="here", hosts=1, devices=2, device="cpu")


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher(HOST)
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "tokens")


def write_spec(root: Path, tokens: Path, processes: int, **changes) -> Path:
    """The spec of a pretraining in `root`, as flows/step.py writes it."""
    root.mkdir(exist_ok=True)
    record = artifact(tokens, Kind.TOKENS).record
    spec = {"stage": "train.pretrain", "name": "pretrained", "config": BASE | changes, "ancestors": {}, "threads": 2,
            "inputs": {"tokens": {"path": str(tokens), "record": record}}, "device": "cpu", "processes": processes,
            **{name: str(root / name) for name in ("out", "scratch")}, "result": str(root / "result.json")}  # fmt: skip
    (root / "spec.json").write_text(json.dumps(spec))
    return root / "spec.json"


def series(root: Path) -> dict[int, float]:
    points = [json.loads(line) for line in (root / "scratch/metrics.jsonl").read_text().splitlines()]
    assert len({point["step"] for point in points}) == len(points)  # one process writes, and no step twice
    return {point["step"]: point["loss"] for point in points}


def test_two_processes_equal_one_and_stop_on_request(tmp_path, launcher, tokens):
    one, two = (write_spec(tmp_path / name, tokens, n, steps=40) for name, n in (("one", 1), ("two", 2)))
    assert launcher.launch(one, tmp_path / "one.log", 1).wait(print) == OK
    lines = []
    job = launcher.launch(two, tmp_path / "two.log", 2)
    while not (metrics := tmp_path / "two/scratch/metrics.jsonl").exists() or metrics.read_text().count("\n") < 2:
        assert not job.ended.wait(0.02), (tmp_path / "two.log").read_text()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(lines.append) == AGAIN
    done = len(series(tmp_path / "two"))
    assert 2 <= done < 40 and any("stopped on request" in line for line in lines)
    lines.clear()
    assert launcher.launch(two, tmp_path / "again.log", 2).wait(lines.append) == OK
    assert sum(line.startswith(f"resumed after step {done}") for line in lines) == 1
    found, expected = series(tmp_path / "two"), series(tmp_path / "one")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=2e-5)
    assert json.loads((tmp_path / "two/result.json").read_text())["metrics"]["steps"] == 40
    assert (tmp_path / "two/out/model.safetensors").exists()


def test_a_refusal_is_its_sentence(tmp_path, launcher, tokens):
    spec = write_spec(tmp_path, tokens, 2, steps="many")
    assert launcher.launch(spec, tmp_path / "log", 2).wait(print) == REFUSED
    answer = json.loads((tmp_path / "result.json").read_text())
    assert answer["error"].startswith("pretrained.steps: Value 'many'")
    assert not list((tmp_path / "out").glob("*"))  # nor the folder, where rank 1 was the first to refuse


def started(launcher, root: Path, tokens: Path, **changes):
    """A job of two ranks, and their processes, as soon as there are any."""
    job = launcher.launch(write_spec(root, tokens, 2, **changes), root / "log", 2)
    while len(ranks := psutil.Process(job.pid).children()) < 2:
        assert not job.ended.wait(0.02), (root / "log").read_text()
    return job, ranks


def test_a_killed_rank_is_a_death_by_signal(tmp_path, launcher, tokens):
    job, ranks = started(launcher, tmp_path, tokens)
    ranks[1].kill()
    assert job.wait(lambda line: None) == -signal.SIGKILL


def test_cancelling_ends_every_rank(tmp_path, launcher, tokens):
    job, ranks = started(launcher, tmp_path, tokens)
    job.cancel()
    assert job.wait(lambda line: None) < 0 and psutil.wait_procs(ranks, timeout=60)[1] == []


def test_ranks_save_and_leave_when_the_run_is_killed(tmp_path, launcher, tokens):
    job, ranks = started(launcher, tmp_path, tokens, steps=100_000)
    agent = psutil.Process(job.pid)
    job._processes[0].stdin.close()  # as the kernel does then
    assert psutil.wait_procs([agent, *ranks], timeout=120)[1] == []


def test_several_hosts_are_one_job(tmp_path, tokens):
    """Through a command as ssh is: another host's rank is killed, and all end with that status."""
    shell = [sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[2], shell=True))"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hosts = SimpleNamespace(name="two", hosts=2, devices=2, device="cpu", nodes=["127.0.0.1", "127.0.0.2"], shell=shell, port=port)
    launcher, root = Launcher(hosts), tmp_path / "a folder"
    job = launcher.launch(write_spec(root, tokens, 2, steps=200), root / "log", 2)
    there = psutil.Process(job._processes[1].pid)
    while not (metrics := root / "scratch/metrics.jsonl").exists() or metrics.read_text().count("\n") < 2:
        assert not job.ended.wait(0.02), (root / "log").read_text()
    everything = [there, *there.children(recursive=True), *psutil.Process(job.pid).children()]
    there.children(recursive=True)[-1].kill()
    assert job.wait(lambda line: None) == -signal.SIGKILL
    assert psutil.wait_procs(everything, timeout=60)[1] == []


def test_several_hosts_without_names_are_refused():
    with pytest.raises(ConfigError, match="has 64 hosts"):
        Launcher(SimpleNamespace(name="h100x512", hosts=64, devices=512, device="cpu"))
