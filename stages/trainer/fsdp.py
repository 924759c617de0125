"""Fully sharded data parallel: torch's FSDP2, a layer at a time, with FP32 weights that are gathered in BF16.

Megatron-core's own FSDP needs CUDA, checkpoints of another format and the distributed optimizer; its wrapper of FSDP2
shards embedding and output layer apart, which tied ones cannot be. Here a rank's share of the FP32 weights is what
AdamW updates and what checkpoints hold, so that it has the interface of optimizer.Optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from stages.model import weights
from stages.model.config import ModelConfig
from stages.model.model import Model
from stages.model.mup import lr_multiplier
from stages.trainer.anchor import Anchor
from stages.trainer.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def as_main_weights(chunks: list[Model]) -> None:
    """Make the parameters of a new model FP32, and have their gradients returned, not added to a buffer."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.data.float()
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = False


def _replicas() -> dist.ProcessGroup:
    """The ranks that would have the same weights: data and context parallel."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


class Sharded(_BaseDataParallel):
    """A model (FP32) whose layers are gathered when they run, in the place of Megatron-core's DistributedDataParallel.

    Gradients are summed among the ranks in FP32 after each microbatch.
    """

    def __init__(self, model: Model, half: bool):
        super().__init__(config=model.config, module=model)
        self.ddp_config = DistributedDataParallelConfig()
        mesh = DeviceMesh.from_group(_replicas(), next(model.parameters()).device.type)
        told = {name: vars(parameter) for name, parameter in model.named_parameters()}
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        for module in [*model.decoder.layers, model]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by its count, over all ranks
            module.set_force_sum_reduction_for_comms(True)
        for name, parameter in model.named_parameters():  # which are new: how tensor and pipeline parallel share them
            for key, value in told[name].items():
                setattr(parameter, key, value)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Gradients are reduced already. Megatron-core's reduction of tied embeddings is a collective of pipeline stages,
        and would leave out one that did not use its copy (a reward head's)."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def scale_gradients(self, factor: Tensor) -> None:
        for parameter in self.module.parameters():
            parameter.grad.to_local().mul_(factor)

    def zero_grad_buffer(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None


class ShardedAdam:
    """AdamW of the parameters of Sharded chunks; what the methods do, see optimizer.Optimizer."""

    def __init__(self, config: TrainConfig, sizes: ModelConfig, chunks: list[Model]):
        # Its checkpoints can be read by any number of data-parallel ranks, but of this model-parallel layout alone.
        self.kind = f"fsdp tp{config.tensor_parallel} pp{config.pipeline_parallel}x{config.virtual_pipeline}"
        self.clip_grad, self._parameters = config.clip_grad, weights.by_name(chunks)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            key = (lr_multiplier(sizes, name), config.weight_decay if parameter.dim() > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
        self._adam = torch.optim.AdamW(
            [{"params": p, "weight_decay": decay, "lr_mult": factor} for (factor, decay), p in groups.items()],
            betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True,
        )  # fmt: skip
        self._anchor = Anchor(config.anchor, self._adam.param_groups)
        for parameter in self._parameters.values():
            self._adam.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
            self._adam.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def zero(self) -> None:
        self._adam.zero_grad()

    def norm(self) -> float:
        once = [
            p for p in self._parameters.values() if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)
        ]
        total = torch.stack([p.grad.to_local().pow(2).sum() for p in once]).sum()
        for group in (_replicas(), parallel_state.get_model_parallel_group()):
            dist.all_reduce(total, group=group)
        return float(total.sqrt())

    def step(self, lr: float, norm: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if self.clip_grad > 0:
            clip_grad_by_total_norm_fp32(list(self._parameters.values()), self.clip_grad, norm)
        self._anchor.pull(self._adam.param_groups)
        self._adam.step()

    @staticmethod
    def main(parameter: nn.Parameter) -> Tensor:
        return parameter.full_tensor().detach().float()

    def sharded_state(self, chunks: dict[str, Model], loading: bool) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            for kind, tensor in self._tensors(parameter).items():
                if tensor.to_local().numel():  # fewer rows than ranks leave some without any
                    tensors[f"fsdp.{kind}.{name}"] = _sharded(f"fsdp.{kind}.{name}", tensor)
        step = next(iter(self._adam.state.values()))["step"]
        return {"tensors": tensors, "step": float(step), "extra": {name: _extra(c, name) for name, c in chunks.items()}}

    def load(self, chunks: dict[str, Model], state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                for kind, tensor in self._tensors(parameter).items():
                    if tensor.to_local().numel():
                        tensor.to_local().copy_(state["tensors"][f"fsdp.{kind}.{name}"][0])
                self._adam.state[parameter]["step"].fill_(state["step"])
        for name, chunk in chunks.items():
            chunk.load_state_dict(state["extra"][name], strict=False)

    def _tensors(self, parameter: nn.Parameter) -> dict[str, DTensor]:
        return {"param": parameter, **{name: self._adam.state[parameter][name] for name in MOMENTS}}


def _sharded(key: str, tensor: DTensor) -> dist_checkpointing.ShardedTensor:
    """This rank's rows of `tensor`, in a checkpoint that any number of data-parallel ranks can read. A first dimension
    numbers the tensor-parallel ranks."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    rank, ranks = (f() for f in (parallel_state.get_tensor_model_parallel_rank,
                                 parallel_state.get_tensor_model_parallel_world_size))  # fmt: skip
    local = tensor.to_local().detach()[None]
    return dist_checkpointing.ShardedTensor(
        key, local, local.dtype, (1, *shape), (ranks, *tensor.shape), (rank, *offset), axis_fragmentations=None
    )


def _extra(chunk: Model, name: str) -> dict[str, Any]:
    """What layers keep besides parameters: Transformer Engine's FP8 scales, the same on every replica."""
    place = dist.get_rank(parallel_state.get_model_parallel_group())
    rank = dist.get_rank(_replicas())
    return {
        key: dist_checkpointing.mapping.ShardedObject(f"fsdp.{place}.{name}.{key}", value, (1,), (0,), replica_id=rank)
        for key, value in chunk.state_dict().items() if key.endswith("_extra_state") and value is not None
    }  # fmt: skip
