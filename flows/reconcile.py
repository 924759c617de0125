"""Runs whose process died without a word (kill -9, power) are closed in Prefect by the process that watches them
(flows/services.py), or by the next run or worker; in MLflow the journal that they left does it (flows/tracking.py).

Every run leaves a note in `<state>/runs/` while it lives; a note of this host whose process is gone is a dead run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.config import state_dir
from flows.tracking import redacted
from stages.store.lease import here, is_gone, this_process
from stages.store.record import write_atomic

logger = logging.getLogger("cuvee.reconcile")


@contextmanager
def registered(flow_run_id: str) -> Iterator[None]:
    """Note that this process runs `flow_run_id`, after closing what died before."""
    close_dead()
    note = state_dir() / "runs" / f"{flow_run_id}.json"
    write_atomic(note, json.dumps(this_process()).encode())
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def close_dead() -> None:
    """Set the runs of dead processes to Crashed in Prefect, unless it knows already how they ended."""
    _close(_dead, _close_prefect)


def close_own() -> None:
    """Likewise the runs of this process, which it is about to leave half done: to KILLED in MLflow, with their children."""
    _close(lambda holder: holder["pid"] == os.getpid() and holder["host"] == here(), _close_prefect, _close_mlflow)


def _close(wanted: Callable[[dict[str, Any]], bool], *closers: Callable[[str], None]) -> None:
    for note in sorted((state_dir() / "runs").glob("*.json")):
        try:
            holder = json.loads(note.read_text())
        except FileNotFoundError:  # its run has just ended
            continue
        if wanted(holder):
            closed = True
            for close in closers:
                try:
                    close(note.stem)
                except Exception as error:  # a lost server must not keep a new run from starting; a later one closes it
                    closed = False
                    logger.warning("%s: could not close the dead run %s: %s", close.__name__, note.stem, redacted(error))
            if closed:
                note.unlink(missing_ok=True)


def _dead(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this host, and is gone or was before the host's (or the container's) last start.
    Others may share the state directory."""
    host = holder.get("host", here())
    return host.split()[0] == here().split()[0] and (host != here() or is_gone(holder | {"host": host}))


def _close_prefect(flow_run_id: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    died, whose = Crashed(message="its process died"), FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(flow_run_id)
        except ObjectNotFound:  # somebody removed it
            return
        if not run.state or not run.state.is_final():
            client.set_flow_run_state(flow_run_id, died, force=True)
        at = 0
        while tasks := client.read_task_runs(flow_run_filter=whose, limit=200, offset=at):
            for task in tasks:
                if not task.state or not task.state.is_final():
                    client.set_task_run_state(task.id, died, force=True)
            at += len(tasks)


def _close_mlflow(flow_run_id: str) -> None:
    import mlflow

    from flows.tracking import tracking_uri

    if tracking_uri().startswith("sqlite") and not Path(tracking_uri().removeprefix("sqlite:///")).exists():
        return
    client = mlflow.MlflowClient(tracking_uri())
    experiments = [e.experiment_id for e in client.search_experiments()]
    for top in client.search_runs(experiments, f"tags.`cuvee.flow_run` = '{flow_run_id}'"):
        children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{top.info.run_id}'")
        for run in [top, *children]:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
