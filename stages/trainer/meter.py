"""What a training run tells of itself: speed, FLOPs, waiting, memory, time to the end, and a profiler's trace."""

from __future__ import annotations

import resource
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from stages.model.config import ModelConfig
from stages.trainer.batch import Group
from stages.trainer.config import TrainConfig
from stages.trainer.flops import training_flops

WINDOW = 20  # steps that speed is averaged over


class Meter:
    """Speed over the last steps of this process, from the end of one step to the end of the next, saving included.
    The first step (warming up) counts only alone."""

    def __init__(self, sizes: ModelConfig, head: str):
        self.sizes, self.head = sizes, head
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._warm = False
        self._mark, self._waited = time.perf_counter(), 0.0

    def waited(self, seconds: float) -> None:
        """Count time that the step waited for its batch."""
        self._waited += seconds

    def step(self, groups: list[Group]) -> dict[str, float]:
        """Count a step as ended. Returns tokens_per_second of all ranks, tflops_per_gpu (model FLOPs, see flops.py;
        without GPUs a process's), data_wait (share of the time), peak_memory_gib (of this rank's GPU, or process)."""
        now, sequences = time.perf_counter(), [sequence for group in groups for sequence in group]
        lengths = np.array([len(sequence.tokens) for sequence in sequences], np.int64)
        targets = sum(int(np.count_nonzero(sequence.mask[1:])) for sequence in sequences)
        work = training_flops(self.sizes, lengths, targets, self.head)
        if len(self._steps) == 1 and not self._warm:
            self._steps.clear()
            self._warm = True
        self._steps.append((now - self._mark, self._waited, float(lengths.sum()), work))
        self._mark, self._waited = now, 0.0
        seconds, waited, tokens, work = np.sum(self._steps, axis=0)
        return {
            "tokens_per_second": tokens / seconds,
            "tflops_per_gpu": work / seconds / dist.get_world_size() / 1e12,
            "data_wait": waited / seconds,
            "peak_memory_gib": _peak_memory() / 2**30,
        }

    def eta(self, steps: int) -> float:
        """Seconds that `steps` more will take."""
        return float(np.mean([seconds for seconds, *_ in self._steps])) * steps


def _peak_memory() -> int:
    """Bytes: the most that tensors took on this rank's GPU, or that the process took of the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Trace:
    """Rank 0's torch.profiler trace of config.profile_steps (of a resumed run, those of them that are left), to open in
    chrome://tracing or Perfetto."""

    def __init__(self, config: TrainConfig):
        self.first, self.last = config.profile_steps or (0, 0)
        self.file = Path(config.profile_dir).expanduser() / f"steps-{self.first}-{self.last}.json"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """To be called before step `step` (from 0)."""
        if self._profiler is None and self.first <= step + 1 <= self.last and dist.get_rank() == 0:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def after(self, step: int) -> None:
        if self._profiler is not None and step + 1 == self.last:
            self._profiler.stop()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.file))
            self._profiler = None
