"""Transformer Engine's layers (a GPU; BF16 and FP8) in the places of the torch ones: same parameters, same names.

Norms, RoPE, softmax and the loss compute in FP32 inside their kernels; matrix products run in BF16 or, under
`megatron.set_precision`, in FP8; attention stays in BF16 (Command A report, section 2).
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
import triton
import triton.language as tl
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

from stages.model import residual_cuda, rope
from stages.model.layers import ParallelBlock
from stages.model.packing import Packing
from stages.stage import CuveeError


class TESelfAttention(SelfAttention):
    """Megatron-core's projections around one kernel that splits and rotates Q, K and V, and fused attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        rotary_pos_emb: None = None,
        packed_seq_params: Packing | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [T, 1, hidden] (a share of T under sequence parallel) -> the same."""
        mixed, _ = self.linear_qkv(hidden_states)
        if not self.training and rope.extends(self.config.sizes, max(packed_seq_params.lengths)):
            raise CuveeError(
                "model.dynamic_ntk, model.logn_attention: only FP32 layers read beyond trained_length; set precision to "
                "fp32 or give shorter sequences"
            )
        rotary = not self.config.no_rope_freq[self.layer_number - 1]
        rotation = _rotation(packed_seq_params, self.config.sizes) if rotary else None
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        query, key, value = _SplitRotate.apply(mixed.view(mixed.shape[0], groups, -1, dim), rotation)
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        else:
            attend = self.core_attention
        out = attend(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed_seq_params)
        return self.linear_proj(out.view(len(query), 1, -1))


class TEAttention(TEDotProductAttention):
    """Causal attention within each document, windowed where the layer is."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, attn_mask_type: AttnMaskType,
        packed_seq_params: Packing, **unused: Any,
    ) -> Tensor:  # fmt: skip
        """query: [T, heads, head_dim], key and value: [T, groups, head_dim] -> [T, heads * head_dim]."""
        length = packed_seq_params.uniform
        if length is None or self.config.context_parallel_size > 1:
            return super().forward(
                query, key, value, None, attn_mask_type=attn_mask_type, packed_seq_params=packed_seq_params
            )
        # Documents of one length are a dense batch, whose kernels are a tenth faster.
        query, key, value = (x.unflatten(0, (-1, length)) for x in (query, key, value))
        out = te.DotProductAttention.forward(self, query, key, value, qkv_format="bshd", attn_mask_type="causal")
        return out.flatten(0, 1)


def _rotation(packing: Packing, sizes: Any) -> Tensor:
    """float32 [2, T, head_dim / 2], cos and sin of every token's angles, made once a microbatch."""
    if "rotation" not in packing.cache:
        angle = rope.angles(sizes, packing.positions)
        packing.cache["rotation"] = torch.stack([angle.cos(), angle.sin()])
    return packing.cache["rotation"]


class TELayerNorm(nn.Module):
    """Mean-centred layer norm with a weight and no bias: [..., hidden] -> [..., hidden]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps
        self.feeds: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm.apply(x, self.weight, self.eps, _quantizer(self.feeds, forward=True))


class TERMSNorm(TELayerNorm):
    """Root mean square norm: [..., hidden] -> [..., hidden]."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps, _quantizer(self.feeds, forward=True))


class TEParallelBlock(ParallelBlock):
    """ParallelBlock around a centred norm, with its sums and its norm's backward pass fused."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        rotary_pos_emb: None = None,
        packed_seq_params: Packing | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [tokens, 1, hidden] (a tensor-parallel rank's share of the tokens under sequence parallel)."""
        norm = self.input_layernorm
        quantizer = _quantizer(norm.feeds, forward=True)
        residual, to_attention, to_mlp = residual_cuda.Fork.apply(hidden_states, norm.weight, norm.eps, quantizer)
        attention, _ = self.self_attention(to_attention, packed_seq_params=packed_seq_params)
        mlp, _ = self.mlp(to_mlp)
        return residual_cuda.Join.apply(residual, attention, mlp), None


class TESwiGLU(MegatronModule):
    """silu(gate) * up of the concatenated [gate, up]: [..., 2 * ffn] -> [..., ffn], one kernel each way."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.feeds: list[nn.Module] = []
        self.fed_by: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x, _quantizer(self.feeds, forward=True), _quantizer(self.fed_by, forward=False))


def connect(layer: nn.Module) -> None:
    """Tell a layer's norms and SwiGLU which linears they feed (lists, so that they are no submodules): under delayed
    scaling their kernels write FP8 themselves, which saves a pass over memory each."""
    if layer.config.sequence_parallel or layer.config.recompute_granularity == "full":
        return  # the linears gather their input in BF16; or take the scales of the first forward pass for the second
    layer.input_layernorm.feeds.append(layer.self_attention.linear_qkv)
    if isinstance(layer.pre_mlp_layernorm, TELayerNorm):
        layer.pre_mlp_layernorm.feeds.append(layer.mlp.linear_fc1)
    layer.mlp.activation_func.feeds.append(layer.mlp.linear_fc2)
    layer.mlp.activation_func.fed_by.append(layer.mlp.linear_fc1)


def _quantizer(linears: list[nn.Module], forward: bool) -> Float8Quantizer | None:
    """The quantizer of a linear's input (or of its output's gradient) under FP8 with delayed scaling, else None. With
    current scaling the largest value must be known before the cast, so that nothing is saved."""
    if (
        not linears
        or not FP8GlobalStateManager.is_fp8_enabled()
        or not FP8GlobalStateManager.get_fp8_recipe().delayed()
    ):
        return None
    linear = linears[0]
    linear.init_fp8_metadata(num_gemms=1)
    if forward:
        quantizer = linear.quantizers["scaling_fwd"][tex.FP8FwdTensors.GEMM1_INPUT]
    else:
        quantizer = linear.quantizers["scaling_bwd"][tex.FP8BwdTensors.GRAD_OUTPUT1]
    quantizer = quantizer.copy()  # the linear sets usages of its own on the other; scale and amax are shared
    quantizer.internal = False
    quantizer.set_usage(rowwise=True, columnwise=torch.is_grad_enabled())
    return quantizer


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, quantizer: Float8Quantizer | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        bias = torch.zeros_like(weight)
        out, mean, rstd = tex.layernorm_fwd(flat, weight, bias, eps, None, quantizer, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(flat, weight, mean, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, _ = tex.layernorm_bwd(grad.reshape(x.shape), x, mean, rstd, weight, 0, False)
        return dx.view(grad.shape), dweight, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, quantizer: Float8Quantizer | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out, _, rstd = tex.rmsnorm_fwd(flat, weight, eps, None, quantizer, TE_DType[x.dtype], 0, False)
        ctx.save_for_backward(flat, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = tex.rmsnorm_bwd(grad.reshape(x.shape), x, rstd, weight, 0, False)
        return dx.view(grad.shape), dweight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Float8Quantizer | None, of_gradient: Float8Quantizer | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quantizer = of_gradient
        return tex.swiglu(x, quantizer)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return tex.dswiglu(grad.contiguous(), ctx.saved_tensors[0], ctx.quantizer), None, None


class _SplitRotate(torch.autograd.Function):
    """[T, groups, queries + 2, dim] of each group's queries, key and value -> contiguous Q [T, groups * queries, dim],
    K and V [T, groups, dim], Q and K rotated in FP32 where `rotation` is given. Pairs are (i, i + dim / 2): the weight
    table permutes the rows of interleaved checkpoints."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, slots, dim = mixed.shape
        query = mixed.new_empty(tokens, groups * (slots - 2), dim)
        key, value = (mixed.new_empty(tokens, groups, dim) for _ in range(2))
        _run(mixed, query, key, value, rotation, backward=False)
        ctx.rotation = rotation
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        query, key, value = (grad.contiguous() for grad in grads)
        tokens, groups, dim = key.shape
        mixed = key.new_empty(tokens, groups, query.shape[1] // groups + 2, dim)
        _run(mixed, query, key, value, ctx.rotation, backward=True)
        return mixed, None


def _run(mixed: Tensor, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor | None, backward: bool) -> None:
    tokens, groups, slots, dim = mixed.shape
    _split_rotate[(tokens,)](
        mixed.contiguous(), query, key, value, rotation, tokens, GROUPS=groups, SLOTS=slots, HALF=dim // 2,
        ROWS=triton.next_power_of_2(groups * slots), ROTATE=rotation is not None, BACKWARD=backward,
    )  # fmt: skip


@triton.jit
def _split_rotate(
    mixed, query, key, value, rotation, tokens,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    ROTATE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One token a program. Backward reads Q, K, V and writes mixed, with the rotation's inverse."""
    token = tl.program_id(0).to(tl.int64)
    row, half = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    group, slot = row // SLOTS, row % SLOTS
    inside = row < GROUPS * SLOTS
    is_query, is_key, is_value = inside & (slot < SLOTS - 2), inside & (slot == SLOTS - 2), inside & (slot == SLOTS - 1)
    at = mixed + (token * GROUPS * SLOTS + row) * 2 * HALF + half
    at_query = query + (token * GROUPS * (SLOTS - 2) + group * (SLOTS - 2) + slot) * 2 * HALF + half
    at_key = key + (token * GROUPS + group) * 2 * HALF + half
    at_value = value + (token * GROUPS + group) * 2 * HALF + half
    if BACKWARD:
        a = tl.load(at_query, is_query, 0.0) + tl.load(at_key, is_key, 0.0) + tl.load(at_value, is_value, 0.0)
        b = (
            tl.load(at_query + HALF, is_query, 0.0)
            + tl.load(at_key + HALF, is_key, 0.0)
            + tl.load(at_value + HALF, is_value, 0.0)
        )
    else:
        a, b = tl.load(at, inside, 0.0), tl.load(at + HALF, inside, 0.0)
    if ROTATE:
        cos = tl.load(rotation + token * HALF + half)
        sin = tl.load(rotation + (tokens + token) * HALF + half)
        if BACKWARD:
            sin = -sin
        x, y = a.to(tl.float32), b.to(tl.float32)
        a = tl.where(is_value, x, x * cos - y * sin).to(mixed.dtype.element_ty)
        b = tl.where(is_value, y, y * cos + x * sin).to(mixed.dtype.element_ty)
    if BACKWARD:
        tl.store(at, a, inside)
        tl.store(at + HALF, b, inside)
    else:
        tl.store(at_query, a, is_query)
        tl.store(at_query + HALF, b, is_query)
        tl.store(at_key, a, is_key)
        tl.store(at_key + HALF, b, is_key)
        tl.store(at_value, a, is_value)
        tl.store(at_value + HALF, b, is_value)
