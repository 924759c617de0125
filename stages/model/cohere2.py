"""Cohere2 (Command A, Command R7B) on Megatron-core: transformer configuration, layer spec, table of weights.

A GPU's spec (Transformer Engine's linears and attention in the same places) belongs beside `torch_spec`;
everything else here is shared between the two.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from stages.model.config import ModelConfig
from stages.model.layers import DocumentAttention, LayerNorm, ParallelBlock, SwiGLU
from stages.model.weights import Row


def transformer_config(
    config: ModelConfig, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, sequence_parallel: bool = False
) -> TransformerConfig:
    """Megatron-core's configuration of this architecture, FP32 on a CPU."""
    full = [int(config.full_attention(i)) for i in range(config.num_layers)]
    built = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # "take the activation module from the spec"
        hidden_dropout=0.0,
        attention_dropout=0.0,
        window_size=(config.sliding_window - 1, 0),  # Megatron counts the tokens before the current one
        window_attn_skip_freq=[1 - f for f in full],
        no_rope_freq=full,  # a list: the integer form needs a number of layers that it divides
        rotary_interleaved=False,
        use_cpu_initialization=True,
        perform_initialization=False,  # weights come from a Hugging Face folder or from weights.initial
        calculate_per_token_loss=True,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        pipeline_dtype=torch.float32 if pipeline_parallel > 1 else None,
        sequence_parallel=sequence_parallel and tensor_parallel > 1,
        variable_seq_lengths=pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here, but the check of variable lengths asks for it
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # the library's default warns about itself
    )
    built.rotary_theta = config.rope_theta
    return built


def torch_spec(layers: int) -> TransformerBlockSubmodules:
    """`layers` parallel blocks of Megatron-core's own linears with the CPU attention, and the final norm."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=DocumentAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU),
    )
    block = ModuleSpec(
        module=ParallelBlock,
        submodules=TransformerLayerSubmodules(input_layernorm=LayerNorm, self_attention=attention, mlp=mlp),
    )
    # Without layer_norm the final norm would be the library's default, which has a bias.
    return TransformerBlockSubmodules(layer_specs=[block] * layers, layer_norm=LayerNorm)


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
