"""AdamW on Megatron-core: parameter groups, FP32 main weights, its state in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from stages.model.config import ModelConfig
from stages.model.mup import lr_multiplier
from stages.trainer.anchor import Anchor
from stages.trainer.config import TrainConfig

SHARED = ("param", "exp_avg", "exp_avg_sq")  # what the distributed optimizer shares among data-parallel ranks


class Optimizer:
    """AdamW of the model's chunks, wrapped for data parallel, with gradients accumulated in FP32.

    Weight decay excludes what has one dimension (norms, biases); the learning rate of each parameter is multiplied by
    muP's factor (stages/model/mup.py). exact: the FP32 values of parameters of lower precision, of which the FP32 main
    weights are made.
    """

    def __init__(
        self, config: TrainConfig, sizes: ModelConfig, chunks: list[nn.Module], exact: dict[nn.Parameter, Tensor]
    ):
        half = config.precision_at(0) != "fp32"
        settings = OptimizerConfig(
            optimizer="adam", lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay,
            adam_beta1=config.beta1, adam_beta2=config.beta2, adam_eps=config.epsilon, clip_grad=config.clip_grad,
            bf16=half, params_dtype=torch.bfloat16 if half else torch.float32,
            use_distributed_optimizer=config.distributed_optimizer,
        )  # fmt: skip
        self.clip_grad = config.clip_grad
        self.inner = get_megatron_optimizer(settings, chunks, _overrides(sizes, chunks))
        # One: a second one is only made for experts.
        self._part = self.inner.chained_optimizers[0]
        self._adam = self._part.optimizer  # None where a rank has no parameters
        for group in self.inner.param_groups:
            # Megatron-core leaves these products to its own scheduler.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
            if self._torch:
                group["fused"] = True
        self._set_main(exact)
        self._anchor = Anchor(config.anchor, self.inner.param_groups)
        self._create_state()

    @property
    def kind(self) -> str:
        """Checkpoints of one kind cannot be read by another."""
        return "distributed" if isinstance(self._part, DistributedOptimizer) else "plain"

    @property
    def _torch(self) -> bool:
        return isinstance(self._adam, torch.optim.AdamW)

    def zero(self) -> None:
        self.inner.zero_grad()

    def norm(self) -> float:
        """The norm of the reduced gradients of the whole model, which are made ready for `step`."""
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    def step(self, lr: float, norm: float) -> None:
        """Update the weights with gradients whose global norm is `norm`, clipped."""
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if self.clip_grad > 0 and (parameters := self._part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, self.clip_grad, norm)
        self._anchor.pull(self.inner.param_groups)
        self.inner.step_with_ready_grads()

    def main(self, parameter: nn.Parameter) -> Tensor:
        """FP32 value of this rank's `parameter`; a collective of its data-parallel ranks."""
        if parameter.dtype == torch.float32 or self.kind == "plain":
            return getattr(parameter, "main_param", parameter).detach().float()
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        if self._holds(parameter):
            whole.view(-1)[self._range(parameter)] = self._held(parameter)["param"].detach()
        dist.all_reduce(whole, group=self._part.data_parallel_group)
        return whole

    def _range(self, parameter: nn.Parameter) -> slice:
        """The flat part of `parameter` that this rank of the distributed optimizer has."""
        held = self._part._get_model_param_range_map(parameter)["param"]
        return slice(held.start, held.end)

    def _set_main(self, exact: dict[nn.Parameter, Tensor]) -> None:
        """Main weights start as the exact values: Megatron-core copies what BF16 has rounded."""
        for parameter, value in exact.items():
            main = getattr(parameter, "main_param", None)
            if main is not None:
                sharded = getattr(parameter, "main_param_sharded", False)
                flat = value.reshape(-1)[self._range(parameter)] if sharded else value.reshape(-1)
                main.detach().view(-1).copy_(flat)

    def _create_state(self) -> None:
        """Create what Adam would create at its first step: saving and loading need it before. torch's keeps a step for
        each parameter, and after a load they must not be one tensor, which every parameter's update would raise."""
        if self._adam is None:
            return
        for group in self._adam.param_groups:
            for p in group["params"]:
                state = self._adam.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(p))
                if self._torch:
                    state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)).clone()

    def sharded_state(self, chunks: dict[str, nn.Module], loading: bool) -> dict[str, Any]:
        """Sharded state dict of the model's chunks by name and of this optimizer."""
        model = {name: chunk.sharded_state_dict() for name, chunk in chunks.items()}
        with torch.no_grad():
            if self.kind == "distributed":
                return {**model, "optimizer": self._part.state_dict(), "shards": self._shards(model, loading)}
            return {**model, "optimizer": self.inner.sharded_state_dict(model, is_loading=loading)}

    def load(self, chunks: dict[str, nn.Module], state: dict[str, Any]) -> None:
        """Take over a state dict of the form of `sharded_state`."""
        for name, chunk in chunks.items():
            chunk.load_state_dict(state[name])
        with torch.no_grad():
            if self.kind == "plain" and self._torch:  # Megatron-core leaves a step of 0 out, and then misses it
                own = state["optimizer"].get("optimizer", state["optimizer"])
                own["state"].setdefault("common_step", torch.zeros(()))
            self.inner.load_state_dict(state["optimizer"])
            self._create_state()
            for number, parameter in self._shared().items():
                for kind in SHARED:
                    self._held(parameter)[kind].copy_(state["shards"][number][kind])

    def _shards(self, model: dict[str, Any], loading: bool) -> dict[str, dict[str, ShardedTensorFactory]]:
        """This rank's share of the distributed optimizer's main weights and moments, each as pieces of its parameter and
        under its name, so that every layout can read them and no rank gathers another's. Megatron-core's own such form
        ("fully_reshardable") gathers all, and shifts what lies behind a padded bucket: buckets are padded where embeddings
        are shared between pipeline stages."""
        found, _ = extract_sharded_tensors_and_factories(model)
        like = {id(sharded.data): sharded for sharded in nested_values(found)}
        shards = {}
        for number, parameter in self._shared().items():
            sharded, held, own = like[id(parameter)], self._range(parameter), self._held(parameter)
            shards[number] = {
                kind: _pieces(sharded, kind, torch.empty(own[kind].shape) if loading else own[kind], held) for kind in SHARED
            }
        return shards

    def _shared(self) -> dict[str, nn.Parameter]:
        """The parameters of which this rank of a distributed optimizer has a share."""
        if self.kind == "plain":
            return {}
        parameters = (parameter for buffer in self._part.buffers for parameter in buffer.param_index_map)
        return {str(number): parameter for number, parameter in enumerate(parameters) if self._holds(parameter)}

    def _holds(self, parameter: nn.Parameter) -> bool:
        return parameter in self._part.model_param_gbuf_map

    def _held(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """SHARED of a parameter, float32 [n]: this rank's share."""
        return self._part._get_main_param_and_optimizer_states(parameter)


def _pieces(sharded: Any, kind: str, flat: Tensor, held: slice) -> ShardedTensorFactory:
    """`flat`: the elements `held` of a parameter (flattened) that `sharded` describes, as rectangles of the whole parameter
    in a checkpoint, and one tensor again after a load."""
    # A matrix of two (SwiGLU's) has a factory, which gives one after the other.
    parts = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]

    def build(key: str, data: Tensor, *unused: Any) -> list[ShardedTensor]:
        found, before, done = [], 0, 0  # elements of the parts before; of `data` that have a rectangle
        for part in parts:
            size, axes = math.prod(part.local_shape), part.prepend_axis_num
            within = max(held.start - before, 0), min(held.stop - before, size)
            for at, shape in rectangles(part.local_shape, *within):
                value = data[done : done + math.prod(shape)].view((1,) * axes + shape)
                offset = [a + b for a, b in zip(part.global_offset, (0,) * axes + at, strict=True)]
                found.append(ShardedTensor(
                    f"optimizer.state.{kind}.{key}", value, value.dtype, tuple(value.shape), part.global_shape,
                    tuple(offset), axis_fragmentations=None, replica_id=(*part.replica_id[:-1], 0),
                ))  # fmt: skip
                done += value.numel()
            before += size
        return found

    return ShardedTensorFactory(sharded.key, flat.detach(), build, lambda loaded: torch.cat([t.flatten() for t in loaded]))


def rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of those that the elements begin <= i < end of a flattened [rows] or [rows, columns] make, in turn:
    the end of a row, whole rows, the beginning of one."""
    columns = shape[1] if len(shape) > 1 else 1
    while begin < end:
        row, column = divmod(begin, columns)
        rows = 0 if column else (end - begin) // columns
        size = (rows, columns) if rows else (1, min(columns - column, end - begin))
        yield (row, column)[: len(shape)], size[: len(shape)]
        begin += size[0] * size[1]


def _overrides(sizes: ModelConfig, chunks: list[nn.Module]) -> dict[ParamKey, ParamGroupOverride]:
    """Weight decay for matrices only, and one group for each muP multiplier."""
    flat = ParamWithNamePredicate("flat", lambda parameter, name: len(parameter.shape) == 1)
    found = {ParamKey(with_name_predicate=flat): {"wd_mult": 0.0}}
    names = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    for factor in sorted({lr_multiplier(sizes, name) for name in names} - {1.0}):
        scaled = ParamWithNamePredicate(f"lr x {factor}", lambda _, name, f=factor: lr_multiplier(sizes, name) == f)
        found[ParamKey(with_name_predicate=scaled)] = {"lr_mult": factor}
    return found
