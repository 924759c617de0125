"""Group Relative Policy Optimisation (Shao et al., DeepSeekMath, arXiv 2402.03300, eq. 3 and 4).

With rho_t = pi(y_t)/pi_old(y_t) of the sampling policy and A_i = (r_i - mean r) / (std r + 1e-4) in a prompt's group:

    l = mean_i 1/|y_i| sum_t { -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) + beta k3_t }
    k3 = e^d - d - 1,  d = log pi_ref(y_t) - log pi(y_t)

The standard deviation has k - 1 in it, as in TRL. A group of equal rewards feels the pull to the reference only.
A group is the completions of one prompt; field `reward` is r. Sequences without target tokens do not count.
"""

from dataclasses import dataclass

from stages.objectives._common import length, within
from stages.objectives._policy import average, clipped, contrasted, cut, described, k3, ratio, standardised
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "completions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = True
COUNT = "groups"


@dataclass
class Config:
    beta: float = option(0.04, "strength of the pull to the reference model; for none take dapo")
    clip_low: float = option(0.2, "ratios below 1 - clip_low are clipped")
    clip_high: float = option(0.2, "ratios above 1 + clip_high are clipped")

    def check(self) -> None:
        within(self, "clip_low", "clip_high")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over groups of k >= 2 filled sequences; count = such groups.

    Metrics, means over sequences: clipped (share of tokens), and those of `described`.
    """
    part, reward = contrasted(batch), batch.fields["reward"].to(batch.logprobs)
    advantage = standardised(batch, reward, part)[batch.sequence]
    rho = ratio(batch.logprobs - batch.behaviour)
    limits = (config.clip_low, config.clip_high)
    tokens = length(batch).clamp(min=1)
    each = clipped(rho, advantage, *limits) + config.beta * k3(batch.reference - batch.logprobs)
    total, count = average(batch, batch.sums(each) / tokens, part)
    share = batch.sums(cut(rho, advantage, *limits)) / tokens
    return Loss(total, count, described(batch, part, clipped=share))
