"""Kill things at random while whole recipes run against a bucket, and count what must never happen.

    python -m infra.bench.chaos --kills 100 [--seed 0] [--keep FOLDER]

Kills come in rounds that meet each of these once, in a random order: the stage's process, the warm worker, the run itself,
its Prefect server, the tracking server (started again some seconds later) and the network to the bucket (connections
reset for some seconds). When the run ends, the same command starts it again, until the recipe is finished; then the next
recipe begins, in an empty prefix. The bucket is Ceph's radosgw where it is installed, moto's server elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil

from flows import lineage, services, tracking
from stages.store.s3 import S3Store, place
from tests.s3 import ceph
from tests.s3.proxy import DOWN, Proxy

ROOT = Path(__file__).parents[2]
RECIPE = ("scale=micro", "recipe.experts=[math,safety]")
OUTAGE_SECONDS = (2.0, 8.0)
REFUSED = 2  # the exit status of a run that says what is wrong, and would say so again
RESTARTS = 60  # of one recipe, after which it counts as never finished
POLL_SECONDS = 0.2
ENDED = ("COMPLETED", "CRASHED", "FAILED", "CANCELLED")


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)
    recipes: int = 0
    starts: int = 0
    artifacts: int = 0
    half: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left_running: list[str] = field(default_factory=list)
    open_flows: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    off_loopback: set[str] = field(default_factory=set)

    @property
    def faults(self) -> int:
        return sum(map(len, (self.half, self.duplicate, self.repeated, self.unfinished, self.left_running, self.open_flows,
                             self.untold, self.off_loopback)))  # fmt: skip


class Chaos:
    """One machine's worth of servers, and the recipes that run on it. gap: seconds between two kills, at least and at
    most. real: Ceph and MLflow rather than moto and a tracking server that is never there. variables: what else the runs
    find in their environment."""

    def __init__(self, folder: Path, seed: int, recipe: tuple[str, ...] = RECIPE, gap: tuple[float, float] = (0.5, 6.0),
                 kinds: tuple[str, ...] = (), real: bool = True, variables: dict[str, str] | None = None):
        self.folder, self.random, self.recipe, self.gap = folder, random.Random(seed), recipe, gap
        self.tally, self.down_until, self._last_kill, self.real, self.variables = Tally(), 0.0, 0.0, real, variables or {}
        self._moto = None
        if ceph.missing() or not real:
            from moto.server import ThreadedMotoServer

            self._moto = ThreadedMotoServer(port=0)
            self._moto.start()
            self.upstream = "http://{}:{}".format(*self._moto.get_host_and_port())
            self.keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "canary-s3-51c9", "AWS_DEFAULT_REGION": "us-east-1"}
        else:
            self._ceph = ceph.Ceph(folder / "ceph")
            self.upstream, self.keys = self._ceph.endpoint, self._ceph.environment()
        os.environ.update(self.keys)
        self.proxy = Proxy(self.upstream, lambda *_: DOWN if time.monotonic() < self.down_until else "")
        boto3.session.Session().client("s3", endpoint_url=self.upstream).create_bucket(Bucket="chaos")
        self.state = folder / "state"
        os.environ["CUVEE_STATE"] = str(self.state)
        self.mlflow_port = services.free_port()
        self.mlflow: subprocess.Popen | None = None
        self._mlflow_due = 0.0 if real else float("inf")
        self.kinds, self._bag = kinds or tuple(self._killers()), list[str]()

    def close(self) -> None:
        if self.mlflow:
            services.stop(self.mlflow)
        self.proxy.__exit__()
        if self._moto:
            self._moto.stop()
        else:
            self._ceph.stop()

    def run(self, kills: int) -> Tally:
        """Recipes until `kills` kills were done and the last recipe is finished."""
        while sum(self.tally.kills.values()) < kills and not self.tally.unfinished:
            self.recipe_with_kills(kills)
        if self.real:
            self._check_mlflow()
        return self.tally

    def recipe_with_kills(self, kills: int) -> None:
        at, seen = self.tally.recipes, {}
        uri = f"s3://chaos/recipe-{at}"
        for _ in range(RESTARTS):
            process, began = self._start(uri), time.monotonic()
            self.tally.starts += 1
            next_kill = time.monotonic() + self.random.uniform(*self.gap)
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                self._keep_mlflow()
                if time.monotonic() > next_kill and sum(self.tally.kills.values()) < kills:
                    if self._kill_something(process):
                        next_kill = time.monotonic() + self.random.uniform(*self.gap)
            self.down_until = 0.0
            self._await_end_of_all(uri)
            self._check(uri, seen)
            if process.returncode == 0:
                self._check_flows(uri)
                break
            if process.returncode == REFUSED and not self._excused(began):
                self.tally.unfinished.append(f"{uri}: refused, see runs.log")
                break
        else:
            self.tally.unfinished.append(uri)
        self.tally.recipes += 1
        self.tally.artifacts += len(seen)
        self._verify(uri)

    def _excused(self, began: float) -> bool:
        """Whether something that a run needs was killed since `began`: then it may refuse."""
        return self._last_kill > began

    def _start(self, uri: str) -> subprocess.Popen:
        url = f"http://127.0.0.1:{self.mlflow_port}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))} | self.keys | {
            "CUVEE_STATE": str(self.state), "MLFLOW_TRACKING_URI": url, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE",
            **self.variables}
        log = open(self.folder / "runs.log", "ab")
        return subprocess.Popen([sys.executable, "-m", "flows.cli", "run", "store=s3", f"store.uri={uri}",
                                 f"store.endpoint={self.proxy.endpoint}", *self.recipe], cwd=self.folder, env=environment, stdout=log,
                                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _keep_mlflow(self) -> None:
        if (self.mlflow is None or self.mlflow.poll() is not None) and time.monotonic() > self._mlflow_due:
            self._mlflow_due = time.monotonic() + 5
            self.mlflow = services.start_mlflow(self.mlflow_port, self.folder / "mlflow.log")

    def _killers(self) -> dict[str, Any]:
        return {"stage": lambda run: self._kill(run, lambda p, above: _is(p, "stages.worker") and _is(above, "stages.worker")),
                "worker": lambda run: self._kill(run, lambda p, above: _is(p, "stages.worker") and not _is(above, "stages.worker")),
                "run": lambda run: run.kill() or True,
                "Prefect server": lambda run: self._kill(run, lambda p, above: _is(p, "flows.services:private_prefect")),
                "tracking server": lambda run: self._kill_mlflow(),
                "network to the bucket": lambda run: self._cut()}

    def _kill_something(self, run: subprocess.Popen) -> bool:
        """True when what is next in the bag, which holds each kind once, was there to be killed."""
        self._bag = self._bag or self.random.sample(self.kinds, len(self.kinds))
        self._look_for_listeners(run)
        if not self._killers()[self._bag[-1]](run):
            return False
        kind, self._last_kill = self._bag.pop(), time.monotonic()
        self.tally.kills[kind] += 1
        with open(self.folder / "runs.log", "ab") as log:
            log.write(f"--- {time.strftime('%X')} killed: {kind}\n".encode())
        return True

    def _kill(self, run: subprocess.Popen, wanted: Any) -> bool:
        found = [p for p, above in _tree(run.pid) if wanted(p, above)]
        if found:
            self.random.choice(found).kill()
        return bool(found)

    def _kill_mlflow(self) -> bool:
        if self.mlflow is None or self.mlflow.poll() is not None:
            return False
        os.killpg(self.mlflow.pid, 9)
        self.mlflow.wait()
        self._mlflow_due = time.monotonic() + self.random.uniform(1, 20)
        return True

    def _cut(self) -> bool:
        self.down_until = time.monotonic() + self.random.uniform(*OUTAGE_SECONDS)
        return True

    def _await_end_of_all(self, uri: str) -> None:
        """Whatever was killed: soon nothing of the run is alive."""
        deadline = time.monotonic() + 60
        while left := _of_state(self.state, besides=self.mlflow):
            if time.monotonic() > deadline:
                self.tally.left_running += [f"{uri}: {p.cmdline()[:4]}" for p in left]
                for process in left:
                    process.kill()
                return
            time.sleep(0.2)

    def _look_for_listeners(self, run: subprocess.Popen) -> None:
        for process, _ in [*_tree(run.pid), *(_tree(self.mlflow.pid) if self.mlflow else [])]:
            try:
                for one in process.net_connections(kind="inet"):
                    if one.status == psutil.CONN_LISTEN and one.laddr.ip not in ("127.0.0.1", "::1"):
                        self.tally.off_loopback.add(f"{' '.join(process.cmdline()[:4])}: {one.laddr}")
            except psutil.Error:
                pass

    def _store(self, uri: str) -> S3Store:
        return S3Store(uri, self.folder / "reader" / uri.rpartition("/")[2], self.upstream)

    def _check(self, uri: str, seen: dict[str, str]) -> None:
        """What can be selected now is whole, is what it was, and was made once."""
        store = self._store(uri)
        sizes = {name: item["Size"] for name, item in store.bucket.names("artifacts/")}
        found = {fingerprint: store.record(fingerprint) for fingerprint in store.fingerprints()}
        for fingerprint, record in found.items():
            for name, meta in record["files"].items():
                if sizes.get(place(record) + name) != meta["size"]:
                    self.tally.half.append(f"{uri}: {record['name']} {name}")
            if seen.setdefault(fingerprint, record["digest"]) != record["digest"]:
                self.tally.duplicate.append(f"{uri}: {record['name']} was published again")
            log = self.state / "work" / fingerprint / "log.txt"
            if log.exists() and log.stat().st_mtime > _seconds(record["ended"]) + 1:
                self.tally.repeated.append(f"{uri}: {record['name']}")
        self.tally.half += [f"{uri}: {fingerprint} is gone" for fingerprint in seen.keys() - found.keys()]

    def _check_flows(self, uri: str) -> None:
        """Once a recipe is finished Prefect holds none of its runs for running."""
        with sqlite3.connect(self.state / "prefect/prefect.db") as database:
            found = database.execute("SELECT name, state_type FROM flow_run")
            self.tally.open_flows += [f"{uri}: {name} {state}" for name, state in found if state not in ENDED]

    def _check_mlflow(self) -> None:
        """In the end MLflow has been told everything: of each artifact, and how each run ended."""
        import mlflow

        url, deadline = f"http://127.0.0.1:{self.mlflow_port}", time.monotonic() + services.START_SECONDS
        while not services.answers(f"{url}/health") and time.monotonic() < deadline:
            self._keep_mlflow()
            time.sleep(0.5)
        os.environ["MLFLOW_TRACKING_URI"] = url
        try:
            tracking.deliver_left()
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]
        self.tally.untold += [str(path) for path in (self.state / "tracking").glob("*.jsonl")]
        client = mlflow.MlflowClient(url)
        runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=50_000)
        self.tally.untold += [f"{run.info.run_name} is running" for run in runs if run.info.status == "RUNNING"]
        told = {run.data.tags.get("cuvee.fingerprint") for run in runs}
        for recipe in range(self.tally.recipes):
            self.tally.untold += sorted(set(self._store(f"s3://chaos/recipe-{recipe}").fingerprints()) - told)

    def _verify(self, uri: str) -> None:
        store, checked = self._store(uri), set()
        for name, fingerprint in store.aliases().items():
            if fingerprint not in checked and name in ("report", "export", "polished", "corpus", "tokens"):
                self.tally.half += [f"{uri}: {line}" for line in lineage.verify(store, store.record(fingerprint))]


def _is(process: psutil.Process | None, what: str) -> bool:
    try:
        return process is not None and what in process.cmdline()
    except psutil.Error:
        return False


def _tree(pid: int) -> list[tuple[psutil.Process, psutil.Process | None]]:
    """(process, its parent) for each descendant."""
    try:
        return [(p, p.parent()) for p in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _of_state(state: Path, besides: subprocess.Popen | None) -> list[psutil.Process]:
    """Processes that work for this state directory, but the tracking server and this one."""
    spared = {os.getpid(), *([besides.pid, *(p.pid for p, _ in _tree(besides.pid))] if besides else [])}
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        if process.pid not in spared and process.info["status"] != psutil.STATUS_ZOMBIE:
            if (process.info["environ"] or {}).get("CUVEE_STATE") == str(state):
                found.append(process)
    return found


def _seconds(iso: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(iso).timestamp()


def secrets_left(folder: Path, secret: str) -> list[Path]:
    """Files below `folder` that hold the secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is left")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="chaos"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    chaos = Chaos(folder, args.seed)
    stop = threading.Event()
    threading.Thread(target=_tell, args=(chaos, stop), daemon=True).start()
    try:
        tally = chaos.run(args.kills)
    finally:
        stop.set()
        chaos.close()
    leaked = secrets_left(chaos.state, chaos.keys["AWS_SECRET_ACCESS_KEY"])
    print(table(tally, leaked, time.monotonic() - began))
    print(json.dumps({"seed": args.seed, "folder": str(folder)}))
    return 1 if tally.faults or leaked else 0


def _tell(chaos: Chaos, stop: threading.Event) -> None:
    while not stop.wait(60):
        t = chaos.tally
        print(f"{sum(t.kills.values())} kills, {t.starts} starts, {t.recipes} recipes, {t.faults} faults", flush=True)


def table(tally: Tally, leaked: list[Path], seconds: float) -> str:
    rows = [("kills", sum(tally.kills.values()), [f"{kind} {n}" for kind, n in sorted(tally.kills.items())]),
            ("recipes finished", tally.recipes - len(tally.unfinished), [f"{tally.starts} starts, {tally.artifacts} artifacts"]),
            ("recipes never finished", len(tally.unfinished), tally.unfinished),
            ("half artifacts that could be selected", len(tally.half), tally.half),
            ("artifacts published twice", len(tally.duplicate), tally.duplicate),
            ("finished stages repeated", len(tally.repeated), tally.repeated),
            ("processes left running", len(tally.left_running), tally.left_running),
            ("flows that Prefect holds for running", len(tally.open_flows), tally.open_flows),
            ("runs and artifacts of which MLflow was not told", len(tally.untold), tally.untold),
            ("listeners off loopback", len(tally.off_loopback), sorted(tally.off_loopback)),
            ("files that hold the secret key", len(leaked), list(map(str, leaked)))]
    lines = [f"| {what} | {count} | {'; '.join(details)} |" for what, count, details in rows]
    return "\n".join(["| | | |", "| --- | ---: | --- |", *lines, "", f"{seconds / 60:.0f} min"])


if __name__ == "__main__":
    sys.exit(main())
