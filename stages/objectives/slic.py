"""Sequence likelihood calibration with human feedback, SLiC-HF (Zhao et al., arXiv 2305.10425, eq. 1).

    l = max(0, delta - log pi(y_w|x) + log pi(y_l|x)) - lambda log pi(y_ref|x)      (token sums, no reference model)

y_ref, whose likelihood is kept up, is the preferred completion, the best-ranked candidate of the paper's choices.
A group is a pair; field `chosen` is 1 for the preferred completion, 0 for the other.
"""

from dataclasses import dataclass

from stages.objectives._common import complete, pick, total, within
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "pair"
NEEDS_REFERENCE = False
NEEDS_SCORES = False
NEEDS_BEHAVIOUR = False
COUNT = "groups"


@dataclass
class Config:
    delta: float = option(1.0, "margin in nats by which the preferred completion should be likelier")
    regularisation: float = option(0.1, "lambda, weight of the preferred completion's negative log-likelihood")

    def check(self) -> None:
        within(self, "delta", "regularisation")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over pairs; count = pairs. Metrics: accuracy (share with log pi_w > log pi_l), gap (their difference)."""
    chosen, likelihood = batch.fields["chosen"] > 0.5, batch.sums(batch.logprobs)
    pairs = complete(batch, chosen, ~chosen)
    winner, loser = pick(batch, likelihood, chosen), pick(batch, likelihood, ~chosen)
    gap = winner - loser
    terms = (config.delta - gap).relu() - config.regularisation * winner
    metrics = {"accuracy": total((gap > 0).to(gap), pairs), "gap": total(gap, pairs)}
    return Loss((terms * pairs).sum(), pairs.sum(), metrics)
