"""Spherical interpolation of two models, every tensor flattened (Shoemake 1985); t = w_b / (w_a + w_b)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.stage import option

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_BASE = False
WEIGHTED = True
MODELS = (2, 2)


@dataclass
class Config:
    parallel: float = option(0.9995, "above this |cosine| the two tensors are interpolated on a line")


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor | None", config: Config, seed: int) -> "Tensor":
    """The tensors a and b [shape] FP32 -> sin((1-t)W)/sin(W) a + sin(tW)/sin(W) b, W the angle between them."""
    import math

    from stages.merge._math import cosine

    a, b = tensors
    t = weights[1] / sum(weights)
    near = cosine(a, b)
    if abs(near) > config.parallel or not (a.any() and b.any()):
        return a * (1 - t) + b * t
    angle = math.acos(near)
    return a * (math.sin((1 - t) * angle) / math.sin(angle)) + b * (math.sin(t * angle) / math.sin(angle))
