"""Models on Megatron-core: its transformer configuration and the layer specs of a ModelConfig.

Two specs build the same parameters under the same names: `torch_spec` for a CPU (and FP32 anywhere); Transformer
Engine's for a GPU is in te.py.
"""

from __future__ import annotations

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

from stages.model.config import ModelConfig
from stages.model.layers import DocumentAttention, LayerNorm, ParallelBlock, SwiGLU


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
