"""What the tracker's operations do in MLflow: one run an artifact under the run of the flow, linked to its inputs' runs.

Operations and their results are JSON, so that they can wait on a disk. `again` says that an earlier attempt may have
been done without its answer being seen: what creates something looks first whether it is there.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.config import state_dir
from flows.graph import Node
from flows.lineage import flatten
from stages.stage import Kind
from stages.store import record as records

MODELS = (Kind.CHECKPOINT.value, Kind.REWARD_MODEL.value, Kind.EXPORT.value)
SAMPLES = "samples.json"
PARAM_BATCH, METRIC_BATCH, VALUE_LENGTH, TAG_LENGTH = 100, 1000, 500, 5000


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or a SQLite file in the state directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state_dir() / 'mlflow.db'}"


def make_database() -> None:
    """Make the SQLite file in the state directory where there is none, whole or not at all: MLflow can't go on with one
    during whose first migration it was killed."""
    path = state_dir() / "mlflow.db"
    if os.environ.get("MLFLOW_TRACKING_URI") or path.exists():
        return
    import mlflow

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mlflow-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        mlflow.MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another process was first
            os.link(made, path)


def described(node: Node, parents: dict[str, Any]) -> dict[str, Any]:
    """What MLflow is told of a stage that starts. parents: fingerprint -> record."""
    inputs = []
    for arg, one in records.parents({"inputs": node.map_inputs(lambda n: {"fingerprint": n.fingerprint})}):
        record = parents[one["fingerprint"]]
        inputs.append({"arg": arg, "name": record["name"], "fingerprint": record["fingerprint"],
                       "digest": record["digest"], "mlflow": record.get("mlflow")})
    return {"name": node.name, "stage": node.stage, "fingerprint": node.fingerprint, "kind": node.kind.value,
            "params": [[key, str(value)[:VALUE_LENGTH]] for key, value in flatten(node.identity).items()], "inputs": inputs}


class Mlflow:
    """One flow's runs. results: id of a run ("flow" for the flow's) -> {"run_id", "model_id"?}, also of earlier
    processes. Raises what MLflow's client raises."""

    def __init__(self, results: dict[str, dict[str, str]]):
        self.results = results
        self._client: Any = None

    def do(self, operation: dict[str, Any], again: bool) -> dict[str, str] | None:
        """Do one operation, {"do": name of a method, "run": id, ...}; what it made is kept in `results`."""
        self._connect()
        run = operation["run"]
        if operation["do"] not in ("open", "start") and run not in self.results:
            return None  # its start was refused
        made = getattr(self, operation["do"])(again=again, **{k: v for k, v in operation.items() if k != "do"})
        if made:
            self.results[run] = made
        return made

    def _connect(self) -> None:
        import mlflow

        if self._client is None:
            # A server has a place of its own for files; beside a database it would be the working directory.
            self._location = None if tracking_uri().startswith("http") else (state_dir() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a stage
            make_database()
            mlflow.set_tracking_uri(tracking_uri())
            self._mlflow, self._client = mlflow, mlflow.MlflowClient(tracking_uri())

    def open(self, run: str, recipe: str, flow_run: str, attempt: str, title: str, again: bool) -> dict[str, str]:
        found = self._client.get_experiment_by_name(recipe)
        experiment = found.experiment_id if found else self._client.create_experiment(recipe, self._location)
        return self._create(experiment, title, {"cuvee.flow_run": flow_run, "cuvee.attempt": attempt}, again)

    def _create(self, experiment: str, name: str, tags: dict[str, str], again: bool) -> dict[str, str]:
        wanted = f"tags.`cuvee.attempt` = '{tags['cuvee.attempt']}'"
        found = self._client.search_runs([experiment], wanted) if again else []
        run = found[0] if found else self._client.create_run(experiment, run_name=name, tags=tags)
        return {"run_id": run.info.run_id, "experiment": experiment}

    def start(self, run: str, node: dict[str, Any], again: bool) -> dict[str, str]:
        from mlflow.entities import Param

        inputs = [one | {"mlflow": one["mlflow"] or self._found(one["fingerprint"])} for one in node["inputs"]]
        flow = self.results["flow"]
        tags = {"mlflow.parentRunId": flow["run_id"], "cuvee.attempt": run, "cuvee.stage": node["stage"],
                "cuvee.fingerprint": node["fingerprint"], "cuvee.kind": node["kind"],
                "mlflow.note.content": _note(node, inputs)[:TAG_LENGTH]}
        tags |= {f"cuvee.input.{one['arg']}": one["fingerprint"] for one in inputs}
        address = self._create(flow["experiment"], node["name"], tags, again)
        params = [Param(key, value) for key, value in node["params"]]
        for at in range(0, len(params), PARAM_BATCH):
            self._client.log_batch(address["run_id"], params=params[at : at + PARAM_BATCH])
        self._link_inputs(address["run_id"], inputs)
        if node["kind"] in MODELS:
            address["model_id"] = self._model(node, address, run, again)
        return address

    def _model(self, node: dict[str, Any], address: dict[str, str], attempt: str, again: bool) -> str:
        wanted = f"tags.`cuvee.attempt` = '{attempt}'"
        found = self._client.search_logged_models([address["experiment"]], wanted) if again else []
        if not found:
            self._mlflow.set_experiment(experiment_id=address["experiment"])  # where the model is put
            found = [self._mlflow.create_external_model(
                name=node["name"], source_run_id=address["run_id"],
                tags={"cuvee.fingerprint": node["fingerprint"], "cuvee.attempt": attempt})]
        return found[0].model_id

    def _found(self, fingerprint: str) -> dict[str, str]:
        """The run of an artifact whose record was written while MLflow could not be reached."""
        found = self._client.search_runs([self.results["flow"]["experiment"]],
                                         f"tags.`cuvee.fingerprint` = '{fingerprint}'", max_results=1)
        models = [m.model_id for m in found[0].outputs.model_outputs] if found and found[0].outputs else []
        return ({"run_id": found[0].info.run_id} if found else {}) | ({"model_id": models[0]} if models else {})

    def _link_inputs(self, run_id: str, inputs: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        models, datasets = [], []
        for one in inputs:
            if "model_id" in one["mlflow"]:
                models.append(LoggedModelInput(one["mlflow"]["model_id"]))
            else:
                source = {"fingerprint": one["fingerprint"], "run_id": one["mlflow"].get("run_id", "")}
                data = Dataset(name=one["name"], digest=one["digest"][:32], source_type="cuvee",
                               source=records.canonical(source).decode())
                datasets.append(DatasetInput(data, [InputTag("mlflow.data.context", one["arg"])]))
        if models or datasets:
            self._client.log_inputs(run_id, models=models or None, datasets=datasets or None)

    def metrics(self, run: str, points: list[dict[str, float]], again: bool) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(point["time"] * 1000), int(point["step"])) for point in points
                   for name, value in point.items() if name not in ("step", "time") and math.isfinite(value)]
        self._log(run, metrics)

    def _log(self, run: str, metrics: list[Any]) -> None:
        for at in range(0, len(metrics), METRIC_BATCH):
            self._client.log_batch(self.results[run]["run_id"], metrics=metrics[at : at + METRIC_BATCH])

    def table(self, run: str, columns: dict[str, list[Any]], again: bool) -> None:
        """Samples as a table of MLflow's evaluation view; whole each time, where its own log_table would append."""
        run_id, rows = self.results[run]["run_id"], list(map(list, zip(*columns.values(), strict=True)))
        self._client.log_dict(run_id, {"columns": list(columns), "data": rows}, SAMPLES)
        self._client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": SAMPLES, "type": "table"}]))

    def finish(self, run: str, record: dict[str, Any], registered: bool, again: bool) -> None:
        from mlflow.entities import LoggedModelOutput, Metric, RunTag

        address, ended = self.results[run], _milliseconds(record["ended"])
        run_id = address["run_id"]
        points = [Metric(name, value, ended, int(step)) for name, series in record["series"].items()
                  for step, value in series]
        points += [Metric(f"final/{name}", value, ended, 0) for name, value in record["metrics"].items()]
        self._log(run, [*points, Metric("seconds", record["seconds"], ended, 0)])
        self._client.log_batch(run_id, tags=[RunTag("cuvee.digest", record["digest"])])
        self._client.log_dict(run_id, record, records.NAME)
        if "model_id" in address:
            if not (again and self._client.get_run(run_id).outputs.model_outputs):
                self._client.log_outputs(run_id, [LoggedModelOutput(address["model_id"], step=0)])
            self._client.finalize_logged_model(address["model_id"], "READY")
        if registered and not (again and self._client.search_model_versions(f"run_id = '{run_id}'")):
            self._register(record, address)
        self._client.set_terminated(run_id, end_time=ended)

    def fail(self, run: str, again: bool, status: str = "FAILED") -> None:
        self._client.set_terminated(self.results[run]["run_id"], status)

    def close(self, run: str, again: bool, status: str = "FINISHED") -> None:
        self._client.set_terminated(self.results[run]["run_id"], status)

    def _register(self, record: dict[str, Any], address: dict[str, str]) -> None:
        """A new version of the recipe's registered model, with the artifact's name as its alias."""
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment(self.results["flow"]["experiment"]).name
        name = f"cuvee-{experiment}".replace("_", "-")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        above = {f"cuvee.input.{arg}": parent["fingerprint"] for arg, parent in records.parents(record)}
        version = self._client.create_model_version(
            name, source=f"models:/{address['model_id']}", run_id=address["run_id"], model_id=address["model_id"],
            tags={"cuvee.fingerprint": record["fingerprint"], **above})
        self._client.set_registered_model_alias(name, record["name"], version.version)


def _note(node: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
    """Markdown for the run page: what made this artifact, with links to the runs of its inputs."""
    lines = [f"`{node['stage']}` makes **{node['name']}** (`{node['fingerprint']}`)", ""]
    for one in inputs:
        run = one["mlflow"].get("run_id")
        label = f"[{one['name']}](#/runs/{run})" if run else one["name"]
        lines.append(f"- {one['arg']}: {label} `{one['fingerprint'][:12]}`")
    return "\n".join(lines)


def _milliseconds(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp() * 1000)
