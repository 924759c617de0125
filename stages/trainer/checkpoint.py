"""Checkpoints to resume from: Megatron-core's distributed format, written while training goes on, the mark last.

`<scratch>/checkpoints/<step>/` holds model and optimizer; `commit.json` in it, written when all else is on disk, makes
it one. It carries the run's progress, and size and SHA-256 of every file, so that a damaged checkpoint is known as one
and the one before it is taken. The two newest are kept, and milestones.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from stages.model.cpu import cuda_names
from stages.model.folder import full_disk_is_oserror
from stages.stage import ConfigError, CuveeError
from stages.store.mirror import COMMIT
from stages.trainer.mirroring import Mirroring

KEPT = 2


class _InProcess(TorchDistSaveShardedStrategy):
    """The library's torch_dist format, written by this process from copies that no later step changes.

    Its own writer forks a process for every file and keeps a manager process for their results; for a checkpoint of
    megabytes that costs more than the writing, a process that uses CUDA should not fork, and a daemonic worker may not.
    """

    def __init__(self, copy: bool) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.copy = copy
        filesystem_async._results_queue = queue.Queue()

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        finalize = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret).finalize_fns
        buckets = [
            (path, key, (data, [(item, _host(tensor, self.copy)) for item, tensor in tensors]))
            for path, key, (data, tensors) in writer.write_buckets
        ]
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied:
            copied.record()

        def write() -> list[Path]:
            if copied:
                copied.synchronize()
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            results, done = queue.Queue(), queue.Queue()
            for i, bucket in enumerate(buckets):
                done.put(i)
                writer.write_preloaded_data(transforms, i, bucket, results, done, use_fsync=True)
            found = dict(results.get() for _ in buckets)
            failed = [result for result in found.values() if isinstance(result, Exception)]
            if failed:  # a full disk must reach the user as what it is
                raise failed[0]
            if buckets:
                writer.results_queue.put(found)
            return [Path(path) for path, _, _ in buckets]

        return AsyncRequest(write, (), finalize)


def _host(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    """`tensor` in host memory; in memory of its own where `copy` is set. From a GPU it arrives with the stream's next
    event, into pinned blocks that torch keeps for the next checkpoint."""
    if tensor.device.type == "cpu":
        return tensor.clone() if copy else tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass
class _Pending:
    path: Path
    mark: dict[str, Any]
    finalize: list[Callable[[], None]]
    written: Future


class Checkpoints:
    """The checkpoints of one run in `folder`. At most one is being written; every method is a collective.

    keep_every: checkpoints of steps that it divides are never removed (0: none). background: `save` returns when the
    state is copied, and a thread writes it; otherwise it returns when the checkpoint is committed. mirror: keeps what is
    committed elsewhere too (stages/store/mirror.py).
    """

    def __init__(self, folder: Path, keep_every: int = 0, background: bool = True, mirror: Any = None):
        self.folder, self.keep_every, self.background = folder, keep_every, background
        self.mirroring = Mirroring(mirror)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future | None = None
        self._validated = False

    def save(self, step: int, state: dict[str, Any], mark: dict[str, Any]) -> None:
        """Save a sharded state dict as it is now, to be committed with `mark` (JSON)."""
        self.wait()
        path = self.folder / f"{step:010d}"
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)  # what a killed save left
            path.mkdir(parents=True)
        dist.barrier()
        with cuda_names(), full_disk_is_oserror(self.folder):
            request = dist_checkpointing.save(
                state, str(path), sharded_strategy=_InProcess(self.background), async_sharded_save=True,
                validate_access_integrity=not self._validated,  # gathers every rank's layout, which stays the same
            )  # fmt: skip
        self._validated = True
        written = self._thread.submit(self._write, request.async_fn)
        self._pending = _Pending(path, mark, request.finalize_fns, written)
        if not self.background:
            self.wait()

    def _write(self, write: Callable[[], list[Path]]) -> dict[str, list[Any]]:
        with full_disk_is_oserror(self.folder):
            return _described(write())

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; `commit` is due when no rank does."""
        return self._pending is not None and not self._pending.written.done()

    def commit(self) -> None:
        """Finish the save under way, if there is one: gather what the ranks wrote, mark it, remove what is too old.

        Raises what any rank's writing raised, on every rank.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.written.exception()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, error or pending.written.result())
        for part in parts:
            if isinstance(part, BaseException):
                raise part
        with cuda_names(), full_disk_is_oserror(self.folder):
            for function in pending.finalize:
                function()
        own = list(parts[dist.get_rank()])
        if dist.get_rank() == 0:
            files = {name: told for part in parts for name, told in part.items()}
            rest = _described([path for path in pending.path.iterdir() if path.name not in files])  # the library's own metadata
            _commit(pending.path, pending.mark | {"files": files | rest})
            own += [*rest, COMMIT]
            self._removal = self._thread.submit(self._remove)
        self.mirroring.add(pending.path, own)

    def wait(self, mirrored: bool = False) -> None:
        """Return on every rank when the save under way is committed (mirrored: and kept elsewhere too) and what is too
        old is gone: a rank that left before would have the launcher end the one that still writes the mark."""
        self.commit()
        if mirrored:
            self.mirroring.finish()
        if self._removal is not None:
            self._removal.result()
            self._removal = None
        dist.barrier()

    def _remove(self) -> None:
        complete = committed(self.folder)
        milestones = [path for path in complete if self.keep_every and int(path.name) % self.keep_every == 0]
        for old in sorted(set(self.folder.iterdir()) - {*complete[-KEPT:], *milestones, self.mirroring.sending}):
            (old / COMMIT).unlink(missing_ok=True)
            shutil.rmtree(old)


def _commit(path: Path, mark: dict[str, Any]) -> None:
    part = path / (COMMIT + ".part")
    with open(part, "w") as file:
        json.dump(mark, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / COMMIT)


def _described(paths: list[Path]) -> dict[str, list[Any]]:
    """name -> [size in bytes, SHA-256] of each file."""
    found = {}
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = [path.stat().st_size, digest]
    return found


def committed(folder: Path) -> list[Path]:
    """The checkpoints with a commit mark, oldest first."""
    return sorted(mark.parent for mark in folder.glob(f"*/{COMMIT}"))


def newest(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and the mark it was committed with; None where there is no checkpoint at all.

    A collective: the ranks share the hashing. Damaged ones (a file missing, cut or changed) lose their mark, so that
    the next save replaces them. Raises CuveeError where every one is damaged.
    """
    found = _same(committed(folder))
    damaged: list[tuple[Path, str]] = []
    for path in reversed(found):
        fault, mark = _fault(path)
        if not fault:
            for worse, why in damaged:
                log(f"{worse}: {why}; going on from {path.name} instead")
                if dist.get_rank() == 0:
                    (worse / COMMIT).unlink(missing_ok=True)
            dist.barrier()
            return path, mark
        damaged.append((path, fault))
    if damaged:
        raise CuveeError(
            f"{folder}: none of its {len(damaged)} checkpoints is whole ({damaged[0][0].name}: {damaged[0][1]}); "
            "remove the folder to start from the beginning"
        )
    return None


def _same(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def _fault(path: Path) -> tuple[str, dict[str, Any]]:
    """(what is wrong with the checkpoint at `path`, or ""; its mark), the same on every rank."""
    try:
        mark = json.loads((path / COMMIT).read_text())
        files = sorted(mark["files"].items())
    except (ValueError, KeyError, TypeError):
        return f"{COMMIT} is not readable", {}
    own = ""
    for name, (size, digest) in files[dist.get_rank() :: dist.get_world_size()]:
        if not (path / name).exists():
            own = f"{name} is missing"
        elif (path / name).stat().st_size != size:
            own = f"{name} has {(path / name).stat().st_size} bytes of {size}"
        elif _described([path / name])[name][1] != digest:
            own = f"{name} has other contents than were written"
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return next((fault for fault in parts if fault), ""), mark


def check_kind(path: Path, kind: str) -> None:
    """Raises ConfigError where the checkpoint at `path` holds another kind of optimizer than "plain", "distributed" or
    "fsdp" with its model-parallel layout: other layouts may change between runs, these may not."""
    found = dist_checkpointing.load_common_state_dict(str(path))["kind"]
    if found != kind:
        fields = {"plain": "distributed_optimizer=false fsdp=false", "distributed": "distributed_optimizer=true"}
        back = fields.get(found, "fsdp=true and tensor_parallel, pipeline_parallel, virtual_pipeline as they were")
        raise ConfigError(
            f"distributed_optimizer, fsdp: {path} was saved with the {found} optimizer and cannot go on with the {kind} "
            f"one; set {back} until this run is finished"
        )


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict shaped like `state`, with the values saved at `path`."""
    with warnings.catch_warnings():  # the library's own use of what torch has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return dist_checkpointing.load(state, str(path))
