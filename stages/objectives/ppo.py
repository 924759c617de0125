"""Proximal Policy Optimisation with a value network (Schulman et al., arXiv 1707.06347; InstructGPT, arXiv 2203.02155).

Under the policy pi_old that sampled y, with the KL in the reward of every token and the verifier's at the last, V the
value network as it was then, and generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16):

    r_t = -beta log pi_old(y_t)/pi_ref(y_t) + [t = T] r        delta_t = r_t + gamma V_t+1 - V_t,  V_T+1 = 0
    A_t = delta_t + gamma lam A_t+1        R_t = A_t + V_t
    policy:  l = mean_t -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t),  rho_t = pi(y_t)/pi_old(y_t), A whitened
    value:   l = mean_t 1/2 max((v_t - R_t)^2, (clip(v_t, V_t - value_clip, V_t + value_clip) - R_t)^2)

Means are over the tokens of the step, whitening is to mean 0 and variance 1 over them. V_t is the value network's output
where the policy chooses y_t. A group is the completions of one prompt, which PPO takes one by one; field `reward` is r.
Qwen v1 (arXiv 2309.16609) trained its value network alone for the first 50 steps, and five times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.objectives._common import length, within
from stages.objectives._policy import clipped, cut, described, ratio
from stages.stage import option
from stages.trainer.batch import Loss, Packed

if TYPE_CHECKING:
    from numpy import ndarray

GROUP = "completions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = True
NEEDS_VALUES = True  # token_fields advantage, value and return, which stages/train/_critic.py makes
COUNT = "tokens"


@dataclass
class Config:
    beta: float = option(0.05, "strength of the pull to the reference model")
    clip: float = option(0.2, "ratios outside 1 - clip .. 1 + clip are clipped")
    value_clip: float = option(0.2, "how far a value may move from that of its block's beginning before its gradient is cut")
    gamma: float = option(1.0, "discount of a later token's reward")
    lam: float = option(0.95, "of generalised advantage estimation: 1 sums rewards, 0 trusts the value of the next token")
    value_lr: float = option(5.0, "learning rate of the value network, in the policy's")
    value_steps: int = option(0, "first steps that train the value network alone")

    def check(self) -> None:
        within(self, "clip", "value_clip", "value_lr", "value_steps")
        within(self, "gamma", "lam", most=1)


def loss(batch: Packed, config: Config) -> Loss:
    """The policy's: sum over tokens; count = tokens (the sum of their mask).

    Metrics, means over sequences: clipped (share of tokens), and those of `described`.
    """
    advantage = batch.token_fields["advantage"]
    rho, tokens = ratio(batch.logprobs - batch.behaviour), length(batch)
    total = batch.sums(clipped(rho, advantage, config.clip, config.clip)).sum()
    share = batch.sums(cut(rho, advantage, config.clip, config.clip)) / tokens.clamp(min=1)
    return Loss(total, tokens.sum(), described(batch, (tokens > 0).to(rho), clipped=share))


def value_loss(batch: Packed, config: Config) -> Loss:
    """The value network's: sum over tokens; count = tokens. Metrics: value_clipped (share of tokens)."""
    before, aim = batch.token_fields["value"], batch.token_fields["return"]
    near = before + (batch.values - before).clamp(-config.value_clip, config.value_clip)
    plain, held = (batch.values - aim) ** 2, (near - aim) ** 2
    share = ((held > plain) * batch.mask).sum().detach()
    return Loss((0.5 * plain.maximum(held) * batch.mask).sum(), batch.mask.sum(), {"value_clipped": share})


def estimate(rewards: ndarray, values: ndarray, config: Config) -> tuple[ndarray, ndarray]:
    """(advantages, returns) of one completion's tokens, float64 [T], from each token's reward and value [T]."""
    following = np.append(values[1:], 0.0)
    delta = rewards + config.gamma * following - values
    advantage, later = np.zeros(len(delta)), 0.0
    for t in reversed(range(len(delta))):
        advantage[t] = later = delta[t] + config.gamma * config.lam * later
    return advantage, advantage + values


def whitened(advantages: list[ndarray]) -> list[ndarray]:
    """Less their mean and divided by their standard deviation (n - 1), both over all tokens."""
    every = np.concatenate(advantages)
    scale = np.sqrt(every.var(ddof=1) + 1e-8) if len(every) > 1 else 1.0
    return [(own - every.mean()) / scale for own in advantages]
