"""MLflow: one run an artifact under the run of the flow, linked to the runs that made its inputs.

Everything happens on one background thread and in batches: no stage ever waits for the tracker, and a tracker that is
down costs a warning, not a run. Big files stay in the store; MLflow gets addresses, digests and the record.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any

from flows.config import state_dir
from flows.graph import Node
from stages.stage import Kind
from stages.store import record as records

MODELS = (Kind.CHECKPOINT.value, Kind.REWARD_MODEL.value, Kind.EXPORT.value)
PARAM_BATCH, METRIC_BATCH, VALUE_LENGTH = 100, 1000, 500
logger = logging.getLogger("cuvee.tracking")


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file in the state directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state_dir() / 'mlflow.db'}"


class Tracker:
    """Sends what stages do to MLflow. `start` and `finish` return at once; `close` waits for what is queued."""

    def __init__(self, conf: Any, flow_run: str, stages: int):
        self.recipe, self.flow_run_id, self.stages = conf.recipe.name, flow_run, stages
        self.registered = set(conf.recipe.registered)
        self._queue = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._failed = threading.Event()
        self.flow_run: Future = self._submit(self._open)

    def start(self, node: Node, parents: dict[str, Any]) -> Future:
        return self._submit(self._start, node, parents)

    def finish(self, run: Future, record: dict[str, Any]) -> None:
        self._submit(self._finish, run, record)

    def progress(self, run: Future, points: list[dict[str, float]]) -> None:
        """Send points of a running stage: {"step", "time" in seconds, metric: value, ...} each."""
        self._submit(self._metrics, run, points)

    def fail(self, run: Future) -> None:
        self._submit(lambda: run.result() and self.client.set_terminated(run.result()["run_id"], "FAILED"))

    def address(self, run: Future) -> dict[str, str] | None:
        """{"run_id", "model_id"?} for the record, or None when MLflow could not be reached."""
        return run.result()

    def close(self) -> None:
        self._submit(lambda: self.flow_run.result() and self.client.set_terminated(self.flow_run.result()["run_id"]))
        self._queue.shutdown(wait=True)

    def _submit(self, function: Any, *args: Any) -> Future:
        def guarded() -> Any:
            if self._failed.is_set():
                return None
            try:
                return function(*args)
            except Exception as error:
                self._failed.set()
                logger.warning("MLflow at %s failed, the run goes on without it: %s", tracking_uri(), error)
                return None

        return self._queue.submit(guarded)

    def _open(self) -> dict[str, str]:
        import mlflow

        uri = tracking_uri()
        # Asked before set_tracking_uri, which sets the variable. A server of the user's has a place of its own.
        location = None if os.environ.get("MLFLOW_TRACKING_URI") else (state_dir() / "mlruns").as_uri()
        mlflow.set_tracking_uri(uri)
        self.mlflow, self.client = mlflow, mlflow.MlflowClient(uri)
        found = self.client.get_experiment_by_name(self.recipe)
        self.experiment = found.experiment_id if found else self.client.create_experiment(self.recipe, location)
        mlflow.set_experiment(experiment_id=self.experiment)  # where create_external_model puts its models
        run = self.client.create_run(self.experiment, run_name=f"{self.recipe} ({self.stages} stages)",
                                     tags={"cuvee.flow_run": self.flow_run_id})
        return {"run_id": run.info.run_id}

    def _start(self, node: Node, parents: dict[str, Any]) -> dict[str, str]:
        from mlflow.entities import Param, RunTag

        tags = {"mlflow.parentRunId": self.flow_run.result()["run_id"], "cuvee.stage": node.stage,
                "cuvee.fingerprint": node.fingerprint, "cuvee.kind": node.kind.value,
                "mlflow.note.content": _note(node, parents)}
        run = self.client.create_run(self.experiment, run_name=node.name,
                                     tags={k: v[:5000] for k, v in tags.items()})
        params = [Param(k, str(v)[:VALUE_LENGTH]) for k, v in _flatten(node.identity)]
        for at in range(0, len(params), PARAM_BATCH):
            self.client.log_batch(run.info.run_id, params=params[at : at + PARAM_BATCH])
        inputs = [RunTag(f"cuvee.input.{arg}", one["fingerprint"]) for arg, one in
                  records.parents({"inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})})]
        self.client.log_batch(run.info.run_id, tags=inputs)
        self._link_inputs(run.info.run_id, node, parents)
        address = {"run_id": run.info.run_id}
        if node.kind.value in MODELS:
            model = self.mlflow.create_external_model(
                name=node.name, source_run_id=run.info.run_id, tags={"cuvee.fingerprint": node.fingerprint})
            address["model_id"] = model.model_id
        return address

    def _link_inputs(self, run_id: str, node: Node, parents: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        models, datasets = [], []
        for arg, one in records.parents({"inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})}):
            record = parents[one["fingerprint"]]
            address = record.get("mlflow") or {}
            if "model_id" in address:
                models.append(LoggedModelInput(address["model_id"]))
            else:
                data = Dataset(name=record["name"], digest=record["digest"][:32], source_type="cuvee",
                               source=records.canonical({"fingerprint": record["fingerprint"],
                                                         "run_id": address.get("run_id", "")}).decode())
                datasets.append(DatasetInput(data, [InputTag("mlflow.data.context", arg)]))
        if models or datasets:
            self.client.log_inputs(run_id, models=models or None, datasets=datasets or None)

    def _metrics(self, run: Future, points: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(point["time"] * 1000), int(point["step"])) for point in points
                   for name, value in point.items() if name not in ("step", "time") and math.isfinite(value)]
        for at in range(0, len(metrics) if run.result() else 0, METRIC_BATCH):
            self.client.log_batch(run.result()["run_id"], metrics=metrics[at : at + METRIC_BATCH])

    def _finish(self, run: Future, record: dict[str, Any]) -> None:
        from mlflow.entities import LoggedModelOutput, Metric, RunTag

        address = run.result()
        if address is None:
            return
        run_id, ended = address["run_id"], _milliseconds(record["ended"])
        points = [Metric(name, value, ended, int(step)) for name, series in record["series"].items()
                  for step, value in series]
        points += [Metric(f"final/{name}", value, ended, 0) for name, value in record["metrics"].items()]
        points.append(Metric("seconds", record["seconds"], ended, 0))
        for at in range(0, len(points), METRIC_BATCH):
            self.client.log_batch(run_id, metrics=points[at : at + METRIC_BATCH])
        self.client.log_batch(run_id, tags=[RunTag("cuvee.digest", record["digest"])])
        self.client.log_dict(run_id, record, records.NAME)
        if "model_id" in address:
            self.client.log_outputs(run_id, [LoggedModelOutput(address["model_id"], step=0)])
            self.client.finalize_logged_model(address["model_id"], "READY")
        if record["name"] in self.registered:
            self._register(record, address)
        self.client.set_terminated(run_id, end_time=ended)

    def _register(self, record: dict[str, Any], address: dict[str, str]) -> None:
        """A new version of the recipe's registered model, with the artifact's name as its alias."""
        from mlflow.exceptions import MlflowException

        name = f"cuvee-{self.recipe}".replace("_", "-")
        try:
            self.client.create_registered_model(name)
        except MlflowException:
            pass  # it exists
        above = {f"cuvee.input.{arg}": parent["fingerprint"] for arg, parent in records.parents(record)}
        version = self.client.create_model_version(
            name, source=f"models:/{address['model_id']}", run_id=address["run_id"], model_id=address["model_id"],
            tags={"cuvee.fingerprint": record["fingerprint"], **above})
        self.client.set_registered_model_alias(name, record["name"], version.version)


def _note(node: Node, parents: dict[str, Any]) -> str:
    """Markdown for the run page: what made this artifact, with links to the runs of its inputs."""
    lines = [f"`{node.stage}` makes **{node.name}** (`{node.fingerprint}`)", ""]
    for arg, one in records.parents({"inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})}):
        record = parents[one["fingerprint"]]
        run = (record.get("mlflow") or {}).get("run_id")
        label = f"[{record['name']}](#/runs/{run})" if run else record["name"]
        lines.append(f"- {arg}: {label} `{one['fingerprint'][:12]}`")
    return "\n".join(lines)


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _flatten(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def _milliseconds(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp() * 1000)
