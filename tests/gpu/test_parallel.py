"""Two GPUs against one, in BF16: every kind of parallelism trains the same model. Skipped with one GPU.

`python -m tests.gpu.test_parallel ROOT WORDS` is one rank; it trains all layouts in turn, since starting costs most.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from tests.gpu.test_trainer import FIELDS
from tests.resume import trainer_run
from tests.unit.tiny import tokenizer

LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "PP2-VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "DP2": {},
    "DP2-distributed-optimizer": {"distributed_optimizer": True},
    "FSDP2": {"fsdp": True},
    "CP2": {"context_parallel": 2},
    "TP2+SP-fp8": {"tensor_parallel": 2, "sequence_parallel": True, "precision": "fp8_delayed"},
    "DP2-recompute": {"recompute": "full"},
}
RUN = FIELDS | {"steps": 12, "precision": "bf16"}


def losses(root: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "scratch/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a run a layout, and "single"."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    root = tmp_path_factory.mktemp("runs")
    words = tokenizer(root / "tokenizer")
    trainer_run.run(root / "single", words, **RUN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.gpu.test_parallel", str(root), str(words)]
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    try:
        for rank in ranks:
            rank.wait(400)
    finally:
        for rank in ranks:
            rank.kill()
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_gpu(name, runs):
    failed = runs / name / "error.txt"
    assert not failed.exists(), failed.read_text()
    assert losses(runs / name) == pytest.approx(losses(runs / "single"), rel=0.05 if "fp8" in name else 5e-3)


def main(root: Path, words: Path) -> None:
    from stages.model import cuda

    cuda.prepare()
    for name, layout in LAYOUTS.items():
        try:
            trainer_run.run(root / name, words, **RUN | layout)
        except SystemExit:
            pass  # how ranks but the first leave
        except BaseException:
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
