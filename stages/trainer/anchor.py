"""A pull of the weights back to where training began."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Anchor:
    """The penalty strength / 2 * |w - w0|^2 on the distance to the first weights (L2-SP: Li et al. 2018, arXiv 1802.01483,
    eq. 3), decoupled from Adam's moments as its weight decay is (Loshchilov and Hutter 2019, arXiv 1711.05101): before each
    update w -= lr * strength * (w - w0).

    groups: an optimizer's parameter groups, whose `params` are this rank's FP32 main weights as they are at first.
    """

    def __init__(self, strength: float, groups: list[dict[str, Any]]):
        self.strength = strength
        self.first = [[_local(w).clone() for w in group["params"]] for group in groups if strength]

    @torch.no_grad()
    def pull(self, groups: list[dict[str, Any]]) -> None:
        """groups: the optimizer's, as it has them now: a load makes new ones of the same weights."""
        for group, first in zip(groups, self.first, strict=bool(self.strength)):
            for weight, start in zip(group["params"], first, strict=True):
                _local(weight).lerp_(start, group["lr"] * self.strength)


def _local(weight: Tensor) -> Tensor:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()
