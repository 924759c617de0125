"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): theta = theta_0 + scale * sum(w delta_i), not normalised."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.stage import option

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_BASE = True
WEIGHTED = True
MODELS = (1, None)


@dataclass
class Config:
    scale: float = option(1.0, "factor of the sum of the weighted task vectors (lambda)")


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor", config: Config, seed: int) -> "Tensor":
    """One tensor of every model and of the base [shape] FP32 -> the merged tensor [shape] FP32."""
    merged = base.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        merged += (tensor - base) * (config.scale * weight)
    return merged
