"""A whole run on a Kubernetes cluster: a job whose one pod does `cuvee run`, and makes the jobs of its stages.

`python -m flows.submit [arguments of cuvee run]` is what that pod does. When it is asked to end it does not take the
stages with it: evicted, it is started again elsewhere and finds their jobs; deleted, it owns them, and they end too.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from flows._parts import domains
from stages.run import OK
from stages.stage import ConfigError, names

LEAVE_SECONDS = 20.0


def submit(overrides: list[str], until: str, follow: bool, cancel: bool) -> int:
    """Start the run, or find it where it goes on, and follow its log until it ends; the exit status of a command.

    Raises ConfigError for a run that would be refused, before anything is asked of the cluster.
    """
    from flows.launchers import kubernetes
    from flows.launchers._kubernetes_api import Api
    from flows.launchers._kubernetes_manifests import FLOW, Stage

    conf = check(overrides, until)
    settings = kubernetes.settings(conf.cluster)
    api = Api(settings.context, settings.namespace)
    find = lambda name: kubernetes.patiently(lambda: api.get("Job", name), print)  # noqa: E731
    digest = hashlib.sha256(json.dumps([overrides, until]).encode()).hexdigest()
    name, found = kubernetes.attempt(find, f"cuvee-run-{digest[:10]}-0")
    if cancel:
        if found is None:
            raise ConfigError(f"no run of these overrides is under way in namespace {api.namespace}")
        kubernetes.end(api, "Job", name, f"{FLOW}={name}", settings.grace_seconds + 60.0)
        print(f"cuvee: {name} was ended; what was finished is kept, the same command goes on from there")
        return 0
    adopted = bool(found) or kubernetes.create(api, manifest(settings, name, overrides, until)) is None
    if not follow:
        print(f"cuvee: {name} in namespace {api.namespace} {'goes on' if adopted else 'was created'}")
        return 0
    job = kubernetes.Job(api, settings, "Job", Stage(name, "", "", 1), adopted)
    try:
        return 0 if job.wait(print) == OK else 1
    except KeyboardInterrupt:
        command = " ".join(["cuvee submit", *overrides, *(["--until", until] if until else [])])
        print(f"\ncuvee: {name} goes on without you; to see it again: {command}\n       to end it: {command} --cancel")
        return 0


def check(overrides: list[str], until: str) -> Any:
    """The run's configuration. Raises ConfigError where it, the graph or the cluster can't be right."""
    from flows.config import compose
    from flows.graph import Graph

    conf = compose(overrides)
    if conf.cluster.launcher != "kubernetes":
        raise ConfigError(f"cluster={conf.cluster.name} starts stages with launcher {conf.cluster.launcher}, but submit runs "
                          "on Kubernetes; add cluster=kubernetes, or use cuvee run")
    if conf.store.kind == "local" and conf.store.uri and not below(conf.store.uri, conf):
        raise ConfigError(f"store.uri={conf.store.uri} is not on the volume that the pods share; give a folder below "
                          f"cluster.volume.path={conf.cluster.volume.path}, or store=s3")
    for field, path in files(conf):
        if not below(path, conf):
            raise ConfigError(f"{field}: {path} would be read in the cluster, where it is not; copy it to the volume, below "
                              f"{conf.cluster.volume.path}" + (", or to a bucket, s3://..." if field.endswith(".sources") else ""))
    Graph(conf).until(targets(until))
    return conf


def files(conf: Any) -> Iterator[tuple[str, str]]:
    """(field, path) of all that stages read from the file system of the machine on which they run."""
    yield from (("data.sources", one) for one in conf.data.sources if "://" not in one and one not in names("data/sources"))
    yield from (("conversations.sources", one) for one in conf.conversations.sources if "://" not in one)
    for expert in domains(conf):
        for field in ("files", "heldout_files"):
            yield from ((f"expert.{expert}.prompts.{field}", one) for one in conf.expert[expert].prompts[field])


def below(path: str, conf: Any) -> bool:
    return path.startswith(f"{conf.cluster.volume.path}/")


def targets(until: str) -> list[str]:
    return [one for one in until.split(",") if one]


def manifest(settings: Any, name: str, overrides: list[str], until: str) -> dict[str, Any]:
    """The job of the run. What it notes of itself lies on the volume, for whoever goes on."""
    from flows.launchers._kubernetes_manifests import run_job

    command = ["python", "-m", "flows.submit", *overrides, *(["--until", until] if until else [])]
    state = f"{settings.volume.path}/runs/{name.rpartition('-')[0]}"
    return run_job(settings, name, command, {"CUVEE_STATE": state, "PREFECT_HOME": "/tmp/prefect"})


def inside() -> None:
    """The run's pod: `cuvee run`, which leaves at once when it is asked to, and says so in Prefect and MLflow."""
    from flows import cli

    signal.signal(signal.SIGTERM, _leave)  # a container's first process would not hear it otherwise
    sys.argv = ["cuvee", "run", *sys.argv[1:]]
    cli.main()


def _leave(*_: Any) -> None:
    from flows.reconcile import close_own

    closing = threading.Thread(target=close_own, daemon=True)
    closing.start()
    closing.join(LEAVE_SECONDS)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    inside()
