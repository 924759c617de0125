"""Decoupled clip and dynamic sampling policy optimisation (Yu et al., DAPO, arXiv 2503.14476, eq. 8 and 9).

With rho_t = pi(y_t)/pi_old(y_t) of the sampling policy and A_i = (r_i - mean r) / (std r + 1e-4) in a prompt's group:

    l = sum_i sum_t -min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i)  /  sum_i |y_i|

The range is wider above, so that unlikely tokens can rise; the mean is over all tokens of the batch, so that a long
completion weighs by its tokens; no pull to a reference. Dynamic sampling is the stream's: groups of equal rewards have
no advantage and are left out (DYNAMIC_SAMPLING; where the paper samples others in their place, the step is smaller).
Soft overlong punishment is the reward `overlong`.
A group is the completions of one prompt; field `reward` is r. Sequences without target tokens do not count.
"""

from dataclasses import dataclass

from stages.objectives._common import length, within
from stages.objectives._policy import clipped, contrasted, cut, described, ratio, standardised
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "completions"
NEEDS_REFERENCE = False
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = True
DYNAMIC_SAMPLING = True
COUNT = "tokens"


@dataclass
class Config:
    clip_low: float = option(0.2, "ratios below 1 - clip_low are clipped")
    clip_high: float = option(0.28, "ratios above 1 + clip_high are clipped")

    def check(self) -> None:
        within(self, "clip_low", "clip_high")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over the tokens of groups of k >= 2 filled sequences; count = these tokens (the sum of their mask).

    Metrics, means over sequences: clipped (share of tokens), and those of `described`.
    """
    part, reward = contrasted(batch), batch.fields["reward"].to(batch.logprobs)
    advantage = standardised(batch, reward, part)[batch.sequence]
    rho = ratio(batch.logprobs - batch.behaviour)
    limits = (config.clip_low, config.clip_high)
    tokens = length(batch)
    share = batch.sums(cut(rho, advantage, *limits)) / tokens.clamp(min=1)
    total = batch.sums(clipped(rho, advantage, *limits)).sum()
    return Loss(total, (tokens * part).sum(), described(batch, part, clipped=share))
