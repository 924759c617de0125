"""Model Stock (Jang et al. 2024, arXiv 2403.19522): the average, nearer to the base the less the models agree.

theta = t mean(theta_i) + (1 - t) theta_0, t = N c / (1 + (N - 1) c), c the mean pairwise cosine of the task vectors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_BASE = True
WEIGHTED = False
MODELS = (2, None)


@dataclass
class Config:
    pass


def merge(tensors: "list[Tensor]", weights: list[float], base: "Tensor", config: Config, seed: int) -> "Tensor":
    """One tensor of every model and of the base [shape] FP32 -> the merged tensor [shape] FP32."""
    from itertools import combinations

    from stages.merge._math import cosine

    deltas = [tensor - base for tensor in tensors]
    pairs = list(combinations(deltas, 2))
    c = max(0.0, sum(cosine(a, b) for a, b in pairs) / len(pairs))  # opposed task vectors: stay at the base
    n = len(deltas)
    t = n * c / (1 + (n - 1) * c)
    return base + sum(deltas) * (t / n)
