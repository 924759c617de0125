"""Make one artifact: published already -> return it; otherwise lease, launch, stream, publish, release.

The store's record decides what is done; Prefect (flows/flow.py) only schedules and shows, MLflow only explains.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from flows.graph import Node
from stages.run import AGAIN, OK, REFUSED, logged
from stages.stage import ROOT, CuveeError
from stages.store import record as records

ATTEMPTS = 3
LOG_TAIL = 12
METRIC_SECONDS = 5.0
EXPECTED_SECONDS = 3.0  # in which Prefect starts a task whose parents are made


class Cancelled(CuveeError):
    """The run was interrupted; nothing half made was published."""


class Maker:
    """Makes artifacts with one store, one launcher and one tracker, at most `slots` at a time: of one machine each has its
    share of the `cores` and of the GPU's memory, elsewhere all."""

    def __init__(
        self, store: Any, launcher: Any, tracker: Any, work: Path, cores: int, device: str = "cpu", devices: int = 1, slots: int = 1
    ):
        self.store, self.launcher, self.tracker, self.work = store, launcher, tracker, work
        self.cores, self.device, self.devices, self.slots = cores, device, devices, slots
        self._free = slots
        self._waiting: list[int] = []
        self._expected: dict[int, float] = {}  # order -> until when it is waited for
        self._turn = threading.Condition()
        self._jobs: set[Any] = set()
        self._cancelled = threading.Event()

    def make(self, node: Node, alone: bool, order: int, log: Callable[[str], None]) -> dict[str, Any]:
        """The record of the node's artifact, made now unless it is published. The inputs must be published.

        alone: nothing runs beside it. order: among stages that wait for a slot the lowest goes first. Raises CuveeError when
        the stage refuses, keeps dying, or the run is cancelled.
        """
        try:
            return self._published(node, alone, order, log)
        finally:
            self._arrived(order)

    def _published(self, node: Node, alone: bool, order: int, log: Callable[[str], None]) -> dict[str, Any]:
        record = self.store.record(node.fingerprint)
        if record is None:
            lease = self.store.lease(node.fingerprint)
            if not lease.acquire():
                log("waiting: another run is making it")
                if not lease.wait(self._cancelled):
                    raise Cancelled(f"{node.name}: interrupted while another run was making it")
            with lease:
                record = self.store.record(node.fingerprint)  # made by the lease's last holder?
                if record is None:
                    wanted = self.slots if alone else 1
                    with self._room(wanted, order):
                        record = self._make(node, wanted, log)
        self.store.set_alias(node.name, node.fingerprint)
        return record

    def expect(self, orders: list[int]) -> None:
        """These stages will be asked for in a moment: none behind them takes a slot that they need. Without this the first two
        of nine experts that Prefect happens to start would hold up what the whole recipe waits for."""
        with self._turn:
            self._expected |= dict.fromkeys(orders, time.monotonic() + EXPECTED_SECONDS)

    def _arrived(self, order: int) -> None:
        with self._turn:
            self._expected.pop(order, None)
            self._turn.notify_all()

    def cancel(self) -> None:
        """End every running stage; nothing more is started."""
        self._cancelled.set()
        with self._turn:
            self._turn.notify_all()
            jobs = list(self._jobs)
        enders = [threading.Thread(target=_end, args=(job,)) for job in jobs]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()

    @contextmanager
    def _room(self, wanted: int, order: int):
        """Hold slots. Strictly in order: a stage that needs all of them is not overtaken forever by small ones."""
        def mine() -> bool:
            sooner = sum(o < order and until > time.monotonic() for o, until in self._expected.items())
            return self._cancelled.is_set() or (self._free >= wanted + sooner and order == min(self._waiting))

        with self._turn:
            self._waiting.append(order)
            self._arrived(order)
            while not mine():
                self._turn.wait(EXPECTED_SECONDS / 10 if self._expected else None)
            self._waiting.remove(order)
            self._free -= wanted
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._free += wanted
                self._turn.notify_all()

    def _make(self, node: Node, slots: int, log: Callable[[str], None]) -> dict[str, Any]:
        share, threads = slots / self.slots, max(1, self.cores * slots // self.slots)
        if self.launcher.REMOTE:
            share, threads = 1.0, self.cores
        if self._cancelled.is_set():
            raise Cancelled(f"{node.name}: interrupted")
        folder = self.work / node.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        parents = {n.fingerprint: self.store.record(n.fingerprint) for n in node.parents}
        run = self.tracker.start(node, parents)
        started, held = time.time(), []
        try:
            self._write_spec(node, folder, threads, share, parents, held)
            self.store.restore(node.fingerprint, folder / "scratch", log)  # where another host had begun
            outcome = self._launch(node, folder, threads, self._watch(run, folder, log))
            if (table := folder / "out" / "samples.json").exists():
                self.tracker.table(run, json.loads(table.read_text()))
            record = self.store.publish(folder / "out", self._record(node, outcome, parents, started, threads, run))
        except OSError as error:
            self.tracker.fail(run)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CuveeError(f"{node.name}: no space left on the disk of {error.filename or self.store.uri}; "
                             "free some, then run again: finished stages are kept") from None
        except BaseException:
            self.tracker.fail(run)
            raise
        finally:
            for fingerprint in held:
                self.store.release(fingerprint)
        self.tracker.finish(run, record)
        self.store.forget(node.fingerprint)
        for part in ("scratch", "spec.json"):  # the log stays
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return record

    def _watch(self, run: Any, folder: Path, log: Callable[[str], None]) -> Callable[[str], None]:
        """`log`, which also sends the stage's new metrics to the tracker every few seconds."""
        at, sent = 0, time.monotonic()

        def on_line(line: str) -> None:
            nonlocal at, sent
            log(line)
            path = folder / "scratch" / "metrics.jsonl"
            if time.monotonic() - sent > METRIC_SECONDS and path.exists():
                with open(path) as file:
                    file.seek(at)
                    new = file.read()
                whole = new[: new.rfind("\n") + 1]
                at, sent = at + len(whole.encode()), time.monotonic()
                self.tracker.progress(run, logged(whole))

        return on_line

    def _write_spec(
        self, node: Node, folder: Path, threads: int, share: float, parents: dict[str, Any], held: list[str]
    ) -> None:
        """share: of a GPU's memory. held: gets the address of every artifact that was fetched, to be released."""

        def place(parent: Node) -> dict[str, Any]:
            path = self.store.fetch(parent.fingerprint)
            held.append(parent.fingerprint)
            return {"path": str(path), "record": parents[parent.fingerprint]}

        spec = {
            "stage": node.stage, "name": node.name, "config": asdict(node.config), "inputs": node.map_inputs(place),
            "ancestors": {fp: {k: v for k, v in record.items() if k != "files"}
                          for fp, record in ancestors(self.store, parents.values()).items()},
            "out": str(folder / "out"), "scratch": str(folder / "scratch"), "result": str(folder / "result.json"),
            "threads": threads, "device": self.device if node.needs_device else "cpu",
            "share": share,
            "processes": self.devices if node.distributed else 1,
            "mirror": self.store.mirror(node.fingerprint),
        }
        text = json.dumps(spec).encode()
        if not (self.launcher.REMOTE and _succeeded(folder, text)):
            (folder / "result.json").unlink(missing_ok=True)
        records.write_atomic(folder / "spec.json", text)

    def _launch(self, node: Node, folder: Path, threads: int, log: Callable[[str], None]) -> dict[str, Any]:
        """Start the stage, again from its last checkpoint when it dies by a signal, or as often as it asks for that.
        Returns its outcome. Deaths count until a newer checkpoint shows that it gets on."""
        deaths, reached = 0, _newest_checkpoint(folder / "scratch")
        while deaths < ATTEMPTS:
            if self._cancelled.is_set():
                raise Cancelled(f"{node.name}: interrupted")
            (folder / "log.txt").unlink(missing_ok=True)
            job = self.launcher.launch(folder / "spec.json", folder / "log.txt", threads)
            with self._turn:
                self._jobs.add(job)
            if self._cancelled.is_set():  # while it was being started: `cancel` did not see it
                _end(job)
            try:
                status = job.wait(log)
            finally:
                with self._turn:
                    self._jobs.discard(job)
            if self._cancelled.is_set() and status != OK:
                raise Cancelled(f"{node.name}: interrupted")
            if status == OK:
                outcome = json.loads((folder / "result.json").read_text())
                (folder / "result.json").unlink()  # what it answers for is moved into the store
                return outcome
            if status == REFUSED:
                error = json.loads((folder / "result.json").read_text())["error"]
                raise CuveeError(f"{node.name}: {error}")
            if status > 0 and status != AGAIN:
                break  # an exception is a defect: the same again would give the same
            before, reached = reached, _newest_checkpoint(folder / "scratch")
            deaths = (0 if reached > before else deaths) + (status != AGAIN)
            log(f"{node.name}: ended with status {status}; starting again from its checkpoint")
        tail = "\n    ".join((folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_TAIL:])
        raise CuveeError(f"{node.name}: the stage ended with status {status}; the log is {folder / 'log.txt'} "
                         f"and its last lines are:\n    {tail}")

    def _record(self, node: Node, outcome: dict, parents: dict, started: float, threads: int, run: Any) -> dict:
        def link(parent: Node) -> dict[str, str]:
            return {"fingerprint": parent.fingerprint, "kind": parent.kind.value,
                    "digest": parents[parent.fingerprint]["digest"],
                    "content": records.content(parents[parent.fingerprint])}

        out = self.work / node.fingerprint / "out"
        return {
            "schema": records.SCHEMA, "fingerprint": node.fingerprint, "name": node.name, "kind": node.kind.value,
            "stage": node.stage, "version": node.module.VERSION, "config": node.identity, "external": node.external,
            "inputs": node.map_inputs(link), "files": records.digest_files(out), "metrics": outcome["metrics"],
            "series": outcome["series"], "started": _utc(started), "ended": _utc(time.time()),
            "seconds": round(time.time() - started, 3), "threads": threads, "environment": environment(),
            "estimate": vars(node.estimate), "mlflow": self.tracker.address(run),
        }


def _succeeded(folder: Path, spec: bytes) -> bool:
    """Whether a stage was made from this very spec: a job in a cluster ends also while no run waits for it."""
    try:
        return (folder / "spec.json").read_bytes() == spec and json.loads((folder / "result.json").read_text())["status"] == OK
    except FileNotFoundError:
        return False


def _newest_checkpoint(scratch: Path) -> str:
    return max((mark.parent.name for mark in scratch.glob("checkpoints/*/commit.json")), default="")


def _end(job: Any) -> None:
    try:
        job.cancel()
    except CuveeError as error:  # it may still run, where only a person can see to it
        logging.getLogger("cuvee.step").error("%s", error)


def ancestors(store: Any, found: Any) -> dict[str, dict[str, Any]]:
    """Fingerprint -> record for the given records and everything that they were made from."""
    tree: dict[str, dict[str, Any]] = {}
    pending = list(found)
    while pending:
        record = pending.pop()
        if record["fingerprint"] not in tree:
            tree[record["fingerprint"]] = record
            for arg, parent in records.parents(record):
                above = tree.get(parent["fingerprint"]) or store.record(parent["fingerprint"])
                if above is None:
                    raise CuveeError(f"{record['name']}: its input {arg} ({parent['fingerprint']}) is not in the store "
                                     f"{store.uri}; run the recipe again to remake it")
                pending.append(above)
    return tree


@cache
def environment() -> dict[str, str]:
    """What the bytes may depend on besides recipe and code: interpreter, machine, library versions, code version."""
    libraries = ("cuvee", "torch", "megatron-core", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system(),
            "commit": _commit(), **{name: _version(name) for name in libraries}}


def _commit() -> str:
    """The code's version: what an image was built from (it has no Git), or what the checkout is at."""
    if built := os.environ.get("CUVEE_COMMIT"):
        return built
    git = shutil.which("git")
    asked = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() if git else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from its folder, without an installation
        return "not installed"


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
