"""What a GPU process needs before Transformer Engine is imported, and the memory that it may have."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED, of every call of the driver before cuInit


def prepare() -> None:
    """Give Transformer Engine the cuDNN that torch brought. To be called before its import.

    It would load the system's cuDNN, whatever that is; 9.14 has no kernel for windows over packed documents.
    """
    there = all(importlib.util.find_spec(name) for name in ("transformer_engine", "nvidia"))
    found = importlib.util.find_spec("nvidia.cudnn") if there else None
    if found is None or "CUDNN_HOME" in os.environ or "transformer_engine" in sys.modules:
        return
    folder = Path(next(iter(found.submodule_search_locations)))
    os.environ["CUDNN_HOME"] = str(folder)
    import torch  # noqa: F401  loads what these libraries need

    for library in sorted(folder.glob("lib/libcudnn*.so.*")):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def started() -> bool:
    """Whether this process has started CUDA, itself or through a library: then no fork of it can use a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != NOT_INITIALIZED


def free_memory() -> int:
    """Bytes that this process may still allocate on its GPU: of what is free there, and of its share of the whole."""
    import torch

    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    share = int(torch.cuda.get_per_process_memory_fraction() * total) - torch.cuda.memory_allocated()
    return min(free + unused, share)
