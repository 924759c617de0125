"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim small changes, elect a sign for each weight, average who agrees."""

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
    density: float = option(0.5, "share of each task vector's entries kept, the largest by absolute value, in (0, 1]")
    scale: float = option(1.0, "factor of the merged task vector (lambda)")

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it should be above 0 and at most 1")


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor", config: Config, seed: int) -> "Tensor":
    """One tensor of every model and of the base [shape] FP32 -> the merged tensor [shape] FP32."""
    import torch

    deltas = [_trim(tensor - base, config.density) for tensor in tensors]
    total = sum(delta * weight for delta, weight in zip(deltas, weights, strict=True))
    sign = torch.where(total >= 0, 1.0, -1.0)  # zero counts as positive
    agreed, share = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta * weight * sign > 0
        agreed += torch.where(agrees, delta * weight, 0.0)
        share += torch.where(agrees, weight, 0.0)
    return base + config.scale * torch.where(share != 0, agreed / share, 0.0)


def _trim(delta: "Tensor", density: float) -> "Tensor":
    """The entries of largest absolute value, the rest 0; entries as large as the smallest one kept stay too."""
    size = delta.abs()
    drop = delta.numel() - max(1, round(density * delta.numel()))
    return delta.where(size >= size.flatten().kthvalue(drop + 1).values, 0.0)
