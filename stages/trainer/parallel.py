"""Process groups: one process needs no network and no launcher; more are read from torchrun's environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from stages.model.config import ModelConfig
from stages.stage import CuveeError
from stages.trainer import layout
from stages.trainer.config import TrainConfig

TIMEOUT = timedelta(hours=2)  # that ranks wait for one another, e.g. for rollouts that the first one samples
T = TypeVar("T")


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank; raises what it raised there. A collective: the others wait."""
    return gathered(make, only_first=True)[0]


def gathered(make: Callable[[], T], only_first: bool = False) -> list[T]:
    """What `make` gives on each rank, or on the first alone, on every rank; raises what it raised on any. A collective."""
    if dist.get_world_size() == 1:
        return [make()]
    mine: tuple[Any, Exception | None] = (None, None)
    own: Exception | None = None
    if dist.get_rank() == 0 or not only_first:
        try:
            mine = (make(), None)
        except Exception as error:  # the others must not wait for what will not come
            own = error
            mine = (None, error if isinstance(error, CuveeError) else RuntimeError(f"on rank {dist.get_rank()}: {error!r}"))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    for _, error in parts:
        if error is not None:
            raise own or error
    return [value for value, _ in (parts[:1] if only_first else parts)]


def join() -> None:
    """Meet the processes that torchrun started beside this one; again in one process is allowed."""
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    alone = {} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # Objects and flags travel between CPUs, tensors of a GPU through NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, **alone)


def initialise(config: TrainConfig, sizes: ModelConfig | None = None) -> None:
    """Set up torch.distributed and Megatron-core's groups for `config`; again in one process is allowed.

    Raises ConfigError where the processes cannot hold a model of `sizes` as configured (stages/trainer/layout.py).
    """
    join()
    cuda = torch.cuda.is_available()
    if sizes is not None:
        layout.check(config, sizes, dist.get_world_size(), "cuda" if cuda else "cpu")
    virtual = config.virtual_pipeline if config.virtual_pipeline > 1 else None
    wanted = (config.tensor_parallel, config.pipeline_parallel, virtual, config.context_parallel)
    if parallel_state.model_parallel_is_initialized():
        found = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
        if found == wanted:
            return
        parallel_state.destroy_model_parallel()
    tensor, pipeline, _, context = wanted
    parallel_state.initialize_model_parallel(tensor, pipeline, virtual, context_parallel_size=context)
    # Nothing here draws random numbers; on a CPU there is no CUDA generator to keep the states of.
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, inference_rng_tracker=not cuda, force_reset_rng=True)
