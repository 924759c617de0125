"""The warm worker on a GPU: what it imports must leave CUDA to its forks."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os
from stages import worker
from stages.model import cuda

assert worker.preload("cuda"), "an import has started CUDA"
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert len([name for name in threads if not name.startswith("cuda")]) == 1, threads  # the driver has one of its own
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        import torch
        import transformer_engine.pytorch as te

        layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
        with te.fp8_autocast(enabled=True):
            layer(torch.ones(32, 64, dtype=torch.bfloat16, device="cuda")).sum().backward()
        assert float(layer.weight.grad.float().abs().sum()) > 0 and cuda.started()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_forks_of_the_worker_have_the_gpu():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300,
                         env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})  # its threads, unlike others', end before a fork
    assert run.returncode == 0, run.stderr[-2000:]
