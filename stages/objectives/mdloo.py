"""Mirror descent with leave-one-out estimation (Apple Foundation Models, arXiv 2407.21075, section 4.3).

A completion is one action, sampled by the policy pi_k at the start of an iteration (token sums):

    R_i = r_i - beta log pi_k(y_i)/pi_ref(y_i)      A_i = R_i - mean_{j != i} R_j      rho_i = pi(y_i)/pi_k(y_i)
    l = mean_i { -rho_i A_i + gamma (rho_i log rho_i - rho_i + 1) }

The second term estimates KL(pi || pi_k) from samples of pi_k: it keeps pi near pi_k in the place of clipping. As
E[rho] = 1, 1 - rho takes variance away and adds no bias; the term is never negative, and flat at pi = pi_k.
beta and gamma of Apple's models are not published; the defaults are ours.
A group is the completions of one prompt; field `reward` is r. Sequences without target tokens do not count.
"""

from dataclasses import dataclass

from stages.objectives._common import within
from stages.objectives._policy import LARGEST, average, contrasted, described, leave_one_out, ratio
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
    gamma: float = option(0.1, "strength of the pull to the policy that sampled")

    def check(self) -> None:
        within(self, "gamma")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over groups of k >= 2 filled sequences; count = such groups.

    Metrics, means over sequences: divergence (KL(pi || pi_k)), and those of `described`.
    """
    part, reward = contrasted(batch), batch.fields["reward"].to(batch.logprobs)
    shaped = reward - config.beta * batch.sums(batch.behaviour - batch.reference)
    advantage = leave_one_out(batch, shaped, part)
    difference = batch.sums(batch.logprobs - batch.behaviour).clamp(max=LARGEST)
    rho = ratio(difference)
    divergence = rho * difference - rho + 1
    total, count = average(batch, config.gamma * divergence - rho * advantage, part)
    return Loss(total, count, described(batch, part, divergence=divergence))
