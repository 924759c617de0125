"""The maker with a real launcher and a real stage: publish, skip, refuse, die, cancel."""

import json
import os
import signal
import threading
import time
from pydoc_data.topics import topics

import psutil
import pytest

from flows.graph import Node
from flows.launchers.local import Launcher
from flows.step import ATTEMPTS, Cancelled, Maker
from stages import stage as stages
from stages.run import AGAIN, OK, series
from stages.stage import CuveeError
from stages.store.local import LocalStore


class NoTracker:
    """The tracker's interface without MLflow."""

    def start(self, node, parents):
        return None

    progress = table = finish = fail = lambda self, *_: None

    def address(self, run):
        return None


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def maker(tmp_path, launcher):
    return Maker(LocalStore(tmp_path / "store"), launcher, NoTracker(), tmp_path / "work", cores=2)


def node(sources, **values):
    module = stages.load("data.curate")
    return Node("corpus", "data.curate", stages.parse(module.Config, {"sources": [str(s) for s in sources]} | values, "data"))


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for topic in sorted(topics)[:40]:
        (folder / f"{topic}.txt").write_text(topics[topic])
    return folder


def test_a_stage_is_made_once_and_then_found(maker, documents):
    lines = []
    record = maker.make(node([documents]), True, 0, lines.append)
    assert record["files"] and any("documents removed" in line for line in lines)
    assert maker.store.aliases() == {"corpus": record["fingerprint"]}
    assert not (maker.work / record["fingerprint"] / "scratch").exists()
    lines.clear()
    assert maker.make(node([documents]), True, 0, lines.append) == record and not lines


class Ending:
    """A launcher whose first jobs end with `status`; the next one is real."""

    REMOTE = False

    def __init__(self, launcher, status, count):
        self.launcher, self.status, self.left, self.starts = launcher, status, count, 0

    def launch(self, spec, log, threads):
        self.starts, self.left = self.starts + 1, self.left - 1
        log.touch()
        return self.launcher.launch(spec, log, threads) if self.left < 0 else self

    def wait(self, on_line):
        return self.status


class Elsewhere:
    """A launcher whose jobs go on when the run that waits for them dies, as those of a cluster do."""

    REMOTE = True

    def __init__(self, launcher):
        self.launcher, self.starts, self.dies = launcher, 0, True

    def launch(self, spec, log, threads):
        self.result = spec.parent / "result.json"
        if not self.result.exists():
            self.starts += 1
            assert self.launcher.launch(spec, log, threads).wait(print) == OK
        return self

    def wait(self, on_line):
        if self.dies:
            raise KeyboardInterrupt
        return OK


def test_what_a_job_made_while_no_run_waited_is_not_made_again(maker, documents, launcher):
    maker.launcher = Elsewhere(launcher)
    with pytest.raises(KeyboardInterrupt):
        maker.make(node([documents]), True, 0, print)
    maker.launcher.dies = False
    assert maker.make(node([documents]), True, 0, print)["files"] and maker.launcher.starts == 1
    assert not maker.launcher.result.exists()


def test_a_stage_that_asks_to_be_started_again_is_not_one_that_keeps_dying(maker, documents, launcher):
    maker.launcher = Ending(launcher, -signal.SIGKILL, ATTEMPTS)
    with pytest.raises(CuveeError, match="ended with status -9"):
        maker.make(node([documents]), True, 0, lambda _: None)
    assert maker.launcher.starts == ATTEMPTS
    maker.launcher = Ending(launcher, AGAIN, ATTEMPTS + 2)
    assert maker.make(node([documents]), True, 0, lambda _: None)["files"]
    assert maker.launcher.starts == ATTEMPTS + 3


def test_as_many_stages_run_as_were_asked_for(tmp_path):
    """Each with its share of cores and memory, however the cores divide; one that wants all is not overtaken."""
    maker = Maker(None, None, None, tmp_path, cores=16, slots=6)
    running, most, threads = [], [], []

    def stage(order, wanted):
        with maker._room(wanted, order):
            running.append(wanted)
            most.append(sum(running))
            time.sleep(0.01)
            running.remove(wanted)

    for order in range(20):
        threads.append(threading.Thread(target=stage, args=(order, 6 if order == 3 else 1)))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert max(most) == 6 and len(most) == 20 and maker._free == 6


def test_what_comes_first_in_the_recipe_is_waited_for_a_moment(tmp_path, monkeypatch):
    """Prefect starts the tasks that have become ready in any order."""
    monkeypatch.setattr("flows.step.EXPECTED_SECONDS", 1.0)
    maker, started = Maker(None, None, None, tmp_path, cores=2, slots=2), []

    def stage(order, delay):
        time.sleep(delay)
        with maker._room(1, order):
            started.append(order)
            time.sleep(0.3)

    def run(orders):
        started.clear()
        threads = [threading.Thread(target=stage, args=(order, delay)) for order, delay in orders.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return [*started]

    assert sorted(run({5: 0.0, 6: 0.0, 1: 0.1, 2: 0.2})[:2]) == [5, 6]  # nobody said that others would come
    maker.expect([1, 2, 5, 6])
    found = run({5: 0.0, 6: 0.0, 1: 0.1, 2: 0.2})
    assert found[:2] == [1, 2] and sorted(found[2:]) == [5, 6] and not maker._expected
    maker.expect([1, 5])
    begun = time.monotonic()
    assert run({5: 0.0, 6: 0.0}) == [5, 6]  # one that does not come holds up nobody for long
    assert maker._expected.keys() == {1} and time.monotonic() - begun < 10


@pytest.mark.parametrize("remote, alone, threads, share", [
    (False, False, 2, 1 / 6), (False, True, 16, 1.0), (True, False, 16, 1.0)])  # fmt: skip
def test_a_stage_has_its_share_of_the_machine(maker, documents, remote, alone, threads, share):
    maker.cores, maker.slots, maker._free, specs = 16, 6, 6, []

    class Reading:
        REMOTE = remote

        def launch(self, spec, log, count):
            specs.append((json.loads(spec.read_text())["share"], count))
            return maker_launcher.launch(spec, log, 2)

    maker_launcher, maker.launcher = maker.launcher, Reading()
    record = maker.make(node([documents]), alone, 0, print)
    assert specs == [(share, threads)] and record["threads"] == threads and maker._free == 6


def test_content_not_place_decides_the_address(documents, tmp_path):
    moved = tmp_path / "elsewhere" / documents.name
    moved.parent.mkdir()
    before = node([documents]).fingerprint
    documents.rename(moved)
    assert node([moved]).fingerprint == before
    next(moved.iterdir()).write_text("another text")
    assert node([moved]).fingerprint != before


def test_a_refusal_is_its_sentence_and_leaves_nothing(maker, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CuveeError, match="corpus: .*"):
        maker.make(node([tmp_path / "short.txt"]), True, 0, print)
    assert list(maker.store.fingerprints()) == []


def test_full_disk_is_one_sentence(maker, documents, monkeypatch):
    """RLIMIT-free: a small tmpfs is mounted where root may; elsewhere the write itself is made to fail."""
    with tmpfs(maker.work) as small:
        if not small:
            pytest.skip("mounting a tmpfs needs root")
        with pytest.raises(CuveeError, match="no space left on the disk"):
            maker.make(node([documents]), True, 0, print)
    assert list(maker.store.fingerprints()) == []


class tmpfs:
    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.path.mkdir(parents=True, exist_ok=True)
        self.mounted = os.system(f"mount -t tmpfs -o size=8k tmpfs {self.path} 2>/dev/null") == 0
        return self.mounted

    def __exit__(self, *_):
        if self.mounted:
            os.system(f"umount -l {self.path}")


class Killing:
    """A launcher whose stages are killed while they read their specs."""

    REMOTE = False

    def __init__(self, launcher):
        self.launcher = launcher

    def launch(self, spec, log, threads):
        pipe = spec.with_name("pipe")
        if not pipe.exists():
            os.mkfifo(pipe)
        job = self.launcher.launch(pipe, log, threads)
        assert job.started.wait(300)
        os.kill(job.pid, signal.SIGKILL)
        return job


def test_a_stage_that_keeps_dying_fails_with_its_log(maker, documents, launcher):
    lines, maker.launcher = [], Killing(launcher)
    with pytest.raises(CuveeError, match="ended with status -9; the log is"):
        maker.make(node([documents]), True, 0, lines.append)
    assert sum("starting again" in line for line in lines) == ATTEMPTS
    assert list(maker.store.fingerprints()) == []
    maker.launcher = launcher
    assert maker.make(node([documents]), True, 0, lines.append)["files"]


def test_cancelling_ends_the_process_tree(maker, launcher, tmp_path):
    """A stage that hangs (a source that never ends) is gone soon after the run is cancelled."""
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    spec, log = tmp_path / "spec.json", tmp_path / "log.txt"
    os.mkfifo(spec)  # the stage blocks while it reads its own spec
    job = launcher.launch(spec, log, 1)
    assert job.started.wait(300)
    assert psutil.pid_exists(job.pid)
    job.cancel()
    assert job.ended.wait(60) and job.status == -signal.SIGTERM


def test_nothing_starts_after_cancel(maker, documents):
    maker.cancel()
    with pytest.raises(Cancelled):
        maker.make(node([documents]), True, 0, print)


def test_the_worker_ends_with_its_parent(tmp_path):
    """Closing the pipe is what kill -9 of the parent does: the worker and its stage must go."""
    launcher = Launcher()
    spec = tmp_path / "spec.json"
    os.mkfifo(spec)
    job = launcher.launch(spec, tmp_path / "log.txt", 1)
    assert job.started.wait(300)
    worker = launcher._worker
    worker.stdin.close()
    assert worker.wait(60) == 0
    assert not psutil.pid_exists(job.pid)


def test_exit_statuses(launcher, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"stage": "data.curat", "name": "corpus", "config": {}, "inputs": {}, "ancestors": {},
                                "out": str(tmp_path / "o"), "scratch": str(tmp_path / "s"), "threads": 1,
                                "result": str(tmp_path / "result.json"), "device": "cpu"}))
    assert launcher.launch(spec, tmp_path / "log.txt", 1).wait(print) == 64
    assert "did you mean 'curate'" in json.loads((tmp_path / "result.json").read_text())["error"]
    spec.write_text("{")
    assert launcher.launch(spec, tmp_path / "log2.txt", 1).wait(print) == 1
    assert "JSONDecodeError" in (tmp_path / "log2.txt").read_text()


def test_a_point_that_a_kill_cut_off_takes_no_other_with_it(tmp_path):
    lines = ['{"step": 1, "loss": 3.0}\n', '{"step": 2, "lo', '{"step": 2, "loss": 2.5}\n', '{"step": 3, "loss": 2.0}\n', '{"st']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert series(tmp_path) == {"loss": [[1, 3.0], [2, 2.5], [3, 2.0]]}
