"""Identity Preference Optimisation (Azar et al., arXiv 2310.12036, eq. 17).

With h(y) = log pi(y|x)/pi_ref(y|x) and D = h_w - h_l:    l = (D - 1/(2 beta))^2

`average` divides h of either side by its number of target tokens, as TRL does and the authors confirmed; without
it h is a token sum, the form that CoPG with rewards 1/2 apart equals up to the factor beta^2. At D = 0 the gradient by D is
-1/beta, beside which a cross-entropy term of weight 1 is nothing; `rescale` multiplies the loss by beta / 2, as CoPG's does,
so that it is -1/2.
A group is a pair; field `chosen` is 1 for the preferred completion, 0 for the other.
"""

from dataclasses import dataclass

from stages.objectives._common import complete, length, log_ratio, pick, total
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "pair"
NEEDS_REFERENCE = True
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "groups"


@dataclass
class Config:
    beta: float = option(0.1, "strength of the pull to the reference model")
    average: bool = option(True, "divide each side's log-ratio by its tokens")
    rescale: bool = option(False, "multiply the loss by beta / 2: gradients of the size of a policy gradient's")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over pairs; count = pairs. Metrics: accuracy (share with D > 0), gap (D), h of either side."""
    chosen, h = batch.fields["chosen"] > 0.5, log_ratio(batch)
    if config.average:
        h = h / length(batch).clamp(min=1.0)
    pairs = complete(batch, chosen, ~chosen)
    winner, loser = pick(batch, h, chosen), pick(batch, h, ~chosen)
    gap = winner - loser
    metrics = {
        "accuracy": total((gap > 0).to(gap), pairs),
        "gap": total(gap, pairs),
        "chosen_ratio": total(winner, pairs),
        "rejected_ratio": total(loser, pairs),
    }
    scale = config.beta / 2 if config.rescale else 1.0
    return Loss(scale * ((gap - 1 / (2 * config.beta)) ** 2 * pairs).sum(), pairs.sum(), metrics)
