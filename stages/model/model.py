"""A Megatron-core model of this repository, with a language-model head or a scalar reward head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor, nn

from stages.model import megatron
from stages.model.config import ModelConfig
from stages.model.head import logprobs
from stages.model.packing import Packing


class Model(GPTModel):
    """GPTModel whose last pipeline stage returns what objectives need instead of logits.

    forward(tokens [1, T], packing, rows [N], targets [N]) returns log p(targets[i] | rows <= rows[i]), float32 [N];
    without targets, the logits [N, V] at those rows; with head "reward", the scalar scores [N] at those rows.
    Other pipeline stages return hidden states [T, 1, h].
    """

    def __init__(
        self, config: ModelConfig, head: str, *, precision: str = "fp32", vp_stage: int | None = None, **parallel: Any
    ):
        transformer = megatron.transformer_config(config, precision=precision, **parallel)
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        count = get_num_layers_to_build(transformer, vp_stage)
        super().__init__(
            config=transformer,
            transformer_layer_spec=megatron.block_spec(config, count, precision),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=config.tie_embeddings or head == "reward",
            position_embedding_type="none",  # the attention of the spec rotates
            vp_stage=vp_stage,
        )
        if precision != "fp32":
            self._fuse()
        self.sizes, self.head = config, head
        if head == "reward" and last:
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
            if precision != "fp32":
                self.score.to(torch.cuda.current_device(), torch.bfloat16)

    def _fuse(self) -> None:
        """Let weight gradients add to their FP32 buffer inside the matrix product, and norms and SwiGLU write FP8."""
        from stages.model import te

        for layer in self.decoder.layers:
            te.connect(layer)
        for module in self.decoder.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True

    def forward(
        self, tokens: Tensor, packing: Packing, rows: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        hidden = self.embedding(tokens, None) if self.pre_process else None
        hidden = self.decoder(hidden, None, packed_seq_params=packing)
        if not self.post_process:
            return hidden
        split = self.config.sequence_parallel
        if self.head == "reward":
            # Every tensor-parallel rank computes the whole score: the gradient is split, not summed.
            if split:
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
            return F.linear(hidden[:, 0].index_select(0, rows).float(), self.score.weight.float())[:, 0]
        gather = gather_from_sequence_parallel_region if split else copy_to_tensor_model_parallel_region
        hidden = gather(hidden)[:, 0].index_select(0, rows)
        weight, scale = self._output_weight(), self.sizes.output_scale
        if targets is None:
            return torch.mm(hidden * scale, weight.t()).float()
        group = parallel_state.get_tensor_model_parallel_group()
        return logprobs(hidden, weight, targets, scale, group)

    def _output_weight(self) -> Tensor:
        return self.shared_embedding_or_output_weight() if self.sizes.tie_embeddings else self.output_layer.weight
