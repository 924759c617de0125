"""Direct Preference Optimisation (Rafailov et al., arXiv 2305.18290, eq. 7).

With h(y) = log pi(y|x)/pi_ref(y|x) (token sums) and D = h_w - h_l:    l = -log s(beta D)

Label smoothing e (Mitchell's conservative DPO):    l = -(1 - e) log s(beta D) - e log s(-beta D)
DPO + NLL on the preferred completion (Llama 3, arXiv 2407.21783, section 4.1.4: 0.2) is the stage's `sft_weight`: the mean
over pairs of each one's mean over its tokens (Pang et al.), where TRL takes the mean over all tokens of the batch.
A group is a pair; field `chosen` is 1 for the preferred completion, 0 for the other.
"""

from dataclasses import dataclass

from stages.objectives._common import complete, log_ratio, pick, total, within
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
    label_smoothing: float = option(0.0, "probability that a preference label is wrong, 0 to 0.5")

    def check(self) -> None:
        within(self, "label_smoothing", most=0.5)


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over pairs; count = pairs. Metrics: accuracy (share with D > 0), gap (beta D), h of either side."""
    import torch.nn.functional as F

    chosen, h = batch.fields["chosen"] > 0.5, log_ratio(batch)
    pairs = complete(batch, chosen, ~chosen)
    winner, loser = pick(batch, h, chosen), pick(batch, h, ~chosen)
    z, e = config.beta * (winner - loser), config.label_smoothing
    terms = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    metrics = {
        "accuracy": total((z > 0).to(z), pairs),
        "gap": total(z, pairs),
        "chosen_ratio": total(winner, pairs),
        "rejected_ratio": total(loser, pairs),
    }
    return Loss((terms * pairs).sum(), pairs.sum(), metrics)
