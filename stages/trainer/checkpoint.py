"""Checkpoints to resume from: Megatron-core's distributed format in the scratch folder, the commit mark last.

`<scratch>/checkpoints/<step>/` holds model and optimizer; `commit.json` in it, written when all else is on disk,
makes it one. It carries the trainer's progress. The two newest are kept.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from stages.model.folder import full_disk_is_oserror

KEPT = 2
COMMIT = "commit.json"


class _InProcess(TorchDistSaveShardedStrategy):
    """The library's torch_dist format, written by this process.

    Its own writer forks a process for every file and keeps a manager process for their results; for a checkpoint of
    megabytes that costs more than the writing, and a daemonic worker may not fork at all.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        filesystem_async._results_queue = queue.Queue()

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)

        def write() -> None:
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            results, done = queue.Queue(), queue.Queue()
            for i, bucket in enumerate(writer.write_buckets):
                done.put(i)
                writer.write_preloaded_data(transforms, i, bucket, results, done, use_fsync=True)
            found = dict(results.get() for _ in writer.write_buckets)
            failed = [result for result in found.values() if isinstance(result, Exception)]
            if failed:  # a full disk must reach the user as what it is
                raise failed[0]
            writer.results_queue.put(found)

        return AsyncRequest(write if writer.write_buckets else None, (), request.finalize_fns)


def save(folder: Path, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
    """Save a sharded state dict (a collective) and commit it with `progress`; older ones but one are removed."""
    path = folder / f"{step:010d}"
    writer = dist.get_rank() == 0
    if writer:
        shutil.rmtree(path, ignore_errors=True)  # what a killed save left
        path.mkdir(parents=True)
    dist.barrier()
    with full_disk_is_oserror(folder):
        dist_checkpointing.save(state, str(path), sharded_strategy=_InProcess())
    if not writer:
        return
    part = path / (COMMIT + ".part")
    with open(part, "w") as file:
        json.dump(progress, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / COMMIT)
    kept = committed(folder)[-KEPT:]
    for old in sorted(set(folder.iterdir()) - set(kept)):
        (old / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(old)


def committed(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(mark.parent for mark in folder.glob(f"*/{COMMIT}"))


def load(path: Path, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the state dict shaped like `state` with the saved values, the progress it was committed with)."""
    with warnings.catch_warnings():  # the library's own use of what torch has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return dist_checkpointing.load(state, str(path)), json.loads((path / COMMIT).read_text())
