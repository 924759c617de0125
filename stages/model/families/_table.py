"""The table of weights that these families share: transformers gives their tensors the same names. Imports no torch
before tensors are joined, so that parameters are counted from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from stages.model import mup
from stages.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, OUTPUT, SCORE = "embedding.word_embeddings.weight", "output_layer.weight", "score.weight"


@dataclass(frozen=True)
class Row:
    """One Megatron-core parameter and the Hugging Face tensors it is made of.

    name: Megatron-core's name with the layer's number in the whole model. hf: names and shapes.
    join: the Hugging Face tensors -> the whole parameter, in a shape whose dimension `split` is divided evenly among
    tensor-parallel ranks (None: each rank has all of it). divide: the inverse. std: of initial weights (None: ones).
    """

    name: str
    hf: dict[str, tuple[int, ...]]
    std: float | None
    split: int | None = None
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]
    divide: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]
    shape: tuple[int, ...] = ()  # of `join`'s result, where it differs from the first Hugging Face tensor's

    @property
    def whole(self) -> tuple[int, ...]:
        return self.shape or next(iter(self.hf.values()))


def table(config: ModelConfig, head: str = "lm") -> list[Row]:
    """Every parameter of a model with head "lm" (transformers' ...ForCausalLM) or "reward" (`score.weight`).

    Residual outputs start smaller by sqrt(2 layers) (GPT-2, Megatron-core), everything with muP's factors (mup.py).
    """
    h, ffn = config.hidden_size, config.ffn_hidden_size
    q = config.num_attention_heads * config.head_dim
    std = config.init_std * mup.init_multiplier(config)
    residual = std / math.sqrt(2 * config.num_layers)
    rows = [Row(EMBEDDING, {"model.embed_tokens.weight": (config.vocab_size, h)}, config.init_std, 0)]
    for i in range(config.num_layers):
        ours, hf = f"decoder.layers.{i}", f"model.layers.{i}"
        rows.append(Row(f"{ours}.input_layernorm.weight", {f"{hf}.input_layernorm.weight": (h,)}, None))
        rows.append(_qkv(config, i, "weight", (h,), std))
        if config.traits.qkv_bias:
            rows.append(_qkv(config, i, "bias", (), 0.0))
        proj = Row(f"{ours}.self_attention.linear_proj.weight", {f"{hf}.self_attn.o_proj.weight": (h, q)}, residual, 1)
        rows.append(proj)
        if not config.traits.parallel_block:
            norm = {f"{hf}.post_attention_layernorm.weight": (h,)}
            rows.append(Row(f"{ours}.pre_mlp_layernorm.weight", norm, None))
        fc1 = {f"{hf}.mlp.gate_proj.weight": (ffn, h), f"{hf}.mlp.up_proj.weight": (ffn, h)}
        rows.append(Row(f"{ours}.mlp.linear_fc1.weight", fc1, std, 1, _stack, list, (2, ffn, h)))
        rows.append(Row(f"{ours}.mlp.linear_fc2.weight", {f"{hf}.mlp.down_proj.weight": (h, ffn)}, residual, 1))
    rows.append(Row("decoder.final_layernorm.weight", {"model.norm.weight": (h,)}, None))
    if head == "reward":
        # Stiennon et al. 2020, appendix C.1: reward head ~ N(0, 1 / (width + 1)).
        rows.append(Row(SCORE, {SCORE: (1, h)}, mup.init_multiplier(config) / math.sqrt(h + 1)))
    elif not config.tie_embeddings:
        std = config.init_std * mup.output_init_multiplier(config)
        rows.append(Row(OUTPUT, {"lm_head.weight": (config.vocab_size, h)}, std, 0))
    return rows


def _qkv(config: ModelConfig, layer: int, kind: str, columns: tuple[int, ...], std: float) -> Row:
    """linear_qkv of one layer: for each key/value group its query heads, its key and its value.

    Where Hugging Face's rotary pairs are (2i, 2i + 1), rows of Q and K are permuted to pairs (i, i + head_dim / 2), in
    every layer: attention does not change when Q and K are permuted alike.
    """
    q, kv = config.num_attention_heads * config.head_dim, config.num_query_groups * config.head_dim
    sizes = {"q": q, "k": kv, "v": kv}
    return Row(
        f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}",
        {f"model.layers.{layer}.self_attn.{name}_proj.{kind}": (n, *columns) for name, n in sizes.items()},
        std,
        0,
        partial(_join_qkv, config),
        partial(_divide_qkv, config),
        (q + 2 * kv, *columns),
    )


def _join_qkv(config: ModelConfig, tensors: list[Tensor]) -> Tensor:
    """[q, ...], [kv, ...], [kv, ...] -> [q + 2 kv, ...] by group."""
    import torch

    columns = tensors[0].shape[1:]
    q, k, v = (t.reshape(config.num_query_groups, -1, config.head_dim, *columns) for t in tensors)
    if config.traits.interleaved_rope:
        q, k = (torch.cat([t[:, :, ::2], t[:, :, 1::2]], dim=2) for t in (q, k))
    return torch.cat([q, k, v], dim=1).reshape(-1, *columns)


def _divide_qkv(config: ModelConfig, whole: Tensor) -> list[Tensor]:
    """The inverse of _join_qkv."""
    import torch

    groups, half, columns = config.num_query_groups, config.head_dim // 2, whole.shape[1:]
    heads = config.num_attention_heads // groups
    q, k, v = whole.reshape(groups, heads + 2, config.head_dim, *columns).split([heads, 1, 1], dim=1)
    if config.traits.interleaved_rope:
        q, k = (torch.stack([t[:, :, :half], t[:, :, half:]], dim=3) for t in (q, k))
    return [t.reshape(-1, *columns) for t in (q, k, v)]


def _stack(tensors: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(tensors)
