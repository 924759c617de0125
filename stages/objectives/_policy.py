"""What the policy-gradient objectives share: groups of completions, their advantages, ratios to the sampling policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.objectives._common import by_group, filled, length, log_ratio

if TYPE_CHECKING:
    from torch import Tensor

    from stages.trainer.batch import Packed

LARGEST = 20.0  # nats; a ratio of e^20 teaches nothing, and above e^88 FP32 would make NaN of it


def contrasted(batch: Packed) -> Tensor:
    """[S], 1 for a sequence with targets that is not alone in its group, else 0."""
    present = filled(batch).to(batch.logprobs)
    return present * (by_group(batch, present) >= 2)[batch.group]


def leave_one_out(batch: Packed, values: Tensor, part: Tensor) -> Tensor:
    """[S]: a value less the mean of the others of its group; 0 where `part` [S] is 0."""
    others = (by_group(batch, part)[batch.group] - 1).clamp(min=1)
    rest = by_group(batch, values * part)[batch.group] - values
    return (values - rest / others) * part


def standardised(batch: Packed, values: Tensor, part: Tensor, epsilon: float = 1e-4) -> Tensor:
    """[S]: (value - mean) / (standard deviation + epsilon) in its group, k - 1 in the variance; 0 where `part` is 0."""
    k = by_group(batch, part)
    mean = by_group(batch, values * part) / k.clamp(min=1)
    deviation = (values - mean[batch.group]) * part
    spread = (by_group(batch, deviation**2) / (k - 1).clamp(min=1)).sqrt()
    return deviation / (spread + epsilon)[batch.group]


def ratio(difference: Tensor) -> Tensor:
    """pi / pi_old from the difference of their logarithms."""
    return difference.clamp(max=LARGEST).exp()


def clipped(rho: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) (Schulman et al., arXiv 1707.06347, eq. 7), elementwise."""
    return -(rho * advantage).minimum(rho.clamp(1 - low, 1 + high) * advantage)


def cut(rho: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """1 where clipping takes the gradient away, else 0."""
    return (((rho < 1 - low) & (advantage < 0)) | ((rho > 1 + high) & (advantage > 0))).to(rho)


def k3(difference: Tensor) -> Tensor:
    """e^d - d - 1 of d = log q - log p, elementwise: at samples of p an estimate of KL(p || q) (Schulman 2020)."""
    return difference.clamp(max=LARGEST).expm1() - difference


def average(batch: Packed, values: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over groups of the mean of [S] values where `part` is 1, number of such groups)."""
    k = by_group(batch, part)
    return (by_group(batch, values * part) / k.clamp(min=1)).sum(), (k > 0).to(values).sum()


def described(batch: Packed, part: Tensor, **values: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over the sequences where `part` is 1: the [S] values given, reward (field), entropy (-log pi a token: the
    policy's entropy on its own completions) and length (target tokens).

    With a reference log_ratio, log pi/pi_ref (token sum, of either sign: of what pi_ref sampled it estimates
    -KL(pi_ref || pi)); with behaviour kl_sampler, KL(sampler || pi) a token; with both kl, KL(pi || pi_ref) of a completion:
    k3 weighed by pi/sampler token by token, which is never negative, whoever of the two sampled. best_ratio is log_ratio over
    the best of each group alone (field `sft`): below 0 even what was rewarded most gets unlikely.
    """
    tokens = length(batch)
    mean = lambda each: batch.sums(each) / tokens.clamp(min=1)  # noqa: E731
    reward = batch.fields["reward"].to(batch.logprobs)
    values = values | {"reward": reward, "entropy": mean(-batch.logprobs), "length": tokens}
    if batch.reference is not None:
        values["log_ratio"] = log_ratio(batch)
    if batch.behaviour is not None:
        values["kl_sampler"] = mean(k3(batch.logprobs - batch.behaviour))
        if batch.reference is not None:
            rho = ratio(batch.logprobs - batch.behaviour)
            values["kl"] = batch.sums(rho * k3(batch.reference - batch.logprobs))
    found = {name: ((value.detach() * part).sum(), part.sum()) for name, value in values.items()}
    if batch.reference is not None and "sft" in batch.fields:
        best = part * batch.fields["sft"]
        found["best_ratio"] = ((values["log_ratio"].detach() * best).sum(), best.sum())
    return found
