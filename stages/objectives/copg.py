"""Contrastive Policy Gradient (Flet-Berliac et al., arXiv 2406.19185; Command A, arXiv 2504.00698, section 3.2.2.2).

R_b(y) = R(x, y) - beta log pi(y|x)/pi_ref(y|x)   (token sums), and over the k >= 2 completions of a prompt, whoever
wrote them:

    l = 1/(k - 1)  sum_{i > j} (R_b(y_i) - R_b(y_j))^2  =  k/(k - 1)  sum_i (R_b(y_i) - mean_j R_b(y_j))^2

The gradient passes through R_b and is -2 beta sum_i A_i grad log pi(y_i) with A_i = R_b(y_i) - mean_{j != i} R_b(y_j):
on the policy's own completions that is RLOO with the KL in the reward. No importance weights, clipping or value
network; the minimum is pi_ref exp(R/beta)/Z on off-policy data too. `rescale` divides by 2 beta, so that a learning
rate found for policy gradients keeps its meaning when beta changes.
A group is the completions of one prompt; field `reward` is R. Sequences without target tokens do not count in k.
"""

from dataclasses import dataclass

from stages.objectives._common import by_group, log_ratio
from stages.objectives._policy import contrasted, described
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "completions"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "groups"


@dataclass
class Config:
    beta: float = option(0.06, "strength of the pull to the reference model; above 0 (0.03 to 0.1 were stable)")
    rescale: bool = option(True, "divide the loss by 2 beta: gradients of the size of a policy gradient's")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over groups of k >= 2 filled sequences; count = such groups. Metrics: those of `described`."""
    part = contrasted(batch)
    value = (batch.fields["reward"].to(batch.logprobs) - config.beta * log_ratio(batch)) * part
    k = by_group(batch, part)
    mean = by_group(batch, value) / k.clamp(min=1)
    deviation = (value - mean[batch.group]) * part
    terms = by_group(batch, deviation**2) * k / (k - 1).clamp(min=1)
    scale = 1 / (2 * config.beta) if config.rescale else 1.0
    return Loss(scale * terms.sum(), (k > 0).to(value).sum(), described(batch, part))
