"""Rotary angles: plain, Llama 3.1's, and Qwen v1's beyond the trained length at inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.model.config import ModelConfig


def frequencies(sizes: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2i / head_dim), float32 [head_dim / 2]; with `rope_scaling`, Llama 3.1's: those of wavelengths beyond
    original_max_position_embeddings / low_freq_factor divided by factor, a linear blend down to / high_freq_factor."""
    plain = 1.0 / sizes.rope_theta ** _exponents(sizes, device)
    if not sizes.rope_scaling:
        return plain
    scaling = sizes.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain


def ntk_base(sizes: ModelConfig, lengths: Tensor) -> Tensor:
    """The rotary base of documents of `lengths` tokens, float64: theta * alpha^(d / (d - 2)) with
    alpha = max(2^ceil(log2(length / trained) + 1) - 1, 1) (Qwen technical report, section 2.3; its modelling code)."""
    alpha = (2 ** ((lengths.double() / trained_length(sizes)).log2() + 1).ceil() - 1).clamp(min=1)
    return sizes.rope_theta * alpha ** (sizes.head_dim / (sizes.head_dim - 2))


def logn(sizes: ModelConfig, positions: Tensor) -> Tensor:
    """Factor on the query at `positions` (from 0), float32: max(1, log(position + 1) / log(trained)) (the same)."""
    return ((positions + 1).double().log() / math.log(trained_length(sizes))).clamp(min=1).float()


def angles(sizes: ModelConfig, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
    """float32 [P, head_dim / 2] of int64 [P] positions; lengths: at inference, of each one's document."""
    frequency = frequencies(sizes, positions.device)
    if lengths is not None and sizes.dynamic_ntk:
        frequency = 1.0 / ntk_base(sizes, lengths).float()[:, None] ** _exponents(sizes, positions.device)
    return positions[:, None].float() * frequency


def extends(sizes: ModelConfig, length: int) -> bool:
    """Whether inference on a document of `length` tokens differs from training."""
    return (sizes.dynamic_ntk or sizes.logn_attention) and length > trained_length(sizes)


def trained_length(sizes: ModelConfig) -> int:
    return sizes.trained_length or sizes.max_position_embeddings


def _exponents(sizes: ModelConfig, device: torch.device | str) -> Tensor:
    return torch.arange(0, sizes.head_dim, 2, dtype=torch.float32, device=device) / sizes.head_dim
