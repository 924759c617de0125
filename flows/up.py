"""`cuvee up`: Prefect server, a worker and MLflow on loopback, with deployments for the recipe and its parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from flows import services
from flows.config import CONF, compose, state_dir
from stages.stage import CuveeError
from stages.store.record import write_atomic

POOL = "cuvee"


def up(prefect_port: int, mlflow_port: int) -> int:
    """Start everything, print the addresses, and stay until Ctrl-C; then end everything that was started."""
    for name, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
        if services.port_taken(port):
            raise CuveeError(f"{name}={port}: something listens there already; stop it or choose another port")
    os.environ.update(services.environment())
    logs, prefect, mlflow = state_dir() / "logs", f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}"
    os.environ["PREFECT_API_URL"] = f"{prefect}/api"
    started: list[tuple[str, subprocess.Popen]] = []
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        print("cuvee: starting Prefect and MLflow (half a minute the first time)", flush=True)
        started.append(("Prefect", services.start_prefect(prefect_port, logs / "prefect.log")))
        started.append(("MLflow", services.start_mlflow(mlflow_port, logs / "mlflow.log")))
        services.wait_for(started[0][1], f"{prefect}/api/health", logs / "prefect.log", "the Prefect server")
        names = deploy()
        worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
        started.append(("the worker", services.start(worker, logs / "worker.log", {})))
        services.wait_for(started[1][1], f"{mlflow}/health", logs / "mlflow.log", "MLflow")
        write_atomic(state_dir() / "services.json", json.dumps({"prefect": prefect, "mlflow": mlflow}).encode())
        print(f"  prefect   {prefect}/deployments   ({', '.join(names)})\n  mlflow    {mlflow}\n"
              f"  logs      {logs}\nStart a run from a deployment's form; Ctrl-C ends all of it.", flush=True)
        while True:
            for name, process in started:
                if process.poll() is not None:
                    raise CuveeError(f"{name} ended with status {process.returncode}; its log is in {logs}")
            time.sleep(1)
    except KeyboardInterrupt:
        print("cuvee: stopping", flush=True)
        return 0
    finally:
        (state_dir() / "services.json").unlink(missing_ok=True)
        for _, process in reversed(started):
            services.stop(process)


def deploy() -> list[str]:
    """Register the deployments with the server at PREFECT_API_URL: the whole recipe, and one for each of its parts."""
    import asyncio

    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    from flows.flow import cuvee

    recipe = compose([]).recipe

    async def pool() -> None:
        async with get_client() as client:
            try:
                await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            except ObjectAlreadyExists:
                pass

    asyncio.run(pool())
    env = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "AWS_"))}
    env |= services.environment() | {"CUVEE_STATE": str(state_dir()), "PYTHONPATH": str(CONF.parent)}
    whole = recipe.name.replace("_", "-")
    for name, until in {whole: [], **{f"{whole}-{part}": [part] for part in recipe.parts}}.items():
        source = cuvee.from_source(source=str(CONF.parent), entrypoint="flows/flow.py:cuvee")
        source.deploy(name=name, work_pool_name=POOL, parameters={"overrides": [], "until": until},
                      job_variables={"env": env}, build=False, push=False, print_next_steps=False, ignore_warnings=True)
    return [whole, *(f"{whole}-{part}" for part in recipe.parts)]
