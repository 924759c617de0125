"""What a warm worker saves: the same small stage as a fork of it, and as a fresh process with the same imports, in turn.

    python infra/bench/warm_worker.py [rounds] [cpu|cuda]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from flows.launchers.local import Launcher
from stages.stage import load


def main(rounds: int, device: str = "cpu") -> None:
    launcher = Launcher(SimpleNamespace(device=device, devices=1))
    times: dict[str, list[float]] = {"fork of the warm worker": [], "fresh process": []}
    with tempfile.TemporaryDirectory() as folder:
        spec = write_spec(Path(folder), device)
        launcher.launch(spec, Path(folder) / "log", 1).wait(lambda line: None)  # the worker's own start is paid once
        fresh = [sys.executable, "-c", f"from stages import worker; worker.preload({device!r}); worker.main({str(spec)!r})"]
        for _ in range(rounds):
            started = time.perf_counter()
            launcher.launch(spec, Path(folder) / "log", 1).wait(lambda line: None)
            times["fork of the warm worker"].append(time.perf_counter() - started)
            started = time.perf_counter()
            subprocess.run(fresh, check=True, capture_output=True)
            times["fresh process"].append(time.perf_counter() - started)
    launcher.close()
    warm, cold = (statistics.median(values) for values in times.values())
    for name, values in times.items():
        print(f"{name:<26} median {statistics.median(values):6.2f} s   min {min(values):6.2f}   max {max(values):6.2f}")
    print(f"ratio {cold / warm:.1f}, {cold - warm:.1f} s saved a stage ({rounds} rounds)")


def write_spec(folder: Path, device: str) -> Path:
    """A stage of almost no work: curate one small file."""
    text = folder / "text.py"
    text.write_text(Path(json.__file__).read_text())
    config = asdict(load("data.curate").Config())
    config |= {"sources": [str(text)], "blocks": ["split"], "options": {"split": {"heldout": 0}}}
    spec = {"stage": "data.curate", "name": "corpus", "config": config, "inputs": {}, "ancestors": {}, "threads": 1,
            "out": str(folder / "out"), "scratch": str(folder / "scratch"), "result": str(folder / "result.json"),
            "device": device}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    return path


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, *sys.argv[2:])
