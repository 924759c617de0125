"""Models on Megatron-core: its transformer configuration and the layer specs of a ModelConfig.

Two specs build the same parameters under the same names: torch modules for a CPU (and FP32 anywhere), Transformer
Engine's for BF16 and FP8 on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from stages.model import layers
from stages.model.config import ModelConfig

FP8 = {"fp8_delayed": "delayed", "fp8_tensorwise": "tensorwise", "fp8_blockwise": "blockwise"}


def transformer_config(
    config: ModelConfig,
    *,
    precision: str = "fp32",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int = 1,
    context_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> TransformerConfig:
    """Megatron-core's configuration of this architecture; `set_precision` chooses among BF16 and FP8 later."""
    gpu = precision != "fp32"
    dtype = torch.bfloat16 if gpu else torch.float32
    full = [int(config.full_attention(i)) for i in range(config.num_layers)]
    windowed = config.sliding_window > 0 and not all(full)
    built = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=config.traits.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # "take the activation module from the spec"
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Megatron counts the tokens before the current one.
        window_size=(config.sliding_window - 1, 0) if windowed else None,
        window_attn_skip_freq=[1 - f for f in full] if windowed else None,
        # A list: the integer form needs a number of layers that it divides.
        no_rope_freq=[int(not config.rotary(i)) for i in range(config.num_layers)],
        rotary_interleaved=False,
        use_cpu_initialization=not gpu,
        perform_initialization=False,  # weights come from a Hugging Face folder or from weights.Initial
        calculate_per_token_loss=True,
        bf16=gpu,
        params_dtype=dtype,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context_parallel,
        # Windows need whole sequences a head: Transformer Engine's ring exchange refuses them.
        cp_comm_type="a2a" if windowed else "p2p",
        pipeline_dtype=dtype if pipeline_parallel > 1 else None,
        sequence_parallel=sequence_parallel and tensor_parallel > 1,
        # With virtual stages two ranks send each other activations and gradients at once: only this mode of sending
        # keeps them apart, and only while lengths need not be told first.
        variable_seq_lengths=pipeline_parallel > 1 and virtual_pipeline == 1,
        overlap_p2p_comm=virtual_pipeline > 1,
        batch_p2p_comm=virtual_pipeline == 1,
        moe_token_dispatcher_type="alltoall",  # no experts here, but the check of variable lengths asks for it
        gradient_accumulation_fusion=False,  # Model switches Transformer Engine's on; torch linears would need Apex
        masked_softmax_fusion=False,
        # Where no fused kernel fits, an error is better than one that holds every score.
        attention_backend=AttnBackend.fused,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        cuda_graph_scope=[],  # the library's default warns about itself
        **_recompute(recompute),
    )
    built.sizes = config
    set_precision(built, precision)
    return built


def set_precision(config: TransformerConfig, precision: str) -> None:
    """The format of matrix products from the next forward pass on: "bf16" or one of FP8's recipes (E4M3 forward, E5M2
    gradients). Weights stay BF16 with FP32 main copies, so that a schedule may change it at any step."""
    config.fp8 = "hybrid" if precision in FP8 else None
    config.fp8_recipe = FP8.get(precision, "delayed")


def _recompute(choice: str) -> dict[str, Any]:
    if choice == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if choice == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def block_spec(config: ModelConfig, count: int, precision: str = "fp32") -> TransformerBlockSubmodules:
    """`count` layers of the architecture and the final norm, in torch modules or, but for FP32, Transformer Engine's."""
    parallel = layers.ParallelBlock
    if precision == "fp32":
        projections, attention = SelfAttention, layers.DocumentAttention
        column, row = ColumnParallelLinear, RowParallelLinear
        norm, swiglu = {"layernorm": layers.LayerNorm, "rmsnorm": layers.RMSNorm}[config.traits.norm], layers.SwiGLU
    else:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        from stages.model import te

        projections, attention = te.TESelfAttention, te.TEAttention
        column, row = TEColumnParallelLinear, TERowParallelLinear
        norm, swiglu = {"layernorm": te.TELayerNorm, "rmsnorm": te.TERMSNorm}[config.traits.norm], te.TESwiGLU
        if config.traits.norm == "layernorm":
            parallel = te.TEParallelBlock
    parts = {
        "input_layernorm": norm,
        "self_attention": ModuleSpec(
            module=projections,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=attention, linear_proj=row),
        ),
        "mlp": ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row, activation_func=swiglu)
        ),
    }
    block = parallel
    if not config.traits.parallel_block:
        block, parts["pre_mlp_layernorm"] = layers.SequentialBlock, norm
    spec = ModuleSpec(module=block, submodules=TransformerLayerSubmodules(**parts))
    # Without layer_norm the final norm would be the library's default, which has a bias.
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=norm)
