"""DARE (Yu et al. 2024, arXiv 2311.03099): drop a random part of every task vector, rescale the rest, add."""

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
    density: float = option(0.5, "probability that an entry of a task vector is kept, in (0, 1]")
    scale: float = option(1.0, "factor of the sum of the weighted task vectors (lambda)")

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it should be above 0 and at most 1")


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor", config: Config, seed: int) -> "Tensor":
    """One tensor of every model and of the base [shape] FP32 -> the merged tensor [shape] FP32. Drawn from `seed`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    merged = base.clone()
    for tensor, weight in zip(tensors, weights, strict=True):
        keep = torch.rand(base.shape, generator=generator) < config.density
        merged += (tensor - base) * keep * (config.scale * weight / config.density)
    return merged
