"""Run what needs a GPU and keep what it said: `python -m tests.gpu.record [--no-tests] [benchmark ...]`.

Writes tests/gpu/records/<date>-<gpu>.md: versions, the tests' outcome and every benchmark's table with its command.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = (
    "infra/bench/training_speed.py",
    "infra/bench/long_context.py",
    "infra/bench/rollout_speed.py --prompts 64 --batches 512 --rl-steps 3",
)
LIBRARIES = ("torch", "transformer-engine", "megatron-core", "transformers", "triton")


def run(command: list[str]) -> str:
    """A command's standard output under its name; raises CalledProcessError with what it printed on failure."""
    shown = " ".join(["python", *command[1:]])
    print(f"$ {shown}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr)
    done.check_returncode()
    print(done.stdout, flush=True)
    return f"`{shown}`\n\n{done.stdout.strip()}\n"


def versions() -> str:
    import torch

    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (unpackaged)")
    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{gpus}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", default=BENCHMARKS)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/gpu/records")
    arguments = parser.parse_args()
    import torch

    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    count = torch.cuda.device_count()
    file = arguments.out / f"{datetime.date.today()}-{f'{count}x' if count > 1 else ''}{name}.md"
    parts = [f"# {file.stem}\n", versions() + "\n"]
    if not arguments.no_tests:
        text = run([sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-rA", "tests/gpu"])
        outcome = [line for line in text.splitlines() if line.startswith(("PASSED", "SKIPPED", "`", "=", "FAILED"))]
        parts.append("## Tests\n\n" + "\n".join(outcome[:1] + [""] + [f"    {line}" for line in outcome[1:]]) + "\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(parts))
    for benchmark in arguments.benchmarks:
        parts.append(f"## {Path(benchmark).stem}\n\n" + run([sys.executable, *benchmark.split()]))
        file.write_text("\n".join(parts))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
