"""Cohere2 (Command A, Command R7B): the table of weights."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from stages.model.config import ModelConfig
from stages.model.weights import Row


def table(config: ModelConfig, head: str = "lm") -> list[Row]:
    """Every parameter with its Hugging Face tensors (transformers' Cohere2ForCausalLM; `score.weight` of a reward head).

    linear_qkv holds, for each key/value group, its query heads, its key and its value. Rows of Q and K are permuted
    from interleaved rotary pairs (2i, 2i + 1) to (i, i + head_dim / 2), in every layer: attention does not change
    when Q and K are permuted alike. Residual outputs start smaller by sqrt(2 layers) (GPT-2, Megatron-core).
    """
    h, d, ffn = config.hidden_size, config.head_dim, config.ffn_hidden_size
    q, kv = config.num_attention_heads * d, config.num_query_groups * d
    std, residual = config.init_std, config.init_std / math.sqrt(2 * config.num_layers)
    rows = [Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (config.vocab_size, h)}, std, 0)]
    for i in range(config.num_layers):
        ours, hf = f"decoder.layers.{i}", f"model.layers.{i}"
        rows += [
            Row(f"{ours}.input_layernorm.weight", {f"{hf}.input_layernorm.weight": (h,)}, None),
            Row(
                f"{ours}.self_attention.linear_qkv.weight",
                {
                    f"{hf}.self_attn.q_proj.weight": (q, h),
                    f"{hf}.self_attn.k_proj.weight": (kv, h),
                    f"{hf}.self_attn.v_proj.weight": (kv, h),
                },
                std,
                0,
                partial(_join_qkv, config),
                partial(_divide_qkv, config),
                (q + 2 * kv, h),
            ),
            Row(f"{ours}.self_attention.linear_proj.weight", {f"{hf}.self_attn.o_proj.weight": (h, q)}, residual, 1),
            Row(
                f"{ours}.mlp.linear_fc1.weight",
                {f"{hf}.mlp.gate_proj.weight": (ffn, h), f"{hf}.mlp.up_proj.weight": (ffn, h)},
                std,
                1,
                torch.stack,
                lambda whole: list(whole.unbind(0)),
                (2, ffn, h),
            ),
            Row(f"{ours}.mlp.linear_fc2.weight", {f"{hf}.mlp.down_proj.weight": (h, ffn)}, residual, 1),
        ]
    rows.append(Row("decoder.final_layernorm.weight", {"model.norm.weight": (h,)}, None))
    if head == "reward":
        # Stiennon et al. 2020, appendix C.1: reward head ~ N(0, 1 / (width + 1)).
        rows.append(Row("score.weight", {"score.weight": (1, h)}, 1 / math.sqrt(h + 1)))
    return rows


def _join_qkv(config: ModelConfig, tensors: list[Tensor]) -> Tensor:
    """[q, h], [kv, h], [kv, h] with interleaved rotary pairs -> [q + 2 kv, h] by group."""
    groups, h = config.num_query_groups, config.hidden_size
    q, k, v = (t.reshape(groups, -1, config.head_dim, h) for t in tensors)
    q, k = (torch.cat([t[:, :, ::2], t[:, :, 1::2]], dim=2) for t in (q, k))
    return torch.cat([q, k, v], dim=1).reshape(-1, h)


def _divide_qkv(config: ModelConfig, whole: Tensor) -> list[Tensor]:
    """The inverse of _join_qkv."""
    groups, h, half = config.num_query_groups, config.hidden_size, config.head_dim // 2
    heads = config.num_attention_heads // groups
    q, k, v = whole.reshape(groups, heads + 2, config.head_dim, h).split([heads, 1, 1], dim=1)
    q, k = (torch.stack([t[:, :, :half], t[:, :, half:]], dim=3) for t in (q, k))
    return [t.reshape(-1, h) for t in (q, k, v)]
