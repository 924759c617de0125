"""What the objectives share: sums over sequences and groups of a packed microbatch. Group ids lie in 0..S-1."""

from __future__ import annotations

from math import inf, prod
from typing import TYPE_CHECKING, Any

from stages.stage import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.trainer.batch import Packed


def length(batch: Packed) -> Tensor:
    """[S]: the number of target tokens of each sequence (the sum of its mask)."""
    return batch.sums(batch.logprobs.new_ones(len(batch.logprobs)))


def filled(batch: Packed) -> Tensor:
    """[S] bool: the sequences with at least one target token; the others take no part in any loss."""
    return length(batch) > 0


def log_ratio(batch: Packed) -> Tensor:
    """[S]: h(y) = log pi(y|x) / pi_ref(y|x), summed over the target tokens."""
    return batch.sums(batch.logprobs - batch.reference)


def by_group(batch: Packed, values: Tensor) -> Tensor:
    """[S] values of sequences -> [S] sums of groups, at the group's id; slots without a group hold 0."""
    return values.new_zeros(len(values)).index_add(0, batch.group, values)


def pick(batch: Packed, values: Tensor, where: Tensor) -> Tensor:
    """[S] values of sequences -> [S], at each group's id the value of its one sequence that meets `where` [S] bool."""
    return by_group(batch, values.where(where, values.new_zeros(())))


def complete(batch: Packed, *roles: Tensor) -> Tensor:
    """[S], 1 at the ids of groups that hold exactly one filled sequence of every role ([S] bool each), else 0."""
    present = filled(batch)
    return prod(by_group(batch, (role & present).to(batch.logprobs)) == 1 for role in roles).to(batch.logprobs)


def total(values: Tensor, weight: Tensor) -> Tensor:
    """Detached sum of values where weight is not 0: a metric, summed like the loss and divided by the same count."""
    return (values.detach() * weight).sum()


def within(config: Any, *names: str, most: float = inf) -> None:
    """Raises ConfigError for an option that is not from 0 to `most`."""
    for name in names:
        if not 0 <= getattr(config, name) <= most:
            allowed = "0 or more" if most == inf else f"0 to {most:g}"
            raise ConfigError(f"options.{name}: {getattr(config, name)} is out of range; give {allowed}")
