"""The tracker: tells MLflow what stages do, from one background thread; no stage ever waits for it.

Every operation is first written to a journal in `<state>/tracking/`. While MLflow can't be reached the run goes on and
the journal grows; it is delivered when MLflow is back, by this run or, after its end, by the next. Big files stay in the
store: MLflow gets addresses, digests and the record.
"""

from __future__ import annotations

import fcntl
import json
import logging
import queue
import re
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows._mlflow import Mlflow, described, tracking_uri
from flows.config import state_dir
from flows.graph import Node

RETRY_SECONDS = 5.0
ADDRESS_SECONDS = 60.0  # that a stage which is done waits for the address of its run, while MLflow answers
IDLE_SECONDS = 2.0
logger = logging.getLogger("cuvee.tracking")


def redacted(text: object) -> str:
    """The text without the user and password of an address."""
    return re.sub(r"://[^/@\s]+@", "://", str(text))


@dataclass(eq=False)
class Run:
    """A run of MLflow's that will be: `address` is known once `ready`."""

    id: str
    ready: threading.Event = field(default_factory=threading.Event)
    address: dict[str, str] | None = None


class Journal:
    """Operations in the order in which they came, as JSON lines, and beside them what became of each.

    The process that writes it holds a lock on it; one without a lock was left by a process that is gone.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._sent_path = path, path.with_suffix(".sent")
        self._file = open(path, "a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        self.operations = list(_lines(self._file.read()))
        answers = list(_lines(self._sent_path.read_bytes())) if self._sent_path.exists() else []
        self.sent = len(answers)
        self.results = {self.operations[n]["run"]: made for n, made in enumerate(answers) if made}

    def write(self, operation: dict[str, Any]) -> None:
        self.operations.append(operation)
        self._file.write(json.dumps(operation).encode() + b"\n")
        self._file.flush()

    def answered(self, made: dict[str, str] | None) -> None:
        """The first operation that was not yet is done."""
        self.operations[self.sent] = {k: self.operations[self.sent][k] for k in ("do", "run")}  # bounds the memory
        self.sent += 1
        with open(self._sent_path, "ab") as file:
            file.write(json.dumps(made).encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink()
        self._sent_path.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        self._file.close()


def _lines(data: bytes) -> Iterator[Any]:
    """The JSON of every whole line: a kill may have cut the last one off."""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        yield json.loads(line)


def left() -> Iterator[Journal]:
    """The journals of runs that have ended without delivering everything."""
    for path in sorted((state_dir() / "tracking").glob("*.jsonl")):
        try:
            yield Journal(path)
        except BlockingIOError:  # its run lives
            pass


def deliver_left() -> None:
    """Tell MLflow what runs that have ended could not. Raises what MLflow's client raises."""
    for journal in left():
        try:
            mlflow = Mlflow(journal.results)
            while journal.sent < len(journal.operations):
                journal.answered(_do(mlflow, journal.operations[journal.sent], again=True))
            ended = {o["run"] for o in journal.operations if o["do"] in ("finish", "fail", "close")}
            for run in [r for r in journal.results if r not in ended]:  # it was killed
                mlflow.do({"do": "fail", "run": run, "status": "KILLED"}, again=True)
            journal.remove()
        finally:
            journal.close()


def try_left() -> None:
    try:
        deliver_left()
    except Exception as error:
        logger.warning("what earlier runs left for MLflow stays on disk: %s", redacted(error))


def _do(mlflow: Mlflow, operation: dict[str, Any], again: bool) -> dict[str, str] | None:
    """Do an operation; one that MLflow will never accept, or another version of this program wrote, is given up with a
    warning: it must not keep back all that comes after it."""
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.do(operation, again)
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):
            raise
        reason: Exception = error
    except (AttributeError, KeyError, TypeError) as error:
        reason = error
    logger.warning("MLflow refuses to %s %s: %s: %s", operation["do"], operation["run"], type(reason).__name__, redacted(reason))
    return None


class Tracker:
    """Tells MLflow what stages do. `start`, `progress`, `finish` and `fail` return at once; `close` waits for what is
    queued while MLflow answers."""

    def __init__(self, conf: Any, flow_run: str, stages: int):
        self.registered = set(conf.recipe.registered)
        attempt = uuid.uuid4().hex  # Prefect may start a flow run again
        self._journal = Journal(state_dir() / "tracking" / f"{attempt}.jsonl")
        self._mlflow = Mlflow(self._journal.results)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._mutex, self._down, self._closing = threading.Lock(), False, threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()
        recipe = conf.recipe.name
        self._put(Run("flow"), "open", recipe=recipe, flow_run=flow_run, attempt=attempt,
                  title=f"{recipe} ({stages} stages)")

    def start(self, node: Node, parents: dict[str, Any]) -> Run:
        run = Run(uuid.uuid4().hex)
        self._put(run, "start", node=described(node, parents))
        return run

    def progress(self, run: Run, points: list[dict[str, float]]) -> None:
        """Send points of a running stage: {"step", "time" in seconds, metric: value, ...} each."""
        self._put(run, "metrics", points=points)

    def table(self, run: Run, columns: dict[str, list[Any]]) -> None:
        """Show a table of samples, column -> values."""
        self._put(run, "table", columns=columns)

    def finish(self, run: Run, record: dict[str, Any]) -> None:
        self._put(run, "finish", record=record, registered=record["name"] in self.registered)

    def fail(self, run: Run) -> None:
        self._put(run, "fail")

    def address(self, run: Run) -> dict[str, str] | None:
        """{"run_id", "model_id"?} for the record, or None where MLflow can't be reached."""
        run.ready.wait(0 if self._down else ADDRESS_SECONDS)
        return {k: v for k, v in run.address.items() if k != "experiment"} if run.address else None

    def close(self, failed: bool) -> None:
        """Deliver what is queued, while MLflow answers. failed: whether the flow did."""
        self._put(Run("flow"), "close", status="FAILED" if failed else "FINISHED")
        self._queue.put(None)
        self._closing.set()
        self._thread.join()
        if self._journal.sent < len(self._journal.operations):
            logger.warning("MLflow at %s could not be reached; what it was not told is kept in %s, and the next run "
                           "delivers it", redacted(tracking_uri()), self._journal.path)
            self._journal.close()
        else:
            self._journal.remove()

    def _put(self, run: Run, do: str, **values: Any) -> None:
        with self._mutex:  # the journal and the queue have one order
            self._journal.write({"do": do, "run": run.id, **values})
            self._queue.put(run)

    def _deliver(self) -> None:
        """In the thread: one operation after the other; what earlier runs left when there is nothing to do."""
        old_are_due = True
        while True:
            try:
                run = self._queue.get(timeout=IDLE_SECONDS if old_are_due else None)
            except queue.Empty:
                old_are_due = False
                try_left()
                continue
            if run is None or not self._send(run):
                break
        if not self._down:
            try_left()

    def _send(self, run: Run) -> bool:
        """Do the next operation, however long it takes; False where this run ends before it could be done."""
        again = last = False
        while True:
            try:
                made = _do(self._mlflow, self._journal.operations[self._journal.sent], again)
            except Exception as error:
                if not self._down:
                    logger.warning("MLflow at %s can't be reached, the run goes on; what it is not told is kept in %s: %s",
                                   redacted(tracking_uri()), self._journal.path.parent, redacted(error))
                self._down = again = True
                if last:
                    return False
                last = self._closing.wait(RETRY_SECONDS)
                continue
            if self._down:
                logger.warning("MLflow answers again")
            self._down = False
            self._journal.answered(made)
            run.address = run.address or made
            run.ready.set()
            return True
