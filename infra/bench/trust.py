"""What orchestration, records, leases and tracking cost: stages of almost no work through a whole flow (Prefect's server
and tasks, lease, spec, digests, record, alias, MLflow), and the same stages as bare forks of the warm worker, in turn.

    python -m infra.bench.trust [stages]

The cost a stage is the slope between a flow of 2 stages and one of `stages`; the cost a run is what is left.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HOUR, STAGES_OF_A_RECIPE = 3600, 55


def main(count: int) -> int:
    folder = Path(tempfile.mkdtemp(prefix="trust"))
    os.environ["CUVEE_STATE"] = str(folder / "state")
    from flows import services

    began = time.perf_counter()
    with services.prefect_api():
        os.environ.update(PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL")
        from infra.bench._noop import flow_of  # imports Prefect, which reads the environment

        server = time.perf_counter() - began
        flow_of(folder, range(1))  # what is paid once a process: imports, tables of the databases
        small, large, bare = [], [], []
        for round_ in range(3):
            first = 1000 * (round_ + 1)
            small.append(_timed(flow_of, folder, range(first, first + 2)))
            large.append(_timed(flow_of, folder, range(first + 2, first + 2 + count)))
            bare += _bare(folder, count)
    whole = (statistics.median(large) - statistics.median(small)) / (count - 2)
    stage = whole - statistics.median(bare)
    run = max(0.0, statistics.median(small) - 2 * whole) + server
    total = run + STAGES_OF_A_RECIPE * stage
    print(f"a stage: {whole:.3f} s in a flow, {statistics.median(bare):.3f} s bare: {stage:.3f} s of trust (at most 0.5)")
    print(f"a run:   {run:.1f} s (its Prefect server {server:.1f} s, the worker's imports, closing MLflow)")
    print(f"a recipe of {STAGES_OF_A_RECIPE} stages in an hour: {total:.1f} s, {total / HOUR:.2%} (at most 2 %)")
    print(json.dumps({"stages": count, "flows of 2": small, "flows of all": large, "bare": statistics.quantiles(bare, n=4),
                      "load": os.getloadavg()}))
    return 0 if stage <= 0.5 and total <= 0.02 * HOUR else 1


def _timed(function, *args) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def _bare(folder: Path, count: int) -> list[float]:
    from flows.launchers.local import Launcher
    from infra.bench._noop import node

    launcher, found = Launcher(), []
    try:
        for at in range(-1, count):
            one = node(folder, at)
            spec = {"stage": one.stage, "name": one.name, "config": asdict(one.config), "inputs": {}, "ancestors": {},
                    "threads": 1, "device": "cpu", "out": str(folder / "bare/out"), "scratch": str(folder / "bare/scratch"),
                    "result": str(folder / "bare/result.json"), "processes": 1}
            (folder / "bare").mkdir(exist_ok=True)
            (folder / "bare/spec.json").write_text(json.dumps(spec))
            took = _timed(lambda: launcher.launch(folder / "bare/spec.json", folder / "bare/log", 1).wait(lambda line: None))
            found += [took] if at >= 0 else []  # the first waits for the worker's imports
    finally:
        launcher.close()
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 22))
