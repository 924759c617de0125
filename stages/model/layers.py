"""The modules that Megatron-core's layer spec does not have: a bias-free norm, the parallel block, CPU attention.

Parameter names are those of Megatron-core's own modules, so that checkpoints and the weight table do not depend
on which spec (torch or Transformer Engine) a model was built with.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from stages.model import rope
from stages.model.config import ModelConfig
from stages.model.packing import Bucket, Packing


class LayerNorm(nn.Module):
    """Mean-centred layer norm with a weight and no bias: [..., hidden] -> [..., hidden].

    Megatron-core's norms cannot drop the bias (Transformer Engine) or refuse sequence parallelism (torch).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        # Tells the gradient reduction that each tensor-parallel rank saw only its share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)


class RMSNorm(LayerNorm):
    """Root mean square norm with a weight: [..., hidden] -> [..., hidden]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ParallelBlock(TransformerLayer):
    """x + attention(n) + mlp(n) with n = norm(x): one norm a layer (Command A report, section 2)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [tokens, 1, hidden] (a tensor-parallel rank's share of the tokens under sequence parallel)."""
        normed = self.input_layernorm(hidden_states)
        attention, _ = self.self_attention(
            normed, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        mlp, _ = self.mlp(normed)
        return hidden_states + attention + mlp, None


class SequentialBlock(TransformerLayer):
    """y = x + attention(norm(x)), then y + mlp(norm(y)): Llama, Qwen."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [tokens, 1, hidden] (a tensor-parallel rank's share of the tokens under sequence parallel)."""
        attention, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = hidden_states + attention
        mlp, _ = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + mlp, None


class SwiGLU(MegatronModule):
    """silu(gate) * up of the concatenated [gate, up]: [..., 2 * ffn] -> [..., ffn]. Megatron-core's own fused form
    compiles for a minute on a CPU, its plain form makes one pass more over memory."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class _Pad(torch.autograd.Function):
    """Packed rows [T, ...] to the padded layout [P, ...] of a packing; padding repeats row 0 and gets no gradient.
    Both directions read rows instead of adding them up, which is several times faster than index_select's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        return x.index_select(0, pad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The padded layout [P, ...] back to packed rows [T, ...]; the gradient of padding is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        ctx.shape = x.shape
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None


class DocumentAttention(nn.Module):
    """Core attention for a CPU: causal within each document, windowed, grouped queries, RoPE where the layer has it.

    RoPE is applied here and not by Megatron-core, whose packed form loops over documents in Python in every layer.
    The rotary pairs are (i, i + head_dim / 2): the weight table permutes the rows of interleaved checkpoints.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: Any):
        super().__init__()
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.rotary = not config.no_rope_freq[layer_number - 1]
        self.sizes = config.sizes

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, packed_seq_params: Packing, **unused: Any
    ) -> Tensor:
        """query: [T, heads, head_dim], key and value: [T, groups, head_dim] -> [T, heads * head_dim]."""
        packing = packed_seq_params
        layout = packing.layout
        query, key, value = (_Pad.apply(x, layout.pad, layout.unpad) for x in (query, key, value))
        if self.rotary:
            rotation = _rotation(packing, self.sizes, not self.training)
            query, key = _rotate(query, *rotation[:2]), _rotate(key, *rotation[2:])
        sizes = [bucket.count * bucket.length for bucket in layout.buckets]
        parts = zip(layout.buckets, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        outputs = [self._bucket(*part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return _Unpad.apply(output, layout.unpad)

    def _bucket(self, bucket: Bucket, *qkv: Tensor) -> Tensor:
        """Attention of one bucket: rows of q, k, v -> [count * length, heads * head_dim]."""
        q, k, v = (x.unflatten(0, (bucket.count, bucket.length)) for x in qkv)
        window, length = self.window, bucket.length
        if window is not None and length > 2 * window:
            out = _blocks(q, k, v, window)[:, :length]
        else:
            mask = _window_mask(window, q.device)[:length, :length] if window is not None and length > window else None
            out = _attend(q, k, v, mask)
        return out.reshape(bucket.count * length, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA of [batch, length, heads, head_dim] with grouped keys, causal where no mask is given."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Windowed attention of [batch, length, heads, head_dim] in blocks of `window` queries, each against its own and
    the previous block of keys: work in proportion to the window, not the length. The length comes back padded."""
    batch, length = q.shape[:2]
    blocks = -(-length // window)

    def cut(x: Tensor, before: int) -> Tensor:
        """[batch * blocks, window, ...], shifted by `before` positions, which are zeros."""
        x = F.pad(x, (0, 0, 0, 0, before, blocks * window - length))[:, : blocks * window]
        return x.reshape(batch * blocks, window, *x.shape[2:])

    k, v = (torch.cat([cut(x, window), cut(x, 0)], dim=1) for x in (k, v))
    out = _attend(cut(q, 0), k, v, _block_mask(batch, blocks, window, q.device))
    return out.reshape(batch, blocks * window, *q.shape[2:])


@functools.lru_cache(maxsize=2)
def _window_mask(window: int, device: torch.device) -> Tensor:
    """[2 * window, 2 * window] added to scores: 0 where query i sees key j, i - window < j <= i, -inf elsewhere."""
    seen = torch.ones(2 * window, 2 * window, dtype=torch.bool, device=device).tril().triu(1 - window)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


@functools.lru_cache(maxsize=8)
def _block_mask(batch: int, blocks: int, window: int, device: torch.device) -> Tensor:
    """[batch * blocks, 1, window, 2 * window]: the window's mask, and no previous block for a document's first."""
    mask = _window_mask(window, device)[window:].repeat(blocks, 1, 1)
    mask[0, :, :window] = -torch.inf
    return mask.repeat(batch, 1, 1)[:, None]


def _rotation(packing: Packing, sizes: ModelConfig, inference: bool) -> tuple[Tensor, ...]:
    """cos and signed sin of each padded position's angles for queries, and for keys, float32 [P, 1, dim], made once a
    microbatch. They differ at inference beyond a Qwen v1 model's trained length."""
    extended = inference and rope.extends(sizes, max(packing.lengths))
    name = "extended rotation" if extended else "rotation"
    if name not in packing.cache:
        layout, lengths = packing.layout, None
        if extended:
            sequences = torch.tensor(packing.lengths, device=layout.pad.device)
            lengths = sequences.repeat_interleave(sequences)[layout.pad]
        angle = rope.angles(sizes, layout.positions, lengths)
        cos, sin = angle.cos(), angle.sin()
        key = torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
        query = key
        if extended and sizes.logn_attention:
            query = [x * rope.logn(sizes, layout.positions)[:, None, None] for x in key]
        packing.cache[name] = (*query, *key)
    return packing.cache[name]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [P, heads, dim]: x * cos + (x with halves swapped) * signed sin."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
