"""`cuvee up`: Prefect server, a worker and MLflow on loopback, with deployments for every recipe and its parts.
`cuvee worker`: the worker alone, for a server that runs elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from flows import services
from flows.config import CONF, choices, compose, split, state_dir
from flows.reconcile import close_dead
from stages.stage import CuveeError
from stages.store.record import write_atomic

POOL = "cuvee"
WORKER = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]


def up(prefect_port: int, mlflow_port: int) -> None:
    """Start everything, print the addresses, and stay until Ctrl-C; then end everything that was started."""
    for name, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
        services.check_port(name, port)
    os.environ.update(services.environment())
    logs, prefect, mlflow = state_dir() / "logs", f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}"
    os.environ["PREFECT_API_URL"] = f"{prefect}/api"
    started: list[tuple[str, subprocess.Popen]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print("cuvee: starting Prefect and MLflow (half a minute the first time)", flush=True)
        with services.starting():
            started.append(("Prefect", services.start_prefect(prefect_port, logs / "prefect.log")))
            started.append(("MLflow", services.start_mlflow(mlflow_port, logs / "mlflow.log")))
            services.wait_for(started[0][1], f"{prefect}/api/health", logs / "prefect.log", "the Prefect server")
        names = deploy()
        close_dead()
        started.append(("the worker", services.start(WORKER, logs / "worker.log", _place())))
        services.wait_for(started[1][1], f"{mlflow}/health", logs / "mlflow.log", "MLflow")
        write_atomic(state_dir() / "services.json", json.dumps({"prefect": prefect, "mlflow": mlflow}).encode())
        print(f"  prefect   {prefect}/deployments   ({', '.join(names)})\n  mlflow    {services.mlflow_page(mlflow)}\n"
              f"  logs      {logs}\nStart a run from a deployment's form; Ctrl-C ends all of it.", flush=True)
        while True:
            for name, process in started:
                if process.poll() is not None:
                    raise CuveeError(f"{name} ended with status {process.returncode}; its log is in {logs}")
            time.sleep(1)
    except KeyboardInterrupt:
        print("cuvee: stopping", flush=True)
    finally:
        (state_dir() / "services.json").unlink(missing_ok=True)
        for _, process in reversed(started):
            services.stop(process)


def worker(overrides: list[str]) -> None:
    """Register the deployments at PREFECT_API_URL, with `overrides` as their defaults, then become their worker."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise CuveeError("PREFECT_API_URL is not set; it names the server to work for, e.g. http://prefect:4200/api. For "
                         "servers on this machine use `cuvee up`")
    os.environ.update(services.environment())
    state_dir().mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + services.START_SECONDS
    while not services.answers(f"{url}/health"):
        if time.monotonic() > deadline:
            raise CuveeError(f"PREFECT_API_URL={url}: no Prefect server answered in {services.START_SECONDS} s")
        time.sleep(1)
    print(f"cuvee: deployments {', '.join(deploy(overrides))}", flush=True)
    close_dead()
    os.execve(WORKER[0], WORKER, os.environ | _place())


def _place() -> dict[str, str]:
    """What the runs of a worker inherit from it besides its environment: nothing of that, secrets least of all, is kept in
    Prefect's database."""
    return {"CUVEE_STATE": str(state_dir()), "PYTHONPATH": str(CONF.parent)}


def deploy(overrides: list[str] = []) -> list[str]:  # noqa: B006
    """Register a deployment for every recipe and one for each of its parts, with `overrides` as their defaults, and the
    notification if $CUVEE_NOTIFY_URL is set. Raises ConfigError for overrides that no run could honour."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.utilities.callables import parameter_schema

    from flows import notify
    from flows.flow import GROUPS, cuvee

    chosen, rest = split(overrides, GROUPS)
    without = [o for o in overrides if not o.startswith("recipe=")]
    # Prefect's own schema lets a misspelt parameter pass, and the run then crashes.
    schema = parameter_schema(cuvee).model_dump_for_openapi() | {"additionalProperties": False}
    made = []
    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        except ObjectAlreadyExists:
            pass
        flow_id = client.create_flow(cuvee)
        for recipe in [chosen["recipe"]] if "recipe" in chosen else choices("recipe"):
            for part in ["", *compose([f"recipe={recipe}", *without]).recipe.parts]:
                made.append("-".join(filter(None, [recipe.replace("_", "-"), part])))
                client.create_deployment(
                    flow_id, made[-1], work_pool_name=POOL, entrypoint="flows/flow.py:cuvee", path=str(CONF.parent),
                    pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(CONF.parent)}}],
                    parameters={**chosen, "recipe": recipe, "overrides": rest, "until": [part] if part else []},
                    parameter_openapi_schema=schema, enforce_parameter_schema=True, tags=["cuvee", recipe],
                    description=f"{recipe}: everything that `{part}` needs, and itself" if part else f"{recipe}: all of it",
                )
    if url := os.environ.get("CUVEE_NOTIFY_URL"):
        notify.register(url)
    return made
