"""Run one stage from a spec file: `python -m stages.run spec.json`. Knows nothing of Prefect, MLflow or clusters.

The spec: {"stage", "config", "inputs": {arg: {"path", "record"} or {key: {...}}}, "ancestors": {fingerprint: record},
"out", "scratch", "result", "threads", "device", "share"}. The outcome is written to `result`:
{"status"} with {"metrics", "series"} or {"error"}; the exit status is one of those below.

Several processes may run one stage (torchrun's RANK and WORLD_SIZE): the first writes, logs and answers, but for an
error, which whoever meets it tells. The others leave when training ends; see stages/trainer/loop.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from stages.model import cuda
from stages.stage import Artifact, ConfigError, Context, CuveeError, Kind, load, parse
from stages.store.mirror import Mirror

OK = 0
FAILED = 1  # a defect: the log holds the traceback
REFUSED = 64  # the user can mend it: the result holds the sentence. Never retried
AGAIN = 75  # checkpointed on request: start me again (EX_TEMPFAIL)
SERIES_POINTS = 200
ANSWER_BYTES = 4096
PR_SET_PDEATHSIG = 1


class Silent(Context):
    """The context of a rank that is not the first."""

    def log(self, message: str) -> None:
        pass

    def metrics(self, step: int, **values: float) -> None:
        pass


def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def passive_threads() -> None:
    """To be called before torch is imported: OpenMP threads that wait sleep rather than spin. Where anything else runs
    on the cores (the servers of a run do), a spinning thread takes the time of the one it waits for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(spec_file: str) -> int:
    """Run the stage that `spec_file` describes; returns the process's exit status."""
    spec = json.loads(Path(spec_file).read_text())
    try:
        _part(spec).write_text(" " * ANSWER_BYTES)  # room for the answer, even where the stage fills the disk
        outcome = _run(spec)
    except CuveeError as error:
        return _finish(spec, {"error": str(error)}, REFUSED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or spec["out"]
        return _finish(spec, {"error": f"{where}: no space left on the disk; free some, then run again"}, REFUSED)
    except SystemExit as stop:
        # To a launcher of several processes the first status other than 0 is a failure, and it ends the others.
        status = _finish(spec, {}, stop.code) if stop.code == AGAIN and ranks()[0] == 0 else stop.code
        return OK if status == AGAIN and ranks()[1] > 1 else status
    return _finish(spec, outcome, OK)


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    out, scratch, (rank, world) = Path(spec["out"]), Path(spec["scratch"]), ranks()
    if rank == 0:
        shutil.rmtree(out, ignore_errors=True)  # what a killed attempt left; training resumes from scratch, not from here
        out.mkdir(parents=True)
    scratch.mkdir(parents=True, exist_ok=True)
    threads = max(1, spec["threads"] // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    mirror = Mirror(**spec["mirror"]) if spec.get("mirror") else None
    ctx = (Silent if rank else Context)(scratch=scratch, threads=threads, device=spec["device"], mirror=mirror)
    _use_device(ctx.device, spec.get("share", 1.0))
    module = load(spec["stage"])
    config = parse(module.Config, spec["config"], spec["name"])
    inputs = {arg: _artifacts(one, spec["ancestors"]) for arg, one in spec["inputs"].items()}
    _limit_threads(ctx.threads)
    metrics = module.run(config, inputs, out, ctx) or {}
    return {"metrics": {k: v for k, v in metrics.items() if math.isfinite(v)}, "series": series(scratch)}


def _use_device(device: str, share: float) -> None:
    """Raises ConfigError where a GPU is asked for and there is none; hides those that were not asked for. share: of the
    GPU's memory, the rest being for stages that run beside this one."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("cluster.device: cuda, but torch finds no NVIDIA GPU here; set cluster=local")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_per_process_memory_fraction(share)
        cuda.prepare()


def _artifacts(one: dict[str, Any], ancestors: dict[str, Any]) -> Artifact | dict[str, Artifact]:
    if "path" not in one:
        return {key: _artifacts(item, ancestors) for key, item in one.items()}
    record = one["record"] | {"ancestors": ancestors}
    return Artifact(Path(one["path"]), Kind(record["kind"]), record["fingerprint"], record)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def logged(text: str) -> list[dict[str, float]]:
    """The points of a text of metrics.jsonl. One that a kill cut off is left out; the next one stands on its line."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line[max(line.rfind("{"), 0) :]))
    return found


def series(scratch: Path) -> dict[str, list[list[float]]]:
    """Every metric that the stage logged, as [[step, value], ...], thinned to SERIES_POINTS; a repeated step (after a
    resume) counts once, as it was last."""
    points: dict[str, dict[int, float]] = {}
    path = scratch / "metrics.jsonl"
    for point in logged(path.read_text()) if path.exists() else []:
        for name in point.keys() - {"step", "time"}:
            if math.isfinite(point[name]):
                points.setdefault(name, {})[point["step"]] = point[name]
    thinned = {}
    for name, values in points.items():
        ordered = sorted(values.items())
        stride = max(1, math.ceil(len(ordered) / SERIES_POINTS))
        thinned[name] = [[step, value] for step, value in ordered[::-1][::stride][::-1]]  # the last point always stays
    return thinned


def _part(spec: dict[str, Any]) -> Path:
    """Where this process writes its answer, before it takes its place."""
    return Path(f"{spec['result']}.{ranks()[0]}.part")


def _finish(spec: dict[str, Any], outcome: dict[str, Any], status: int) -> int:
    if "error" in outcome:
        with contextlib.suppress(OSError):  # the log's disk may be the full one
            print(outcome["error"], file=sys.stderr, flush=True)
    part = _part(spec)
    part.write_text(json.dumps(outcome | {"status": status}))
    part.replace(spec["result"])
    return status


if __name__ == "__main__":
    passive_threads()
    # In every rank of every start it advises to install Apex; what is used in its place is what is meant.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    if ranks()[1] > 1:  # kill -9 of the launcher must not leave ranks that write on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        sys.exit(main(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.exit(FAILED)
