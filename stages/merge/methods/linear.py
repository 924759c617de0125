"""Weighted average of the models: theta = sum(w theta_i) / sum(w). The blend of the Command A recipe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_BASE = False
WEIGHTED = True
MODELS = (1, None)


@dataclass
class Config:
    pass


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor | None", config: Config, seed: int) -> "Tensor":
    """One tensor of every model [shape] FP32 and their weights -> the merged tensor [shape] FP32."""
    total = sum(weights)
    merged = tensors[0] * (weights[0] / total)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        merged += tensor * (weight / total)
    return merged
