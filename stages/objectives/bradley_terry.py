"""Bradley-Terry reward model with soft labels, margin and centring.

With z = r_w - r_l - m:    l = -p log s(z) - (1 - p) log s(-z) + c (r_w + r_l)^2

Sources: Bradley & Terry 1952; soft labels p: Command A (arXiv 2504.00698) section 3.2.3; margin m: Llama 2
(arXiv 2307.09288) eq. 2; centring c: Eisenstein et al. (arXiv 2312.09244), as in TRL's RewardTrainer.
A group is a pair; fields: `chosen` (1 preferred, 0 rejected), `label` (p, probability that the preferred one is the
better; read from the preferred sequence), `margin` (m, from the preferred one too; absent = 0).
"""

from dataclasses import dataclass

from stages.objectives._common import complete, pick, total
from stages.stage import option
from stages.trainer.batch import Loss, Packed

GROUP = "pair"
NEEDS_REFERENCE = False
NEEDS_SCORES = True
NEEDS_BEHAVIOUR = False
COUNT = "groups"


@dataclass
class Config:
    centring: float = option(0.0, "weight c of (r_w + r_l)^2, which keeps the rewards' mean near 0")


def loss(batch: Packed, config: Config) -> Loss:
    """Sum over pairs; count = pairs. Metrics: accuracy (share with r_w > r_l) and gap (r_w - r_l)."""
    import torch.nn.functional as F

    chosen = batch.fields["chosen"] > 0.5
    pairs = complete(batch, chosen, ~chosen)
    winner, loser = pick(batch, batch.scores, chosen), pick(batch, batch.scores, ~chosen)
    label = pick(batch, batch.fields["label"].to(winner), chosen)
    gap = winner - loser
    z = gap
    if "margin" in batch.fields:
        z = gap - pick(batch, batch.fields["margin"].to(winner), chosen)
    terms = -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z) + config.centring * (winner + loser) ** 2
    metrics = {"accuracy": total((gap > 0).to(gap), pairs), "gap": total(gap, pairs)}
    return Loss((terms * pairs).sum(), pairs.sum(), metrics)
