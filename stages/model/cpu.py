"""Megatron-core on a CPU: answer the CUDA names that its trainer spells out.

Megatron-core's model, schedules, gradient buffers, optimizer and checkpoints are device-neutral arithmetic, but
they write `device="cuda"` and `torch.cuda.current_device()` literally and compare `Tensor.type()` with
"torch.cuda.FloatTensor". No configuration changes that, so without a GPU these few names are answered here, and
nothing else of the library is patched. With a GPU this file does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _AsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


@contextlib.contextmanager
def cuda_names() -> Iterator[None]:
    """Within this block, on this thread, Megatron-core's CUDA names mean the CPU; a no-op where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return
    current_device, synchronize = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device, torch.cuda.synchronize = (lambda: _CPU), (lambda *_: None)
    try:
        with _AsCpu():
            yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = current_device, synchronize


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning them: activations of every microbatch otherwise fault
    in page by page again, which cost a third of a step where page faults are slow (virtual machines)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD
    mallopt(ctypes.c_int(-3), ctypes.c_int(2**30))  # M_MMAP_THRESHOLD
