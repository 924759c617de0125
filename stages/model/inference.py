"""Qwen v1's inference options on transformers' Qwen2 model, which does not know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.model import rope
from stages.model.config import ModelConfig


def extend(model: Any) -> Any:
    """`model`, a ...ForCausalLM, with the NTK-aware base and LogN scaling where its config.json asks for them."""
    if extended(model.config):
        sizes = ModelConfig.from_hf(model.config.to_dict())
        rotary = model.model.rotary_emb = _Rotary(sizes)
        for layer in model.model.layers if sizes.logn_attention else ():
            layer.self_attn.q_proj.register_forward_hook(lambda _, args, out: out * rotary.scale.to(out.dtype))
    return model


def extended(config: Any) -> bool:
    return bool(getattr(config, "use_dynamic_ntk", False) or getattr(config, "use_logn_attn", False))


def take_rows(model: Any, rows: Tensor) -> None:
    """Go on with these rows of the sequences that are being generated: call it where the cache's rows change."""
    if extended(model.config):
        model.model.rotary_emb.lengths = model.model.rotary_emb.lengths[rows]


class _Rotary(nn.Module):
    """In the place of transformers' rotary embedding. A sequence keeps the base of its first forward pass, since its
    keys are cached rotated (as Qwen v1's own code does)."""

    def __init__(self, sizes: ModelConfig):
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, T, head_dim] in x's dtype; position_ids: int64 [batch, T], each row from 0 at first."""
        if (position_ids == 0).any():
            self.lengths = position_ids.amax(1) + 1
        flat = position_ids.flatten()
        angle = rope.angles(self.sizes, flat, self.lengths.repeat_interleave(position_ids.shape[1]))
        angle = torch.cat([angle, angle], -1).view(*position_ids.shape, -1)
        self.scale = rope.logn(self.sizes, position_ids)[..., None]
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
