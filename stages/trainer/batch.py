"""What flows between a data stream, the trainer and an objective. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Sequence:
    """One document. tokens: int32 [T]. mask: float32 [T], weight of token t as a TARGET (mask[0] is ignored:
    nothing predicts the first token). fields: numbers an objective needs of this sequence (reward, label, ...);
    all sequences of a run carry the same keys. behaviour: float32 [T], log-probability of token t under the policy that
    sampled it (read where the mask is not 0). teacher: int32 [T, k] and float32 [T, k], a teacher's likeliest tokens in the
    place of token t, with their log-probabilities. token_fields: float32 [T] each, more that an objective needs of each
    target (PPO's advantage). All sequences of a run have these, or none."""

    tokens: np.ndarray
    mask: np.ndarray
    fields: dict[str, float] = field(default_factory=dict)
    behaviour: np.ndarray | None = None
    teacher: tuple[np.ndarray, np.ndarray] | None = None
    token_fields: dict[str, np.ndarray] = field(default_factory=dict)


# Sequences of one group always share a microbatch: the two of a pair, the k completions of a prompt.
Group = list[Sequence]


@dataclass
class Packed:
    """One microbatch as an objective sees it: N targets of S sequences. Targets are the tokens with a nonzero
    mask, in the order of the sequences; the output layer is computed for no other.

    logprobs: float32 [N], log p(token), with gradient (zeros when the head is a reward head).
    mask: float32 [N]. sequence: int64 [N], index in 0..S-1 of the sequence each target belongs to.
    group: int64 [S], index of each sequence's group in the microbatch, from 0, ascending.
    fields: name -> float32 [S]. reference: float32 [N], log-probabilities under the frozen reference model.
    behaviour: float32 [N], under the policy that sampled the sequences (Sequence.behaviour).
    scores: float32 [S], reward head at each sequence's last token, with gradient.
    teacher: float32 [M, k], log-probabilities of a teacher's tokens (Sequence.teacher) in M places. Then N = M * (k + 1): of
    each place the teacher's k tokens, then its own.
    values: float32 [N], a value head before each target, with gradient. token_fields: name -> float32 [N].
    """

    logprobs: Tensor
    mask: Tensor
    sequence: Tensor
    group: Tensor
    fields: dict[str, Tensor]
    reference: Tensor | None = None
    scores: Tensor | None = None
    behaviour: Tensor | None = None
    teacher: Tensor | None = None
    values: Tensor | None = None
    token_fields: dict[str, Tensor] = field(default_factory=dict)

    def sums(self, values: Tensor) -> Tensor:
        """Masked sums: values [N] -> [S], sum over each sequence's targets of mask * value (0 without targets)."""
        out = values.new_zeros(len(self.group))
        return out.index_add(0, self.sequence, values * self.mask)


@dataclass
class Loss:
    """An objective's value on one microbatch. The trainer minimises (sum of `sum`) / (sum of `count`), both over
    all microbatches and ranks of the step. metrics: name -> sum, reported as sum / count with the loss's count,
    or name -> (sum, count) with a count of its own."""

    sum: Tensor
    count: Tensor | float
    metrics: dict[str, Tensor | float | tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
