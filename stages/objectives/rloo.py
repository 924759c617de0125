"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740), with TRL's clipped sequence ratio.

A completion is one action. Under the policy pi_old that sampled it, with the KL in the reward (token sums):

    R_i = r_i - beta log pi_old(y_i)/pi_ref(y_i)      A_i = R_i - mean_{j != i} R_j      rho_i = pi(y_i)/pi_old(y_i)
    l = mean_i -min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i)

On-policy the gradient is -mean_i A_i grad log pi(y_i): the paper's estimator.
A group is the completions of one prompt; field `reward` is r. Sequences without target tokens do not count.
"""

from dataclasses import dataclass

from stages.objectives._common import within
from stages.objectives._policy import average, clipped, contrasted, cut, described, leave_one_out, ratio
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "completions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = True
COUNT = "groups"


@dataclass
class Config:
    beta: float = option(0.05, "strength of the pull to the reference model")
    clip: float = option(0.2, "ratios outside 1 - clip .. 1 + clip are clipped")

    def check(self) -> None:
        within(self, "clip")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over groups of k >= 2 filled sequences; count = such groups.

    Metrics, means over sequences: clipped (share), and those of `described`.
    """
    part, reward = contrasted(batch), batch.fields["reward"].to(batch.logprobs)
    shaped = reward - config.beta * batch.sums(batch.behaviour - batch.reference)
    advantage = leave_one_out(batch, shaped, part)
    rho = ratio(batch.sums(batch.logprobs - batch.behaviour))
    total, count = average(batch, clipped(rho, advantage, config.clip, config.clip), part)
    share = cut(rho, advantage, config.clip, config.clip)
    return Loss(total, count, described(batch, part, clipped=share))
