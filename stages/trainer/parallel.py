"""Process groups: one process needs no network and no launcher; more are read from torchrun's environment."""

from __future__ import annotations

import os

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from stages.stage import ConfigError
from stages.trainer.config import TrainConfig


def initialise(config: TrainConfig) -> None:
    """Set up torch.distributed and Megatron-core's groups for `config`; again in one process is allowed.

    Raises ConfigError when the number of processes is no multiple of tensor_parallel * pipeline_parallel.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shards = config.tensor_parallel * config.pipeline_parallel
    if world % shards:
        raise ConfigError(
            f"tensor_parallel {config.tensor_parallel} x pipeline_parallel {config.pipeline_parallel} needs a multiple "
            f"of {shards} processes, found {world}; start more of them or lower one of the two"
        )
    if not dist.is_initialized():
        if world == 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group("gloo")
    layout = (config.tensor_parallel, config.pipeline_parallel)
    if parallel_state.model_parallel_is_initialized():
        if layout == (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        ):
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(*layout)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed, inference_rng_tracker=True)
